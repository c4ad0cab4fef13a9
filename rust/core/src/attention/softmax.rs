//! The online softmax of a wave of logits (Milakov and Gimelshein 2018), one vector of heads at a time.

use crate::simd::{Kernel, Level, PAD, Simd, dispatch};

/// Below this, e^x is under the smallest normal f32 and counts as 0.
const LOWEST: f32 = -87.3;

/// One value for each head of a vector.
pub(crate) type Heads = [f32; PAD];

/// e^x for x <= 0 (0 below [`LOWEST`]), NaN for NaN; at most 2 units in the last place off. Branch-free, so that loops over it
/// vectorise: x = n ln 2 + r, a polynomial for e^r, n added to the exponent bits.
#[inline(always)]
fn exp<S: Simd>(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer that the low mantissa bits then hold
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = fused::<S>(n, -355.0 / 512.0, x); // ln 2 in two parts; n times the first is exact
    let r = fused::<S>(n, 2.121_944_4e-4, r);
    // Minimax coefficients of Cephes' expf.
    let p = 1.987_569_1e-4;
    let p = fused::<S>(p, r, 1.398_199_9e-3);
    let p = fused::<S>(p, r, 8.333_452e-3);
    let p = fused::<S>(p, r, 4.166_579_6e-2);
    let p = fused::<S>(p, r, 1.666_666_5e-1);
    let p = fused::<S>(p, r, 0.5);
    let e = fused::<S>(p * r, r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LOWEST { 0.0 } else { e * power }
}

/// `a * b + c`, fused where the level has the instruction: the library routine is some fifty times slower.
#[inline(always)]
fn fused<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::LANES >= 8 || cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

/// Running softmax of a vector of heads: maximum logit, and sum of the exponentials relative to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub max: Heads,
    pub sum: Heads,
}

impl Running {
    /// Before the first key.
    pub const START: Self = Self { max: [f32::NEG_INFINITY; PAD], sum: [0.0; PAD] };

    /// Takes in the logits `rows` (one a key, before the factor `scale`), writes their exponentials relative to the new
    /// maximum to `out`, and returns the factor by which what was accumulated before must shrink.
    pub fn absorb(&mut self, level: Level, rows: LogitRows<'_>, scale: f32, out: &mut [Heads]) -> Heads {
        dispatch(level, Absorb { running: self, rows, scale, out })
    }
}

/// Logits of one vector of heads: key s of a wave is `s % tile` in its tile.
#[derive(Clone, Copy)]
pub(crate) struct LogitRows<'a> {
    /// Tile after tile.
    pub logits: &'a [f32],
    /// Keys of a tile.
    pub tile: usize,
    /// From tile to tile.
    pub tile_stride: usize,
    /// From key to key.
    pub stride: usize,
    /// Of the vector in a tile.
    pub offset: usize,
}

impl LogitRows<'_> {
    /// Calls `work` with the logits of each key that has a place in `out`, in order, and that place.
    #[inline(always)]
    fn each<T>(&self, out: &mut [T], mut work: impl FnMut(&Heads, &mut T)) {
        for (tile, out) in self.logits.chunks(self.tile_stride).zip(out.chunks_mut(self.tile)) {
            for (row, out) in tile[self.offset..].chunks(self.stride).zip(out) {
                work(row.first_chunk().expect("rows are padded to vectors"), out);
            }
        }
    }
}

struct Absorb<'a> {
    running: &'a mut Running,
    rows: LogitRows<'a>,
    scale: f32,
    out: &'a mut [Heads],
}

impl Kernel for Absorb<'_> {
    type Output = Heads;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Heads {
        let Self { running, rows, scale, out } = self;
        let before = running.max;
        let mut max = before;
        rows.each(out, |row, _| {
            for (m, &z) in max.iter_mut().zip(row) {
                let z = z * scale;
                *m = if z > *m { z } else { *m };
            }
        });
        let base = max.map(finite_base);
        let decay: Heads = std::array::from_fn(|i| exp::<S>(before[i] - base[i]));
        let mut sum: Heads = std::array::from_fn(|i| running.sum[i] * decay[i]);
        rows.each(out, |row, out| {
            for i in 0..PAD {
                out[i] = exp::<S>(row[i] * scale - base[i]);
                sum[i] += out[i];
            }
        });
        *running = Running { max, sum };
        decay
    }
}

/// The value exponents are taken relative to: 0 while every logit was -inf, where -inf - -inf would be NaN.
#[inline(always)]
fn finite_base(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;
    use proptest::prelude::*;

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp::<Portable>(0.0), 1.0);
        assert_eq!(exp::<Portable>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Portable>(-1e30), 0.0);
        assert!(exp::<Portable>(f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn exp_is_within_two_units_in_the_last_place(x in -87.0f32..0.0) {
            let want = f64::from(x).exp();
            prop_assert!((f64::from(exp::<Portable>(x)) - want).abs() <= 2.0 * f64::from(f32::EPSILON) * want);
        }

        #[test]
        fn waves_in_any_cut_sum_to_the_softmax(
            z in prop::collection::vec(prop_oneof![4 => -60f32..60.0, 1 => Just(f32::NEG_INFINITY)], 1..40), cut in 0usize..40,
            scale in prop_oneof![Just(1.0f32), Just(-0.5)],
        ) {
            let cut = cut.min(z.len());
            let scaled: Vec<f64> = z.iter().map(|&z| f64::from(z * scale)).collect();
            // exp(+inf) is not a softmax.
            prop_assume!(scaled.iter().all(|&z| z < f64::INFINITY));
            for level in Level::ALL.into_iter().filter(|l| l.available()) {
                let mut running = Running::START;
                for wave in [&z[..cut], &z[cut..]] {
                    // The third head of three vectors, in tiles of 3 keys.
                    let mut logits = vec![f32::NAN; wave.len().div_ceil(3) * 3 * 3 * PAD];
                    wave.iter().enumerate().for_each(|(s, &z)| logits[s * 3 * PAD + PAD + 2] = z);
                    let rows = LogitRows { logits: &logits, tile: 3, tile_stride: 9 * PAD, stride: 3 * PAD, offset: PAD };
                    running.absorb(level, rows, scale, &mut vec![[0.0; PAD]; wave.len()]);
                }
                let top = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                prop_assert_eq!(f64::from(running.max[2]), top);
                let want: f64 = scaled.iter().map(|&x| x.exp()).sum();
                let got = f64::from(running.sum[2]) * if top > f64::NEG_INFINITY { top.exp() } else { 1.0 };
                prop_assert!((got - want).abs() <= 1e-5 * want);
            }
        }
    }
}
