//! The loops in plain Rust.

use crate::topk::candidates::{Candidates, order_key};

/// Scores looked at together: one vectorised maximum decides whether any can pass.
const BLOCK: usize = 64;

pub(super) fn above(scores: &[f32], threshold: f32, offsets: &mut [u16]) -> usize {
    let mut found = 0;
    for (b, block) in scores.chunks(BLOCK).enumerate() {
        if !block.iter().fold(false, |any, &score| any | (score > threshold)) {
            continue;
        }
        for (i, &score) in block.iter().enumerate() {
            offsets[found] = (b * BLOCK + i) as u16;
            found += usize::from(score > threshold);
        }
    }
    found
}

#[inline(always)]
pub(super) fn take(scores: &[f32], offsets: &[u16], first: u32, positions: &mut [u32], keys: &mut [u32]) {
    positions.iter_mut().zip(offsets).for_each(|(position, &i)| *position = first + u32::from(i));
    keys.iter_mut().zip(offsets).for_each(|(key, &i)| *key = scores[usize::from(i)].to_bits());
    // Apart, so that it becomes a loop over vectors.
    keys.iter_mut().for_each(|key| *key = order_key(f32::from_bits(*key)));
}

pub(super) fn matching(keys: &[u32], prefix: u32, free: u32, out: &mut [u32]) -> usize {
    let mut found = 0;
    for &key in keys {
        out[found] = key;
        found += usize::from(u64::from(key ^ prefix) >> free == 0);
    }
    found
}

pub(super) fn retain(candidates: &mut Candidates, bound: u32, mut ties: usize) {
    let mut kept = 0;
    for i in 0..candidates.len {
        let (key, position) = (candidates.keys[i], candidates.positions[i]);
        let tie = key == bound && ties > 0;
        ties -= usize::from(tie);
        (candidates.keys[kept], candidates.positions[kept]) = (key, position);
        kept += usize::from(key > bound || tie);
    }
    candidates.len = kept;
}
