//! FP8 e4m3fn: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinity, NaN is 0x7f / 0xff, largest value 448
//! (Micikevicius et al. 2022, "FP8 formats for deep learning").
//!
//! Both directions are branch-free integer and float arithmetic, so LLVM vectorises the loops.

use rayon::prelude::*;

use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::Elements;

/// Values that share one scale.
pub const GROUP: usize = 128;
/// Largest finite e4m3fn value.
pub const MAX: f32 = 448.0;
/// Smallest `amax` a scale is made from, so that an all-zero group has a usable scale.
pub const AMAX_FLOOR: f32 = 1e-4;

/// Nearest code, ties to even; beyond ±448 (infinity too) saturates; NaN keeps its sign.
#[inline(always)]
pub fn encode_one(x: f32) -> u8 {
    let bits = x.to_bits();
    let sign = ((bits >> 24) & 0x80) as u8;
    let magnitude = bits & 0x7fff_ffff;
    // Normal codes: round away 20 of 23 mantissa bits, then move the exponent bias from 127 to 7.
    let odd = (magnitude >> 20) & 1;
    let normal = ((magnitude + 0x7_ffff + odd) >> 20).wrapping_sub((127 - 7) << 3);
    // Subnormal codes are multiples of 2^-9, the spacing of floats at 2^14: the addition itself rounds to nearest even.
    const SHIFT: f32 = 16384.0;
    let subnormal = (f32::from_bits(magnitude) + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits());
    let code = if magnitude < 0x3c80_0000 { subnormal } else { normal }; // 2^-6
    let code = if magnitude >= 0x43e0_0000 { 0x7e } else { code }; // 448
    let code = if magnitude > 0x7f80_0000 { 0x7f } else { code };
    code as u8 | sign
}

/// The value of a code, exactly.
#[inline(always)]
pub fn decode_one(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + ((127 - 7) << 23));
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (u32::from(code & 0x80) << 24))
}

/// Decodes codes to f32.
#[inline]
pub fn decode(codes: &[u8], dst: &mut [f32]) {
    for (d, &c) in dst.iter_mut().zip(codes) {
        *d = decode_one(c);
    }
}

/// Encodes one group and returns its scale: `amax / 448` over the finite values, `amax` floored at 1e-4; `code = x / scale`.
///
/// An infinite value saturates and a NaN stays NaN; neither spoils the scale of its neighbours.
#[inline]
pub fn quantize_group(values: &[f32], codes: &mut [u8]) -> f32 {
    let finite = |x: f32| if x.abs() < f32::INFINITY { x.abs() } else { 0.0 };
    let amax = values.iter().fold(AMAX_FLOOR, |m, &x| m.max(finite(x)));
    let scale = amax / MAX;
    for (c, &x) in codes.iter_mut().zip(values) {
        *c = encode_one(x / scale);
    }
    scale
}

/// Encodes a row in groups of [`GROUP`] and hands the scale of each to `store_scale`.
pub fn quantize_row(values: &[f32], codes: &mut [u8], mut store_scale: impl FnMut(usize, f32)) {
    for (g, (x, c)) in values.chunks(GROUP).zip(codes.chunks_mut(GROUP)).enumerate() {
        store_scale(g, quantize_group(x, c));
    }
}

/// Decodes one group and multiplies by its scale.
#[inline]
pub fn dequantize_group(codes: &[u8], scale: f32, dst: &mut [f32]) {
    for (d, &c) in dst.iter_mut().zip(codes) {
        *d = decode_one(c) * scale;
    }
}

/// Quantises each row of `x` [N, D] in groups of `group` values: codes [N, D], scales [N, ceil(D / group)].
///
/// # Errors
/// Sizes that do not fit.
pub fn quantize(
    x: Elements<'_>,
    dim: usize,
    group: usize,
    codes: &mut [u8],
    scales: &mut [f32],
) -> Result<()> {
    let groups = check_rows("x", x.len(), dim, group, scales.len())?;
    ensure_volume("codes", &[x.len()], codes.len())?;
    if groups == 0 {
        return Ok(());
    }
    let rows = codes.par_chunks_mut(dim).zip(scales.par_chunks_mut(groups)).enumerate();
    rows.for_each_init(
        || vec![0.0; dim],
        |row, (i, (codes, scales))| {
            x.widen(i * dim, row);
            for ((x, c), s) in row.chunks(group).zip(codes.chunks_mut(group)).zip(scales) {
                *s = quantize_group(x, c);
            }
        },
    );
    Ok(())
}

/// The inverse of [`quantize`], f32 [N, D].
///
/// # Errors
/// Sizes that do not fit.
pub fn dequantize(codes: &[u8], scales: &[f32], dim: usize, group: usize, out: &mut [f32]) -> Result<()> {
    let groups = check_rows("codes", codes.len(), dim, group, scales.len())?;
    ensure_volume("out", &[codes.len()], out.len())?;
    if groups == 0 {
        return Ok(());
    }
    out.par_chunks_mut(dim).zip(codes.par_chunks(dim)).zip(scales.par_chunks(groups)).for_each(
        |((out, codes), scales)| {
            for ((d, c), &s) in out.chunks_mut(group).zip(codes.chunks(group)).zip(scales) {
                dequantize_group(c, s, d);
            }
        },
    );
    Ok(())
}

/// Groups of a row, after checking that `len` values are whole rows and have `scales` scales.
fn check_rows(name: &'static str, len: usize, dim: usize, group: usize, scales: usize) -> Result<usize> {
    ensure(group > 0, "group_size", || "at least 1".into(), || "0".into())?;
    let whole = if dim == 0 { len == 0 } else { len.is_multiple_of(dim) };
    ensure(whole, name, || format!("rows of {dim} values"), || format!("{len} values"))?;
    let groups = dim.div_ceil(group);
    ensure_volume("scales", &[len.checked_div(dim).unwrap_or(0), groups], scales)?;
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every finite magnitude with its code, in order.
    fn ladder() -> Vec<f32> {
        (0..0x7f).map(decode_one).collect()
    }

    #[test]
    fn every_code_survives_a_round_trip() {
        for code in 0..=255u8 {
            assert_eq!(encode_one(decode_one(code)), code, "{code:#x}");
        }
        assert!(ladder().windows(2).all(|w| w[0] < w[1]));
        assert_eq!(decode_one(0x7e), MAX);
        assert_eq!(decode_one(0x01), 2f32.powi(-9));
    }

    #[test]
    fn ties_go_to_the_even_code_and_overflow_saturates() {
        for (code, pair) in ladder().windows(2).enumerate() {
            let even = if code % 2 == 0 { code } else { code + 1 } as u8;
            assert_eq!(encode_one((pair[0] + pair[1]) / 2.0), even);
        }
        assert_eq!(encode_one(f32::INFINITY), 0x7e);
        assert_eq!(encode_one(-1e30), 0xfe);
        assert_eq!(encode_one(f32::NAN) & 0x7f, 0x7f);
    }

    proptest! {
        #[test]
        fn the_code_is_the_nearest_value(x in prop_oneof![-500f32..500.0, -0.05f32..0.05]) {
            let got = decode_one(encode_one(x));
            let best = ladder().iter().map(|v| (v - x.abs()).abs()).fold(f32::INFINITY, f32::min);
            prop_assert_eq!((got.abs() - x.abs()).abs(), best);
            prop_assert!(got == 0.0 || got.signum() == x.signum());
        }

        #[test]
        fn a_group_keeps_each_value_within_half_a_step(x in prop::collection::vec(-1e6f32..1e6, 1..=GROUP)) {
            let mut codes = vec![0; x.len()];
            let scale = quantize_group(&x, &mut codes);
            let mut back = vec![0.0; x.len()];
            dequantize_group(&codes, scale, &mut back);
            for (a, b) in x.iter().zip(&back) {
                // 3 mantissa bits: half a step is 2^-4 of the value; below 2^-6 scales the step is 2^-9 scales.
                let bound = (a.abs() / 16.0).max(scale / 1024.0) * 1.001;
                prop_assert!((a - b).abs() <= bound, "{} {}", a, b);
            }
        }
    }
}
