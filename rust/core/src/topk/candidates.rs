//! The candidates of one row, and the cut to the best k of them.
//!
//! A score's *order key* is an integer in the order wanted. The k-th highest key is found bit by bit, each by one count over all
//! candidates: no comparison of two candidates, no branch on a value, the same time for every input.

use super::leaf;
use crate::simd::{AlignedBuffer, Level};

/// The order key of a number above -inf: at least 2, by value; -0 and +0 are a tie.
#[inline(always)]
pub(super) fn order_key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000)
}

/// The number whose order key is `key`.
#[inline(always)]
pub(super) fn score_of(key: u32) -> f32 {
    f32::from_bits(key ^ ((!(key as i32 >> 31) as u32) | 0x8000_0000))
}

/// Bits that are decided before those keys are dropped that the decisions have put above or below.
const BITS_A_ROUND: u32 = 4;

/// Scores above a threshold, in the order of their positions.
#[derive(Default)]
pub(super) struct Candidates {
    /// Order keys.
    pub keys: AlignedBuffer<u32>,
    /// Positions in the row, rising.
    pub positions: AlignedBuffer<u32>,
    /// How many there are; what lies behind is of no account.
    pub len: usize,
    undecided: [AlignedBuffer<u32>; 2],
    /// Where in a piece what passed the threshold is.
    offsets: AlignedBuffer<u16>,
}

impl Candidates {
    /// Forgets them and makes room for `capacity`.
    pub fn reset(&mut self, capacity: usize) {
        self.len = 0;
        self.keys.reserve(capacity + leaf::SLACK);
        self.positions.reserve(capacity + leaf::SLACK);
    }

    /// Room that is left.
    pub fn room(&self) -> usize {
        self.keys.len() - leaf::SLACK - self.len
    }

    /// Adds the scores above `threshold`; `scores[0]` has position `first`, and there must be room for all of them.
    #[inline]
    pub fn add(&mut self, level: Level, scores: &[f32], first: u32, threshold: f32) {
        self.offsets.reserve(scores.len() + leaf::SLACK);
        let found = leaf::above(level, scores, threshold, &mut self.offsets);
        let offsets = &self.offsets[..found];
        let (positions, keys) = (&mut self.positions[self.len..], &mut self.keys[self.len..]);
        leaf::take(level, scores, offsets, first, positions, keys);
        self.len += found;
    }

    /// Adds candidates of later positions.
    pub fn append(&mut self, later: &Candidates) {
        let (start, end) = (self.len, self.len + later.len);
        self.keys[start..end].copy_from_slice(&later.keys[..later.len]);
        self.positions[start..end].copy_from_slice(&later.positions[..later.len]);
        self.len = end;
    }

    /// Keeps the best k of at least k and returns the key that a later candidate must exceed.
    pub fn cut(&mut self, level: Level, k: usize) -> u32 {
        let (bound, above) = kth_highest(level, &self.keys[..self.len], k, 0, &mut self.undecided);
        leaf::retain(level, self, bound, k - above);
        bound
    }
}

/// The k-th highest of `keys` and how many are above it; k is from 1 to the number of keys. The `coarse` lowest bits are left
/// out: 0 in the result, as if they were 0 in every key. `undecided` is working memory.
pub(super) fn kth_highest(
    level: Level,
    keys: &[u32],
    k: usize,
    coarse: u32,
    undecided: &mut [AlignedBuffer<u32>; 2],
) -> (u32, usize) {
    let [now, later] = undecided;
    let (all, any) = keys.iter().fold((u32::MAX, 0), |(all, any), &key| (all & key, any | key));
    // Bits from here on upwards are known: at first those that all keys have in common.
    let mut known = (32 - (all ^ any).leading_zeros()).max(coarse);
    let mut bound = all & u32::MAX.checked_shl(known).unwrap_or(0);
    let mut above = 0;
    let mut left = keys.len();
    while known > coarse {
        let next = known.saturating_sub(BITS_A_ROUND).max(coarse);
        let keys = if left == keys.len() { keys } else { &now[..left] };
        let mut above_here = 0;
        for bit in (next..known).rev() {
            let trial = bound | 1 << bit;
            let count = leaf::count_at_least(level, keys, trial);
            if above + count >= k {
                bound = trial;
            } else {
                above_here = count;
            }
        }
        above += above_here;
        known = next;
        if known > coarse {
            later.reserve(left + leaf::SLACK);
            left = leaf::matching(level, keys, bound, known, later);
            std::mem::swap(now, later);
        }
    }
    (bound, above)
}
