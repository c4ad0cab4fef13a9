//! The matrix product under attention: `C = A B` or `C += A B` on small tiles that fit the second-level cache.
//!
//! Each element of C is one chain of fused multiply-adds in ascending order of the inner index, whatever the blocking, so
//! a row's bits do not depend on how many other rows or columns were computed with it.

#![allow(clippy::needless_range_loop)] // r and v name registers; iterators over arrays of arrays hide that

use crate::simd::{Kernel, Level, PAD, Simd, dispatch};

/// Inner indices of one pass: a panel of B (this many rows of two vectors) stays in the first-level cache.
const PASS: usize = 192;

/// One product. A is read element by element with free strides, B and C row by row in vectors.
pub(crate) struct Gemm<'a> {
    /// A [m, k], element (i, p) at `i * a_row + p * a_col`.
    pub a: &'a [f32],
    pub a_row: usize,
    pub a_col: usize,
    /// B [k, n], rows `b_row` apart.
    pub b: &'a [f32],
    pub b_row: usize,
    /// C [m, n], rows `c_row` apart.
    pub c: &'a mut [f32],
    pub c_row: usize,
    pub m: usize,
    /// A multiple of [`PAD`].
    pub n: usize,
    pub k: usize,
    /// Adds to what C holds instead of overwriting it.
    pub accumulate: bool,
}

impl Gemm<'_> {
    /// Computes the product.
    #[inline]
    pub fn run_at(mut self, level: Level) {
        let Self { m, n, k, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            if !self.accumulate {
                (0..m).for_each(|i| self.c[i * self.c_row..][..n].fill(0.0));
            }
            return;
        }
        assert!(n.is_multiple_of(PAD), "n is padded by every caller");
        assert!((m - 1) * self.a_row + (k - 1) * self.a_col < self.a.len(), "A holds m x k");
        assert!((k - 1) * self.b_row + n <= self.b.len(), "B holds k x n");
        assert!((m - 1) * self.c_row + n <= self.c.len(), "C holds m x n");
        let first = self.accumulate;
        for start in (0..k).step_by(PASS) {
            self.accumulate = first || start > 0;
            dispatch(level, Pass { gemm: &mut self, start, end: (start + PASS).min(k) });
        }
    }
}

/// Inner indices `start..end` of a product whose bounds have been checked.
struct Pass<'a, 'b> {
    gemm: &'a mut Gemm<'b>,
    start: usize,
    end: usize,
}

impl Kernel for Pass<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let (m, n) = (self.gemm.m, self.gemm.n);
        let wide = 2 * S::LANES;
        for j in (0..n).step_by(wide) {
            // SAFETY: j + NV * LANES <= n because n is a multiple of PAD and thus of LANES; `rows` keeps i below m.
            unsafe {
                if j + wide <= n {
                    self.rows::<S, 2>(j, m);
                } else {
                    self.rows::<S, 1>(j, m);
                }
            }
        }
    }
}

impl Pass<'_, '_> {
    /// Columns `j .. j + NV * LANES` of every row.
    ///
    /// # Safety
    /// Those columns must exist, and the bounds of `Gemm::run_at` must hold.
    #[inline(always)]
    unsafe fn rows<S: Simd, const NV: usize>(&mut self, j: usize, m: usize) {
        let mut i = 0;
        // SAFETY: each call covers MR rows that exist by its condition.
        unsafe {
            // 8 x 2 accumulators and 2 rows of B need 18 registers of the 32 that AVX-512 has.
            while S::LANES == 16 && i + 8 <= m {
                self.block::<S, 8, NV>(i, j);
                i += 8;
            }
            while i + 4 <= m {
                self.block::<S, 4, NV>(i, j);
                i += 4;
            }
            while i < m {
                self.block::<S, 1, NV>(i, j);
                i += 1;
            }
        }
    }

    /// Rows `i .. i + MR`, columns `j .. j + NV * LANES`.
    ///
    /// # Safety
    /// As [`Pass::rows`], and the rows must exist.
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize, const NV: usize>(&mut self, i: usize, j: usize) {
        let g = &mut *self.gemm;
        // SAFETY: `Gemm::run_at` has checked the farthest element of A, B and C; i, j and p stay below m, n and k.
        unsafe {
            let a = g.a.as_ptr().add(i * g.a_row);
            let b = g.b.as_ptr().add(j);
            let c = g.c.as_mut_ptr().add(i * g.c_row + j);
            let mut acc = [[S::zero(); NV]; MR];
            if g.accumulate {
                for r in 0..MR {
                    for v in 0..NV {
                        acc[r][v] = S::load(c.add(r * g.c_row + v * S::LANES));
                    }
                }
            }
            for p in self.start..self.end {
                let mut row = [S::zero(); NV];
                for v in 0..NV {
                    row[v] = S::load(b.add(p * g.b_row + v * S::LANES));
                }
                for r in 0..MR {
                    let x = S::splat(*a.add(r * g.a_row + p * g.a_col));
                    for v in 0..NV {
                        acc[r][v] = S::mul_add(x, row[v], acc[r][v]);
                    }
                }
            }
            for r in 0..MR {
                for v in 0..NV {
                    S::store(c.add(r * g.c_row + v * S::LANES), acc[r][v]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        // A multiplicative generator: enough to tell the elements apart.
        (0..count as u64)
            .map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_level_gives_the_f64_product_and_rows_stand_alone(
            m in 1usize..20, vectors in 1usize..5, k in 0usize..400, seed in any::<u32>(), transposed: bool, accumulate: bool,
        ) {
            let n = vectors * PAD;
            let (a, b, c) = (values(m * k, seed.into()), values(k * n, 77), values(m * n, 99));
            let (a_row, a_col) = if transposed { (1, m) } else { (k, 1) };
            for level in Level::ALL.into_iter().filter(|l| l.available()) {
                let mut got = c.clone();
                Gemm { a: &a, a_row, a_col, b: &b, b_row: n, c: &mut got, c_row: n, m, n, k, accumulate }.run_at(level);
                for i in 0..m {
                    for j in 0..n {
                        let start = if accumulate { f64::from(c[i * n + j]) } else { 0.0 };
                        let want = (0..k).fold(start, |s, p| {
                            s + f64::from(a[i * a_row + p * a_col]) * f64::from(b[p * n + j])
                        });
                        // k products below 1 in magnitude, each addition off by at most half an ulp of the sum.
                        let bound = 1e-6 + k as f64 * k as f64 * 6e-8;
                        prop_assert!((f64::from(got[i * n + j]) - want).abs() <= bound);
                    }
                }
                let mut last = c[(m - 1) * n..].to_vec();
                let a = if k == 0 { &a[..] } else { &a[(m - 1) * a_row..] };
                Gemm { a, a_row, a_col, b: &b, b_row: n, c: &mut last, c_row: n, m: 1, n, k, accumulate }.run_at(level);
                prop_assert_eq!(&last[..], &got[(m - 1) * n..]);
            }
        }
    }
}
