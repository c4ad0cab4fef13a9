//! The matrix product of bfloat16 pairs: `C = A B` or `C += A B`, sums in f32 (AVX-512 BF16).
//!
//! One instruction multiplies 16 pairs by 16 pairs and adds each pair of products to an f32 lane, four times the rate of an
//! f32 multiply-add of 8 lanes. So A and B hold two neighbouring inner indices in 32 bits, the lower one in the lower half.
//! The twin for machines without the instruction is `gemm`, on values widened to f32.

#![allow(clippy::needless_range_loop)] // r and v name registers; iterators over arrays of arrays hide that

use crate::simd::{Level, PAD};

/// The level that has the instruction.
pub(crate) const LEVEL: Level = Level::Avx512Bf16;

/// Vectors of a panel at most: with 8 rows, 24 sums, 3 vectors of B and one of A take 28 of 32 registers.
const PANEL: usize = 3;

/// B [k, n] packed for [`PairGemm`]: groups of inner pairs; in each, panels of columns; in each, pair after pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Vectors of 16 columns.
    pub vectors: usize,
    /// Pairs of a group.
    pub group: usize,
}

impl Packing {
    /// 32-bit items of a group.
    pub fn group_items(&self) -> usize {
        self.vectors * self.group * PAD
    }

    /// Panels of a group; their widths differ by one at most.
    pub fn panels(&self) -> impl Iterator<Item = Panel> + use<> {
        let (vectors, group) = (self.vectors, self.group);
        let panels = vectors.div_ceil(PANEL);
        (0..panels).map(move |panel| {
            let (start, end) = (panel * vectors / panels, (panel + 1) * vectors / panels);
            Panel { first: start, vectors: end - start, at: start * group * PAD }
        })
    }
}

/// Neighbouring vectors of a packed B; their items of one pair lie together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel {
    /// First vector.
    pub first: usize,
    pub vectors: usize,
    /// Where the panel begins in its group.
    pub at: usize,
}

impl Panel {
    /// Items from pair to pair.
    pub fn stride(&self) -> usize {
        self.vectors * PAD
    }
}

/// One product. A is read pair by pair with free strides, B in the order of [`Packing`], C row by row in vectors.
pub(crate) struct PairGemm<'a> {
    /// A [m, k / 2] pairs, pair (i, p) at `i * a_row + p * a_col`. In the last pair of an odd k the upper half is 0.
    pub a: &'a [u32],
    pub a_row: usize,
    pub a_col: usize,
    /// B [k / 2, n] pairs.
    pub b: &'a [u32],
    pub packing: Packing,
    /// C [m, n], rows `c_row` apart.
    pub c: &'a mut [f32],
    pub c_row: usize,
    pub m: usize,
    /// Inner indices. When odd, the upper half of B's last pair is not used.
    pub k: usize,
    /// Adds to what C holds instead of overwriting it.
    pub accumulate: bool,
    /// Addresses that the caller will read soon: they are fetched here and there while the product runs.
    pub ahead: std::slice::Iter<'a, usize>,
}

impl PairGemm<'_> {
    /// Computes the product; the machine must have [`LEVEL`].
    #[inline]
    pub fn run(self) {
        let Self { m, k, packing, .. } = self;
        if m == 0 || packing.vectors == 0 {
            return;
        }
        let pairs = k.div_ceil(2);
        assert!(LEVEL.available(), "the caller has asked");
        assert!(
            pairs == 0 || (m - 1) * self.a_row + (pairs - 1) * self.a_col < self.a.len(),
            "A holds m x k"
        );
        assert!(pairs.div_ceil(packing.group) * packing.group_items() <= self.b.len(), "B holds k x n");
        assert!((m - 1) * self.c_row + packing.vectors * PAD <= self.c.len(), "C holds m x n");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions exist and the farthest elements of A, B and C lie inside, as just asserted.
        unsafe {
            x86::run(self);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{PAD, PairGemm};
    use crate::prefetch::fetch;
    use std::arch::x86_64::*;

    /// # Safety
    /// The machine must have the instructions; A, B and C must hold what their fields say.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn run(mut gemm: PairGemm<'_>) {
        let g = &mut gemm;
        for panel in g.packing.panels() {
            // SAFETY: the caller's condition; the panel's vectors lie below `vectors`.
            unsafe {
                match panel.vectors {
                    1 => rows::<1>(g, panel.first),
                    2 => rows::<2>(g, panel.first),
                    _ => rows::<3>(g, panel.first),
                }
            }
        }
        g.ahead.by_ref().for_each(|&line| fetch(line));
    }

    /// Every row of the panel of `NV` vectors that begins at vector `start`.
    ///
    /// # Safety
    /// As [`run`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn rows<const NV: usize>(g: &mut PairGemm<'_>, start: usize) {
        let mut i = 0;
        // SAFETY: the caller's condition; each call covers R rows below `m`.
        unsafe {
            while i + 8 <= g.m {
                block::<8, NV>(g, i, start);
                i += 8;
            }
            while i + 4 <= g.m {
                block::<4, NV>(g, i, start);
                i += 4;
            }
            while i < g.m {
                block::<1, NV>(g, i, start);
                i += 1;
            }
        }
    }

    /// Rows `i .. i + R` of a panel.
    ///
    /// # Safety
    /// As [`run`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn block<const R: usize, const NV: usize>(g: &mut PairGemm<'_>, i: usize, start: usize) {
        // SAFETY: the caller's condition bounds i, p and the vectors.
        unsafe {
            let c = g.c.as_mut_ptr().add(i * g.c_row + start * PAD);
            let mut acc = [[_mm512_setzero_ps(); NV]; R];
            if g.accumulate {
                for r in 0..R {
                    for v in 0..NV {
                        acc[r][v] = _mm512_loadu_ps(c.add(r * g.c_row + v * PAD));
                    }
                }
            }
            let mut a = g.a.as_ptr().add(i * g.a_row);
            let (mut left, mut group) = (g.k / 2, 0);
            loop {
                let mut b = g.b.as_ptr().add(group * g.packing.group_items() + start * g.packing.group * PAD);
                let count = left.min(g.packing.group);
                for p in 0..count {
                    if p % 4 == 0
                        && let Some(&line) = g.ahead.next()
                    {
                        fetch(line);
                    }
                    step::<R, NV>(&mut acc, a, g.a_row, b, -1);
                    a = a.add(g.a_col);
                    b = b.add(NV * PAD);
                }
                left -= count;
                if left == 0 {
                    // The half pair of an odd k follows in this group, or begins the next.
                    if g.k % 2 == 1 {
                        if count == g.packing.group {
                            group += 1;
                            b =
                                g.b.as_ptr()
                                    .add(group * g.packing.group_items() + start * g.packing.group * PAD);
                        }
                        step::<R, NV>(&mut acc, a, g.a_row, b, 0xffff);
                    }
                    break;
                }
                group += 1;
            }
            for r in 0..R {
                for v in 0..NV {
                    _mm512_storeu_ps(c.add(r * g.c_row + v * PAD), acc[r][v]);
                }
            }
        }
    }

    /// One pair of inner indices, of B the bits in `mask`.
    ///
    /// # Safety
    /// `a` must be good for R reads `a_row` apart, `b` for NV vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn step<const R: usize, const NV: usize>(
        acc: &mut [[__m512; NV]; R],
        a: *const u32,
        a_row: usize,
        b: *const u32,
        mask: i32,
    ) {
        // SAFETY: the caller's condition; the casts are between types of 64 bytes without invalid values.
        unsafe {
            let mut row = [_mm512_setzero_si512(); NV];
            for v in 0..NV {
                row[v] = _mm512_loadu_si512(b.add(v * PAD).cast());
                if mask != -1 {
                    row[v] = _mm512_and_si512(row[v], _mm512_set1_epi32(mask));
                }
            }
            for r in 0..R {
                let x = _mm512_set1_epi32(a.add(r * a_row).read() as i32);
                for v in 0..NV {
                    acc[r][v] = _mm512_dpbf16_ps(
                        acc[r][v],
                        std::mem::transmute::<__m512i, __m512bh>(x),
                        std::mem::transmute::<__m512i, __m512bh>(row[v]),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn number(i: u64, seed: u32) -> bf16 {
        let bits = (i + u64::from(seed)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        bf16::from_f32(bits as f32 / 8_388_608.0 - 1.0)
    }

    fn pair(low: bf16, high: bf16) -> u32 {
        u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_product_is_that_of_f64_and_rows_stand_alone(
            m in 1usize..20, vectors in 1usize..9, k in 0usize..140, group in 1usize..40, seed in any::<u32>(), transposed: bool,
            accumulate: bool,
        ) {
            if !LEVEL.available() {
                return Ok(());
            }
            let (n, pairs) = (vectors * PAD, k.div_ceil(2));
            let packing = Packing { vectors, group };
            let a = |i: usize, p: usize| number((i * k + p) as u64, seed);
            let b = |p: usize, j: usize| number((p * n + j) as u64, seed ^ 77);
            let (a_row, a_col) = if transposed { (1, m) } else { (pairs, 1) };
            let mut a_pairs = vec![0; m * pairs];
            for i in 0..m {
                for p in 0..pairs {
                    let high = if 2 * p + 1 < k { a(i, 2 * p + 1) } else { bf16::ZERO };
                    a_pairs[i * a_row + p * a_col] = pair(a(i, 2 * p), high);
                }
            }
            // What lies beyond k is NaN: it must not matter.
            let mut b_pairs = vec![u32::MAX; pairs.div_ceil(group) * packing.group_items()];
            for p in 0..pairs {
                for panel in packing.panels() {
                    let at = p / group * packing.group_items() + panel.at + p % group * panel.stride();
                    for j in 0..panel.stride() {
                        let column = panel.first * PAD + j;
                        let high = if 2 * p + 1 < k { b(2 * p + 1, column) } else { bf16::NAN };
                        b_pairs[at + j] = pair(b(2 * p, column), high);
                    }
                }
            }
            let c: Vec<f32> = (0..m * n).map(|i| number(i as u64, 99).to_f32()).collect();
            let mut got = c.clone();
            let product = |a: &[u32], c: &mut [f32], m| {
                PairGemm { a, a_row, a_col, b: &b_pairs, packing, c, c_row: n, m, k, accumulate, ahead: [].iter() }.run();
            };
            product(&a_pairs, &mut got, m);
            for i in 0..m {
                for j in 0..n {
                    let start = if accumulate { f64::from(c[i * n + j]) } else { 0.0 };
                    let want = (0..k).fold(start, |s, p| s + f64::from(a(i, p).to_f32()) * f64::from(b(p, j).to_f32()));
                    // k products below 1, exact in f32; each addition is off by at most half an ulp of the sum.
                    let bound = 1e-6 + k as f64 * k as f64 * 6e-8;
                    prop_assert!((f64::from(got[i * n + j]) - want).abs() <= bound);
                }
            }
            if k > 0 {
                let mut last = c[(m - 1) * n..].to_vec();
                product(&a_pairs[(m - 1) * a_row..], &mut last, 1);
                prop_assert_eq!(&last[..], &got[(m - 1) * n..]);
            }
        }
    }
}
