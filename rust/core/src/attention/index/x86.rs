//! The kernels in AVX-512: dot products of bf16 pairs (vdpbf16ps) and of four bytes (vpdpbusd), and the conversions to bf16.

#![allow(clippy::needless_range_loop)] // r and v name registers; iterators over arrays of arrays hide that

use std::arch::x86_64::*;
use std::sync::LazyLock;

use half::bf16;

use super::kernel::KeyRun;
use super::query::PackedQuery;
use crate::cache::fp8;

const LANES: usize = 16;

/// How a word of a key meets the words of 16 heads. Every method is unsafe because it uses instructions that the caller must
/// have proven to exist.
#[allow(clippy::missing_safety_doc)]
trait Dot {
    /// What sums start from.
    unsafe fn start(from: *const i32) -> __m512i;
    /// The word of a key, in every lane.
    unsafe fn key(word: i32) -> __m512i;
    /// Adds the products of a word.
    unsafe fn add(sum: __m512i, key: __m512i, query: __m512i) -> __m512i;
    /// Sums as f32.
    unsafe fn logits(sum: __m512i) -> __m512;
}

struct Bf16;

// SAFETY (of every block of this and the next implementation): the trait's condition is the callers' to keep.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dot for Bf16 {
    #[inline(always)]
    unsafe fn start(_: *const i32) -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn key(word: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(word) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512i, key: __m512i, query: __m512i) -> __m512i {
        // SAFETY: __m512bh and __m512i are the same 64 bytes.
        unsafe {
            let (key, query) = (
                std::mem::transmute::<__m512i, __m512bh>(key),
                std::mem::transmute::<__m512i, __m512bh>(query),
            );
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), key, query))
        }
    }
    #[inline(always)]
    unsafe fn logits(sum: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(sum) }
    }
}

struct I8;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Dot for I8 {
    #[inline(always)]
    unsafe fn start(from: *const i32) -> __m512i {
        unsafe { _mm512_load_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn key(word: i32) -> __m512i {
        // The instruction takes one operand unsigned: 128 more than each byte of the key, which `start` takes off again.
        unsafe { _mm512_set1_epi32(word ^ 0x8080_8080_u32 as i32) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512i, key: __m512i, query: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, key, query) }
    }
    #[inline(always)]
    unsafe fn logits(sum: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sum) }
    }
}

/// # Safety
/// The machine must have the features; there must be a key for each score.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn score_bf16(keys: KeyRun<'_>, query: &PackedQuery, out: &mut [f32]) {
    // SAFETY: this function's own condition.
    unsafe { score::<Bf16>(keys, query, out) }
}

/// # Safety
/// As [`score_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn score_i8(keys: KeyRun<'_>, query: &PackedQuery, out: &mut [f32]) {
    // SAFETY: this function's own condition.
    unsafe { score::<I8>(keys, query, out) }
}

/// # Safety
/// As [`score_bf16`], with the features of `D`.
#[inline(always)]
unsafe fn score<D: Dot>(keys: KeyRun<'_>, query: &PackedQuery, out: &mut [f32]) {
    let mut keys = Keys { rows: keys.rows.as_ptr().cast(), keys, query, out, next: 0 };
    // SAFETY: the caller's condition. As many keys at a time as give 24 sums (16 with one vector of heads), which with the
    // query's vectors and the key's fill the registers.
    unsafe {
        match query.lanes() / LANES {
            1 => keys.blocks::<D, 16>(),
            2 => keys.blocks::<D, 12>(),
            _ => keys.blocks::<D, 6>(),
        }
        keys.blocks::<D, 4>();
        keys.blocks::<D, 1>();
    }
}

struct Keys<'a> {
    rows: *const i32,
    keys: KeyRun<'a>,
    query: &'a PackedQuery,
    out: &'a mut [f32],
    /// The first key that has no score yet.
    next: usize,
}

impl Keys<'_> {
    /// Scores of the next keys, MR at a time, while there are so many.
    ///
    /// # Safety
    /// As [`score`].
    #[inline(always)]
    unsafe fn blocks<D: Dot, const MR: usize>(&mut self) {
        while self.next + MR <= self.out.len() {
            self.keys.ahead.fetch(self.keys.at + self.next, MR);
            // SAFETY: these keys exist; panels cover Hp heads.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); MR];
                let lanes = self.query.lanes();
                let mut j = 0;
                while MR <= 6 && j + 4 * LANES <= lanes {
                    self.panel::<D, MR, 4>(j, &mut sums);
                    j += 4 * LANES;
                }
                while MR <= 12 && j + 2 * LANES <= lanes {
                    self.panel::<D, MR, 2>(j, &mut sums);
                    j += 2 * LANES;
                }
                while j < lanes {
                    self.panel::<D, MR, 1>(j, &mut sums);
                    j += LANES;
                }
                for r in 0..MR {
                    let at = self.next + r;
                    self.out[at] = _mm512_reduce_add_ps(sums[r]) * self.keys.factors[at];
                }
            }
            self.next += MR;
        }
    }

    /// Adds heads `j .. j + 16 NV` to the sums of the next MR keys.
    ///
    /// # Safety
    /// As [`score`]; the heads must lie below Hp.
    #[inline(always)]
    unsafe fn panel<D: Dot, const MR: usize, const NV: usize>(&self, j: usize, sums: &mut [__m512; MR]) {
        let (steps, lanes) = (self.query.steps(), self.query.lanes());
        // SAFETY: the caller's condition; buffers of the query are on cache lines, keys at any alignment.
        unsafe {
            let k = self.rows.add(self.next * steps);
            let q = self.query.words().as_ptr().add(j);
            let mut acc = [[_mm512_setzero_si512(); NV]; MR];
            for v in 0..NV {
                let start = D::start(self.query.start().as_ptr().add(j + v * LANES));
                for r in 0..MR {
                    acc[r][v] = start;
                }
            }
            for p in 0..steps {
                let mut row = [_mm512_setzero_si512(); NV];
                for v in 0..NV {
                    row[v] = _mm512_load_si512(q.add(p * lanes + v * LANES).cast());
                }
                for r in 0..MR {
                    let word = D::key(k.add(r * steps + p).read_unaligned());
                    for v in 0..NV {
                        acc[r][v] = D::add(acc[r][v], word, row[v]);
                    }
                }
            }
            for v in 0..NV {
                let w = _mm512_load_ps(self.query.weights().as_ptr().add(j + v * LANES));
                let mask = _mm512_load_si512(self.query.mask().as_ptr().add(j + v * LANES).cast());
                let heads = _mm512_test_epi32_mask(mask, mask);
                for r in 0..MR {
                    // The second operand is returned when either is NaN.
                    let relu = _mm512_maskz_max_ps(heads, _mm512_setzero_ps(), D::logits(acc[r][v]));
                    sums[r] = _mm512_fmadd_ps(w, relu, sums[r]);
                }
            }
        }
    }
}

/// The bf16 of each e4m3 magnitude.
static MAGNITUDES: LazyLock<[u16; 128]> =
    LazyLock::new(|| std::array::from_fn(|code| bf16::from_f32(fp8::decode_one(code as u8)).to_bits()));

/// # Safety
/// The machine must have AVX-512 F and BW; `out` must have a place for each code.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn e4m3_to_bf16(codes: &[u8], out: &mut [u16]) {
    let table = &*MAGNITUDES;
    // SAFETY: each load and store lies in a chunk of 32 codes and 32 places; the table has 4 vectors.
    unsafe {
        let part = |i: usize| _mm512_loadu_si512(table.as_ptr().add(32 * i).cast());
        let (t0, t1, t2, t3) = (part(0), part(1), part(2), part(3));
        let upper = _mm512_set1_epi16(0x40);
        let sign = _mm512_set1_epi16(0x80);
        for (codes, out) in codes.chunks_exact(32).zip(out.chunks_exact_mut(32)) {
            let code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().cast()));
            let low = _mm512_permutex2var_epi16(t0, code, t1);
            let high = _mm512_permutex2var_epi16(t2, code, t3);
            let magnitude = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, upper), high);
            let sign = _mm512_slli_epi16::<8>(_mm512_and_si512(code, sign));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(magnitude, sign));
        }
    }
    let done = codes.len() / 32 * 32;
    for (&code, out) in codes[done..].iter().zip(&mut out[done..]) {
        *out = table[usize::from(code & 0x7f)] | u16::from(code & 0x80) << 8;
    }
}

/// # Safety
/// The machine must have AVX-512 F and BW; `out` must have a place for each byte.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn i8_to_bf16(bytes: &[i8], out: &mut [u16]) {
    // Without a branch, so that LLVM makes vectors of it: a small whole number fills the upper half of its f32 alone.
    for (out, &byte) in out.iter_mut().zip(bytes) {
        *out = (f32::from(byte).to_bits() >> 16) as u16;
    }
}
