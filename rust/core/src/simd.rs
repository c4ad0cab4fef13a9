//! Vector instructions behind one trait, and the choice of instruction set at run time.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each level inside a function that enables the level's
//! features ([`dispatch`]); one build therefore serves every machine. Adding a level touches this file alone.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};

use crate::argument::{ArgumentError, Result};

/// The environment variable that forces a level.
pub const ENVIRONMENT: &str = "HEEDFUL_SIMD";

/// Every buffer a kernel loads vectors from is padded to a multiple of this many f32 (one cache line).
pub(crate) const PAD: usize = 16;

/// An instruction set; each has what those before it on its architecture have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the target always has, through arrays that LLVM vectorises.
    Portable,
    /// NEON: 4 lanes of f32.
    Neon,
    /// AVX2 with FMA: 8 lanes.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, with the bit counting that came before: 16 lanes, masks, compression.
    Avx512,
    /// AVX-512 VNNI beside them: dot products of bytes.
    Avx512Vnni,
    /// AVX-512 BF16 beside them: dot products of bfloat16.
    Avx512Bf16,
}

impl Level {
    /// Every level, weakest first.
    pub const ALL: [Level; 6] =
        [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16];

    /// The name used in `HEEDFUL_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512_vnni",
            Self::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// True when this machine can run it.
    #[inline]
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Self::Avx512.available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512Vnni.available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// True when this machine can run `self` and it has what `needed` has: the test before a function that enables the
    /// features of `needed` is called.
    #[inline]
    pub(crate) fn runs(self, needed: Level) -> bool {
        self >= needed && needed.available()
    }

    /// The best level that this machine can run.
    pub fn best() -> Level {
        Self::ALL.into_iter().rev().find(|l| l.available()).unwrap_or(Self::Portable)
    }

    /// The level operators run at: the best available, or the one `HEEDFUL_SIMD` names. Decided once a process.
    ///
    /// # Errors
    /// [`ArgumentError::Setting`] when the variable names no level, or one that this machine lacks.
    pub fn current() -> Result<Level> {
        static CHOICE: OnceLock<std::result::Result<Level, String>> = OnceLock::new();
        let choice = CHOICE.get_or_init(|| {
            let Some(raw) = std::env::var_os(ENVIRONMENT) else {
                return Ok(Self::best());
            };
            match Self::ALL.into_iter().find(|l| raw == l.name()) {
                Some(level) if level.available() => Ok(level),
                Some(level) => Err(format!("this machine has no {}", level.name())),
                None => {
                    let names = Self::ALL.map(Self::name).join(", ");
                    Err(format!("expected one of {names}, got {raw:?}"))
                }
            }
        });
        choice.clone().map_err(|reason| ArgumentError::Setting { name: ENVIRONMENT, reason })
    }
}

/// Vectors of f32. Every method is unsafe because it may use instructions that only [`dispatch`] has proven to exist;
/// loads and stores read and write `LANES` values at any alignment.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// f32 values in a vector; divides [`PAD`].
    const LANES: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `max(v, 0)`; NaN stays NaN.
    unsafe fn relu(v: Self::V) -> Self::V;
    /// Keeps the lanes whose mask has all bits set and zeroes those whose mask is 0.
    unsafe fn keep(v: Self::V, mask: Self::V) -> Self::V;
    /// Sum of the lanes.
    unsafe fn sum(v: Self::V) -> f32;
}

/// Work that is compiled for every level. `run` must be `#[inline(always)]`, else it would not see the level's features.
pub(crate) trait Kernel {
    /// What the kernel returns.
    type Output;
    /// # Safety
    /// The machine must have the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `kernel` at `level`, or at the portable one where the machine lacks it.
#[inline]
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `runs` has just seen the features that the function enables.
        _ if level.runs(Level::Avx512) => unsafe { x86::run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        _ if level.runs(Level::Avx2) => unsafe { x86::run_avx2(kernel) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of aarch64.
        _ if level.runs(Level::Neon) => unsafe { kernel.run::<neon::Neon>() },
        // SAFETY: the portable level uses no instruction beyond the target's own.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// Four lanes in an array: what SSE2 holds in a register.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller promises LANES readable values; an array of f32 has f32's alignment.
        unsafe { p.cast::<[f32; 4]>().read() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller promises LANES writable values; an array of f32 has f32's alignment.
        unsafe { p.cast::<[f32; 4]>().write(v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not fused: without the instruction, the library routine is some fifty times slower.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn relu(v: Self::V) -> Self::V {
        v.map(|x| if x < 0.0 { 0.0 } else { x })
    }
    #[inline(always)]
    unsafe fn keep(v: Self::V, mask: Self::V) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(v[i].to_bits() & mask[i].to_bits()))
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! AVX2 and AVX-512. The intrinsics are inlined once a kernel is inlined into `run_avx2` or `run_avx512`.
    use super::{Kernel, Simd};
    use std::arch::x86_64::*;

    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: this function's own condition.
        unsafe { kernel.run::<Avx2>() }
    }

    /// # Safety
    /// The machine must have what [`super::Level::Avx512`] names.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,popcnt")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: this function's own condition.
        unsafe { kernel.run::<Avx512>() }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    // SAFETY (of every block below): the trait's condition, that the machine has the instructions and that pointers are
    // good for LANES values, is the callers' to keep.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self::V {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn relu(v: Self::V) -> Self::V {
            // The second operand is returned when either is NaN.
            unsafe { _mm256_max_ps(_mm256_setzero_ps(), v) }
        }
        #[inline(always)]
        unsafe fn keep(v: Self::V, mask: Self::V) -> Self::V {
            unsafe { _mm256_and_ps(v, mask) }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    // SAFETY: as for `Avx2`.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self::V {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn relu(v: Self::V) -> Self::V {
            unsafe { _mm512_max_ps(_mm512_setzero_ps(), v) }
        }
        #[inline(always)]
        unsafe fn keep(v: Self::V, mask: Self::V) -> Self::V {
            unsafe {
                _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_castps_si512(mask)))
            }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            unsafe { _mm512_reduce_add_ps(v) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    //! NEON, which every aarch64 machine has.
    use super::Simd;
    use std::arch::aarch64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Neon;

    // SAFETY: as for the levels of x86: pointers are good for LANES values by the trait's condition.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Neon {
        type V = float32x4_t;
        const LANES: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> Self::V {
            unsafe { vdupq_n_f32(0.0) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            unsafe { vst1q_f32(p, v) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { vfmaq_f32(c, a, b) }
        }
        #[inline(always)]
        unsafe fn relu(v: Self::V) -> Self::V {
            // FMAX gives NaN when either operand is.
            unsafe { vmaxq_f32(vdupq_n_f32(0.0), v) }
        }
        #[inline(always)]
        unsafe fn keep(v: Self::V, mask: Self::V) -> Self::V {
            unsafe { vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vreinterpretq_u32_f32(mask))) }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            unsafe { vaddvq_f32(v) }
        }
    }
}

/// A zeroed buffer of numbers on cache-line boundaries, so that no vector load straddles two lines.
pub(crate) struct AlignedBuffer<T = f32> {
    lines: Vec<Line>,
    items: PhantomData<T>,
}

#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Line([u8; 64]);

impl<T: Pod> AlignedBuffer<T> {
    /// Makes it hold at least `len` items; new ones are zeros.
    pub fn reserve(&mut self, len: usize) {
        let lines = len.checked_mul(size_of::<T>()).expect("fits memory").div_ceil(size_of::<Line>());
        if self.lines.len() < lines {
            self.lines.resize(lines, Line::zeroed());
        }
    }
}

impl<T> Default for AlignedBuffer<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), items: PhantomData }
    }
}

impl<T: Pod> Deref for AlignedBuffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.lines)
    }
}

impl<T: Pod> DerefMut for AlignedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}

/// `n` rounded up to a multiple of [`PAD`].
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}
