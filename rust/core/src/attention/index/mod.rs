//! Lightning-indexer scores, I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]), and the selection of the best keys of each query.
//!
//! `query` packs a query, heads in the lanes, and chooses the arithmetic; `keys` gives tiles of keys; `kernel` and `x86` score a
//! tile. Work is cut into tiles of queries, which share each tile of keys while a query's packed form stays in the first-level
//! cache; where there are too few of them to keep all threads busy, the keys are cut as well. Selection takes scores a tile at a
//! time (`topk::Selector`), so no row of scores is ever held. Neither cut shows in the results.

mod kernel;
mod keys;
mod query;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use rayon::prelude::*;

use self::kernel::KeyRun;
use self::keys::{Ahead, IndexKeys, KEY_TILE, KeyTile};
use self::query::{PackedQuery, Products};
use super::batch::{PagedBatch, QueryTile, Sequence, fill_threads};
use crate::argument::{Result, ensure, ensure_volume};
use crate::cache::pages::{Cache, Layout};
use crate::elements::Elements;
use crate::simd::{AlignedBuffer, Level};
use crate::threads::Arena;
use crate::topk::{Selector, ensure_positions_fit};
pub use query::IndexQueries;

/// Queries that share a tile of keys.
const QUERY_TILE: usize = 16;
/// Keys of a task when one query's keys are shared out among threads.
const KEY_TASK: usize = 8 * KEY_TILE;

/// Where the keys are.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Rows { values: Elements<'a>, count: usize, scales: Option<&'a [f32]>, q_positions: Option<&'a [i64]> },
    Pages { cache: Cache<'a>, batch: PagedBatch<'a> },
}

/// Queries with the keys each of them sees.
pub struct Indexer<'a> {
    level: Level,
    products: Products,
    queries: IndexQueries<'a>,
    source: Source<'a>,
}

/// Working memory of the indexer, kept from call to call.
#[derive(Default)]
pub struct IndexArena {
    tiles: Arena<Vec<QueryTile>>,
    scratch: Arena<Scratch>,
}

impl IndexArena {
    /// An arena without memory.
    pub const fn new() -> Self {
        Self { tiles: Arena::new(), scratch: Arena::new() }
    }
}

/// Working memory of a tile of queries.
#[derive(Default)]
struct Scratch {
    packed: Vec<PackedQuery>,
    parts: Vec<Part>,
}

/// Working memory of a tile of queries over a part of its keys.
#[derive(Default)]
struct Part {
    tile: KeyTile,
    scores: AlignedBuffer<f32>,
    /// One a query.
    selectors: Vec<Selector>,
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
        q_positions: Option<&'a [i64]>,
    ) -> Result<Self> {
        queries.check()?;
        ensure_volume("k", &[keys, queries.dim], k.len())?;
        ensure_positions_fit("k", keys)?;
        if let Some(scales) = k_scale {
            let got = || format!("[{}]", scales.len());
            ensure(scales.len() == keys, "k_scale", || format!("[{keys}]"), got)?;
            if let Some((s, x)) = scales.iter().enumerate().find(|(_, x)| !x.is_finite()) {
                ensure(false, "k_scale", || "finite scales".into(), || format!("{x} at {s}"))?;
            }
        }
        if let Some(positions) = q_positions {
            let (count, got) = (queries.count, || format!("[{}]", positions.len()));
            ensure(positions.len() == count, "q_positions", || format!("[{count}]"), got)?;
        }
        let products = Products::of(level, queries.values, k, queries.dim);
        let source = Source::Rows { values: k, count: keys, scales: k_scale, q_positions };
        Ok(Self { level, products, queries, source })
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
        batch.check(queries.count, cache.blocks())?;
        let products = Products::of(level, queries.values, cache.values(), queries.dim);
        Ok(Self { level, products, queries, source: Source::Pages { cache, batch } })
    }

    /// Scores [T, columns] to `out`; -inf where a key is not visible. `columns` must be at least every sequence's length.
    ///
    /// # Errors
    /// `out` of the wrong size.
    pub fn scores(&self, columns: usize, out: &mut [f32], arena: &IndexArena) -> Result<()> {
        ensure_volume("out", &[self.queries.count, columns], out.len())?;
        let longest = (0..self.sequences()).map(|b| self.sequence(b).len).max().unwrap_or(0);
        ensure(columns >= longest, "out", || format!("at least {longest} columns"), || columns.to_string())?;
        if columns == 0 {
            return Ok(());
        }
        let mut tiles = arena.tiles.lend();
        self.cut_queries(&mut tiles);
        if fill_threads(tiles.len()) {
            each_tile(&tiles, columns, out, &|tile, out| {
                let scratch = &mut *arena.scratch.lend();
                let sequence = self.sequence(tile.sequence);
                self.pack(tile.queries.clone(), scratch);
                scratch.parts.resize_with(1.max(scratch.parts.len()), Part::default);
                self.score_range(&sequence, tile, 0..columns, &scratch.packed, &mut scratch.parts[0], out);
            });
        } else {
            for tile in tiles.iter() {
                for t in tile.queries.clone() {
                    let row = &mut out[t * columns..][..columns];
                    let alone = QueryTile { sequence: tile.sequence, queries: t..t + 1 };
                    self.score_query(&alone, row, arena);
                }
            }
        }
        Ok(())
    }

    /// Positions of the k best keys of each query, [T, k], as [`crate::topk::top_k`] over [`Indexer::scores`] would give
    /// them, with a tile of scores a thread.
    ///
    /// # Errors
    /// k of 0, `out` of the wrong size.
    pub fn top_k(&self, k: usize, sorted: bool, out: &mut [i32], arena: &IndexArena) -> Result<()> {
        ensure(k >= 1, "top_k", || "at least 1".into(), || k.to_string())?;
        ensure_volume("out", &[self.queries.count, k], out.len())?;
        let mut tiles = arena.tiles.lend();
        self.cut_queries(&mut tiles);
        let threads = rayon::current_num_threads();
        let parts = if threads == 1 || fill_threads(tiles.len()) { 1 } else { 2 * threads };
        let work = |tile: &QueryTile, out: &mut [i32]| self.select_tile(tile, parts, sorted, out, arena);
        if parts == 1 {
            each_tile(&tiles, k, out, &work);
        } else {
            for tile in tiles.iter() {
                work(tile, &mut out[tile.queries.start * k..tile.queries.end * k]);
            }
        }
        Ok(())
    }

    fn sequences(&self) -> usize {
        match self.source {
            Source::Rows { .. } => 1,
            Source::Pages { batch, .. } => batch.seq_lens.len(),
        }
    }

    fn sequence(&self, b: usize) -> Sequence<IndexKeys<'a>> {
        match self.source {
            Source::Rows { values, count, scales, .. } => Sequence {
                queries: 0..self.queries.count,
                keys: IndexKeys::Rows { values, scales, dim: self.queries.dim },
                len: count,
            },
            Source::Pages { cache, batch } => {
                let Sequence { queries, keys, len } = batch.sequence(b, cache);
                Sequence { queries, keys: IndexKeys::Pages(keys), len }
            }
        }
    }

    /// Keys that query `t` of `sequence` sees: those up to its position, by default that of the sequence's last tokens.
    fn visible(&self, sequence: &Sequence<IndexKeys<'a>>, t: usize) -> usize {
        let Sequence { ref queries, len, .. } = *sequence;
        match self.source {
            Source::Rows { q_positions: Some(positions), .. } => {
                usize::try_from(positions[t]).map_or(0, |p| p.saturating_add(1).min(len))
            }
            _ => (len + t + 1).saturating_sub(queries.end),
        }
    }

    fn cut_queries(&self, tiles: &mut Vec<QueryTile>) {
        tiles.clear();
        for b in 0..self.sequences() {
            let queries = self.sequence(b).queries;
            tiles.extend(queries.clone().step_by(QUERY_TILE).map(|start| QueryTile {
                sequence: b,
                queries: start..(start + QUERY_TILE).min(queries.end),
            }));
        }
    }

    fn pack(&self, queries: Range<usize>, scratch: &mut Scratch) {
        scratch.packed.resize_with(queries.len().max(scratch.packed.len()), PackedQuery::default);
        for (packed, t) in scratch.packed.iter_mut().zip(queries) {
            packed.pack(self.products, &self.queries, t);
        }
    }

    /// Scores of one query, its keys shared out among the threads.
    fn score_query(&self, tile: &QueryTile, row: &mut [f32], arena: &IndexArena) {
        let scratch = &mut *arena.scratch.lend();
        let sequence = self.sequence(tile.sequence);
        self.pack(tile.queries.clone(), scratch);
        let packed = &scratch.packed;
        row.par_chunks_mut(KEY_TASK).enumerate().for_each(|(i, row)| {
            let scratch = &mut *arena.scratch.lend();
            scratch.parts.resize_with(1.max(scratch.parts.len()), Part::default);
            let range = i * KEY_TASK..i * KEY_TASK + row.len();
            self.score_range(&sequence, tile, range, packed, &mut scratch.parts[0], row);
        });
    }

    /// Scores of the keys in `range` for each query of a tile: `out` [tile, range].
    fn score_range(
        &self,
        sequence: &Sequence<IndexKeys<'a>>,
        tile: &QueryTile,
        range: Range<usize>,
        packed: &[PackedQuery],
        part: &mut Part,
        out: &mut [f32],
    ) {
        let columns = range.len();
        let visible = |t| self.visible(sequence, t).clamp(range.start, range.end);
        for (row, t) in out.chunks_exact_mut(columns).zip(tile.queries.clone()) {
            row[visible(t) - range.start..].fill(f32::NEG_INFINITY);
        }
        let end = tile.queries.clone().map(visible).max().unwrap_or(range.start);
        for first in (range.start..end).step_by(KEY_TILE) {
            let count = KEY_TILE.min(end - first);
            part.tile.load(self.level, self.products, &sequence.keys, first, count, self.queries.dim);
            let mut ahead = part.tile.ahead(&sequence.keys, self.queries.dim);
            for ((row, packed), t) in out.chunks_exact_mut(columns).zip(packed).zip(tile.queries.clone()) {
                let live = visible(t).saturating_sub(first).min(count);
                let scores = &mut row[first - range.start..][..live];
                self.score_tile(&sequence.keys, &part.tile, &std::mem::take(&mut ahead), packed, scores);
            }
        }
    }

    /// Scores of the first `out.len()` keys of a tile; the first query of a tile fetches what is `ahead` for all.
    fn score_tile(
        &self,
        keys: &IndexKeys<'a>,
        tile: &KeyTile,
        ahead: &Ahead,
        packed: &PackedQuery,
        out: &mut [f32],
    ) {
        tile.for_each_run(keys, out.len(), self.queries.dim, |at, rows, factors| {
            let out = &mut out[at..][..factors.len()];
            kernel::score(self.level, self.products, KeyRun { rows, factors, ahead, at }, packed, out);
        });
    }

    /// Selects for each query of a tile: `out` [tile, k].
    fn select_tile(&self, tile: &QueryTile, parts: usize, sorted: bool, out: &mut [i32], arena: &IndexArena) {
        let scratch = &mut *arena.scratch.lend();
        let sequence = &self.sequence(tile.sequence);
        let k = out.len() / tile.queries.len();
        self.pack(tile.queries.clone(), scratch);
        let Scratch { packed, parts: memory } = scratch;
        memory.resize_with(parts.max(memory.len()), Part::default);
        let memory = &mut memory[..parts];
        let end = tile.queries.clone().map(|t| self.visible(sequence, t)).max().unwrap_or(0);
        let size = end.div_ceil(parts).next_multiple_of(KEY_TILE);
        let select = |p: usize, part: &mut Part| {
            let range = (p * size).min(end)..((p + 1) * size).min(end);
            self.select_range(sequence, tile, k, range, packed, part);
        };
        if let [part] = memory {
            select(0, part);
        } else {
            memory.par_iter_mut().enumerate().for_each(|(p, part)| select(p, part));
        }
        let (first, later) = memory.split_at_mut(1);
        for (i, out) in out.chunks_exact_mut(k).enumerate() {
            let selector = &mut first[0].selectors[i];
            later.iter_mut().for_each(|part| selector.absorb(self.level, &mut part.selectors[i]));
            selector.finish(self.level, sorted, out);
        }
    }

    /// Offers the keys in `range` to a selector of each query of a tile.
    fn select_range(
        &self,
        sequence: &Sequence<IndexKeys<'a>>,
        tile: &QueryTile,
        k: usize,
        range: Range<usize>,
        packed: &[PackedQuery],
        part: &mut Part,
    ) {
        let Part { tile: keys, scores, selectors } = part;
        scores.reserve(KEY_TILE);
        selectors.resize_with(tile.queries.len().max(selectors.len()), Selector::default);
        for (selector, t) in selectors.iter_mut().zip(tile.queries.clone()) {
            selector.begin(k, self.visible(sequence, t));
        }
        for first in range.clone().step_by(KEY_TILE) {
            let count = KEY_TILE.min(range.end - first);
            keys.load(self.level, self.products, &sequence.keys, first, count, self.queries.dim);
            let mut ahead = keys.ahead(&sequence.keys, self.queries.dim);
            for ((selector, packed), t) in selectors.iter_mut().zip(packed).zip(tile.queries.clone()) {
                let live = self.visible(sequence, t).saturating_sub(first).min(count);
                if live > 0 {
                    let scores = &mut scores[..live];
                    self.score_tile(&sequence.keys, keys, &std::mem::take(&mut ahead), packed, scores);
                    selector.push(self.level, scores, first);
                }
            }
        }
    }
}

/// Calls `work` with each tile and its rows of `out`, `width` items a query, in parallel.
fn each_tile<T: Send>(
    tiles: &[QueryTile],
    width: usize,
    out: &mut [T],
    work: &(impl Fn(&QueryTile, &mut [T]) + Sync),
) {
    match tiles {
        [] => {}
        [tile] => work(tile, out),
        _ => {
            let (left, right) = tiles.split_at(tiles.len() / 2);
            let rows = right[0].queries.start - left[0].queries.start;
            let (left_out, right_out) = out.split_at_mut(rows * width);
            rayon::join(
                || each_tile(left, width, left_out, work),
                || each_tile(right, width, right_out, work),
            );
        }
    }
}
