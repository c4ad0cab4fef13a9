//! Softmax attention over chosen keys (sparse) or over every visible key (dense); one code path, so that the two can be
//! compared: choosing every key in order gives the dense result bit for bit.
//!
//! This file checks arguments and cuts the queries into tasks; `wave` computes one. Products of bfloat16 queries and
//! bfloat16 or FP8 keys run on bfloat16 pairs where the machine multiplies those (`paired`), all others in f32 (`single`).

use rayon::prelude::*;

use super::batch::{
    PagedBatch, QueryTile, Sequence, fill_threads, query_tiles, visible_of_last, visible_of_positions,
};
use super::paired::Paired;
use super::pairs;
pub use super::rows::KeyValueRows;
use super::rows::KeyValues;
use super::single::Single;
use super::wave::{Outputs, Shape, Task};
use crate::argument::{Result, ensure, ensure_volume};
use crate::cache::pages::{Cache, Layout};
use crate::elements::{Elements, ElementsMut, take_front};
use crate::simd::Level;

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
    pub(super) queries: AttentionQueries<'a>,
    pub(super) sequences: Vec<Sequence<KeyValues<'a>>>,
    /// Hkv.
    pub(super) kv_heads: usize,
    /// Dv.
    pub(super) value_dim: usize,
    pub(super) visible: Vec<usize>,
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
        Ok(Self { level, queries, sequences, kv_heads, value_dim, visible })
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
        Ok(Self { level, queries, sequences, kv_heads: 1, value_dim, visible })
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
    pub(super) fn group_heads(&self) -> usize {
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
        // Enough tiles run side by side; few of them one after another, their keys and heads shared out among the threads.
        let parallel = !fill_threads(tiles.len()) && rayon::current_num_threads() > 1;
        let tasks = tiles.into_iter().map(|tile| {
            let rows = tile.queries.len() * heads;
            let outputs =
                Outputs { out: out.take_front(rows * self.value_dim), lse: take_front(&mut lse, rows) };
            Task { attention: self, selection, tile, outputs, parallel }
        });
        let half = matches!(self.queries.values, Elements::Bf16(_))
            && self.sequences.iter().all(|s| s.keys.is_half())
            && self.level.runs(pairs::LEVEL);
        if parallel {
            tasks.for_each(|task| self.compute(task, half));
        } else {
            tasks.collect::<Vec<_>>().into_par_iter().for_each(|task| self.compute(task, half));
        }
        Ok(())
    }

    fn compute(&self, task: Task<'_, '_>, half: bool) {
        let shape = Shape {
            dim: self.queries.dim,
            value_dim: self.value_dim,
            heads: self.group_heads(),
            apart: self.sequences.iter().any(|s| s.keys.has_values()),
        };
        if half { task.run(&Paired { shape }) } else { task.run(&Single { shape, level: self.level }) }
    }
}
