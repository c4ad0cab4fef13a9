//! Lightning-indexer scores, I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), and the selection of the best keys of each query.
//!
//! Queries are packed once, heads in the lanes; keys are then read row by row as they lie in memory, and relu, the head
//! weights and the sum over heads happen in registers, so no logit of a single head is ever stored.

#![allow(clippy::needless_range_loop)] // r and v name registers; iterators over arrays of arrays hide that

use rayon::prelude::*;

use super::batch::{
    PagedBatch, PagedKeys, QueryTile, Sequence, fill_threads, query_tiles, visible_of_last,
    visible_of_positions,
};
use crate::argument::{Result, ensure, ensure_volume};
use crate::cache::layout::PAGE_TOKENS;
use crate::cache::pages::{Cache, Layout};
use crate::elements::{Elements, take_front};
use crate::simd::{AlignedBuffer, Kernel, Level, Simd, dispatch, padded};
use crate::topk::{Selector, ensure_positions_fit};

/// Queries that share a tile of keys; their packed form (256 KiB at 64 heads of 128) stays in the second-level cache.
const QUERY_TILE: usize = 8;
/// Keys of a tile.
const KEY_TILE: usize = PAGE_TOKENS;
/// Keys of a task when one query's keys are shared out among threads.
const KEY_TASK: usize = 2048;

/// Index queries of a step.
#[derive(Clone, Copy, Debug)]
pub struct IndexQueries<'a> {
    /// q [T, Hi, Di].
    pub values: Elements<'a>,
    /// w [T, Hi].
    pub weights: &'a [f32],
    /// T.
    pub count: usize,
    /// Hi.
    pub heads: usize,
    /// Di.
    pub dim: usize,
}

impl IndexQueries<'_> {
    fn check(&self) -> Result<()> {
        let shape = || "[T, Hi, Di] with Hi and Di of at least 1".to_string();
        ensure(self.heads > 0 && self.dim > 0, "q", shape, || {
            format!("[{}, {}, {}]", self.count, self.heads, self.dim)
        })?;
        ensure_volume("q", &[self.count, self.heads, self.dim], self.values.len())?;
        ensure_volume("weights", &[self.count, self.heads], self.weights.len())
    }
}

/// Index keys of one sequence.
#[derive(Clone, Copy, Debug)]
enum IndexKeys<'a> {
    Rows { values: Elements<'a>, scales: Option<&'a [f32]>, dim: usize },
    Pages(PagedKeys<'a>),
}

impl IndexKeys<'_> {
    /// Reads the key at `position` and returns the factor of its scores.
    #[inline]
    fn read(&self, position: usize, dst: &mut [f32]) -> f32 {
        match self {
            Self::Rows { values, scales, dim } => {
                values.widen(position * dim, dst);
                scales.map_or(1.0, |s| s[position])
            }
            Self::Pages(keys) => keys.read(position, dst),
        }
    }
}

/// Queries with the keys each of them sees.
pub struct Indexer<'a> {
    level: Level,
    queries: IndexQueries<'a>,
    sequences: Vec<Sequence<IndexKeys<'a>>>,
    visible: Vec<usize>,
}

impl<'a> Indexer<'a> {
    /// One sequence of `keys` rows, k [S, Di]; query t sees the keys up to its position, by default S - T + t.
    ///
    /// # Errors
    /// Shapes that do not fit, a scale that is not finite.
    pub fn contiguous(
        level: Level,
        queries: IndexQueries<'a>,
        k: Elements<'a>,
        keys: usize,
        k_scale: Option<&'a [f32]>,
        q_positions: Option<&[i64]>,
    ) -> Result<Self> {
        queries.check()?;
        ensure_volume("k", &[keys, queries.dim], k.len())?;
        ensure_positions_fit("k", keys)?;
        if let Some(scales) = k_scale {
            ensure(
                scales.len() == keys,
                "k_scale",
                || format!("[{keys}]"),
                || format!("[{}]", scales.len()),
            )?;
            if let Some((s, x)) = scales.iter().enumerate().find(|(_, x)| !x.is_finite()) {
                ensure(false, "k_scale", || "finite scales".into(), || format!("{x} at {s}"))?;
            }
        }
        let visible = visible_of_positions(q_positions, queries.count, keys)?;
        let keys_of = IndexKeys::Rows { values: k, scales: k_scale, dim: queries.dim };
        let sequences = vec![Sequence { queries: 0..queries.count, keys: keys_of, len: keys }];
        Ok(Self { level, queries, sequences, visible })
    }

    /// A ragged batch whose keys lie in an index cache.
    ///
    /// # Errors
    /// Shapes that do not fit, see [`PagedBatch::check`].
    pub fn paged(
        level: Level,
        queries: IndexQueries<'a>,
        cache: Cache<'a>,
        batch: PagedBatch<'a>,
    ) -> Result<Self> {
        queries.check()?;
        ensure(
            cache.layout() == Layout::Index(queries.dim),
            "cache",
            || format!("index keys of {} values (Di of q)", queries.dim),
            || format!("rows of {} values", cache.layout().dim()),
        )?;
        let sequences = batch.sequences(queries.count, cache)?;
        let visible = visible_of_last(&sequences);
        let sequences = sequences
            .into_iter()
            .map(|s| Sequence { queries: s.queries, keys: IndexKeys::Pages(s.keys), len: s.len })
            .collect();
        Ok(Self { level, queries, sequences, visible })
    }

    /// Scores [T, columns] to `out`; -inf where a key is not visible. `columns` must be at least every sequence's length.
    ///
    /// # Errors
    /// `out` of the wrong size.
    pub fn scores(&self, columns: usize, mut out: &mut [f32]) -> Result<()> {
        ensure_volume("out", &[self.queries.count, columns], out.len())?;
        let longest = self.sequences.iter().map(|s| s.len).max().unwrap_or(0);
        ensure(columns >= longest, "out", || format!("at least {longest} columns"), || columns.to_string())?;
        if columns == 0 {
            return Ok(());
        }
        let tiles = query_tiles(&self.sequences, QUERY_TILE);
        if fill_threads(tiles.len()) {
            let tasks: Vec<_> =
                tiles.into_iter().map(|t| (take_front(&mut out, t.queries.len() * columns), t)).collect();
            tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (rows, tile)| {
                self.score_tile(&tile, rows, columns, scratch);
            });
        } else {
            for (t, row) in out.chunks_mut(columns).enumerate() {
                self.score_query(t, row);
            }
        }
        Ok(())
    }

    /// Positions of the k best keys of each query, [T, k], as [`crate::topk::top_k`] over [`Indexer::scores`] would give
    /// them, with at most a tile of score rows a thread.
    ///
    /// # Errors
    /// k of 0, `out` of the wrong size.
    pub fn top_k(&self, k: usize, mut out: &mut [i32]) -> Result<()> {
        ensure(k >= 1, "top_k", || "at least 1".into(), || k.to_string())?;
        ensure_volume("out", &[self.queries.count, k], out.len())?;
        let tiles = query_tiles(&self.sequences, QUERY_TILE);
        if fill_threads(tiles.len()) {
            let tasks: Vec<_> =
                tiles.into_iter().map(|t| (take_front(&mut out, t.queries.len() * k), t)).collect();
            tasks.into_par_iter().for_each_init(
                || (Scratch::default(), Selector::default(), Vec::new()),
                |(scratch, selector, rows), (out, tile)| {
                    let visible = &self.visible[tile.queries.clone()];
                    let columns = visible.iter().copied().max().unwrap_or(0);
                    rows.resize(tile.queries.len() * columns, 0.0);
                    self.score_tile(&tile, rows, columns, scratch);
                    for (i, out) in out.chunks_mut(k).enumerate() {
                        selector.select(&rows[i * columns..][..visible[i]], out);
                    }
                },
            );
        } else {
            let (mut selector, mut row) = (Selector::default(), Vec::new());
            for (t, out) in out.chunks_mut(k).enumerate() {
                row.resize(self.visible[t], 0.0);
                self.score_query(t, &mut row);
                selector.select(&row, out);
            }
        }
        Ok(())
    }

    /// Scores a tile of queries on the calling thread: `out` [tile, columns].
    fn score_tile(&self, tile: &QueryTile, out: &mut [f32], columns: usize, scratch: &mut Scratch) {
        scratch.packed.resize_with(tile.queries.len(), PackedQuery::default);
        for (packed, t) in scratch.packed.iter_mut().zip(tile.queries.clone()) {
            packed.pack(&self.queries, t);
        }
        let keys = &self.sequences[tile.sequence].keys;
        let visible = &self.visible[tile.queries.clone()];
        self.score_range(keys, 0, columns, &scratch.packed, visible, out, &mut scratch.tile);
    }

    /// Scores one query with every thread of the pool: `row` covers positions from 0.
    fn score_query(&self, t: usize, row: &mut [f32]) {
        let Some(sequence) = self.sequences.iter().find(|s| s.queries.contains(&t)) else {
            return; // every row belongs to a sequence: the constructors have checked that they cover q
        };
        let mut packed = PackedQuery::default();
        packed.pack(&self.queries, t);
        let packed = std::slice::from_ref(&packed);
        let visible = &self.visible[t..=t];
        row.par_chunks_mut(KEY_TASK).enumerate().for_each_init(KeyTile::default, |tile, (i, row)| {
            self.score_range(&sequence.keys, i * KEY_TASK, row.len(), packed, visible, row, tile);
        });
    }

    /// Scores keys `start .. start + columns` for each packed query: `out` [queries, columns].
    #[allow(clippy::too_many_arguments)]
    fn score_range(
        &self,
        keys: &IndexKeys<'_>,
        start: usize,
        columns: usize,
        packed: &[PackedQuery],
        visible: &[usize],
        out: &mut [f32],
        tile: &mut KeyTile,
    ) {
        let dim = self.queries.dim;
        let end = visible.iter().copied().max().unwrap_or(0).min(start + columns);
        for (row, &seen) in out.chunks_mut(columns.max(1)).zip(visible) {
            row[seen.clamp(start, start + columns) - start..].fill(f32::NEG_INFINITY);
        }
        for first in (start..end).step_by(KEY_TILE) {
            let count = KEY_TILE.min(end - first);
            tile.load(keys, first, count, dim);
            for (i, query) in packed.iter().enumerate() {
                let live = visible[i].saturating_sub(first).min(count);
                let out = &mut out[i * columns + first - start..][..live];
                dispatch(self.level, ScoreKeys { keys: &tile.rows, factors: &tile.factors, dim, query, out });
            }
        }
    }
}

/// Per-thread buffers.
#[derive(Default)]
struct Scratch {
    packed: Vec<PackedQuery>,
    tile: KeyTile,
}

/// A tile of keys in f32.
#[derive(Default)]
struct KeyTile {
    rows: AlignedBuffer,
    factors: Vec<f32>,
}

impl KeyTile {
    fn load(&mut self, keys: &IndexKeys<'_>, first: usize, count: usize, dim: usize) {
        if self.rows.len() < KEY_TILE * dim {
            self.rows = AlignedBuffer::zeroed(KEY_TILE * dim);
            self.factors = vec![1.0; KEY_TILE];
        }
        for (i, row) in self.rows.chunks_exact_mut(dim).take(count).enumerate() {
            self.factors[i] = keys.read(first + i, row);
        }
    }
}

/// One query, heads in the lanes: q [Di, Hp], w [Hp], and a mask [Hp] that is all ones for the Hi real heads.
#[derive(Default)]
struct PackedQuery {
    q: AlignedBuffer,
    weights: AlignedBuffer,
    mask: AlignedBuffer,
    row: Vec<f32>,
}

impl PackedQuery {
    fn pack(&mut self, queries: &IndexQueries<'_>, t: usize) {
        let IndexQueries { heads, dim, .. } = *queries;
        let lanes = padded(heads);
        if self.q.is_empty() {
            self.q = AlignedBuffer::zeroed(dim * lanes);
            self.weights = AlignedBuffer::zeroed(lanes);
            self.mask = AlignedBuffer::zeroed(lanes);
            self.mask[..heads].fill(f32::from_bits(u32::MAX));
            self.row = vec![0.0; dim];
        }
        for head in 0..heads {
            queries.values.widen((t * heads + head) * dim, &mut self.row);
            for (d, &x) in self.row.iter().enumerate() {
                self.q[d * lanes + head] = x;
            }
        }
        self.weights[..heads].copy_from_slice(&queries.weights[t * heads..][..heads]);
    }
}

/// Scores of `out.len()` keys for one query. Each score is one fixed chain of operations, whatever the blocking.
struct ScoreKeys<'a> {
    keys: &'a [f32],
    factors: &'a [f32],
    dim: usize,
    query: &'a PackedQuery,
    out: &'a mut [f32],
}

impl Kernel for ScoreKeys<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let count = self.out.len();
        let lanes = self.query.weights.len();
        assert!(
            count * self.dim <= self.keys.len() && count <= self.factors.len(),
            "the tile holds the keys"
        );
        assert!(
            self.dim * lanes <= self.query.q.len() && lanes == self.query.mask.len(),
            "the query is packed"
        );
        let mut i = 0;
        // SAFETY: the assertions above bound every load; each call covers MR keys below `count`.
        unsafe {
            while S::LANES == 16 && i + 8 <= count {
                self.block::<S, 8>(i, lanes);
                i += 8;
            }
            while i + 4 <= count {
                self.block::<S, 4>(i, lanes);
                i += 4;
            }
            while i < count {
                self.block::<S, 1>(i, lanes);
                i += 1;
            }
        }
    }
}

impl ScoreKeys<'_> {
    /// Keys `i .. i + MR`.
    ///
    /// # Safety
    /// The keys must exist and the buffers must have the sizes that `run` asserts.
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(&mut self, i: usize, lanes: usize) {
        // SAFETY: the caller's condition; `lanes` is a multiple of PAD and thus of LANES.
        unsafe {
            let mut sums = [S::zero(); MR];
            let mut j = 0;
            while j + 2 * S::LANES <= lanes {
                self.panel::<S, MR, 2>(i, j, lanes, &mut sums);
                j += 2 * S::LANES;
            }
            while j < lanes {
                self.panel::<S, MR, 1>(i, j, lanes, &mut sums);
                j += S::LANES;
            }
            for r in 0..MR {
                self.out[i + r] = S::sum(sums[r]) * self.factors[i + r];
            }
        }
    }

    /// Adds heads `j .. j + NV * LANES` to the sums of keys `i .. i + MR`.
    ///
    /// # Safety
    /// As [`ScoreKeys::block`], and the heads must lie below `lanes`.
    #[inline(always)]
    unsafe fn panel<S: Simd, const MR: usize, const NV: usize>(
        &self,
        i: usize,
        j: usize,
        lanes: usize,
        sums: &mut [S::V; MR],
    ) {
        // SAFETY: the caller's condition.
        unsafe {
            let k = self.keys.as_ptr().add(i * self.dim);
            let q = self.query.q.as_ptr().add(j);
            let mut acc = [[S::zero(); NV]; MR];
            for d in 0..self.dim {
                let mut row = [S::zero(); NV];
                for v in 0..NV {
                    row[v] = S::load(q.add(d * lanes + v * S::LANES));
                }
                for r in 0..MR {
                    let x = S::splat(*k.add(r * self.dim + d));
                    for v in 0..NV {
                        acc[r][v] = S::mul_add(x, row[v], acc[r][v]);
                    }
                }
            }
            for v in 0..NV {
                let w = S::load(self.query.weights.as_ptr().add(j + v * S::LANES));
                let mask = S::load(self.query.mask.as_ptr().add(j + v * S::LANES));
                for r in 0..MR {
                    // A padded head has q = 0 and w = 0, but 0 times an infinite key would still be NaN.
                    sums[r] = S::mul_add(w, S::keep(S::relu(acc[r][v]), mask), sums[r]);
                }
            }
        }
    }
}
