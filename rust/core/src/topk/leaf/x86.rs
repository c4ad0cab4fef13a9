//! The loops in AVX-512. Compression goes from register to register and is followed by a plain store of a whole vector: some
//! CPUs take a hundred cycles for the form that stores what it compresses.

use std::arch::x86_64::*;

use super::SLACK;
use crate::topk::candidates::{Candidates, order_key};

const LANES: usize = 16;

/// A mask of the lowest `count` lanes, at most 16.
#[inline(always)]
fn lowest(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

/// Scores whose masks are looked at together.
const GROUP: usize = 4 * LANES;
/// So many of a group are taken out one by one, whether they are there or not: without a branch on how many there are.
const FEW: usize = 4;

/// # Safety
/// The machine must have the level's features; `positions` and `keys` must have room for every score and [`SLACK`] more.
#[target_feature(enable = "avx512f,avx512bw,bmi1,popcnt")]
pub(super) unsafe fn above(
    scores: &[f32],
    threshold: f32,
    first: u32,
    positions: &mut [u32],
    keys: &mut [u32],
) -> usize {
    const { assert!(SLACK >= LANES && SLACK >= FEW) };
    let limit = _mm512_set1_ps(threshold);
    let mut out = Above { positions: positions.as_mut_ptr(), keys: keys.as_mut_ptr(), found: 0 };
    let mut start = 0;
    // SAFETY: loads stay within `scores`: a group taken apart reads at most one score behind it, and there is one. Stores begin
    // at most `scores.len()` items from the start, and SLACK more are there.
    unsafe {
        while start + GROUP < scores.len() {
            let group = scores.as_ptr().add(start);
            let mask = |v: usize| {
                u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(_mm512_loadu_ps(group.add(v * LANES)), limit))
            };
            let masks = [mask(0), mask(1), mask(2), mask(3)];
            let mut bits = masks[0] | masks[1] << 16 | masks[2] << 32 | masks[3] << 48;
            let count = bits.count_ones() as usize;
            if count <= FEW {
                for i in 0..FEW {
                    let at = bits.trailing_zeros(); // 64 when there is none
                    *out.positions.add(out.found + i) = first + start as u32 + at;
                    *out.keys.add(out.found + i) = (*group.add(at as usize)).to_bits();
                    bits &= bits.wrapping_sub(1);
                }
                out.found += count;
            } else {
                for (v, &mask) in masks.iter().enumerate() {
                    let vector = _mm512_loadu_ps(group.add(v * LANES));
                    out.push(mask as __mmask16, vector, first + (start + v * LANES) as u32);
                }
            }
            start += GROUP;
        }
        while start < scores.len() {
            let live = lowest(LANES.min(scores.len() - start));
            let vector = _mm512_maskz_loadu_ps(live, scores.as_ptr().add(start));
            let mask = _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(live, vector, limit);
            out.push(mask, vector, first + start as u32);
            start += LANES;
        }
    }
    let found = out.found;
    for key in &mut keys[..found] {
        *key = order_key(f32::from_bits(*key));
    }
    found
}

/// Where [`above`] writes.
struct Above {
    positions: *mut u32,
    /// Bits of the scores at first.
    keys: *mut u32,
    found: usize,
}

impl Above {
    /// Appends the lanes of `mask`; lane i has position `first + i`.
    ///
    /// # Safety
    /// The machine must have AVX-512 F and POPCNT; there must be room for 16 items.
    #[target_feature(enable = "avx512f,popcnt")]
    unsafe fn push(&mut self, mask: __mmask16, vector: __m512, first: u32) {
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let position = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
        // SAFETY: the caller's condition.
        unsafe {
            let positions = _mm512_maskz_compress_epi32(mask, position);
            _mm512_storeu_si512(self.positions.add(self.found).cast(), positions);
            _mm512_storeu_ps(self.keys.add(self.found).cast(), _mm512_maskz_compress_ps(mask, vector));
        }
        self.found += mask.count_ones() as usize;
    }
}

/// # Safety
/// The machine must have AVX-512 F and POPCNT; `out` must have room for every key and [`SLACK`] more.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn matching(keys: &[u32], prefix: u32, free: u32, out: &mut [u32]) -> usize {
    let prefix = _mm512_set1_epi32(prefix as i32);
    // A shift by 32 gives 0.
    let fixed = _mm512_sllv_epi32(_mm512_set1_epi32(-1), _mm512_set1_epi32(free as i32));
    let mut found = 0;
    for vector in keys.chunks(LANES) {
        // SAFETY: the load is of the chunk; as many keys as were passed are before `found`, and SLACK items follow.
        unsafe {
            let live = lowest(vector.len());
            let key = _mm512_maskz_loadu_epi32(live, vector.as_ptr().cast());
            let mask = _mm512_mask_testn_epi32_mask(live, _mm512_xor_si512(key, prefix), fixed);
            _mm512_storeu_si512(out.as_mut_ptr().add(found).cast(), _mm512_maskz_compress_epi32(mask, key));
            found += mask.count_ones() as usize;
        }
    }
    found
}

/// # Safety
/// The machine must have AVX-512 F.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn count_at_least(keys: &[u32], bound: u32) -> usize {
    let limit = _mm512_set1_epi32(bound as i32);
    let one = _mm512_set1_epi32(1);
    let mut counts = [_mm512_setzero_si512(); 4];
    let groups = keys.chunks_exact(4 * LANES);
    let rest = groups.remainder();
    // SAFETY: each load lies in its chunk.
    unsafe {
        for group in groups {
            for (v, count) in counts.iter_mut().enumerate() {
                let vector = _mm512_loadu_si512(group.as_ptr().add(v * LANES).cast());
                *count = _mm512_mask_add_epi32(*count, _mm512_cmpge_epu32_mask(vector, limit), *count, one);
            }
        }
        for vector in rest.chunks(LANES) {
            let live = lowest(vector.len());
            let vector = _mm512_maskz_loadu_epi32(live, vector.as_ptr().cast());
            let mask = _mm512_mask_cmpge_epu32_mask(live, vector, limit);
            counts[0] = _mm512_mask_add_epi32(counts[0], mask, counts[0], one);
        }
    }
    let low = _mm512_add_epi32(counts[0], counts[1]);
    let high = _mm512_add_epi32(counts[2], counts[3]);
    _mm512_reduce_add_epi32(_mm512_add_epi32(low, high)) as usize
}

/// # Safety
/// The machine must have AVX-512 F and POPCNT.
#[target_feature(enable = "avx512f,popcnt")]
pub(super) unsafe fn retain(candidates: &mut Candidates, bound: u32, mut ties: usize) {
    let limit = _mm512_set1_epi32(bound as i32);
    let len = candidates.len;
    assert!(candidates.keys.len() >= len + SLACK && candidates.positions.len() >= len + SLACK, "slack");
    let (keys, positions) = (candidates.keys.as_mut_ptr(), candidates.positions.as_mut_ptr());
    let mut kept = 0;
    for start in (0..len).step_by(LANES) {
        // SAFETY: `start` is below `len`, `kept` is at most `start`, and SLACK items follow the last one.
        unsafe {
            let key = _mm512_loadu_si512(keys.add(start).cast());
            let position = _mm512_loadu_si512(positions.add(start).cast());
            let live = lowest(LANES.min(len - start));
            let mut mask = _mm512_mask_cmpgt_epu32_mask(live, key, limit);
            let mut equal = _mm512_mask_cmpeq_epu32_mask(live, key, limit);
            while equal.count_ones() as usize > ties {
                equal &= !(0x8000 >> equal.leading_zeros()); // the last of them
            }
            ties -= equal.count_ones() as usize;
            mask |= equal;
            _mm512_storeu_si512(keys.add(kept).cast(), _mm512_maskz_compress_epi32(mask, key));
            _mm512_storeu_si512(positions.add(kept).cast(), _mm512_maskz_compress_epi32(mask, position));
            kept += mask.count_ones() as usize;
        }
    }
    candidates.len = kept;
}
