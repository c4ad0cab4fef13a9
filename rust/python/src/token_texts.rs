//! Decoded text as Python strings.

use std::sync::OnceLock;

use pyo3::exceptions::PyUnicodeDecodeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

/// Tokens from here on get a new string each time, so what is kept is bounded whatever the vocabulary.
const MAX_KEPT: usize = 1 << 18;
/// Tokens whose strings are kept together.
const PAGE: usize = 256;

type Page = [PyOnceLock<Py<PyString>>; PAGE];

/// The strings of tokens that were streamed before: making a string anew takes longer than all else in a `push`.
///
/// Pages are made when first needed, so a tokenizer that does not stream keeps nothing.
#[derive(Default)]
pub struct TokenTexts {
    pages: OnceLock<Vec<OnceLock<Box<Page>>>>,
}

impl TokenTexts {
    /// The string of token `id`, whose text is `token`.
    #[inline]
    pub fn get<'py>(&self, py: Python<'py>, id: u32, token: &str) -> PyResult<Bound<'py, PyString>> {
        let id = id as usize;
        if id >= MAX_KEPT {
            return PyString::from_bytes(py, token.as_bytes());
        }
        let pages = self.pages.get_or_init(|| (0..MAX_KEPT / PAGE).map(|_| OnceLock::new()).collect());
        let page = pages[id / PAGE].get_or_init(|| Box::new([const { PyOnceLock::new() }; PAGE]));
        let make = || Ok::<_, PyErr>(PyString::from_bytes(py, token.as_bytes())?.unbind());
        Ok(page[id % PAGE].get_or_try_init(py, make)?.bind(py).clone())
    }
}

/// A Python string of UTF-8, with U+FFFD for what is none.
pub fn text<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyString>> {
    match PyString::from_bytes(py, bytes) {
        Err(error) if error.is_instance_of::<PyUnicodeDecodeError>(py) => {
            PyString::from_bytes(py, String::from_utf8_lossy(bytes).as_bytes())
        }
        text => text,
    }
}
