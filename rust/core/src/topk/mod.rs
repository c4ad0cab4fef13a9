//! Selection of the k highest scores of a row: exact, deterministic, one pass over the row.
//!
//! A score and its position become one integer whose order is the order wanted (higher score first, then lower position),
//! so ties cannot depend on how the selection proceeds. Candidates above the running k-th best are gathered and cut back
//! to k whenever the buffer fills; on score rows in no particular order few of them pass (about k (1 + ln(S / k))).

use rayon::prelude::*;

use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::Elements;

/// Fills the places of a row that has fewer than k selectable scores.
pub const PADDING: i32 = -1;

/// Scores looked at together: one vectorised maximum decides whether any can be a candidate.
const BLOCK: usize = 64;

/// The order key of a score: 0 for -inf (masked, never selected), 1 for NaN (below every number), then by value.
#[inline(always)]
fn order_key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits(); // -0 and +0 are a tie
    let flip = ((bits as i32 >> 31) as u32) | 0x8000_0000;
    let key = bits ^ flip;
    let key = if score == f32::NEG_INFINITY { 0 } else { key };
    if score.is_nan() { 1 } else { key }
}

/// Order key above, complement of the position below: larger is better, and no two are equal.
#[inline(always)]
fn candidate(key: u32, position: usize) -> u64 {
    (u64::from(key) << 32) | u64::from(!(position as u32))
}

/// Keeps the best k candidates of one row after another.
#[derive(Default)]
pub struct Selector {
    candidates: Vec<u64>,
}

impl Selector {
    /// Writes the positions of the `out.len()` best of `scores` to `out`, best first, then [`PADDING`].
    ///
    /// `scores` must have fewer than 2^31 values.
    pub fn select(&mut self, scores: &[f32], out: &mut [i32]) {
        let k = out.len();
        self.candidates.clear();
        if k > 0 {
            self.gather(scores, k);
        }
        self.candidates.sort_unstable_by(|a, b| b.cmp(a));
        let found = self.candidates.iter().map(|&c| !(c as u32) as i32);
        for (slot, position) in out.iter_mut().zip(found.chain(std::iter::repeat(PADDING))) {
            *slot = position;
        }
    }

    fn gather(&mut self, scores: &[f32], k: usize) {
        let k = k.min(scores.len());
        let capacity = k + k.max(1024);
        // Keys up to and including this one cannot enter: every later position loses a tie.
        let mut threshold = 0;
        let mut keys = [0u32; BLOCK];
        for (b, block) in scores.chunks(BLOCK).enumerate() {
            let keys = &mut keys[..block.len()];
            let mut best = 0;
            for (key, &score) in keys.iter_mut().zip(block) {
                *key = order_key(score);
                best = best.max(*key);
            }
            if best <= threshold {
                continue;
            }
            for (i, &key) in keys.iter().enumerate() {
                if key > threshold {
                    self.candidates.push(candidate(key, b * BLOCK + i));
                }
            }
            if self.candidates.len() >= capacity {
                threshold = self.cut(k);
            }
        }
        if self.candidates.len() > k {
            self.cut(k);
        }
    }

    /// Keeps the best k and returns the order key of the worst of them.
    fn cut(&mut self, k: usize) -> u32 {
        let (_, &mut worst, _) = self.candidates.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        self.candidates.truncate(k);
        (worst >> 32) as u32
    }
}

/// Checks that positions below `columns` fit the int32 results.
pub(crate) fn ensure_positions_fit(name: &'static str, columns: usize) -> Result<()> {
    ensure(
        columns <= i32::MAX as usize,
        name,
        || format!("at most {} keys", i32::MAX),
        || format!("{columns} keys"),
    )
}

/// The k highest scores of each row of `scores` [T, S]: positions int32 [T, k] to `out`, highest first.
///
/// Ties go to the lowest position. NaN ranks below every number. Entries of -inf (masked) and positions at or beyond
/// `lengths[t]` are never selected; places left over hold -1.
///
/// # Errors
/// A shape that does not fit, a length outside `0..=S`.
pub fn top_k(
    scores: Elements<'_>,
    rows: usize,
    columns: usize,
    lengths: Option<&[i64]>,
    k: usize,
    out: &mut [i32],
) -> Result<()> {
    ensure_volume("scores", &[rows, columns], scores.len())?;
    ensure_positions_fit("scores", columns)?;
    ensure(k >= 1, "k", || "at least 1".into(), || k.to_string())?;
    ensure_volume("out", &[rows, k], out.len())?;
    if let Some(lengths) = lengths {
        ensure(lengths.len() == rows, "lengths", || format!("[{rows}]"), || format!("[{}]", lengths.len()))?;
        for &l in lengths {
            let fits = usize::try_from(l).is_ok_and(|l| l <= columns);
            ensure(fits, "lengths", || format!("values from 0 to {columns}"), || l.to_string())?;
        }
    }
    out.par_chunks_mut(k).enumerate().for_each_init(
        || (Selector::default(), Vec::new()),
        |(selector, row), (t, out)| {
            let length = lengths.map_or(columns, |l| l[t] as usize);
            if let Elements::F32(x) = scores {
                return selector.select(&x[t * columns..][..length], out);
            }
            row.resize(length, 0.0);
            scores.widen(t * columns, row);
            selector.select(row, out);
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sorts the whole row: the definition.
    fn reference(scores: &[f32], k: usize) -> Vec<i32> {
        let mut order: Vec<usize> = (0..scores.len()).filter(|&s| scores[s] != f32::NEG_INFINITY).collect();
        let rank = |s: usize| (!scores[s].is_nan(), if scores[s].is_nan() { 0.0 } else { scores[s] });
        order.sort_by(|&a, &b| rank(b).partial_cmp(&rank(a)).unwrap().then(a.cmp(&b)));
        let mut out: Vec<i32> = order.into_iter().map(|s| s as i32).take(k).collect();
        out.resize(k, PADDING);
        out
    }

    fn score() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => (-3i32..3).prop_map(|x| x as f32),
            2 => any::<f32>(),
            1 => prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MIN]),
        ]
    }

    proptest! {
        #[test]
        fn selection_is_the_head_of_the_sorted_row(scores in prop::collection::vec(score(), 0..5000), k in 1usize..300) {
            let mut out = vec![7; k];
            let mut selector = Selector::default();
            selector.select(&scores, &mut out);
            prop_assert_eq!(&out, &reference(&scores, k));
            // A selector carries nothing from one row to the next.
            selector.select(&scores[..scores.len() / 2], &mut out);
            prop_assert_eq!(out, reference(&scores[..scores.len() / 2], k));
        }
    }

    #[test]
    fn rising_rows_cut_the_buffer_many_times() {
        let scores: Vec<f32> = (0..20_000).map(|i| (i / 3) as f32).collect();
        let mut out = vec![0; 100];
        Selector::default().select(&scores, &mut out);
        assert_eq!(out, reference(&scores, 100));
    }

    #[test]
    fn bad_arguments_name_themselves() {
        let scores = [1.0, 2.0];
        let mut out = [0; 2];
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert_eq!(
            text(top_k(Elements::F32(&scores), 1, 2, None, 0, &mut [])),
            "k: expected at least 1, got 0"
        );
        let e = text(top_k(Elements::F32(&scores), 1, 2, Some(&[3]), 2, &mut out));
        assert_eq!(e, "lengths: expected values from 0 to 2, got 3");
        assert!(text(top_k(Elements::F32(&scores), 2, 2, None, 1, &mut out)).starts_with("scores: "));
    }
}
