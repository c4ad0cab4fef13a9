//! The k highest scores of a row that comes piece by piece: exact, deterministic, in time linear in the row.
//!
//! Scores above the running threshold are gathered as candidates; when they fill the buffer, it is cut back to the best k and
//! the threshold rises to the k-th of them. Every later position loses a tie, so the threshold itself need not pass. On rows in
//! no particular order few scores pass, about k (1 + ln(S / k)); rising rows, the worst case, cut once every k scores.

use super::PADDING;
use super::candidates::{Candidates, kth_highest, order_key, score_of};
use crate::elements::Elements;
use crate::simd::{AlignedBuffer, Level};

/// Scores of one piece at most.
pub(crate) const PIECE: usize = 4096;
/// Scores of the sample that guesses the threshold of a whole row.
const SAMPLE: usize = 2048;
/// Neighbouring scores of the sample: a cache line.
const SAMPLE_RUN: usize = 16;
/// Bits of the guess: those below hardly change how many scores pass.
const GUESS_BITS: u32 = 18;
/// Fewer winners than this are sorted by comparison.
const RADIX_FROM: usize = 192;

/// Selects in one row after another; its buffers live from row to row.
#[derive(Default)]
pub struct Selector {
    candidates: Candidates,
    /// Places to fill.
    k: usize,
    /// Candidates at which the buffer is cut.
    full: usize,
    /// Scores up to and including this one cannot enter.
    threshold: f32,
    /// Positions of the first k NaN, until k numbers have been seen.
    nans: Vec<u32>,
    /// False once NaN cannot be selected any more.
    watch_nans: bool,
    sample: Vec<u32>,
    undecided: [AlignedBuffer<u32>; 2],
    /// Scores that were not f32.
    piece: Vec<f32>,
    sorting: [Vec<u64>; 2],
}

impl Selector {
    /// Begins a row of `columns` scores, of which the best `k` are wanted.
    pub(crate) fn begin(&mut self, k: usize, columns: usize) {
        self.k = k.min(columns);
        self.full = self.k + self.k.max(PIECE);
        self.candidates.reset(self.full + PIECE);
        self.threshold = f32::NEG_INFINITY;
        self.nans.clear();
        self.watch_nans = true;
    }

    /// Takes the next scores, at most [`PIECE`]; `scores[0]` has position `first`.
    #[inline]
    pub(crate) fn push(&mut self, level: Level, scores: &[f32], first: usize) {
        debug_assert!(scores.len() <= PIECE);
        if self.watch_nans && scores.iter().fold(false, |any, x| any | x.is_nan()) {
            let room = self.k - self.nans.len();
            let nans = scores.iter().enumerate().filter(|(_, x)| x.is_nan());
            self.nans.extend(nans.map(|(i, _)| (first + i) as u32).take(room));
        }
        self.candidates.add(level, scores, first as u32, self.threshold);
        if self.candidates.len >= self.full {
            self.cut(level);
        }
    }

    /// Takes what another selector found at later positions of the same row.
    pub(crate) fn absorb(&mut self, level: Level, later: &mut Selector) {
        if later.candidates.len > self.k {
            later.cut(level);
        }
        if later.candidates.len > self.candidates.room() {
            self.cut(level); // the room that is missing shows that there are more than k
        }
        self.candidates.append(&later.candidates);
        let room = self.k - self.nans.len();
        self.nans.extend(later.nans.iter().take(room));
    }

    fn cut(&mut self, level: Level) {
        self.threshold = score_of(self.candidates.cut(level, self.k));
        self.watch_nans = false;
    }

    /// Ends the row: writes the positions of the best to `out`, then [`PADDING`]. Best first, or in rising order; NaN stand
    /// behind all numbers, or in their order.
    pub(crate) fn finish(&mut self, level: Level, sorted: bool, out: &mut [i32]) {
        if self.candidates.len > self.k && self.k > 0 {
            self.cut(level);
        }
        let found = self.candidates.len;
        let positions = &self.candidates.positions[..found];
        let nans = &self.nans[..self.nans.len().min(self.k - found)];
        if sorted {
            let winners = sort(&mut self.sorting, &self.candidates.keys[..found], positions);
            out.iter_mut().zip(winners).for_each(|(out, &winner)| *out = winner as u32 as i32);
        } else {
            out.iter_mut().zip(positions).for_each(|(out, &position)| *out = position as i32);
        }
        let end = found + nans.len();
        out[found..end].iter_mut().zip(nans).for_each(|(out, &position)| *out = position as i32);
        out[end..].fill(PADDING);
        if !sorted && !nans.is_empty() {
            out[..end].sort_unstable();
        }
    }

    /// The best of a whole row.
    pub(crate) fn select(&mut self, level: Level, row: Row<'_>, sorted: bool, out: &mut [i32]) {
        let mut piece = std::mem::take(&mut self.piece);
        let guess = self.guess(level, row, out.len(), &mut piece);
        self.begin(out.len(), row.columns);
        if let Some(threshold) = guess {
            (self.threshold, self.watch_nans) = (threshold, false);
        }
        self.run(level, row, &mut piece);
        if guess.is_some() && self.candidates.len < self.k {
            self.begin(out.len(), row.columns);
            self.run(level, row, &mut piece);
        }
        self.piece = piece;
        self.finish(level, sorted, out);
    }

    fn run(&mut self, level: Level, row: Row<'_>, piece: &mut Vec<f32>) {
        for first in (0..row.columns).step_by(PIECE) {
            let scores = row.piece(first, PIECE.min(row.columns - first), piece);
            self.push(level, scores, first);
        }
    }

    /// A threshold that a little more than k scores will pass, if the row is like its sample. A wrong guess costs time alone.
    fn guess(&mut self, level: Level, row: Row<'_>, k: usize, piece: &mut Vec<f32>) -> Option<f32> {
        if row.columns < 8 * SAMPLE {
            return None;
        }
        // Winners in the sample are about binomial: three deviations more let fewer than k pass once in some hundreds of rows.
        let expected = k as f64 / row.columns as f64 * SAMPLE as f64;
        let rank = (expected + 3.0 * expected.sqrt() + 3.0) as usize;
        if rank > SAMPLE / 4 {
            return None;
        }
        self.sample.clear();
        let stride = row.columns / (SAMPLE / SAMPLE_RUN);
        for run in 0..SAMPLE / SAMPLE_RUN {
            let scores = row.piece(run * stride, SAMPLE_RUN, piece);
            let key = |&score: &f32| if score > f32::NEG_INFINITY { order_key(score) } else { 0 };
            self.sample.extend(scores.iter().map(key));
        }
        let (bound, _) = kth_highest(level, &self.sample, rank, 32 - GUESS_BITS, &mut self.undecided);
        // Scores equal to the bound shall pass, so the threshold lies below it; +0 has -0 below it, which equals it.
        let below = if bound == order_key(0.0) { bound - 2 } else { bound.saturating_sub(1) };
        Some(score_of(below)).filter(|x| x.is_finite())
    }
}

/// A row of scores.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    /// Where it lies.
    pub scores: Elements<'a>,
    /// Where it begins there.
    pub start: usize,
    /// Its length.
    pub columns: usize,
}

impl Row<'_> {
    /// Scores `first .. first + count`, in place or widened to `buffer`.
    #[inline]
    fn piece<'b>(&'b self, first: usize, count: usize, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        if let Elements::F32(scores) = self.scores {
            return &scores[self.start + first..][..count];
        }
        buffer.resize(count.max(buffer.len()), 0.0);
        self.scores.widen(self.start + first, &mut buffer[..count]);
        &buffer[..count]
    }
}

/// Winners, best first; the low half of each is its position. Keys come in the order of their positions.
fn sort<'a>(buffers: &'a mut [Vec<u64>; 2], keys: &[u32], positions: &[u32]) -> &'a [u64] {
    let [winners, other] = buffers;
    winners.clear();
    winners.extend(keys.iter().zip(positions).map(|(&key, &p)| u64::from(!key) << 32 | u64::from(p)));
    if winners.len() < RADIX_FROM {
        winners.sort_unstable();
        return winners;
    }
    // By the bytes of the key, lowest first; each pass keeps the order of equals.
    let mut counts = [[0u32; 256]; 4];
    for &winner in winners.iter() {
        for (byte, counts) in counts.iter_mut().enumerate() {
            counts[usize::from((winner >> (32 + 8 * byte)) as u8)] += 1;
        }
    }
    other.resize(winners.len(), 0);
    for (byte, counts) in counts.iter_mut().enumerate() {
        let digit = |winner: u64| usize::from((winner >> (32 + 8 * byte)) as u8);
        if counts[digit(winners[0])] as usize == winners.len() {
            continue; // all alike
        }
        let mut start = 0;
        for count in counts.iter_mut() {
            (*count, start) = (start, start + *count);
        }
        for &winner in winners.iter() {
            let place = &mut counts[digit(winner)];
            other[*place as usize] = winner;
            *place += 1;
        }
        std::mem::swap(winners, other);
    }
    winners
}
