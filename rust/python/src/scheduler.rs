//! Bindings of `heedful_core::scheduler`.

use pyo3::prelude::*;

/// Adds this file's names to `heedful._core`.
pub fn register(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
