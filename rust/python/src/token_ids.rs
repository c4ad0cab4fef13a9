//! Ids that are decoded: an array is read where it lies.

use heedful_core::tokenizer::{TokenId, Tokenizer};
use numpy::{PyReadonlyArray1, PyUntypedArray};
use pyo3::prelude::*;

use crate::arguments::{ids, refused};

/// More ids than these are decoded with the GIL released.
pub const RELEASE_IDS: usize = 1024;

/// Token ids: a contiguous array as it is, anything else copied.
pub enum Ids<'n, 'py> {
    Int64(&'n str, PyReadonlyArray1<'py, i64>),
    Int32(&'n str, PyReadonlyArray1<'py, i32>),
    UInt32(&'n str, PyReadonlyArray1<'py, u32>),
    Copied(Vec<u32>),
}

impl<'n, 'py> Ids<'n, 'py> {
    /// Takes an integer array [N] or a sequence of ints; `name` is the argument's.
    pub fn new(name: &'n str, values: &Bound<'py, PyAny>) -> PyResult<Self> {
        if values.cast::<PyUntypedArray>().is_ok() {
            if let Some(array) = contiguous(values) {
                return Ok(Self::Int64(name, array));
            }
            if let Some(array) = contiguous(values) {
                return Ok(Self::Int32(name, array));
            }
            if let Some(array) = contiguous(values) {
                return Ok(Self::UInt32(name, array));
            }
        }
        ids(name, values).map(Self::Copied)
    }

    /// Their bytes.
    pub fn decode(
        &self,
        py: Python<'_>,
        tokenizer: &Tokenizer,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<u8>> {
        match self {
            Self::Int64(name, array) => decode(py, tokenizer, name, array.as_slice()?, skip_special_tokens),
            Self::Int32(name, array) => decode(py, tokenizer, name, array.as_slice()?, skip_special_tokens),
            Self::UInt32(name, array) => decode(py, tokenizer, name, array.as_slice()?, skip_special_tokens),
            Self::Copied(ids) => decode(py, tokenizer, "ids", ids, skip_special_tokens),
        }
    }
}

/// An array of this type, contiguous and aligned.
fn contiguous<'py, T: numpy::Element>(values: &Bound<'py, PyAny>) -> Option<PyReadonlyArray1<'py, T>> {
    let array: PyReadonlyArray1<'py, T> = values.extract().ok()?;
    array.as_slice().is_ok().then_some(array)
}

fn decode<I: TokenId + std::fmt::Display + Sync + Send>(
    py: Python<'_>,
    tokenizer: &Tokenizer,
    name: &str,
    ids: &[I],
    skip_special_tokens: bool,
) -> PyResult<Vec<u8>> {
    let decode = || tokenizer.decode_bytes(ids, skip_special_tokens);
    let bytes = if ids.len() <= RELEASE_IDS { decode() } else { py.detach(decode) };
    bytes.map_err(|id| refused(name, id))
}
