//! The loops of a selection that run over vectors: what passes a threshold, how many keys reach a bound, and the cut.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::candidates::Candidates;
use crate::simd::Level;

/// Items that the loops may write behind the last one, so that whole vectors can be stored.
pub(super) const SLACK: usize = 16;

/// Writes `i` of each score above `threshold` to `offsets`, which has room for all of them and [`SLACK`] more; returns how many
/// there are. NaN is above nothing. There may be 2^15 scores at most.
#[inline]
pub(super) fn above(level: Level, scores: &[f32], threshold: f32, offsets: &mut [u16]) -> usize {
    assert!(offsets.len() >= scores.len() + SLACK && scores.len() <= 1 << 15, "room for every score");
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        if is_x86_feature_detected!("avx512vbmi2") {
            // SAFETY: the machine has the level's instructions and VBMI2; the room has been checked.
            return unsafe { x86::above_vbmi2(scores, threshold, offsets) };
        }
        // SAFETY: as above.
        return unsafe { x86::above(scores, threshold, offsets) };
    }
    let _ = level;
    portable::above(scores, threshold, offsets)
}

/// Positions and order keys of the scores at `offsets`, which must lie within them; `scores[0]` has position `first`.
#[inline]
pub(super) fn take(
    level: Level,
    scores: &[f32],
    offsets: &[u16],
    first: u32,
    positions: &mut [u32],
    keys: &mut [u32],
) {
    let _ = level;
    let (positions, keys) = (&mut positions[..offsets.len()], &mut keys[..offsets.len()]);
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512) {
        // SAFETY: the machine has the level's instructions.
        return unsafe { x86::take(scores, offsets, first, positions, keys) };
    }
    portable::take(scores, offsets, first, positions, keys);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_above_a_threshold_with_and_without_vbmi2(
            scores in prop::collection::vec(prop_oneof![-1f32..1.0, Just(f32::NAN), Just(0.5)], 0..700), dense: bool,
        ) {
            let threshold = if dense { -0.8 } else { 0.9 };
            let want: Vec<u16> = (0..scores.len() as u16).filter(|&i| scores[usize::from(i)] > threshold).collect();
            let mut offsets = vec![0; scores.len() + SLACK];
            for level in Level::ALL.into_iter().filter(|l| l.available()) {
                let found = above(level, &scores, threshold, &mut offsets);
                prop_assert_eq!(&offsets[..found], &want[..]);
            }
            #[cfg(target_arch = "x86_64")]
            if Level::Avx512.available() {
                // SAFETY: the machine has the level's instructions; there is room.
                let found = unsafe { x86::above(&scores, threshold, &mut offsets) };
                prop_assert_eq!(&offsets[..found], &want[..]);
            }
        }
    }
}
