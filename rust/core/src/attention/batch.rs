//! Which keys the queries of a step see: one contiguous sequence, or a ragged batch over block tables.

use std::ops::Range;

use half::bf16;

use crate::argument::{ArgumentError, Result, ensure, ensure_volume};
use crate::cache::layout::PAGE_TOKENS;
use crate::cache::pages::Cache;
use crate::elements::Elements;
use crate::simd::Level;

/// The queries of one sequence and its keys.
#[derive(Clone, Debug)]
pub struct Sequence<K> {
    /// Rows of q that belong to the sequence.
    pub queries: Range<usize>,
    /// Where its keys are.
    pub keys: K,
    /// S: keys it has.
    pub len: usize,
}

/// The pages of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct PagedKeys<'a> {
    pub(crate) cache: Cache<'a>,
    table: &'a [i32],
}

impl<'a> PagedKeys<'a> {
    /// Whether `position` lies in a page of the sequence.
    pub(crate) fn holds(&self, position: usize) -> bool {
        position / PAGE_TOKENS < self.table.len()
    }

    /// Values of the index page that `position` lies in and, where the format has them, its scales.
    #[inline]
    pub(crate) fn index_page(&self, position: usize) -> (Elements<'a>, Option<&'a [u8]>) {
        self.cache.index_page(self.table[position / PAGE_TOKENS] as usize)
    }

    /// Reads the row at `position`; returns its factor (see [`Cache`]).
    #[inline]
    pub(crate) fn read(&self, position: usize, dst: &mut [f32]) -> f32 {
        self.cache.read(self.slot(position), dst)
    }

    /// Reads the latent row at `position` as bfloat16.
    #[inline]
    pub(crate) fn read_half(&self, level: Level, position: usize, dst: &mut [bf16]) {
        self.cache.read_half(level, self.slot(position), dst);
    }

    /// Address and bytes of the row at `position`.
    pub(crate) fn span(&self, position: usize) -> (usize, usize) {
        self.cache.span(self.slot(position))
    }

    fn slot(&self, position: usize) -> usize {
        self.table[position / PAGE_TOKENS] as usize * PAGE_TOKENS + position % PAGE_TOKENS
    }
}

/// A ragged batch over pages, as it comes from the scheduler.
#[derive(Clone, Copy, Debug)]
pub struct PagedBatch<'a> {
    /// [B, M] block of each 64 positions; entries beyond the sequence are not read.
    pub block_tables: &'a [i32],
    /// [B] keys of each sequence, this step's tokens included.
    pub seq_lens: &'a [i32],
    /// [B + 1] first row of q of each sequence, then N.
    pub query_start_loc: &'a [i32],
}

impl<'a> PagedBatch<'a> {
    /// Checks the batch against `queries` = N rows and a cache of `blocks` pages.
    ///
    /// # Errors
    /// Lengths that do not fit each other, a sequence longer than its table or shorter than its queries, a block that is
    /// needed but outside the cache.
    pub fn check(&self, queries: usize, blocks: usize) -> Result<()> {
        let columns = self.columns(queries)?;
        (0..self.seq_lens.len()).try_for_each(|b| self.span(b, columns, blocks).map(drop))
    }

    /// Sequence `b` of a batch that has been checked, its keys in `cache`.
    pub(crate) fn sequence(&self, b: usize, cache: Cache<'a>) -> Sequence<PagedKeys<'a>> {
        let columns = self.block_tables.len() / self.seq_lens.len();
        let len = self.seq_lens[b] as usize;
        let table = &self.block_tables[b * columns..][..len.div_ceil(PAGE_TOKENS)];
        let queries = self.query_start_loc[b] as usize..self.query_start_loc[b + 1] as usize;
        Sequence { queries, keys: PagedKeys { cache, table }, len }
    }

    /// The sequences of a batch whose keys lie in `cache`.
    pub(crate) fn sequences(&self, queries: usize, cache: Cache<'a>) -> Result<Vec<Sequence<PagedKeys<'a>>>> {
        let spans = self.spans(queries, cache.blocks())?;
        let with_cache = |s: Sequence<&'a [i32]>| Sequence {
            queries: s.queries,
            keys: PagedKeys { cache, table: s.keys },
            len: s.len,
        };
        Ok(spans.into_iter().map(with_cache).collect())
    }

    /// Each sequence with its block table, cut to the pages it fills.
    fn spans(&self, queries: usize, blocks: usize) -> Result<Vec<Sequence<&'a [i32]>>> {
        let columns = self.columns(queries)?;
        (0..self.seq_lens.len()).map(|b| self.span(b, columns, blocks)).collect()
    }

    /// M, after checking that the lengths fit each other.
    fn columns(&self, queries: usize) -> Result<usize> {
        let (lens, starts) = (self.seq_lens, self.query_start_loc);
        let batch = lens.len();
        ensure(
            starts.len() == batch + 1,
            "query_start_loc",
            || format!("[{}] (one more than seq_lens)", batch + 1),
            || format!("[{}]", starts.len()),
        )?;
        let rising = starts.windows(2).all(|w| w[0] <= w[1]);
        let ends = (starts[0], usize::try_from(starts[batch]).ok()) == (0, Some(queries));
        ensure(
            rising && ends,
            "query_start_loc",
            || format!("rising values from 0 to {queries} (rows of q)"),
            || abbreviate(starts),
        )?;
        let columns = self.block_tables.len().checked_div(batch).unwrap_or(0);
        ensure_volume("block_tables", &[batch, columns], self.block_tables.len())?;
        Ok(columns)
    }

    fn span(&self, b: usize, columns: usize, blocks: usize) -> Result<Sequence<&'a [i32]>> {
        let queries = self.query_start_loc[b] as usize..self.query_start_loc[b + 1] as usize;
        let (least, most) = (queries.len(), columns.saturating_mul(PAGE_TOKENS));
        let len = self.seq_lens[b];
        let len = usize::try_from(len).ok().filter(|l| (least..=most).contains(l)).ok_or_else(|| {
            ArgumentError::Mismatch {
                name: "seq_lens",
                expected: format!("{least} (queries) to {most} (block table) keys for sequence {b}"),
                got: len.to_string(),
            }
        })?;
        let table = &self.block_tables[b * columns..][..len.div_ceil(PAGE_TOKENS)];
        for (i, &block) in table.iter().enumerate() {
            let inside = usize::try_from(block).is_ok_and(|block| block < blocks);
            ensure(
                inside,
                "block_tables",
                || format!("a block from 0 to {blocks} - 1 in entry {i} of sequence {b}"),
                || block.to_string(),
            )?;
        }
        Ok(Sequence { queries, keys: table, len })
    }
}

/// Keys visible to each query of `sequences`, its queries being the sequence's last tokens.
pub(crate) fn visible_of_last<K>(sequences: &[Sequence<K>]) -> Vec<usize> {
    sequences.iter().flat_map(|s| (0..s.queries.len()).map(|i| s.len - s.queries.len() + i + 1)).collect()
}

/// Keys visible to each of T queries over S keys: those up to its position (default: the queries are the last tokens).
pub(crate) fn visible_of_positions(
    positions: Option<&[i64]>,
    queries: usize,
    keys: usize,
) -> Result<Vec<usize>> {
    let Some(positions) = positions else {
        return Ok((0..queries).map(|t| (keys + t + 1).saturating_sub(queries)).collect());
    };
    ensure(
        positions.len() == queries,
        "q_positions",
        || format!("[{queries}]"),
        || format!("[{}]", positions.len()),
    )?;
    Ok(positions
        .iter()
        .map(|&p| if p < 0 { 0 } else { (p as u64).saturating_add(1).min(keys as u64) as usize })
        .collect())
}

/// A run of neighbouring queries of one sequence, computed together so that they share what is read of the keys.
#[derive(Clone, Debug)]
pub(crate) struct QueryTile {
    pub sequence: usize,
    pub queries: Range<usize>,
}

/// Cuts the queries of every sequence into tiles of at most `size`, in order.
pub(crate) fn query_tiles<K>(sequences: &[Sequence<K>], size: usize) -> Vec<QueryTile> {
    let mut tiles = Vec::new();
    for (sequence, s) in sequences.iter().enumerate() {
        tiles.extend(
            s.queries
                .clone()
                .step_by(size)
                .map(|start| QueryTile { sequence, queries: start..(start + size).min(s.queries.end) }),
        );
    }
    tiles
}

/// True when `tasks` alone keep every thread of the pool busy, so that no task needs to be split further.
pub(crate) fn fill_threads(tasks: usize) -> bool {
    tasks >= 2 * rayon::current_num_threads()
}

fn abbreviate(values: &[i32]) -> String {
    match values {
        [first, .., last] if values.len() > 8 => format!("[{first}, ..., {last}]"),
        _ => format!("{values:?}"),
    }
}
