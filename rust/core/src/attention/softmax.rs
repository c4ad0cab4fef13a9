//! The online softmax of a tile of logits (Milakov and Gimelshein 2018), heads in the lanes.

use crate::simd::{Kernel, Level, Simd, dispatch};

/// Below this, e^x is under the smallest normal f32 and counts as 0.
const LOWEST: f32 = -87.3;

/// e^x for x <= 0 (0 below [`LOWEST`]), NaN for NaN; at most 2 units in the last place off. Branch-free, so that loops over it
/// vectorise: x = n ln 2 + r, a polynomial for e^r, n added to the exponent bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer that the low mantissa bits then hold
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = x - n * (355.0 / 512.0); // ln 2 in two parts; n times the first is exact
    let r = r + n * 2.121_944_4e-4;
    // Minimax coefficients of Cephes' expf.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LOWEST { 0.0 } else { e * power }
}

/// Running softmax of one query: maximum and sum of exponentials of each head.
pub(crate) struct Running<'a> {
    /// [Hp], -inf at the start.
    pub max: &'a mut [f32],
    /// [Hp], 0 at the start.
    pub sum: &'a mut [f32],
}

/// Turns logits [n, Hp] into exponentials relative to the new maximum, updates `running`, and writes to `decay` [Hp] the
/// factor by which what was accumulated before must shrink.
pub(crate) fn absorb(level: Level, logits: &mut [f32], running: Running<'_>, decay: &mut [f32]) {
    dispatch(level, Absorb { logits, running, decay });
}

struct Absorb<'a> {
    logits: &'a mut [f32],
    running: Running<'a>,
    decay: &'a mut [f32],
}

impl Kernel for Absorb<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Running { max, sum } = self.running;
        let decay = self.decay;
        let heads = max.len();
        decay.copy_from_slice(max);
        for row in self.logits.chunks_exact(heads) {
            for (m, &z) in max.iter_mut().zip(row) {
                *m = if z > *m { z } else { *m };
            }
        }
        for (d, &m) in decay.iter_mut().zip(max.iter()) {
            *d = exp(*d - finite_base(m));
        }
        for (s, &d) in sum.iter_mut().zip(decay.iter()) {
            *s *= d;
        }
        for row in self.logits.chunks_exact_mut(heads) {
            for ((z, s), &m) in row.iter_mut().zip(sum.iter_mut()).zip(max.iter()) {
                *z = exp(*z - finite_base(m));
                *s += *z;
            }
        }
    }
}

/// The value exponents are taken relative to: 0 while every logit was -inf, where -inf - -inf would be NaN.
#[inline(always)]
fn finite_base(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Factors that bring two running softmaxes of maxima `a` and `b` to their common maximum, which comes first.
pub(crate) fn merge_factors(a: f32, b: f32) -> (f32, f32, f32) {
    let max = if b > a { b } else { a };
    (max, exp(a - finite_base(max)), exp(b - finite_base(max)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn exp_is_within_two_units_in_the_last_place(x in -87.0f32..0.0) {
            let want = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) - want).abs() <= 2.0 * f64::from(f32::EPSILON) * want);
        }

        #[test]
        fn tiles_in_any_cut_sum_to_the_softmax(
            z in prop::collection::vec(prop_oneof![4 => -60f32..60.0, 1 => Just(f32::NEG_INFINITY)], 1..40), cut in 0usize..40,
        ) {
            let cut = cut.min(z.len());
            for level in Level::ALL.into_iter().filter(|l| l.available()) {
                let (mut max, mut sum, mut decay) = ([f32::NEG_INFINITY; 1], [0.0; 1], [0.0; 1]);
                for tile in [&z[..cut], &z[cut..]] {
                    absorb(level, &mut tile.to_vec(), Running { max: &mut max, sum: &mut sum }, &mut decay);
                }
                let top = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                prop_assert_eq!(max[0], top);
                let want: f64 = z.iter().map(|&x| f64::from(x).exp()).sum();
                let got = f64::from(sum[0]) * if top > f32::NEG_INFINITY { f64::from(top).exp() } else { 1.0 };
                prop_assert!((got - want).abs() <= 1e-5 * want);
            }
        }
    }
}
