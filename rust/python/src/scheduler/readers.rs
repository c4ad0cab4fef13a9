//! The arguments of this module's classes: readers for `from_py_with`, each of which knows its argument's name.

use numpy::{
    PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn, PyReadwriteArray2, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::arguments::{
    count, described, integer, number, optional_count, optional_number, optional_text, text,
};

macro_rules! readers {
    ($($read:ident -> $type:ty: $($name:ident),+;)+) => {
        $($(#[allow(clippy::needless_lifetimes)] // text alone borrows
        pub fn $name<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<$type> {
            $read(stringify!($name), value)
        })+)+
    };
}

readers! {
    count -> usize: num_blocks, block_size, max_batched_tokens, max_num_seqs, max_tokens, num_speculative_tokens,
        ageing_steps, shared_prefix_len, hot_rows, layer;
    optional_count -> Option<usize>: max_waiting, max_model_len, max_waiting_tokens, hash_seed, num_draft_blocks,
        num_latent_blocks, num_swap_blocks;
    integer -> i64: priority;
    number -> f64: watermark, swap_cost, context_cost, weight, now;
    optional_number -> Option<f64>: max_batched_cost, deadline;
    text -> &'a str: request_id, new_request_id, policy, preemption, eviction, tenant;
    optional_text -> Option<&'a str>: cache_salt;
}

/// `max_tokens` where it may be left out.
pub fn fork_max_tokens(value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    optional_count("max_tokens", value)
}

/// Names of forks: a list of texts.
pub fn fork_ids(values: &Bound<'_, PyAny>) -> PyResult<Vec<std::sync::Arc<str>>> {
    let wrong =
        || PyTypeError::new_err(format!("fork_ids: expected a list of names, got {}", described(values)));
    if values.is_instance_of::<pyo3::types::PyString>() {
        return Err(wrong());
    }
    let Ok(items) = values.try_iter() else { return Err(wrong()) };
    items.map(|item| text("fork_ids", &item?).map(Into::into)).collect()
}

/// An int32 array [n], read where it lies if it is contiguous.
pub enum Sampled<'py> {
    Array(PyReadonlyArray1<'py, i32>),
    Copied(Vec<i32>),
}

impl<'py> Sampled<'py> {
    pub fn as_slice(&self) -> &[i32] {
        match self {
            Self::Array(array) => array.as_slice().expect("it was contiguous when it came"),
            Self::Copied(ids) => ids,
        }
    }
}

/// The sampled ids: int32 [n].
pub fn sampled_ids<'py>(values: &Bound<'py, PyAny>) -> PyResult<Sampled<'py>> {
    let expected = || format!("sampled_ids: expected an int32 array [n], got {}", described(values));
    if values.cast::<PyUntypedArray>().is_err() {
        return Err(PyTypeError::new_err(expected()));
    }
    let array: PyReadonlyArray1<'_, i32> = values.extract().map_err(|_| PyValueError::new_err(expected()))?;
    match array.as_slice() {
        Ok(_) => Ok(Sampled::Array(array)),
        Err(_) => Ok(Sampled::Copied(array.call_method0("tolist")?.extract()?)), // strided or not aligned
    }
}

/// The drafts: int32 [B, K], copied, and K.
pub fn draft_ids(values: Option<&Bound<'_, PyAny>>) -> PyResult<Option<(Vec<i32>, usize)>> {
    let Some(values) = values else { return Ok(None) };
    let expected = || format!("draft_ids: expected an int32 array [B, K], got {}", described(values));
    if values.cast::<PyUntypedArray>().is_err() {
        return Err(PyTypeError::new_err(expected()));
    }
    let array: PyReadonlyArray2<'_, i32> = values.extract().map_err(|_| PyValueError::new_err(expected()))?;
    let width = array.shape()[1];
    let ids = match array.as_slice() {
        Ok(ids) => ids.to_vec(),
        Err(_) => array.call_method0("flatten")?.call_method0("tolist")?.extract()?,
    };
    Ok(Some((ids, width)))
}

/// The selected slots: int64, any shape, contiguous.
pub fn slots<'py>(values: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArrayDyn<'py, i64>> {
    let expected = || format!("slots: expected a contiguous int64 array, got {}", described(values));
    if values.cast::<PyUntypedArray>().is_err() {
        return Err(PyTypeError::new_err(expected()));
    }
    let array: PyReadonlyArrayDyn<'_, i64> =
        values.extract().map_err(|_| PyValueError::new_err(expected()))?;
    if array.as_slice().is_err() {
        return Err(PyValueError::new_err(expected()));
    }
    Ok(array)
}

/// A cache's memory: uint8 [num_blocks, bytes of a block]; of a latent cache with a host tier, that of the pages and of the host.
pub fn parts<'py, A>(
    values: &Bound<'py, PyDict>,
    read: impl Fn(&Bound<'py, PyAny>) -> PyResult<A>,
) -> PyResult<Vec<(String, A, Option<A>)>> {
    let one = |(name, value): (Bound<'py, PyAny>, Bound<'py, PyAny>)| {
        let (bytes, host) = match value.extract::<(Bound<'py, PyAny>, Bound<'py, PyAny>)>() {
            Ok((pages, host)) if value.is_instance_of::<PyTuple>() => (read(&pages)?, Some(read(&host)?)),
            _ => (read(&value)?, None),
        };
        Ok((text("parts", &name)?.to_string(), bytes, host))
    };
    values.iter().map(one).collect()
}

/// One array of a cache's memory.
pub fn part<'py>(values: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArray2<'py, u8>> {
    match values.extract::<PyReadonlyArray2<'py, u8>>() {
        Ok(array) if array.as_slice().is_ok() => Ok(array),
        _ => Err(no_part(values)),
    }
}

/// The same, to be written.
pub fn part_mut<'py>(values: &Bound<'py, PyAny>) -> PyResult<PyReadwriteArray2<'py, u8>> {
    match values.extract::<PyReadwriteArray2<'py, u8>>() {
        Ok(array) if array.as_slice().is_ok() => Ok(array),
        _ => Err(no_part(values)),
    }
}

fn no_part(values: &Bound<'_, PyAny>) -> PyErr {
    PyValueError::new_err(format!(
        "parts: expected contiguous uint8 arrays [num_blocks, bytes of a block] (of a latent cache with a host tier: a pair), got {}",
        described(values)
    ))
}
