//! Borrowed number buffers of the dtypes the operators accept.
//!
//! Kernels compute in f32; storage is widened a row at a time on the way in and narrowed on the way out. One enum, rather
//! than a type parameter, keeps one compiled kernel a SIMD level: the branch is taken once a row, not once an element.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cache::fp8;

/// Read-only values.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// The upper half of a single.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// FP8 e4m3fn codes.
    E4m3(&'a [u8]),
    /// Signed bytes.
    I8(&'a [i8]),
}

impl<'a> Elements<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::E4m3(x) => x.len(),
            Self::I8(x) => x.len(),
        }
    }

    /// True when there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of the first value, and bytes of each.
    pub(crate) fn base(&self) -> (usize, usize) {
        match self {
            Self::F32(x) => (x.as_ptr().addr(), 4),
            Self::Bf16(x) => (x.as_ptr().addr(), 2),
            Self::F16(x) => (x.as_ptr().addr(), 2),
            Self::E4m3(x) => (x.as_ptr().addr(), 1),
            Self::I8(x) => (x.as_ptr().addr(), 1),
        }
    }

    /// Values `start .. start + count`.
    #[inline]
    pub(crate) fn slice(&self, start: usize, count: usize) -> Self {
        match self {
            Self::F32(x) => Self::F32(&x[start..][..count]),
            Self::Bf16(x) => Self::Bf16(&x[start..][..count]),
            Self::F16(x) => Self::F16(&x[start..][..count]),
            Self::E4m3(x) => Self::E4m3(&x[start..][..count]),
            Self::I8(x) => Self::I8(&x[start..][..count]),
        }
    }

    /// The memory of the values.
    #[inline]
    pub(crate) fn bytes(&self) -> &'a [u8] {
        match self {
            Self::F32(x) => bytemuck::cast_slice(x),
            Self::Bf16(x) => bytemuck::cast_slice(x.reinterpret_cast()),
            Self::F16(x) => bytemuck::cast_slice(x.reinterpret_cast()),
            Self::E4m3(x) => x,
            Self::I8(x) => bytemuck::cast_slice(x),
        }
    }

    /// Writes values `start .. start + dst.len()` to `dst` as f32; exact for every dtype.
    #[inline]
    pub fn widen(&self, start: usize, dst: &mut [f32]) {
        let end = start + dst.len();
        match self {
            Self::F32(x) => dst.copy_from_slice(&x[start..end]),
            Self::Bf16(x) => widen_bf16(&x[start..end], dst),
            Self::F16(x) => x[start..end].convert_to_f32_slice(dst),
            Self::E4m3(x) => fp8::decode(&x[start..end], dst),
            Self::I8(x) => dst.iter_mut().zip(&x[start..end]).for_each(|(d, &s)| *d = f32::from(s)),
        }
    }
}

/// Rounds to bf16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    // Without a branch, so that loops vectorise; a NaN keeps its upper bits and is made quiet.
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

/// Widens bf16 to f32 by a shift.
#[inline]
pub(crate) fn widen_bf16(src: &[bf16], dst: &mut [f32]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d = f32::from_bits(u32::from(s.to_bits()) << 16);
    }
}

/// A writable output.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// IEEE single precision.
    F32(&'a mut [f32]),
    /// The upper half of a single.
    Bf16(&'a mut [bf16]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
}

impl<'a> ElementsMut<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
        }
    }

    /// True when there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Splits off the first `count` values, which the caller can give to another thread.
    pub fn take_front(&mut self, count: usize) -> ElementsMut<'a> {
        match self {
            Self::F32(x) => ElementsMut::F32(take_front(x, count)),
            Self::Bf16(x) => ElementsMut::Bf16(take_front(x, count)),
            Self::F16(x) => ElementsMut::F16(take_front(x, count)),
        }
    }

    /// Writes `src` at `start`, rounded to nearest even.
    pub fn narrow(&mut self, start: usize, src: &[f32]) {
        let end = start + src.len();
        match self {
            Self::F32(x) => x[start..end].copy_from_slice(src),
            Self::Bf16(x) => x[start..end].iter_mut().zip(src).for_each(|(d, &s)| *d = round_bf16(s)),
            Self::F16(x) => x[start..end].convert_from_f32_slice(src),
        }
    }
}

/// Splits the first `count` items off a mutable slice, keeping its lifetime.
pub(crate) fn take_front<'a, T>(slice: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let (front, rest) = std::mem::take(slice).split_at_mut(count);
    *slice = rest;
    front
}
