//! FP8 codes times their scale as bfloat16, rounded to nearest even: the form in which attention multiplies FP8 rows.

use half::bf16;

use super::fp8;
use crate::elements::round_bf16;
use crate::simd::Level;

/// Decodes one group of codes.
#[inline]
pub(crate) fn dequantize_group(level: Level, codes: &[u8], scale: f32, dst: &mut [bf16]) {
    assert!(codes.len() == dst.len(), "a number for each code");
    #[cfg(target_arch = "x86_64")]
    if level.runs(Level::Avx512Bf16) {
        // SAFETY: the machine has the instructions; the lengths are equal.
        unsafe { x86::dequantize_group(codes, scale, dst) };
        return;
    }
    let _ = level;
    portable(codes, scale, dst);
}

fn portable(codes: &[u8], scale: f32, dst: &mut [bf16]) {
    for (d, &code) in dst.iter_mut().zip(codes) {
        *d = round_bf16(fp8::decode_one(code) * scale);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::bf16;
    use std::arch::x86_64::*;

    /// bfloat16 of the subnormal codes 0 to 7, which are multiples of 2^-9.
    const SUBNORMAL: [u16; 8] = [0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60];

    /// # Safety
    /// The machine must have the instructions; `dst` must be as long as `codes`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn dequantize_group(codes: &[u8], scale: f32, dst: &mut [bf16]) {
        let whole = codes.len() / 32 * 32;
        // SAFETY: `whole` codes lie in both slices.
        unsafe {
            // Words 0 to 7 are looked up by the low bits of the code.
            let table = _mm512_castsi128_si512(_mm_loadu_si128(SUBNORMAL.as_ptr().cast()));
            // The products of even and odd words come out one half after the other.
            let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            let scale = _mm512_set1_ps(scale);
            for i in (0..whole).step_by(32) {
                let code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().add(i).cast()));
                let magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
                // Four mantissa bits more, and the exponent's bias from 7 to 127.
                let normal =
                    _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16((127 - 7) << 7));
                let small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
                let value = _mm512_mask_permutexvar_epi16(normal, small, magnitude, table);
                let nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
                let value = _mm512_mask_blend_epi16(nan, value, _mm512_set1_epi16(0x7fc0));
                let sign = _mm512_slli_epi16::<8>(_mm512_sub_epi16(code, magnitude));
                let value = _mm512_or_si512(value, sign);
                let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(value));
                let odd = _mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32(-0x1_0000)));
                let both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scale), _mm512_mul_ps(even, scale));
                let both = std::mem::transmute::<__m512bh, __m512i>(both);
                _mm512_storeu_si512(dst.as_mut_ptr().add(i).cast(), _mm512_permutexvar_epi16(order, both));
            }
        }
        super::portable(&codes[whole..], scale, &mut dst[whole..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_at_every_level_is_its_value_times_the_scale_rounded() {
        for count in [256, 200, 31] {
            let codes: Vec<u8> = (0..count).map(|i| (i * 37 + 5) as u8).collect();
            // The last one makes some products too large, none too small for a normal bfloat16.
            for scale in [1.0f32, 0.003_906_25, 1.234_567_8, -3.1e-5, 7.7e30, 1e37] {
                for level in Level::ALL.into_iter().filter(|l| l.available()) {
                    let mut got = vec![bf16::ZERO; count];
                    dequantize_group(level, &codes, scale, &mut got);
                    for (&code, got) in codes.iter().zip(got) {
                        let want = bf16::from_f32(fp8::decode_one(code) * scale);
                        assert!(
                            got == want || (got.is_nan() && want.is_nan()),
                            "{level:?} {code:#x} {scale}"
                        );
                    }
                }
            }
        }
    }
}
