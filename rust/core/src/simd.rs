//! Vector instructions behind one trait, and the choice of instruction set at run time.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each level inside a function that enables the level's
//! features ([`dispatch`]); one build therefore serves every machine. Adding a level touches this file alone.

use std::sync::OnceLock;

use crate::argument::{ArgumentError, Result};

/// The environment variable that forces a level.
pub const ENVIRONMENT: &str = "HEEDFUL_SIMD";

/// Every buffer a kernel loads vectors from is padded to a multiple of this many f32 (one cache line).
pub(crate) const PAD: usize = 16;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What the target always has (SSE2, NEON), through arrays that LLVM vectorises.
    Portable,
    /// AVX2 with FMA: 8 lanes.
    Avx2,
    /// AVX-512F: 16 lanes.
    Avx512,
}

impl Level {
    /// Every level, weakest first.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    /// The name used in `HEEDFUL_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// True when this machine can run it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f") && Self::Avx2.available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The level operators run at: the best available, or the one `HEEDFUL_SIMD` names. Decided once a process.
    ///
    /// # Errors
    /// [`ArgumentError::Setting`] when the variable names no level, or one that this machine lacks.
    pub fn current() -> Result<Level> {
        static CHOICE: OnceLock<std::result::Result<Level, String>> = OnceLock::new();
        let choice = CHOICE.get_or_init(|| {
            let Some(raw) = std::env::var_os(ENVIRONMENT) else {
                return Ok(Self::ALL.into_iter().rev().find(|l| l.available()).unwrap_or(Self::Portable));
            };
            match Self::ALL.into_iter().find(|l| raw == l.name()) {
                Some(level) if level.available() => Ok(level),
                Some(level) => Err(format!("this machine has no {}", level.name())),
                None => Err(format!("expected portable, avx2 or avx512, got {raw:?}")),
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
        // SAFETY: `available` has just seen the features that the function enables.
        Level::Avx512 if level.available() => unsafe { x86::run_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 if level.available() => unsafe { x86::run_avx2(kernel) },
        // SAFETY: the portable level uses no instruction beyond the target's own.
        _ => unsafe { kernel.run::<Portable>() },
    }
}

/// Four lanes in an array: what SSE2 and NEON hold in a register.
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
        // Fused only where the target has the instruction: the library routine is some fifty times slower.
        std::array::from_fn(|i| {
            if cfg!(target_arch = "aarch64") { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] }
        })
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
    /// The machine must have AVX-512F, AVX2 and FMA.
    #[target_feature(enable = "avx512f,avx2,fma")]
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

/// A zeroed f32 buffer on cache-line boundaries, so that no vector load straddles two lines.
#[derive(Default)]
pub(crate) struct AlignedBuffer {
    lines: Vec<Line>,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; PAD]);

impl AlignedBuffer {
    /// A buffer of at least `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0.0; PAD]); len.div_ceil(PAD)] }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `Line` is repr(C) around PAD floats, size 64 = its alignment, so lines are floats without gaps.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * PAD) }
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * PAD) }
    }
}

/// `n` rounded up to a multiple of [`PAD`].
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}
