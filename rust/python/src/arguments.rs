//! Arguments that come in several forms, and scalars. Every error names its argument.

use numpy::{Element, PyArrayDescrMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PySequence;

/// Token ids: an integer array [len] or a sequence of ints, copied.
pub fn ids(name: &str, values: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    ids_of_len(name, values, |_| Ok(()))
}

/// The same; `check_len` is asked before any is read.
pub fn ids_of_len(
    name: &str,
    values: &Bound<'_, PyAny>,
    check_len: impl FnOnce(usize) -> PyResult<()>,
) -> PyResult<Vec<u32>> {
    if let Ok(array) = values.cast::<PyUntypedArray>() {
        if array.ndim() != 1 || !matches!(array.dtype().kind(), b'i' | b'u') {
            return Err(no_ids(name, values));
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

/// A count: an integer that is not negative. Whether it may be 0 is the core's to say.
pub fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let number = integer(name, value)?;
    usize::try_from(number)
        .map_err(|_| PyValueError::new_err(format!("{name}: expected a positive integer, got {number}")))
}

/// A count, or None.
pub fn optional_count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    if value.is_none() { Ok(None) } else { count(name, value).map(Some) }
}

/// An integer.
pub fn integer(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected an integer of 64 bits, got {}", described(value)))
    })
}

/// A float.
pub fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected a number, got {}", described(value)))
    })
}

/// A float, or None.
pub fn optional_number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<f64>> {
    if value.is_none() { Ok(None) } else { number(name, value).map(Some) }
}

/// Text, or None.
pub fn optional_text<'a>(name: &str, value: &'a Bound<'_, PyAny>) -> PyResult<Option<&'a str>> {
    if value.is_none() { Ok(None) } else { text(name, value).map(Some) }
}

/// Text, borrowed.
pub fn text<'a>(name: &str, value: &'a Bound<'_, PyAny>) -> PyResult<&'a str> {
    value.extract().map_err(|error| {
        renamed(error, value, || format!("{name}: expected valid Unicode text, got {}", described(value)))
    })
}

/// A value's type, with dtype and shape where it has them.
pub fn described(value: &Bound<'_, PyAny>) -> String {
    let name = value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string());
    match (value.getattr("dtype"), value.getattr("shape")) {
        (Ok(dtype), Ok(shape)) => format!("{name} of {dtype} {shape}"),
        _ => name,
    }
}

/// Ids of an array that is of this type, contiguous and aligned.
fn array_ids<T: Element + Copy + TryInto<u32> + std::fmt::Display>(
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

/// Any 32 bits pass here; what an id above an int32 means is the core's to say.
fn checked<T: Copy + TryInto<u32> + std::fmt::Display>(name: &str, id: T) -> PyResult<u32> {
    id.try_into().map_err(|_| refused(name, id))
}

/// The error for a number that is no id.
pub fn refused(name: &str, id: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(id_range(name, &id.to_string()))
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
