//! `TokenStream` and `push_batch`: bindings of `heedful_core::tokenizer::TokenStream`.

use std::sync::Arc;

use heedful_core::tokenizer as core;
use heedful_core::tokenizer::Piece;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

use crate::arguments::{self, described};
use crate::errors;
use crate::token_ids::RELEASE_IDS;
use crate::token_texts::{TokenTexts, text};

/// Decodes one sequence token by token, never giving half a character; made by `Tokenizer.stream`.
///
/// The texts of all `push` calls and of `flush`, together, equal `Tokenizer.decode` of all ids, up to the stop string if
/// there is one. Stop strings are looked for after each token: the first token that completes one ends the text where the
/// earliest of them begins; of several that begin there, it is the shortest. Text that may be the beginning of a stop string
/// is held back until that is decided. After a stop every text is empty.
///
/// One thread uses a stream at a time; a call while another one is at work in it raises RuntimeError.
///
/// Example:
///     >>> from heedful import Tokenizer, builtin
///     >>> tokenizer = Tokenizer.from_pretrained(builtin.path())
///     >>> stream = tokenizer.stream(stop="matters")
///     >>> "".join(stream.push(id) for id in tokenizer.encode("Attend only where it matters."))
///     'Attend only where it '
///     >>> stream.stopped
///     'matters'
#[pyclass(module = "heedful")]
pub struct TokenStream {
    tokenizer: Arc<core::Tokenizer>,
    texts: Arc<TokenTexts>,
    state: core::TokenStream,
}

impl TokenStream {
    /// A stream at its beginning; the arguments are those of `Tokenizer.stream`.
    pub fn new(
        tokenizer: &Arc<core::Tokenizer>,
        texts: &Arc<TokenTexts>,
        skip_special_tokens: bool,
        prompt_ids: Option<&Bound<'_, PyAny>>,
        stop: Option<&Bound<'_, PyAny>>,
        include_stop: bool,
    ) -> PyResult<Self> {
        let mut state = core::TokenStream::new(skip_special_tokens);
        if let Some(ids) = prompt_ids {
            state = state.with_prompt(tokenizer, &arguments::ids("prompt_ids", ids)?);
        }
        let stop = stop.map_or_else(|| Ok(Vec::new()), stop_strings)?;
        if !stop.is_empty() {
            let stop = core::StopStrings::new(stop).map_err(errors::tokenizer)?;
            state = state.with_stop(Arc::new(stop), include_stop);
        }
        Ok(Self { tokenizer: Arc::clone(tokenizer), texts: Arc::clone(texts), state })
    }

    fn pushed<'py>(&mut self, py: Python<'py>, id: u32) -> PyResult<Bound<'py, PyString>> {
        match self.state.push(&self.tokenizer, id) {
            Piece::Token(token) => self.texts.get(py, id, token),
            Piece::Text(other) => text(py, other.as_bytes()),
        }
    }
}

#[pymethods]
impl TokenStream {
    /// The text that this id completes; empty while a character is unfinished or held back, and after a stop.
    ///
    /// Raises:
    ///     ValueError: the id is negative or of more than 32 bits.
    ///     RuntimeError: the stream is in use.
    fn push<'py>(slf: &Bound<'py, Self>, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
        let id = token_id(id)?;
        used(slf, "stream")?.pushed(slf.py(), id)
    }

    /// The text that these ids complete, one behind the other: a list of ints or an integer array [N].
    ///
    /// Raises:
    ///     ValueError: an id is negative or of more than 32 bits; then none has been pushed.
    ///     TypeError: these are no ids.
    ///     RuntimeError: the stream is in use.
    fn push_many<'py>(slf: &Bound<'py, Self>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
        let ids = arguments::ids("ids", ids)?;
        let mut stream = used(slf, "stream")?;
        let TokenStream { tokenizer, state, .. } = &mut *stream;
        let mut push = || state.push_many(tokenizer, &ids);
        let pushed = if ids.len() <= RELEASE_IDS { push() } else { slf.py().detach(push) };
        text(slf.py(), pushed.as_bytes())
    }

    /// What is still held back: text that began no stop string after all, and U+FFFD for an unfinished character. The stream
    /// is at its beginning again, without a prompt; only one that has stopped stays so.
    ///
    /// Raises:
    ///     RuntimeError: the stream is in use.
    fn flush<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyString>> {
        text(slf.py(), used(slf, "stream")?.state.flush().as_bytes())
    }

    /// The stop string that ended the text; None while there is none. RuntimeError if the stream is in use.
    #[getter]
    fn stopped<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, PyString>>> {
        let stream = used(slf, "stream")?;
        stream.state.stopped().map(|stop| text(slf.py(), stop.as_bytes())).transpose()
    }

    /// A stream in the same state that goes on by itself: one prefix, several continuations.
    ///
    /// Raises:
    ///     RuntimeError: the stream is in use.
    fn copy(slf: &Bound<'_, Self>) -> PyResult<Self> {
        let stream = used(slf, "stream")?;
        Ok(Self {
            tokenizer: Arc::clone(&stream.tokenizer),
            texts: Arc::clone(&stream.texts),
            state: stream.state.clone(),
        })
    }

    fn __copy__(slf: &Bound<'_, Self>) -> PyResult<Self> {
        Self::copy(slf)
    }

    fn __deepcopy__(slf: &Bound<'_, Self>, _memo: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::copy(slf)
    }
}

/// Pushes one token to each of many streams, in one call.
///
/// Args:
///     streams: a list of TokenStream, each of any tokenizer and none twice.
///     ids: as many ids: a list of ints or an integer array [N].
///
/// Returns:
///     The text of each, as `TokenStream.push` gives it.
///
/// Raises:
///     ValueError: the lengths differ, or an id is negative or of more than 32 bits.
///     TypeError: an argument has another type.
///     RuntimeError: a stream is in use or in the list twice. In all these cases nothing has been pushed.
///
/// Example:
///     >>> from heedful import Tokenizer, builtin, push_batch
///     >>> tokenizer = Tokenizer.from_pretrained(builtin.path())
///     >>> push_batch([tokenizer.stream(), tokenizer.stream()], tokenizer.encode("ab")[:1] * 2)
///     ['ab', 'ab']
#[pyfunction]
fn push_batch<'py>(
    py: Python<'py>,
    streams: &Bound<'py, PyList>,
    ids: &Bound<'py, PyAny>,
) -> PyResult<Vec<Bound<'py, PyString>>> {
    let ids = arguments::ids("ids", ids)?;
    let mut used_streams = Vec::with_capacity(streams.len());
    for (place, stream) in streams.iter().enumerate() {
        let Ok(stream) = stream.cast_into::<TokenStream>() else {
            let got = streams.get_item(place).map_or_else(|_| "nothing".into(), |stream| described(&stream));
            return Err(PyTypeError::new_err(format!("streams[{place}]: expected a TokenStream, got {got}")));
        };
        let stream = stream.try_borrow_mut();
        used_streams.push(stream.map_err(|_| in_use(&format!("streams[{place}]")))?);
    }
    if used_streams.len() != ids.len() {
        let (expected, got) = (used_streams.len(), ids.len());
        return Err(PyValueError::new_err(format!(
            "ids: expected one for each of {expected} streams, got {got}"
        )));
    }
    used_streams.iter_mut().zip(ids).map(|(stream, id)| stream.pushed(py, id)).collect()
}

/// Adds this file's names to `heedful._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<TokenStream>()?;
    module.add_function(wrap_pyfunction!(push_batch, module)?)
}

fn used<'py>(stream: &Bound<'py, TokenStream>, name: &str) -> PyResult<PyRefMut<'py, TokenStream>> {
    stream.try_borrow_mut().map_err(|_| in_use(name))
}

fn in_use(name: &str) -> PyErr {
    PyRuntimeError::new_err(format!(
        "{name}: expected one that no other call is using (copy() makes a second one)"
    ))
}

fn token_id(id: &Bound<'_, PyAny>) -> PyResult<u32> {
    let id = arguments::integer("id", id)?;
    u32::try_from(id).map_err(|_| {
        let bound = if id < 0 { "least 0".into() } else { format!("most {}", u32::MAX) };
        PyValueError::new_err(format!("id: expected an id of at {bound}, got {id}"))
    })
}

/// The argument `stop`: a string or strings.
fn stop_strings(stop: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
    if stop.is_instance_of::<PyString>() {
        return Ok(vec![arguments::text("stop", stop)?.to_owned()]);
    }
    let Ok(strings) = stop.try_iter() else {
        let got = described(stop);
        return Err(PyTypeError::new_err(format!("stop: expected a string or strings, got {got}")));
    };
    let named = |(place, string): (usize, PyResult<Bound<'_, PyAny>>)| {
        arguments::text(&format!("stop[{place}]"), &string?).map(str::to_owned)
    };
    strings.enumerate().map(named).collect()
}
