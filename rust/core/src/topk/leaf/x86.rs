//! The loops in AVX-512. Compression goes from register to register and is followed by a plain store of a whole vector: some
//! CPUs take a hundred cycles for the form that stores what it compresses.

use std::arch::x86_64::*;

use super::SLACK;
use crate::prefetch;
use crate::topk::candidates::Candidates;

const LANES: usize = 16;

/// A mask of the lowest `count` lanes, at most 16.
#[inline(always)]
fn lowest(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

/// Scores whose masks are looked at together.
const GROUP: usize = 4 * LANES;
/// So many of a group are taken out in one store, whether they are there or not: without a branch on how many there are.
const FEW: u32 = 4;

/// Writes `i` of each score above `threshold` to `offsets`; returns how many there are.
///
/// # Safety
/// The machine must have the level's features; `offsets` must have room for every score and [`SLACK`] more, and the scores must
/// be so few that their offsets fit.
#[target_feature(enable = "avx512f,avx512bw,bmi1,popcnt")]
pub(super) unsafe fn above(scores: &[f32], threshold: f32, offsets: &mut [u16]) -> usize {
    const { assert!(SLACK >= LANES && SLACK >= FEW as usize) };
    let limit = _mm512_set1_ps(threshold);
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let mut out = offsets.as_mut_ptr();
    let groups = scores.chunks_exact(GROUP);
    let mut start = scores.len() - groups.remainder().len();
    // SAFETY: loads stay in their chunk or are masked. Stores begin at most `scores.len()` items from the start, and SLACK more
    // are there.
    unsafe {
        let push = |out: &mut *mut u16, mask: __mmask16, first: usize| {
            let offset = _mm512_add_epi32(lanes, _mm512_set1_epi32(first as i32));
            let packed = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(mask, offset));
            _mm256_storeu_si256(out.cast(), packed);
            *out = out.add(mask.count_ones() as usize);
        };
        for (g, group) in groups.enumerate() {
            fetch(group);
            let mask = |v: usize| {
                let vector = _mm512_loadu_ps(group.as_ptr().add(v * LANES));
                u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(vector, limit))
            };
            let mut bits = mask(0) | mask(1) << 16 | mask(2) << 32 | mask(3) << 48;
            let count = bits.count_ones();
            if count <= FEW {
                // Four numbers of 16 bits; those that are not there count as 64.
                let mut four = (g * GROUP) as u64 * 0x1_0001_0001_0001;
                for i in 0..FEW {
                    four += u64::from(bits.trailing_zeros()) << (16 * i);
                    bits &= bits.wrapping_sub(1);
                }
                out.cast::<u64>().write_unaligned(four);
                out = out.add(count as usize);
            } else {
                for v in 0..GROUP / LANES {
                    push(&mut out, (bits >> (v * LANES)) as __mmask16, g * GROUP + v * LANES);
                }
            }
        }
        while start < scores.len() {
            let live = lowest(LANES.min(scores.len() - start));
            let vector = _mm512_maskz_loadu_ps(live, scores.as_ptr().add(start));
            push(&mut out, _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(live, vector, limit), start);
            start += LANES;
        }
        out.offset_from_unsigned(offsets.as_ptr())
    }
}

/// As [`above`], a group's offsets compressed as bytes.
///
/// # Safety
/// As [`above`], with VBMI2.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,bmi1,popcnt")]
pub(super) unsafe fn above_vbmi2(scores: &[f32], threshold: f32, offsets: &mut [u16]) -> usize {
    let limit = _mm512_set1_ps(threshold);
    let bytes: [i8; GROUP] = std::array::from_fn(|i| i as i8);
    let mut found = 0;
    let groups = scores.chunks_exact(GROUP);
    let rest = groups.remainder();
    // SAFETY: loads stay in their chunk. Stores begin at most `scores.len()` items from the start of `offsets`, and SLACK more
    // are there; where a group has more than that, it is written by whole vectors of what it has.
    unsafe {
        let lanes = _mm512_loadu_si512(bytes.as_ptr().cast());
        for (g, group) in groups.enumerate() {
            fetch(group);
            let mask = |v: usize| {
                let vector = _mm512_loadu_ps(group.as_ptr().add(v * LANES));
                _mm512_cmp_ps_mask::<_CMP_GT_OQ>(vector, limit)
            };
            let low = _mm512_kunpackw(mask(1).into(), mask(0).into());
            let high = _mm512_kunpackw(mask(3).into(), mask(2).into());
            let bits = _mm512_kunpackd(high.into(), low.into());
            let passed = _mm512_maskz_compress_epi8(bits, lanes);
            let first = _mm256_set1_epi16((g * GROUP) as i16);
            let count = bits.count_ones() as usize;
            let out = offsets.as_mut_ptr().add(found);
            let widened = _mm256_cvtepu8_epi16(_mm512_castsi512_si128(passed));
            _mm256_storeu_si256(out.cast(), _mm256_or_si256(widened, first));
            if count > LANES {
                let more = _mm256_cvtepu8_epi16(_mm512_extracti32x4_epi32::<1>(passed));
                _mm256_storeu_si256(out.add(LANES).cast(), _mm256_or_si256(more, first));
            }
            if count > 2 * LANES {
                let more = _mm256_cvtepu8_epi16(_mm512_extracti32x4_epi32::<2>(passed));
                _mm256_storeu_si256(out.add(2 * LANES).cast(), _mm256_or_si256(more, first));
                let more = _mm256_cvtepu8_epi16(_mm512_extracti32x4_epi32::<3>(passed));
                _mm256_storeu_si256(out.add(3 * LANES).cast(), _mm256_or_si256(more, first));
            }
            found += count;
        }
    }
    let done = scores.len() - rest.len();
    for (i, &score) in rest.iter().enumerate() {
        offsets[found] = (done + i) as u16;
        found += usize::from(score > threshold);
    }
    found
}

/// Brings what follows a group by some groups to the first-level cache. It may lie behind the scores: nothing is read.
#[inline(always)]
fn fetch(group: &[f32]) {
    for v in 0..GROUP / LANES {
        prefetch::fetch(group.as_ptr().wrapping_add(512 + v * LANES).addr());
    }
}

/// [`super::portable::take`] with the level's vectors.
///
/// # Safety
/// The machine must have AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn take(
    scores: &[f32],
    offsets: &[u16],
    first: u32,
    positions: &mut [u32],
    keys: &mut [u32],
) {
    super::portable::take(scores, offsets, first, positions, keys);
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
