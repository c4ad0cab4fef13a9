//! NumPy arrays as the core's slices, without a copy. bfloat16 comes as uint16 and FP8 as uint8: `heedful._arrays` has
//! checked the dtypes the user sees; what is checked here is what memory safety needs (type, contiguity, borrow, writable).

use half::{bf16, f16, slice::HalfBitsSliceExt};
use heedful_core::elements::{Elements, ElementsMut};
use numpy::{
    Element, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A borrowed read-only array of numbers.
pub enum Numbers<'py> {
    F32(Read<'py, f32>),
    Bf16(Read<'py, u16>),
    F16(Read<'py, f16>),
    E4m3(Read<'py, u8>),
    I8(Read<'py, i8>),
}

impl<'py> Numbers<'py> {
    pub fn new(name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if array.cast::<PyArrayDyn<f32>>().is_ok() {
            Ok(Self::F32(Read::new(name, array)?))
        } else if array.cast::<PyArrayDyn<u16>>().is_ok() {
            Ok(Self::Bf16(Read::new(name, array)?))
        } else if array.cast::<PyArrayDyn<f16>>().is_ok() {
            Ok(Self::F16(Read::new(name, array)?))
        } else if array.cast::<PyArrayDyn<u8>>().is_ok() {
            Ok(Self::E4m3(Read::new(name, array)?))
        } else {
            Ok(Self::I8(Read::new(name, array)?))
        }
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Self::F32(x) => x.shape(),
            Self::Bf16(x) => x.shape(),
            Self::F16(x) => x.shape(),
            Self::E4m3(x) => x.shape(),
            Self::I8(x) => x.shape(),
        }
    }

    pub fn elements(&self) -> PyResult<Elements<'_>> {
        Ok(match self {
            Self::F32(x) => Elements::F32(x.slice()?),
            Self::Bf16(x) => Elements::Bf16(x.slice()?.reinterpret_cast::<bf16>()),
            Self::F16(x) => Elements::F16(x.slice()?),
            Self::E4m3(x) => Elements::E4m3(x.slice()?),
            Self::I8(x) => Elements::I8(x.slice()?),
        })
    }
}

/// A borrowed read-only array of one type.
pub struct Read<'py, T: Element> {
    name: &'static str,
    array: PyReadonlyArrayDyn<'py, T>,
}

impl<'py, T: Element> Read<'py, T> {
    pub fn new(name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let typed = typed::<T>(name, array)?;
        let array = typed.try_readonly().map_err(|e| PyValueError::new_err(format!("{name}: {e}")))?;
        Ok(Self { name, array })
    }

    pub fn optional(name: &'static str, array: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        array.map(|a| Self::new(name, a)).transpose()
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    pub fn slice(&self) -> PyResult<&[T]> {
        self.array.as_slice().map_err(|_| contiguous(self.name))
    }
}

/// A borrowed writable array of one type.
pub struct Write<'py, T: Element> {
    name: &'static str,
    array: PyReadwriteArrayDyn<'py, T>,
}

impl<'py, T: Element> Write<'py, T> {
    pub fn new(name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let typed = typed::<T>(name, array)?;
        // Refuses arrays that are not writable, and those that another call is reading or writing at this moment.
        let array = typed.try_readwrite().map_err(|e| PyValueError::new_err(format!("{name}: {e}")))?;
        Ok(Self { name, array })
    }

    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    pub fn slice(&mut self) -> PyResult<&mut [T]> {
        self.array.as_slice_mut().map_err(|_| contiguous(self.name))
    }
}

/// A borrowed writable array of floats.
pub enum Output<'py> {
    F32(Write<'py, f32>),
    Bf16(Write<'py, u16>),
    F16(Write<'py, f16>),
}

impl<'py> Output<'py> {
    pub fn new(name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if array.cast::<PyArrayDyn<u16>>().is_ok() {
            Ok(Self::Bf16(Write::new(name, array)?))
        } else if array.cast::<PyArrayDyn<f16>>().is_ok() {
            Ok(Self::F16(Write::new(name, array)?))
        } else {
            Ok(Self::F32(Write::new(name, array)?))
        }
    }

    pub fn elements(&mut self) -> PyResult<ElementsMut<'_>> {
        Ok(match self {
            Self::F32(x) => ElementsMut::F32(x.slice()?),
            Self::Bf16(x) => ElementsMut::Bf16(x.slice()?.reinterpret_cast_mut::<bf16>()),
            Self::F16(x) => ElementsMut::F16(x.slice()?),
        })
    }
}

/// The dimensions of `shape`, which must have `N` of them.
pub fn dims<const N: usize>(name: &str, shape: &[usize]) -> PyResult<[usize; N]> {
    shape
        .try_into()
        .map_err(|_| PyValueError::new_err(format!("{name}: expected {N} dimensions, got {shape:?}")))
}

fn typed<'a, 'py, T: Element>(
    name: &str,
    array: &'a Bound<'py, PyAny>,
) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
    array.cast::<PyArrayDyn<T>>().map_err(|_| {
        let got = array
            .cast::<PyUntypedArray>()
            .map_or_else(|_| array.get_type().to_string(), |a| a.dtype().to_string());
        PyValueError::new_err(format!("{name}: expected an array of {}, got {got}", T::get_dtype(array.py())))
    })
}

fn contiguous(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name}: expected a C-contiguous array, got one with other strides"))
}
