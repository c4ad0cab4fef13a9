//! Arguments that come in several forms.

use numpy::{Element, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Token ids from an integer array or a sequence of ints.
pub fn ids(name: &str, values: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    fn narrow<T: Copy + TryInto<u32> + std::fmt::Display>(name: &str, values: &[T]) -> PyResult<Vec<u32>> {
        let id = |&value: &T| {
            value.try_into().map_err(|_| {
                PyValueError::new_err(format!("{name}: expected ids from 0 to 2147483647, got {value}"))
            })
        };
        values.iter().map(id).collect()
    }
    fn array<T: Copy + Element + TryInto<u32> + std::fmt::Display>(
        name: &str,
        values: &Bound<'_, PyAny>,
    ) -> Option<PyResult<Vec<u32>>> {
        let values: PyReadonlyArray1<'_, T> = values.extract().ok()?;
        let values: Vec<T> = values.as_array().iter().copied().collect(); // of any strides
        Some(narrow(name, &values))
    }
    if let Some(ids) = array::<u32>(name, values)
        .or_else(|| array::<i32>(name, values))
        .or_else(|| array::<i64>(name, values))
    {
        return ids;
    }
    let values: Vec<i64> = values.extract().map_err(|_| {
        PyTypeError::new_err(format!(
            "{name}: expected a list of ints or an integer array, got {}",
            described(values)
        ))
    })?;
    narrow(name, &values)
}

/// A value's type, with dtype and shape where it has them.
pub fn described(value: &Bound<'_, PyAny>) -> String {
    let name = value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string());
    match (value.getattr("dtype"), value.getattr("shape")) {
        (Ok(dtype), Ok(shape)) => format!("{name} of {dtype} {shape}"),
        _ => name,
    }
}
