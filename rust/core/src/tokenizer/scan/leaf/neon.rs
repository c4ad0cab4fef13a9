//! NEON, which every aarch64 machine has.

use std::arch::aarch64::*;

use super::{Block, Bytes};

/// Four registers of 16 bytes.
#[derive(Clone, Copy)]
pub(super) struct Neon([uint8x16_t; 4]);

// SAFETY (of every block below): aarch64 always has NEON; loads read the 64 bytes of a block.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Bytes for Neon {
    #[inline(always)]
    unsafe fn load(block: &Block) -> Self {
        Self(std::array::from_fn(|i| unsafe { vld1q_u8(block.as_ptr().add(16 * i)) }))
    }
    #[inline(always)]
    unsafe fn small(self) -> Self {
        Self(self.0.map(|v| unsafe { vorrq_u8(v, vdupq_n_u8(0x20)) }))
    }
    #[inline(always)]
    unsafe fn equal(self, byte: u8) -> u64 {
        unsafe { gather(self.0.map(|v| vceqq_u8(v, vdupq_n_u8(byte)))) }
    }
    #[inline(always)]
    unsafe fn within(self, first: u8, last: u8) -> u64 {
        unsafe { gather(self.0.map(|v| vcleq_u8(vsubq_u8(v, vdupq_n_u8(first)), vdupq_n_u8(last - first)))) }
    }
}

/// One bit of each byte, all of whose bits are equal: neighbours are added until eight of them share a byte.
#[inline(always)]
unsafe fn gather(all: [uint8x16_t; 4]) -> u64 {
    const PLACES: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: NEON is there; the load reads the 16 bytes of the array.
    unsafe {
        let places = vld1q_u8(PLACES.as_ptr());
        let [a, b, c, d] = all.map(|v| vandq_u8(v, places));
        let sums = vpaddq_u8(vpaddq_u8(a, b), vpaddq_u8(c, d));
        vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)))
    }
}
