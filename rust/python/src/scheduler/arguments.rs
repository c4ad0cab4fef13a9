//! The arguments of this module's classes, as the core takes them. Every error names its argument.

use numpy::{Element, PyArrayDescrMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PySequence;

/// Readers for `from_py_with`, each of which knows the name of its argument.
macro_rules! readers {
    ($($read:ident -> $type:ty: $($name:ident),+;)+) => {
        $($(pub fn $name<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<$type> {
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

/// Token ids: an integer array [len] or a sequence of ints, copied. `check_len` is asked before anything is.
pub fn ids(
    name: &str,
    values: &Bound<'_, PyAny>,
    check_len: impl FnOnce(usize) -> PyResult<()>,
) -> PyResult<Vec<u32>> {
    if let Ok(array) = values.cast::<PyUntypedArray>() {
        if array.ndim() != 1 || !matches!(array.dtype().kind(), b'i' | b'u') {
            let got = described(values);
            return Err(PyValueError::new_err(format!("{name}: expected an integer array [len], got {got}")));
        }
        check_len(array.len())?;
        return match array_ids::<i64>(name, array)
            .or_else(|| array_ids::<i32>(name, array))
            .or_else(|| array_ids::<u32>(name, array))
        {
            Some(ids) => ids,
            None => sequence_ids(name, array.call_method0("tolist")?.cast::<PySequence>()?, array.len()),
        };
    }
    let Ok(sequence) = values.cast::<PySequence>() else { return Err(no_ids(name, values)) };
    let len = sequence.len().map_err(|error| {
        renamed(error, values, || format!("{name}: expected fewer ids than memory can hold"))
    })?;
    check_len(len)?;
    sequence_ids(name, sequence, len)
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

/// Ids of an array that is of this type, contiguous and aligned.
fn array_ids<T: Element + Copy + TryInto<i32> + std::fmt::Display>(
    name: &str,
    array: &Bound<'_, PyUntypedArray>,
) -> Option<PyResult<Vec<u32>>> {
    let array: PyReadonlyArray1<'_, T> = array.extract().ok()?;
    Some(array.as_slice().ok()?.iter().map(|&id| checked(name, id)).collect())
}

fn sequence_ids(name: &str, values: &Bound<'_, PySequence>, len: usize) -> PyResult<Vec<u32>> {
    let mut ids = Vec::new();
    // A range can be longer than memory.
    ids.try_reserve_exact(len)
        .map_err(|_| PyMemoryError::new_err(format!("{name}: no memory for {len} ids")))?;
    for item in values.try_iter()? {
        let item = item?;
        let id: i64 = item.extract().map_err(|error: PyErr| {
            if error.is_instance_of::<PyTypeError>(item.py()) {
                no_ids(name, values)
            } else {
                renamed(error, &item, || id_range(name, "one beyond 64 bits"))
            }
        })?;
        ids.push(checked(name, id)?);
    }
    Ok(ids)
}

fn checked<T: Copy + TryInto<i32> + std::fmt::Display>(name: &str, id: T) -> PyResult<u32> {
    let small: Option<i32> = id.try_into().ok();
    small
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| PyValueError::new_err(id_range(name, &id.to_string())))
}

fn id_range(name: &str, got: &str) -> String {
    format!("{name}: expected ids from 0 to {}, got {got}", i32::MAX)
}

fn no_ids(name: &str, got: &Bound<'_, PyAny>) -> PyErr {
    PyTypeError::new_err(format!(
        "{name}: expected a list of ints or an integer array, got {}",
        described(got)
    ))
}

/// A count: an integer that is not negative. Whether it may be 0 is the core's to say.
fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let number = integer(name, value)?;
    usize::try_from(number)
        .map_err(|_| PyValueError::new_err(format!("{name}: expected a positive integer, got {number}")))
}

fn optional_count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    if value.is_none() { Ok(None) } else { count(name, value).map(Some) }
}

fn integer(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected an integer of 64 bits, got {}", described(value)))
    })
}

fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected a number, got {}", described(value)))
    })
}

fn text<'a>(name: &str, value: &'a Bound<'_, PyAny>) -> PyResult<&'a str> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected valid Unicode text, got {}", described(value)))
    })
}

/// The same kind of error with a text that names the argument; OverflowError becomes ValueError. What the caller's own code
/// raised stays as it is.
fn renamed(error: PyErr, value: &Bound<'_, PyAny>, text: impl FnOnce() -> String) -> PyErr {
    let py = value.py();
    if error.is_instance_of::<PyTypeError>(py) {
        PyTypeError::new_err(text())
    } else if error.is_instance_of::<PyOverflowError>(py) || error.is_instance_of::<PyUnicodeEncodeError>(py)
    {
        PyValueError::new_err(text())
    } else {
        error
    }
}

/// A value's type, with dtype and shape where it has them.
fn described(value: &Bound<'_, PyAny>) -> String {
    let name = value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string());
    match (value.getattr("dtype"), value.getattr("shape")) {
        (Ok(dtype), Ok(shape)) => format!("{name} of {dtype} {shape}"),
        _ => name,
    }
}
