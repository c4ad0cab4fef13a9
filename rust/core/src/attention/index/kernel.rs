//! Scores of neighbouring keys for one query: products, relu, head weights and the sum over heads in registers.
//!
//! Keys are read as they lie, a word broadcast to all heads of a vector; no [Hi, S] logit is ever stored. Each score is one
//! fixed chain of operations, whatever the blocking.

#![allow(clippy::needless_range_loop)] // r and v name registers; iterators over arrays of arrays hide that

use super::keys::Ahead;
use super::query::{PackedQuery, Products};
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::elements::Elements;
use crate::simd::{Kernel, Level, Simd, dispatch};

/// Keys that lie one after another, in the form that the products take.
#[derive(Clone, Copy)]
pub(super) struct KeyRun<'a> {
    /// Their values.
    pub rows: &'a [u8],
    /// What each score is multiplied by.
    pub factors: &'a [f32],
    /// What to fetch meanwhile.
    pub ahead: &'a Ahead,
    /// The place of the first one in its tile.
    pub at: usize,
}

/// Writes the scores of the first `out.len()` keys.
#[inline]
pub(super) fn score(
    level: Level,
    products: Products,
    keys: KeyRun<'_>,
    query: &PackedQuery,
    out: &mut [f32],
) {
    let KeyRun { rows, factors, .. } = keys;
    assert!(
        out.len() * query.steps() * 4 <= rows.len() && out.len() <= factors.len(),
        "keys for every score"
    );
    match products {
        Products::F32 => dispatch(level, ScoreKeys { rows, factors, query, out }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Products::of` has seen the features; the sizes have been checked.
        Products::Bf16 => unsafe { x86::score_bf16(keys, query, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Products::I8 => unsafe { x86::score_i8(keys, query, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("Products::of gives these on x86-64 alone"),
    }
}

/// Converts e4m3 codes or bytes to the bits of bf16, exactly.
pub(super) fn to_bf16(level: Level, values: Elements<'_>, out: &mut [u16]) {
    assert_eq!(values.len(), out.len(), "a place for each value");
    let _ = level;
    match values {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the machine has the level's instructions; the sizes have been checked.
        Elements::E4m3(codes) if level.runs(Level::Avx512) => unsafe { x86::e4m3_to_bf16(codes, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Elements::I8(bytes) if level.runs(Level::Avx512) => unsafe { x86::i8_to_bf16(bytes, out) },
        _ => unreachable!(
            "bf16 products are there at levels of AVX-512, for numbers that are bf16 or one of these"
        ),
    }
}

/// The kernel in f32.
struct ScoreKeys<'a> {
    rows: &'a [u8],
    factors: &'a [f32],
    query: &'a PackedQuery,
    out: &'a mut [f32],
}

impl Kernel for ScoreKeys<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let count = self.out.len();
        let mut i = 0;
        // SAFETY: `score` has checked that there are `count` keys; each call covers MR of them below `count`.
        unsafe {
            while S::LANES == 16 && i + 8 <= count {
                self.block::<S, 8>(i);
                i += 8;
            }
            while i + 4 <= count {
                self.block::<S, 4>(i);
                i += 4;
            }
            while i < count {
                self.block::<S, 1>(i);
                i += 1;
            }
        }
    }
}

impl ScoreKeys<'_> {
    /// Keys `i .. i + MR`.
    ///
    /// # Safety
    /// The keys must exist.
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize>(&mut self, i: usize) {
        let lanes = self.query.lanes();
        // SAFETY: the caller's condition; `lanes` is a multiple of PAD and thus of LANES.
        unsafe {
            let mut sums = [S::zero(); MR];
            let mut j = 0;
            while j + 2 * S::LANES <= lanes {
                self.panel::<S, MR, 2>(i, j, &mut sums);
                j += 2 * S::LANES;
            }
            while j < lanes {
                self.panel::<S, MR, 1>(i, j, &mut sums);
                j += S::LANES;
            }
            for r in 0..MR {
                self.out[i + r] = S::sum(sums[r]) * self.factors[i + r];
            }
        }
    }

    /// Adds heads `j .. j + NV * LANES` to the sums of keys `i .. i + MR`.
    ///
    /// # Safety
    /// The keys must exist and the heads must lie below Hp.
    #[inline(always)]
    unsafe fn panel<S: Simd, const MR: usize, const NV: usize>(
        &self,
        i: usize,
        j: usize,
        sums: &mut [S::V; MR],
    ) {
        let (dim, lanes) = (self.query.steps(), self.query.lanes());
        // SAFETY: the caller's condition; a packed query has `dim` rows of `lanes` words. Keys may have any alignment.
        unsafe {
            let k = self.rows.as_ptr().cast::<f32>().add(i * dim);
            let q = self.query.words().as_ptr().cast::<f32>().add(j);
            let mut acc = [[S::zero(); NV]; MR];
            for d in 0..dim {
                let mut row = [S::zero(); NV];
                for v in 0..NV {
                    row[v] = S::load(q.add(d * lanes + v * S::LANES));
                }
                for r in 0..MR {
                    let x = S::splat(k.add(r * dim + d).read_unaligned());
                    for v in 0..NV {
                        acc[r][v] = S::mul_add(x, row[v], acc[r][v]);
                    }
                }
            }
            for v in 0..NV {
                let w = S::load(self.query.weights().as_ptr().add(j + v * S::LANES));
                let mask = S::load(self.query.mask().as_ptr().add(j + v * S::LANES));
                for r in 0..MR {
                    sums[r] = S::mul_add(w, S::keep(S::relu(acc[r][v]), mask), sums[r]);
                }
            }
        }
    }
}
