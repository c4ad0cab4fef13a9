//! The arguments of this module's classes: readers for `from_py_with`, each of which knows its argument's name.

use numpy::{PyReadonlyArray1, PyUntypedArray};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::arguments::{count, described, integer, number, optional_count, text};

macro_rules! readers {
    ($($read:ident -> $type:ty: $($name:ident),+;)+) => {
        $($(#[allow(clippy::needless_lifetimes)] // text alone borrows
        pub fn $name<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<$type> {
            $read(stringify!($name), value)
        })+)+
    };
}

readers! {
    count -> usize: num_blocks, block_size, max_batched_tokens, max_num_seqs, max_tokens;
    optional_count -> Option<usize>: max_waiting, max_model_len;
    integer -> i64: priority;
    number -> f64: watermark;
    text -> &'a str: request_id, policy;
}

/// The sampled ids: int32 [n], copied.
pub fn sampled_ids(values: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    let expected = || format!("sampled_ids: expected an int32 array [n], got {}", described(values));
    if values.cast::<PyUntypedArray>().is_err() {
        return Err(PyTypeError::new_err(expected()));
    }
    let array: PyReadonlyArray1<'_, i32> = values.extract().map_err(|_| PyValueError::new_err(expected()))?;
    match array.as_slice() {
        Ok(ids) => Ok(ids.to_vec()),
        Err(_) => array.call_method0("tolist")?.extract(), // strided or not aligned
    }
}
