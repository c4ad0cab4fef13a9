//! Softmax attention over chosen keys (sparse) or over every visible key (dense); one code path, so that the two can be
//! compared: choosing every key in order gives the dense result bit for bit.
//!
//! Keys are read in tiles of 64 rows, once for all heads, and widened to f32; each chunk of 256 keys has its own online
//! softmax, and the chunks are merged in order. Chunks are cut by key count alone, so they can run on any number of threads
//! (one query, long context) or one after another (many queries) with the same bits.

use rayon::prelude::*;

use super::batch::{
    PagedBatch, PagedKeys, QueryTile, Sequence, fill_threads, query_tiles, visible_of_last,
    visible_of_positions,
};
use super::gemm::Gemm;
use super::softmax::{Running, absorb, merge_factors};
use crate::argument::{Result, ensure, ensure_volume};
use crate::cache::layout::PAGE_TOKENS;
use crate::cache::pages::{Cache, Layout};
use crate::elements::{Elements, ElementsMut, take_front};
use crate::simd::{AlignedBuffer, Level, padded};

/// Keys read together.
const KEY_TILE: usize = PAGE_TOKENS;
/// Keys of one online softmax.
const CHUNK: usize = 4 * KEY_TILE;
/// Rows (queries times heads) of a dense tile: they share each key that is read.
const TILE_ROWS: usize = 128;
/// Queries of a dense tile at most.
const MAX_QUERY_TILE: usize = 16;

/// Attention queries of a step.
#[derive(Clone, Copy, Debug)]
pub struct AttentionQueries<'a> {
    /// q [T, H, Dk].
    pub values: Elements<'a>,
    /// T.
    pub count: usize,
    /// H.
    pub heads: usize,
    /// Dk.
    pub dim: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Per head: exp(sink) is added to the denominator.
    pub sink: Option<&'a [f32]>,
}

impl AttentionQueries<'_> {
    fn check(&self) -> Result<()> {
        let shape = || "[T, H, Dk] with H and Dk of at least 1".to_string();
        ensure(self.heads > 0 && self.dim > 0, "q", shape, || {
            format!("[{}, {}, {}]", self.count, self.heads, self.dim)
        })?;
        ensure_volume("q", &[self.count, self.heads, self.dim], self.values.len())?;
        ensure(self.scale.is_finite(), "scale", || "a finite number".into(), || self.scale.to_string())?;
        if let Some(sink) = self.sink {
            ensure(
                sink.len() == self.heads,
                "sink",
                || format!("[{}]", self.heads),
                || format!("[{}]", sink.len()),
            )?;
            ensure(sink.iter().all(|x| !x.is_nan()), "sink", || "numbers".into(), || "NaN".into())?;
        }
        Ok(())
    }
}

/// Contiguous keys and values of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KeyValueRows<'a> {
    /// [S, Hkv, Dk].
    pub keys: Elements<'a>,
    /// [S, Hkv, Dv]; without it, the first Dv numbers of a key are its value.
    pub values: Option<Elements<'a>>,
    /// S.
    pub count: usize,
    /// Hkv; head h reads key head h / (H / Hkv).
    pub heads: usize,
    /// Dv.
    pub value_dim: usize,
}

#[derive(Clone, Copy, Debug)]
enum KeyValues<'a> {
    Rows { rows: KeyValueRows<'a>, dim: usize },
    Pages(PagedKeys<'a>),
}

impl KeyValues<'_> {
    #[inline]
    fn read_key(&self, position: usize, head: usize, dst: &mut [f32]) {
        match self {
            Self::Rows { rows, dim } => rows.keys.widen((position * rows.heads + head) * dim, dst),
            Self::Pages(pages) => {
                pages.read(position, dst);
            }
        }
    }
}

/// Chosen keys: positions in the sequence, int32 [T, K]; those below 0 or at or beyond S are skipped.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// [T, K].
    pub indices: &'a [i32],
    /// K.
    pub width: usize,
}

/// Queries with the keys and values each of them may see.
pub struct Attention<'a> {
    level: Level,
    queries: AttentionQueries<'a>,
    sequences: Vec<Sequence<KeyValues<'a>>>,
    /// Hkv.
    kv_heads: usize,
    /// Dv.
    value_dim: usize,
    /// Values apart from the keys.
    values: Option<Elements<'a>>,
    visible: Vec<usize>,
}

impl<'a> Attention<'a> {
    /// One sequence. `q_positions` matter to dense attention only: query t sees the keys up to its position, by default
    /// S - T + t.
    ///
    /// # Errors
    /// Shapes that do not fit, a scale that is not finite, a NaN sink.
    pub fn contiguous(
        level: Level,
        queries: AttentionQueries<'a>,
        rows: KeyValueRows<'a>,
        q_positions: Option<&[i64]>,
    ) -> Result<Self> {
        queries.check()?;
        let AttentionQueries { count, heads, dim, .. } = queries;
        let KeyValueRows { count: keys, heads: kv_heads, value_dim, .. } = rows;
        let divides = kv_heads > 0 && heads.is_multiple_of(kv_heads);
        ensure(divides, "kv", || format!("a number of heads that divides {heads}"), || kv_heads.to_string())?;
        ensure_volume("kv", &[keys, kv_heads, dim], rows.keys.len())?;
        match rows.values {
            Some(v) => ensure_volume("v", &[keys, kv_heads, value_dim], v.len())?,
            None => {
                ensure(value_dim <= dim, "value_dim", || format!("1 to {dim}"), || value_dim.to_string())?
            }
        }
        ensure(value_dim > 0, "value_dim", || "at least 1".into(), || "0".into())?;
        let visible = visible_of_positions(q_positions, count, keys)?;
        let keys_of = KeyValues::Rows { rows, dim };
        let sequences = vec![Sequence { queries: 0..count, keys: keys_of, len: keys }];
        Ok(Self { level, queries, sequences, kv_heads, value_dim, values: rows.values, visible })
    }

    /// A ragged batch whose latent rows lie in a cache: each is a key, and its first C numbers are the value.
    ///
    /// # Errors
    /// Shapes that do not fit, see [`PagedBatch::check`].
    pub fn paged(
        level: Level,
        queries: AttentionQueries<'a>,
        cache: Cache<'a>,
        batch: PagedBatch<'a>,
    ) -> Result<Self> {
        queries.check()?;
        let value_dim = match cache.layout() {
            Layout::Latent(l) if l.dim() == queries.dim => l.value_dim,
            layout => {
                ensure(
                    false,
                    "cache",
                    || format!("latent rows of {} values (Dk of q)", queries.dim),
                    || format!("rows of {} values", layout.dim()),
                )?;
                0
            }
        };
        let sequences = batch.sequences(queries.count, cache)?;
        let visible = visible_of_last(&sequences);
        let sequences = sequences
            .into_iter()
            .map(|s| Sequence { queries: s.queries, keys: KeyValues::Pages(s.keys), len: s.len })
            .collect();
        Ok(Self { level, queries, sequences, kv_heads: 1, value_dim, values: None, visible })
    }

    /// Attention over the chosen keys: out [T, H, Dv], lse [T, H] (natural log, without the sink).
    ///
    /// # Errors
    /// A selection or an output of the wrong size.
    pub fn sparse(&self, selection: Selection<'_>, out: ElementsMut<'_>, lse: &mut [f32]) -> Result<()> {
        ensure_volume("indices", &[self.queries.count, selection.width], selection.indices.len())?;
        self.run(Some(selection), query_tiles(&self.sequences, 1), out, lse)
    }

    /// Attention over every visible key.
    ///
    /// # Errors
    /// An output of the wrong size.
    pub fn dense(&self, out: ElementsMut<'_>, lse: &mut [f32]) -> Result<()> {
        let size = (TILE_ROWS / self.group_heads()).clamp(1, MAX_QUERY_TILE);
        self.run(None, query_tiles(&self.sequences, size), out, lse)
    }

    /// Heads that share a key head.
    fn group_heads(&self) -> usize {
        self.queries.heads / self.kv_heads
    }

    fn run(
        &self,
        selection: Option<Selection<'_>>,
        tiles: Vec<QueryTile>,
        mut out: ElementsMut<'_>,
        mut lse: &mut [f32],
    ) -> Result<()> {
        let AttentionQueries { count, heads, .. } = self.queries;
        ensure_volume("out", &[count, heads, self.value_dim], out.len())?;
        ensure_volume("lse", &[count, heads], lse.len())?;
        let alone = fill_threads(tiles.len());
        let tasks: Vec<_> = tiles
            .into_iter()
            .map(|tile| {
                let rows = tile.queries.len() * heads;
                let outputs =
                    Outputs { out: out.take_front(rows * self.value_dim), lse: take_front(&mut lse, rows) };
                Task { attention: self, selection, tile, outputs }
            })
            .collect();
        if alone {
            tasks.into_par_iter().for_each_init(Workspace::default, |workspace, task| task.run(workspace, 1));
        } else {
            let mut workspace = Workspace::default();
            let wave = 2 * rayon::current_num_threads();
            tasks.into_iter().for_each(|task| task.run(&mut workspace, wave));
        }
        Ok(())
    }
}

/// The results of a tile of queries: [tile, H, Dv] and [tile, H].
struct Outputs<'a> {
    out: ElementsMut<'a>,
    lse: &'a mut [f32],
}

/// Buffers that live from task to task.
#[derive(Default)]
struct Workspace {
    /// Positions of the chosen keys.
    chosen: Vec<usize>,
    /// Queries of the tile, heads in the lanes: [Dk, Hp] each, times the scale.
    packed: Vec<AlignedBuffer>,
    row: Vec<f32>,
    merged: Vec<Partial>,
    /// [wave][queries of the tile].
    partials: Vec<Vec<Partial>>,
    scratch: Scratch,
}

/// Buffers of the thread that works on a chunk.
#[derive(Default)]
struct Scratch {
    keys: AlignedBuffer,
    values: AlignedBuffer,
    logits: AlignedBuffer,
    decay: Vec<f32>,
}

/// The online softmax of one query over some keys: maximum and sum [Hp], weighted values [heads of the group, Dv padded].
#[derive(Default)]
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    values: AlignedBuffer,
}

impl Partial {
    fn reset(&mut self, lanes: usize, values: usize) {
        self.max.clear();
        self.max.resize(lanes, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(lanes, 0.0);
        if self.values.len() < values {
            self.values = AlignedBuffer::zeroed(values);
        } else {
            self.values.fill(0.0);
        }
    }

    /// Adds a later chunk.
    fn merge(&mut self, chunk: &Self, heads: usize, width: usize) {
        for h in 0..heads {
            if chunk.sum[h] == 0.0 {
                continue; // no key of the chunk was for this query
            }
            let (max, old, new) = merge_factors(self.max[h], chunk.max[h]);
            self.max[h] = max;
            self.sum[h] = self.sum[h] * old + chunk.sum[h] * new;
            let range = h * width..(h + 1) * width;
            for (a, &b) in self.values[range.clone()].iter_mut().zip(&chunk.values[range]) {
                *a = *a * old + b * new;
            }
        }
    }
}

/// One tile of queries with all its heads.
struct Task<'a, 'b> {
    attention: &'a Attention<'b>,
    selection: Option<Selection<'a>>,
    tile: QueryTile,
    outputs: Outputs<'a>,
}

impl Task<'_, '_> {
    /// Computes the tile, `wave` chunks of keys at a time.
    fn run(mut self, workspace: &mut Workspace, wave: usize) {
        let attention = self.attention;
        let Workspace { chosen, packed, row, merged, partials, scratch } = workspace;
        let sequence = &attention.sequences[self.tile.sequence];
        let count = self.tile.queries.len();
        let visible = &attention.visible[self.tile.queries.clone()];
        let (limits, chosen): (&[usize], Option<&[usize]>) = match self.selection {
            None => (visible, None),
            Some(selection) => {
                let row = &selection.indices[self.tile.queries.start * selection.width..][..selection.width];
                chosen.clear();
                chosen.extend(
                    row.iter().filter_map(|&s| usize::try_from(s).ok()).filter(|&s| s < sequence.len),
                );
                (&[chosen.len()], Some(chosen))
            }
        };
        let keys = limits.iter().copied().max().unwrap_or(0);
        let (heads, width) = (attention.group_heads(), padded(attention.value_dim));
        let lanes = padded(heads);
        packed.resize_with(count, AlignedBuffer::default);
        merged.resize_with(count, Partial::default);
        for head in 0..attention.kv_heads {
            for (i, (packed, merged)) in packed.iter_mut().zip(merged.iter_mut()).enumerate() {
                self.pack(self.tile.queries.start + i, head, lanes, packed, row);
                merged.reset(lanes, heads * width);
            }
            let chunks = Chunks { attention, keys: &sequence.keys, head, limits, chosen, packed };
            let starts: Vec<usize> = (0..keys).step_by(CHUNK).collect();
            partials.resize_with(wave.min(starts.len()).max(partials.len()), Vec::new);
            for starts in starts.chunks(wave) {
                if let [start] = starts {
                    chunks.attend(*start, keys, &mut partials[0], scratch);
                } else {
                    partials.par_iter_mut().zip(starts).for_each_init(
                        Scratch::default,
                        |scratch, (partial, start)| {
                            chunks.attend(*start, keys, partial, scratch);
                        },
                    );
                }
                for partial in &partials[..starts.len()] {
                    merged.iter_mut().zip(partial).for_each(|(m, p)| m.merge(p, heads, width));
                }
            }
            for (i, merged) in merged.iter_mut().enumerate() {
                self.finish(i, head, merged, width);
            }
        }
    }

    /// Writes query `t`, heads of group `head` in the lanes, times the scale, to `packed` [Dk, lanes].
    fn pack(&self, t: usize, head: usize, lanes: usize, packed: &mut AlignedBuffer, row: &mut Vec<f32>) {
        let AttentionQueries { values, heads, dim, scale, .. } = self.attention.queries;
        if packed.is_empty() {
            *packed = AlignedBuffer::zeroed(dim * lanes);
            row.resize(dim, 0.0);
        }
        let group = self.attention.group_heads();
        for h in 0..group {
            values.widen((t * heads + head * group + h) * dim, row);
            for (d, &x) in row.iter().enumerate() {
                packed[d * lanes + h] = x * scale;
            }
        }
    }

    /// Divides by the denominator and writes the results of query `i` of the tile.
    fn finish(&mut self, i: usize, head: usize, merged: &mut Partial, width: usize) {
        let attention = self.attention;
        let group = attention.group_heads();
        for h in 0..group {
            let all = head * group + h;
            let at = i * attention.queries.heads + all;
            let (max, sum) = (merged.max[h], merged.sum[h]);
            let lse = if sum == 0.0 { f32::NEG_INFINITY } else { max + sum.ln() };
            // exp(sink) beside sum = exp(lse) in the denominator, written so that neither exponential can overflow.
            let share = attention.queries.sink.map_or(1.0, |sink| 1.0 / (1.0 + (sink[all] - lse).exp()));
            let factor = if sum == 0.0 { 0.0 } else { share / sum };
            let values = &mut merged.values[h * width..][..attention.value_dim];
            values.iter_mut().for_each(|x| *x *= factor);
            self.outputs.out.narrow(at * attention.value_dim, values);
            self.outputs.lse[at] = lse;
        }
    }
}

/// What the chunks of a task have in common.
struct Chunks<'a, 'b> {
    attention: &'a Attention<'b>,
    keys: &'a KeyValues<'b>,
    /// The key head.
    head: usize,
    /// Keys of each query: a count of positions, or of chosen keys.
    limits: &'a [usize],
    chosen: Option<&'a [usize]>,
    packed: &'a [AlignedBuffer],
}

impl Chunks<'_, '_> {
    /// Attends to keys `start .. start + CHUNK` of at most `keys`, into one partial a query.
    fn attend(&self, start: usize, keys: usize, partials: &mut Vec<Partial>, scratch: &mut Scratch) {
        let attention = self.attention;
        let level = attention.level;
        let dim = attention.queries.dim;
        let (heads, width) = (attention.group_heads(), padded(attention.value_dim));
        let (lanes, stride) = (padded(heads), padded(dim));
        partials.resize_with(self.packed.len(), Partial::default);
        partials.iter_mut().for_each(|p| p.reset(lanes, heads * width));
        if scratch.keys.is_empty() {
            scratch.keys = AlignedBuffer::zeroed(KEY_TILE * stride);
            scratch.logits = AlignedBuffer::zeroed(KEY_TILE * lanes);
            scratch.decay = vec![0.0; lanes];
            if attention.values.is_some() {
                scratch.values = AlignedBuffer::zeroed(KEY_TILE * width);
            }
        }
        let end = keys.min(start + CHUNK);
        for first in (start..end).step_by(KEY_TILE) {
            let count = KEY_TILE.min(end - first);
            self.load(first, count, scratch);
            let Scratch { keys, values, logits, decay } = scratch;
            let (values, value_row): (&[f32], usize) =
                if attention.values.is_some() { (values, width) } else { (keys, stride) };
            for ((partial, packed), &limit) in partials.iter_mut().zip(self.packed).zip(self.limits) {
                let live = limit.saturating_sub(first).min(count);
                if live == 0 {
                    continue;
                }
                let logits = &mut logits[..live * lanes];
                Gemm {
                    a: keys,
                    a_row: stride,
                    a_col: 1,
                    b: packed,
                    b_row: lanes,
                    c: logits,
                    c_row: lanes,
                    m: live,
                    n: lanes,
                    k: dim,
                    accumulate: false,
                }
                .run_at(level);
                absorb(level, logits, Running { max: &mut partial.max, sum: &mut partial.sum }, decay);
                for (row, &factor) in partial.values.chunks_exact_mut(width).zip(&decay[..heads]) {
                    if factor != 1.0 {
                        row.iter_mut().for_each(|x| *x *= factor);
                    }
                }
                Gemm {
                    a: logits,
                    a_row: 1,
                    a_col: lanes,
                    b: values,
                    b_row: value_row,
                    c: &mut partial.values,
                    c_row: width,
                    m: heads,
                    n: width,
                    k: live,
                    accumulate: true,
                }
                .run_at(level);
            }
        }
    }

    /// Reads `count` keys (and values) from the `first`-th.
    fn load(&self, first: usize, count: usize, scratch: &mut Scratch) {
        let attention = self.attention;
        let dim = attention.queries.dim;
        let (stride, width) = (padded(dim), padded(attention.value_dim));
        for i in 0..count {
            let position = self.chosen.map_or(first + i, |chosen| chosen[first + i]);
            self.keys.read_key(position, self.head, &mut scratch.keys[i * stride..][..dim]);
            if let Some(values) = attention.values {
                let at = (position * attention.kv_heads + self.head) * attention.value_dim;
                values.widen(at, &mut scratch.values[i * width..][..attention.value_dim]);
            }
        }
    }
}
