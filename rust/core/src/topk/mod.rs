//! Selection of the k highest scores of a row: exact, deterministic, in one pass over the row.
//!
//! `selector` takes a row piece by piece and keeps candidates; `candidates` cuts them back to the best k; `leaf` holds the loops
//! over vectors.

mod candidates;
mod leaf;
mod selector;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::Elements;
use crate::simd::Level;
use crate::threads::Arena;
use selector::Row;
pub use selector::Selector;

/// Fills the places of a row that has fewer than k selectable scores.
pub const PADDING: i32 = -1;

/// Checks that positions below `columns` fit the int32 results.
pub(crate) fn ensure_positions_fit(name: &'static str, columns: usize) -> Result<()> {
    ensure(
        columns <= i32::MAX as usize,
        name,
        || format!("at most {} keys", i32::MAX),
        || format!("{columns} keys"),
    )
}

/// Score rows of which the best are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// [T, S].
    pub values: Elements<'a>,
    /// T.
    pub rows: usize,
    /// S.
    pub columns: usize,
    /// [T] scores of each row that count; default all.
    pub lengths: Option<&'a [i64]>,
}

impl Scores<'_> {
    fn check(&self) -> Result<()> {
        let Self { values, rows, columns, lengths } = *self;
        ensure_volume("scores", &[rows, columns], values.len())?;
        ensure_positions_fit("scores", columns)?;
        let Some(lengths) = lengths else { return Ok(()) };
        ensure(lengths.len() == rows, "lengths", || format!("[{rows}]"), || format!("[{}]", lengths.len()))?;
        for &l in lengths {
            let fits = usize::try_from(l).is_ok_and(|l| l <= columns);
            ensure(fits, "lengths", || format!("values from 0 to {columns}"), || l.to_string())?;
        }
        Ok(())
    }

    fn row(&self, t: usize) -> Row<'_> {
        let columns = self.lengths.map_or(self.columns, |l| l[t] as usize);
        Row { scores: self.values, start: t * self.columns, columns }
    }
}

/// The k highest scores of each row: positions int32 [T, k] to `out`, highest first if `sorted`, else in rising order.
///
/// Ties go to the lowest position. NaN ranks below every number. Entries of -inf (masked) and positions at or beyond
/// `lengths[t]` are never selected; places left over, which come last, hold -1. A single row is selected on the calling thread.
///
/// # Errors
/// A shape that does not fit, a length outside `0..=S`.
pub fn top_k(
    level: Level,
    scores: Scores<'_>,
    k: usize,
    sorted: bool,
    out: &mut [i32],
    arena: &Arena<Selector>,
) -> Result<()> {
    scores.check()?;
    ensure(k >= 1, "k", || "at least 1".into(), || k.to_string())?;
    ensure_volume("out", &[scores.rows, k], out.len())?;
    if scores.rows == 1 {
        // Less work than waking a thread is.
        arena.lend().select(level, scores.row(0), sorted, out);
        return Ok(());
    }
    out.par_chunks_mut(k).enumerate().for_each_init(
        || arena.lend(),
        |selector, (t, out)| selector.select(level, scores.row(t), sorted, out),
    );
    Ok(())
}
