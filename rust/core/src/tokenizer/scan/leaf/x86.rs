//! SSE2, AVX2 and AVX-512BW.

use std::arch::x86_64::*;

use super::{Block, Bytes};

/// Four registers of 16 bytes.
#[derive(Clone, Copy)]
pub(super) struct Sse2([__m128i; 4]);

/// Two of 32.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256i; 2]);

/// One of 64.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512i);

// SAFETY (of every block below): the trait's condition, that the machine has the instructions, is the callers' to keep;
// loads read the 64 bytes of a block.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Sse2 {
    #[inline(always)]
    unsafe fn load(block: &Block) -> Self {
        Self(std::array::from_fn(|i| unsafe { _mm_loadu_si128(block.as_ptr().cast::<__m128i>().add(i)) }))
    }
    #[inline(always)]
    unsafe fn small(self) -> Self {
        Self(self.0.map(|v| unsafe { _mm_or_si128(v, _mm_set1_epi8(0x20)) }))
    }
    #[inline(always)]
    unsafe fn equal(self, byte: u8) -> u64 {
        gather4(self.0.map(|v| unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_set1_epi8(byte as i8))) }))
    }
    #[inline(always)]
    unsafe fn within(self, first: u8, last: u8) -> u64 {
        gather4(self.0.map(|v| unsafe {
            let above = _mm_sub_epi8(v, _mm_set1_epi8(first as i8));
            let kept = _mm_min_epu8(above, _mm_set1_epi8((last - first) as i8));
            _mm_movemask_epi8(_mm_cmpeq_epi8(above, kept))
        }))
    }
}

#[inline(always)]
fn gather4(quarters: [i32; 4]) -> u64 {
    quarters.iter().rev().fold(0, |mask, &quarter| mask << 16 | u64::from(quarter as u16))
}

// Without closures: those would not have the features of the function that they are inlined into.
// SAFETY: as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Avx2 {
    #[inline(always)]
    unsafe fn load(block: &Block) -> Self {
        let halves = block.as_ptr().cast::<__m256i>();
        Self(unsafe { [_mm256_loadu_si256(halves), _mm256_loadu_si256(halves.add(1))] })
    }
    #[inline(always)]
    unsafe fn small(self) -> Self {
        let [low, high] = self.0;
        unsafe {
            let bit = _mm256_set1_epi8(0x20);
            Self([_mm256_or_si256(low, bit), _mm256_or_si256(high, bit)])
        }
    }
    #[inline(always)]
    unsafe fn equal(self, byte: u8) -> u64 {
        let [low, high] = self.0;
        unsafe {
            let wanted = _mm256_set1_epi8(byte as i8);
            let low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(low, wanted));
            gather2([low, _mm256_movemask_epi8(_mm256_cmpeq_epi8(high, wanted))])
        }
    }
    #[inline(always)]
    unsafe fn within(self, first: u8, last: u8) -> u64 {
        let [low, high] = self.0;
        unsafe {
            let (first, width) = (_mm256_set1_epi8(first as i8), _mm256_set1_epi8((last - first) as i8));
            let (low, high) = (_mm256_sub_epi8(low, first), _mm256_sub_epi8(high, first));
            let low = _mm256_cmpeq_epi8(low, _mm256_min_epu8(low, width));
            let high = _mm256_cmpeq_epi8(high, _mm256_min_epu8(high, width));
            gather2([_mm256_movemask_epi8(low), _mm256_movemask_epi8(high)])
        }
    }
}

#[inline(always)]
fn gather2([low, high]: [i32; 2]) -> u64 {
    u64::from(high as u32) << 32 | u64::from(low as u32)
}

// SAFETY: as above.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Avx512 {
    #[inline(always)]
    unsafe fn load(block: &Block) -> Self {
        Self(unsafe { _mm512_loadu_si512(block.as_ptr().cast()) })
    }
    #[inline(always)]
    unsafe fn small(self) -> Self {
        Self(unsafe { _mm512_or_si512(self.0, _mm512_set1_epi8(0x20)) })
    }
    #[inline(always)]
    unsafe fn equal(self, byte: u8) -> u64 {
        unsafe { _mm512_cmpeq_epi8_mask(self.0, _mm512_set1_epi8(byte as i8)) }
    }
    #[inline(always)]
    unsafe fn within(self, first: u8, last: u8) -> u64 {
        unsafe {
            let above = _mm512_sub_epi8(self.0, _mm512_set1_epi8(first as i8));
            _mm512_cmple_epu8_mask(above, _mm512_set1_epi8((last - first) as i8))
        }
    }
    #[inline(always)]
    unsafe fn places(mask: u64, base: u32, out: &mut [u32; 64]) {
        let mut count = 0;
        for quarter in 0..4 {
            let bits = (mask >> (16 * quarter)) as u16;
            // Of each quarter before there are at most 16, so 16 fit behind them.
            let room: &mut [u32; 16] = (&mut out[count..count + 16]).try_into().expect("the length is 16");
            unsafe {
                let first = _mm512_set1_epi32(base.wrapping_add(16 * quarter) as i32);
                let all = _mm512_add_epi32(
                    first,
                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                );
                _mm512_storeu_si512(room.as_mut_ptr().cast(), _mm512_maskz_compress_epi32(bits, all));
            }
            count += bits.count_ones() as usize;
        }
    }
}
