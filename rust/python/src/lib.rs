//! The module `heedful._core`: argument checks, zero-copy views, error conversion, and nothing else.
//!
//! One file a subject, each with a `register` that adds its classes and functions.

use pyo3::prelude::*;

mod arguments;
mod cache;
mod errors;
mod ops;
mod scheduler;
mod texts;
mod token_ids;
mod token_stream;
mod token_texts;
mod tokenizer;
mod utf8;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    tokenizer::register(module)?;
    token_stream::register(module)?;
    ops::register(module)?;
    cache::register(module)?;
    scheduler::register(module)
}
