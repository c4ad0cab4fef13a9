//! The choice of an instruction set for the scanners, at run time.

use super::Leaf;
use super::portable::Portable;
use crate::simd::Level;

#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86;

/// The instructions a scanner runs on; one that is not there is never made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tokenizer::scan) enum Instructions {
    /// Integers alone.
    #[cfg_attr(any(target_arch = "x86_64", target_arch = "aarch64"), allow(dead_code))]
    Portable,
    /// SSE2, the least an x86-64 machine has.
    #[cfg(target_arch = "x86_64")]
    Sse2,
    /// AVX2, with the bit manipulation that came with it.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512BW beside them.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON, the least an aarch64 machine has.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// Work that is compiled for each instruction set. `run` must be `#[inline(always)]`, else it would not see its features.
pub(in crate::tokenizer) trait Work {
    /// What it returns.
    type Output;
    /// # Safety
    /// The machine must have the instructions of `L`.
    unsafe fn run<L: Leaf>(self) -> Self::Output;
}

impl Instructions {
    /// The best that this machine has and that is no better than the level (`HEEDFUL_SIMD` may have lowered it).
    pub fn at(level: Level) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = level != Level::Portable && Self::has_avx2();
            if avx2 && level >= Level::Avx512 && Self::has_avx512() {
                Self::Avx512
            } else if avx2 {
                Self::Avx2
            } else {
                Self::Sse2
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            let _ = level;
            Self::Neon
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = level;
            Self::Portable
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt")
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
    }

    /// Every one that this machine has.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        for level in Level::ALL {
            let instructions = Self::at(level);
            if !found.contains(&instructions) {
                found.push(instructions);
            }
        }
        found
    }

    /// Runs `work` on them.
    #[inline]
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self {
            // SAFETY: these use no instruction beyond the target's own.
            Self::Portable => unsafe { work.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: SSE2 is part of x86-64.
            Self::Sse2 => unsafe { work.run::<x86::Sse2>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `at` has seen the features before it made this value.
            Self::Avx2 => unsafe { run_avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Self::Avx512 => unsafe { run_avx512(work) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of aarch64.
            Self::Neon => unsafe { work.run::<Neon>() },
        }
    }
}

/// # Safety
/// The machine must have these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_avx2<W: Work>(work: W) -> W::Output {
    // SAFETY: this function's own condition.
    unsafe { work.run::<x86::Avx2>() }
}

/// # Safety
/// The machine must have these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_avx512<W: Work>(work: W) -> W::Output {
    // SAFETY: this function's own condition.
    unsafe { work.run::<x86::Avx512>() }
}
