//! Fetching cache lines before they are read: gathered rows and hash tables lie where no hardware prefetcher would look.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for the line at `address` to be brought to the caches. Any address will do: none is read.
#[inline(always)]
pub(crate) fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not fault and changes no value, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above; the instruction writes neither memory nor flags.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// The same for the line where `value` begins.
#[inline(always)]
pub(crate) fn fetch_value<T>(value: &T) {
    fetch(std::ptr::from_ref(value).addr());
}

/// The lines that `bytes` bytes from `start` touch.
pub(crate) fn lines(start: usize, bytes: usize) -> impl Iterator<Item = usize> {
    // A range that is mapped has a length that `extend` trusts, unlike one that is stepped through.
    (start / LINE..(start + bytes).div_ceil(LINE)).map(|line| line * LINE)
}
