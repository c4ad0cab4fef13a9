//! The loops of a selection that run over vectors: what passes a threshold, how many keys reach a bound, and the cut.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::candidates::Candidates;
use crate::simd::Level;

/// Items that the loops may write behind the last one, so that whole vectors can be stored.
pub(super) const SLACK: usize = 16;

/// Writes `first + i` and the order key of each score above `threshold` to `positions` and `keys`, which have room for all of
/// them and [`SLACK`] more; returns how many there are. NaN is above nothing.
#[inline]
pub(super) fn above(
    level: Level,
    scores: &[f32],
    threshold: f32,
    first: u32,
    positions: &mut [u32],
    keys: &mut [u32],
) -> usize {
    let room = scores.len() + SLACK;
    assert!(positions.len() >= room && keys.len() >= room, "room for every score");
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        // SAFETY: the machine has the level's instructions; the room has been checked.
        return unsafe { x86::above(scores, threshold, first, positions, keys) };
    }
    let _ = level;
    portable::above(scores, threshold, first, positions, keys)
}

/// Number of `keys` that are at least `bound`.
#[inline]
pub(super) fn count_at_least(level: Level, keys: &[u32], bound: u32) -> usize {
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        // SAFETY: the machine has the level's instructions.
        return unsafe { x86::count_at_least(keys, bound) };
    }
    let _ = level;
    keys.iter().filter(|&&key| key >= bound).count()
}

/// Writes those of `keys` whose bits agree with `prefix`, but for the lowest `free` ones, to `out`, which has room for all of
/// them and [`SLACK`] more; returns how many there are.
#[inline]
pub(super) fn matching(level: Level, keys: &[u32], prefix: u32, free: u32, out: &mut [u32]) -> usize {
    assert!(out.len() >= keys.len() + SLACK, "room for every key");
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        // SAFETY: the machine has the level's instructions; the room has been checked.
        return unsafe { x86::matching(keys, prefix, free, out) };
    }
    let _ = level;
    portable::matching(keys, prefix, free, out)
}

/// Keeps, in order, the candidates whose key is above `bound` and the first `ties` of those equal to it.
#[inline]
pub(super) fn retain(level: Level, candidates: &mut Candidates, bound: u32, ties: usize) {
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        // SAFETY: the machine has the level's instructions.
        return unsafe { x86::retain(candidates, bound, ties) };
    }
    let _ = level;
    portable::retain(candidates, bound, ties);
}
