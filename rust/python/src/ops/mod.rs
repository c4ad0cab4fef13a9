//! Bindings of the operators: `heedful_core::{attention, topk, cache}`.
//!
//! Every function writes to arrays that `heedful.ops` has allocated, so that memory errors are Python's. Argument checks
//! that depend on shapes are the core's own, with the names the user knows.

mod arrays;
mod attention;
mod index;
mod pages;

use heedful_core::argument::ArgumentError;
use heedful_core::simd::Level;
use heedful_core::threads;
use pyo3::prelude::*;

use crate::errors;

/// Runs `work` in the thread pool with the GIL released.
fn compute(py: Python<'_>, work: impl FnOnce() -> Result<(), ArgumentError> + Send) -> PyResult<()> {
    py.detach(|| threads::install(work)).map_err(errors::threads)?.map_err(errors::argument)
}

fn level() -> PyResult<Level> {
    Level::current().map_err(errors::argument)
}

/// Sets the number of threads of the CPU pool.
#[pyfunction]
fn set_num_threads(py: Python<'_>, n: usize) -> PyResult<()> {
    py.detach(|| threads::set_num_threads(n)).map_err(errors::threads)
}

/// Number of threads of the CPU pool.
#[pyfunction]
fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    py.detach(threads::num_threads).map_err(errors::threads)
}

/// Name of the instruction set the CPU operators run at.
#[pyfunction]
fn simd_level() -> PyResult<&'static str> {
    Ok(level()?.name())
}

/// Adds this folder's names to `heedful._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(get_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(simd_level, module)?)?;
    index::register(module)?;
    attention::register(module)?;
    pages::register(module)
}
