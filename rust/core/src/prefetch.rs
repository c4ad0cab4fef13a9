//! Asks for memory before it is read, so that what is waited for at one place is on its way for others meanwhile.

/// Asks for the cache line where `value` begins.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    let place = std::ptr::from_ref(value);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program sees, from any address; SSE belongs to x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above; the instruction belongs to every AArch64.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) place, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = place;
}
