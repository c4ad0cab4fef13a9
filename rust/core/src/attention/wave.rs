//! One tile of queries with all its heads, over its keys.
//!
//! Keys are taken in waves of [`WAVE`]. First their rows are read, once for all heads, and multiplied with the queries, a
//! tile of [`KEY_TILE`] keys at a time; then each vector of heads takes in the wave's logits (online softmax) and adds the
//! weighted values to its sums. Threads share the first half by tiles and the second by heads: no sum is ever split, so
//! nothing has to be merged and the bits do not depend on the number of threads.

use rayon::prelude::*;

use super::attend::{Attention, AttentionQueries, Selection};
use super::batch::QueryTile;
use super::rows::KeyValues;
use super::softmax::{Heads, LogitRows, Running};
use crate::cache::layout::PAGE_TOKENS;
use crate::elements::ElementsMut;
use crate::prefetch;
use crate::simd::{AlignedBuffer, PAD, padded};
use crate::threads::Arena;

/// Keys read together.
pub(super) const KEY_TILE: usize = PAGE_TOKENS;
/// Keys of a wave: their logits and values stay in the second-level cache.
pub(super) const WAVE: usize = 8 * KEY_TILE;

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Dk.
    pub dim: usize,
    /// Dv.
    pub value_dim: usize,
    /// Heads that share a key head.
    pub heads: usize,
    /// Values lie apart from keys.
    pub apart: bool,
}

impl Shape {
    /// Heads, padded to vectors.
    pub fn lanes(&self) -> usize {
        padded(self.heads)
    }

    /// Dv, padded to vectors.
    pub fn width(&self) -> usize {
        padded(self.value_dim)
    }
}

/// The matrix products of a tile, and the form that queries and values take for them. Buffers are counted in 32-bit items.
pub(super) trait Products: Sync {
    fn shape(&self) -> Shape;

    /// The softmax of a vector of heads over a wave's logits.
    fn absorb(&self, running: &mut Running, rows: LogitRows<'_>, scale: f32, out: &mut [Heads]) -> Heads;

    /// Items of a packed query.
    fn query_items(&self) -> usize;

    /// Items of the values of a key tile.
    fn value_items(&self) -> usize;

    /// Packs the heads of a query that begin at row `first` of q [T H, Dk].
    fn pack(&self, queries: &AttentionQueries<'_>, first: usize, packed: &mut [f32], scratch: &mut Scratch);

    /// Reads a tile of keys and their values; writes the logits, [KEY_TILE, lanes], of each query over the keys it has.
    fn tile(
        &self,
        tile: &KeyTile<'_>,
        packed: &[f32],
        logits: &mut [f32],
        values: &mut [f32],
        scratch: &mut Scratch,
    );

    /// Adds probabilities (in `scratch`, of `count` keys of a wave) times values to `sums` [heads, width].
    fn weigh(&self, count: usize, values: &[f32], sums: &mut [f32], heads: usize, scratch: &mut Scratch);
}

/// Keys of a tile.
pub(super) struct KeyTile<'a> {
    keys: &'a KeyValues<'a>,
    /// The key head.
    head: usize,
    chosen: Option<&'a [usize]>,
    /// Place of the first key among the task's.
    first: usize,
    /// Keys of the tile.
    pub count: usize,
    /// Keys of the task that follow the tile.
    following: usize,
    /// Keys of each query.
    limits: &'a [usize],
}

impl KeyTile<'_> {
    fn position(&self, i: usize) -> usize {
        self.chosen.map_or(self.first + i, |chosen| chosen[self.first + i])
    }

    /// The keys, the key head, and the position of key `i`.
    pub fn source(&self, i: usize) -> (&KeyValues<'_>, usize, usize) {
        (self.keys, self.head, self.position(i))
    }

    /// Keys of the tile that each query has.
    pub fn live(&self) -> impl Iterator<Item = usize> {
        self.limits.iter().map(|limit| limit.saturating_sub(self.first).min(self.count))
    }

    /// Fetches key `i` of the tile, if there is one.
    pub fn fetch(&self, i: usize) {
        if i < self.count {
            let (start, bytes) = self.keys.span(self.position(i), self.head);
            prefetch::lines(start, bytes).for_each(prefetch::fetch);
        }
    }

    /// Cache lines of the next tile's keys.
    pub fn next_lines(&self, lines: &mut Vec<usize>) {
        lines.clear();
        for i in self.count..self.count + self.following.min(KEY_TILE) {
            let (start, bytes) = self.keys.span(self.position(i), self.head);
            lines.extend(prefetch::lines(start, bytes));
        }
    }
}

/// The results of a tile of queries: [tile, H, Dv] and [tile, H].
pub(super) struct Outputs<'a> {
    pub out: ElementsMut<'a>,
    pub lse: &'a mut [f32],
}

/// Buffers of one step on one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// Rows on their way.
    pub rows: AlignedBuffer,
    pub values: AlignedBuffer,
    /// Exponentials of a wave for one vector of heads.
    pub probabilities: Vec<Heads>,
    pub pairs: AlignedBuffer,
    pub lines: Vec<usize>,
}

/// Buffers of a task.
#[derive(Default)]
struct Workspace {
    chosen: Vec<usize>,
    /// [queries][query_items].
    packed: AlignedBuffer,
    /// [tiles of a wave][queries][KEY_TILE, lanes].
    logits: AlignedBuffer,
    /// [tiles of a wave][value_items].
    values: AlignedBuffer,
    /// [queries][vectors of heads].
    running: Vec<Running>,
    /// [queries][lanes, width].
    sums: AlignedBuffer,
}

static SCRATCH: Arena<Scratch> = Arena::new();
static WORKSPACES: Arena<Workspace> = Arena::new();

/// The first `len` values of a buffer that grows when it must.
pub(super) fn front(buffer: &mut AlignedBuffer, len: usize) -> &mut [f32] {
    buffer.reserve(len);
    &mut buffer[..len]
}

/// One tile of queries.
pub(super) struct Task<'a, 'b> {
    pub attention: &'a Attention<'b>,
    pub selection: Option<Selection<'a>>,
    pub tile: QueryTile,
    pub outputs: Outputs<'a>,
    /// Whether threads share the task.
    pub parallel: bool,
}

impl Task<'_, '_> {
    pub fn run(mut self, products: &impl Products) {
        let attention = self.attention;
        let workspace = &mut *WORKSPACES.lend();
        let Workspace { chosen, packed, logits, values, running, sums } = workspace;
        let sequence = &attention.sequences[self.tile.sequence];
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
        let shape = products.shape();
        let (count, lanes, width) = (limits.len(), shape.lanes(), shape.width());
        let keys = limits.iter().copied().max().unwrap_or(0);
        let tiles = keys.min(WAVE).div_ceil(KEY_TILE);
        let packed = front(packed, count * products.query_items());
        let logits = front(logits, tiles * count * KEY_TILE * lanes);
        let values = front(values, tiles * products.value_items());
        let sums = front(sums, count * lanes * width);
        for head in 0..attention.kv_heads {
            for (i, packed) in packed.chunks_exact_mut(products.query_items()).enumerate() {
                let first = (self.tile.queries.start + i) * attention.queries.heads + head * shape.heads;
                products.pack(&attention.queries, first, packed, &mut SCRATCH.lend());
            }
            running.clear();
            running.resize(count * lanes / PAD, Running::START);
            sums.fill(0.0);
            for first in (0..keys).step_by(WAVE) {
                let wave =
                    Wave { products, keys: &sequence.keys, head, limits, chosen, keys_end: keys, first };
                wave.score(packed, logits, values, self.parallel);
                wave.accumulate(attention.queries.scale, logits, values, running, sums, self.parallel);
            }
            self.finish(head, running, sums, shape);
        }
    }

    /// Divides by the denominators and writes the results of the heads of group `head`.
    fn finish(&mut self, head: usize, running: &[Running], sums: &mut [f32], shape: Shape) {
        let attention = self.attention;
        let (vectors, width) = (shape.lanes() / PAD, shape.width());
        for i in 0..self.tile.queries.len() {
            for h in 0..shape.heads {
                let all = head * shape.heads + h;
                let at = i * attention.queries.heads + all;
                let state = &running[i * vectors + h / PAD];
                let (max, sum) = (state.max[h % PAD], state.sum[h % PAD]);
                let lse = if sum == 0.0 { f32::NEG_INFINITY } else { max + sum.ln() };
                // exp(sink) beside sum = exp(lse) in the denominator, written so that neither exponential can overflow.
                let share = attention.queries.sink.map_or(1.0, |sink| 1.0 / (1.0 + (sink[all] - lse).exp()));
                let factor = if sum == 0.0 { 0.0 } else { share / sum };
                let values = &mut sums[(i * vectors * PAD + h) * width..][..attention.value_dim];
                values.iter_mut().for_each(|x| *x *= factor);
                self.outputs.out.narrow(at * attention.value_dim, values);
                self.outputs.lse[at] = lse;
            }
        }
    }
}

/// Keys `first ..` of a task, at most [`WAVE`].
struct Wave<'a, P> {
    products: &'a P,
    keys: &'a KeyValues<'a>,
    head: usize,
    limits: &'a [usize],
    chosen: Option<&'a [usize]>,
    /// Keys of the task.
    keys_end: usize,
    first: usize,
}

impl<P: Products> Wave<'_, P> {
    fn count(&self) -> usize {
        WAVE.min(self.keys_end - self.first)
    }

    /// Reads the keys and writes logits and values, tile by tile.
    fn score(&self, packed: &[f32], logits: &mut [f32], values: &mut [f32], parallel: bool) {
        let tiles = self.count().div_ceil(KEY_TILE);
        let logit_items = self.limits.len() * KEY_TILE * self.products.shape().lanes();
        let work = |(i, (logits, values)): (usize, (&mut [f32], &mut [f32]))| {
            let first = self.first + i * KEY_TILE;
            let count = KEY_TILE.min(self.keys_end - first);
            let following = self.keys_end - first - count;
            let Self { keys, head, chosen, limits, .. } = *self;
            let tile = KeyTile { keys, head, chosen, first, count, following, limits };
            self.products.tile(&tile, packed, logits, values, &mut SCRATCH.lend());
        };
        let logits = &mut logits[..tiles * logit_items];
        let values = &mut values[..tiles * self.products.value_items()];
        if parallel {
            logits
                .par_chunks_exact_mut(logit_items)
                .zip(values.par_chunks_exact_mut(self.products.value_items()))
                .enumerate()
                .for_each(work);
        } else {
            logits
                .chunks_exact_mut(logit_items)
                .zip(values.chunks_exact_mut(self.products.value_items()))
                .enumerate()
                .for_each(work);
        }
    }

    /// Adds the wave to the running softmaxes and their sums, one vector of heads after another.
    fn accumulate(
        &self,
        scale: f32,
        logits: &[f32],
        values: &[f32],
        running: &mut [Running],
        sums: &mut [f32],
        parallel: bool,
    ) {
        let shape = self.products.shape();
        let (lanes, width) = (shape.lanes(), shape.width());
        let vectors = lanes / PAD;
        let work = |(i, (running, sums)): (usize, (&mut Running, &mut [f32]))| {
            let (query, vector) = (i / vectors, i % vectors);
            let count = self.limits[query].saturating_sub(self.first).min(self.count());
            if count == 0 {
                return;
            }
            let heads = PAD.min(shape.heads - vector * PAD);
            let rows = LogitRows {
                logits,
                tile: KEY_TILE,
                tile_stride: self.limits.len() * KEY_TILE * lanes,
                stride: lanes,
                offset: query * KEY_TILE * lanes + vector * PAD,
            };
            let scratch = &mut *SCRATCH.lend();
            scratch.probabilities.resize(WAVE, [0.0; PAD]);
            let decay = self.products.absorb(running, rows, scale, &mut scratch.probabilities[..count]);
            for (row, &factor) in sums.chunks_exact_mut(width).zip(&decay[..heads]) {
                if factor != 1.0 {
                    row.iter_mut().for_each(|x| *x *= factor);
                }
            }
            self.products.weigh(count, values, sums, heads, scratch);
        };
        if parallel {
            running.par_iter_mut().zip(sums.par_chunks_exact_mut(PAD * width)).enumerate().for_each(work);
        } else {
            running.iter_mut().zip(sums.chunks_exact_mut(PAD * width)).enumerate().for_each(work);
        }
    }
}
