//! Signed bytes with one f32 scale a row: scale = amax / 127, code = x / scale to nearest, ties to even.
//!
//! For index keys (after the Hadamard rotation, which spreads outliers) this is at least as close as e4m3, whose 3 mantissa
//! bits leave up to a sixteenth of each value: a byte leaves at most amax / 254. And CPUs multiply bytes.

use rayon::prelude::*;

use super::fp8::AMAX_FLOOR;
use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::Elements;

/// Largest code; -128 is not used, so that the codes are symmetric.
pub const MAX: f32 = 127.0;

/// Encodes a row and returns its scale: `amax / 127` over the finite values, `amax` floored at 1e-4.
///
/// An infinite value saturates. A byte cannot be NaN: a row that holds one has NaN for its scale.
#[inline]
pub fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let finite = |x: f32| if x.abs() < f32::INFINITY { x.abs() } else { 0.0 };
    let amax = values.iter().fold(AMAX_FLOOR, |m, &x| m.max(finite(x)));
    let scale = amax / MAX;
    for (c, &x) in codes.iter_mut().zip(values) {
        // 1.5 * 2^23: adding it rounds to a whole number, to nearest even.
        const SHIFT: f32 = 12_582_912.0;
        *c = ((x / scale).clamp(-MAX, MAX) + SHIFT - SHIFT) as i8;
    }
    if values.iter().fold(false, |any, x| any | x.is_nan()) { f32::NAN } else { scale }
}

/// Quantises each row of `x` [N, D]: codes [N, D], scales [N].
///
/// # Errors
/// Sizes that do not fit.
pub fn quantize(x: Elements<'_>, dim: usize, codes: &mut [i8], scales: &mut [f32]) -> Result<()> {
    let whole = if dim == 0 { x.is_empty() } else { x.len().is_multiple_of(dim) };
    ensure(whole, "x", || format!("rows of {dim} values"), || format!("{} values", x.len()))?;
    ensure_volume("codes", &[x.len()], codes.len())?;
    ensure_volume("scales", &[x.len().checked_div(dim).unwrap_or(scales.len())], scales.len())?;
    if dim == 0 {
        scales.fill(AMAX_FLOOR / MAX);
        return Ok(());
    }
    codes.par_chunks_mut(dim).zip(scales).enumerate().for_each_init(
        || vec![0.0; dim],
        |row, (i, (codes, scale))| {
            x.widen(i * dim, row);
            *scale = quantize_row(row, codes);
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn special_values() {
        let mut codes = [0i8; 5];
        let scale = quantize_row(&[254.0, f32::INFINITY, -254.0, 1.0, 3.0], &mut codes);
        assert_eq!((scale, codes), (2.0, [127, 127, -127, 0, 2])); // halves go to the even code
        assert!(quantize_row(&[1.0, f32::NAN], &mut codes[..2]).is_nan());
        assert_eq!(quantize_row(&[0.0; 2], &mut codes[..2]), AMAX_FLOOR / MAX);
        assert_eq!(codes[..2], [0, 0]);
    }

    proptest! {
        #[test]
        fn a_row_keeps_each_value_within_half_a_step(x in prop::collection::vec(-1e6f32..1e6, 1..200)) {
            let mut codes = vec![0; x.len()];
            let scale = quantize_row(&x, &mut codes);
            for (&x, &code) in x.iter().zip(&codes) {
                prop_assert!((x - f32::from(code) * scale).abs() <= scale * 0.5001, "{} {}", x, code);
            }
        }
    }
}
