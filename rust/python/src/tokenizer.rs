//! `Tokenizer`: the binding of `heedful_core::tokenizer`.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use heedful_core::threads;
use heedful_core::tokenizer as core;
use heedful_core::tokenizer::{AllowedSpecial, EncodeOptions};
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use crate::arguments::described;
use crate::errors;
use crate::token_ids::Ids;
use crate::token_stream::TokenStream;
use crate::token_texts::{TokenTexts, text};

/// Longer texts are encoded with the GIL released; for shorter ones, giving it back and taking it costs more than the work.
const RELEASE_BYTES: usize = 1024;

/// Byte-level BPE with the ids of Hugging Face `tokenizers`.
///
/// Immutable: one object serves any number of threads. Made by `from_file`, `from_pretrained`, `from_str` or
/// `from_tiktoken`; a file that asks for something that would not be computed exactly is refused with its name.
///
/// Example:
///     >>> from heedful import Tokenizer, builtin
///     >>> tokenizer = Tokenizer.from_pretrained(builtin.path())
///     >>> tokenizer.decode(tokenizer.encode("Attend only where it matters."))
///     'Attend only where it matters.'
#[pyclass(frozen, module = "heedful")]
pub struct Tokenizer {
    core: Arc<core::Tokenizer>,
    texts: Arc<TokenTexts>,
}

impl Tokenizer {
    fn load(py: Python<'_>, load: impl FnOnce() -> core::Result<core::Tokenizer> + Send) -> PyResult<Self> {
        let loaded = py.detach(|| threads::install(load)).map_err(errors::threads)?;
        Ok(Self { core: Arc::new(loaded.map_err(errors::tokenizer)?), texts: Arc::default() })
    }

    fn encoded(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: &Allowed,
        errors: &str,
    ) -> PyResult<Vec<u32>> {
        let text = unicode("text", text, errors)?;
        let encode = || self.core.encode(&text, allowed_special.options(add_special_tokens));
        let ids = if text.len() <= RELEASE_BYTES { encode() } else { py.detach(encode) };
        ids.map_err(errors::tokenizer)
    }

    fn added<'py>(
        &self,
        py: Python<'py>,
        wanted: impl Fn(&core::AddedToken) -> bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let tokens = PyDict::new(py);
        for token in self.core.added_tokens().filter(|token| wanted(token)) {
            tokens.set_item(&token.content, token.id)?;
        }
        Ok(tokens)
    }
}

/// The argument `allowed_special`.
enum Allowed {
    None,
    All,
    These(HashSet<String>),
}

impl Allowed {
    fn options(&self, add_special_tokens: bool) -> EncodeOptions<'_> {
        let allowed_special = match self {
            Self::None => AllowedSpecial::None,
            Self::All => AllowedSpecial::All,
            Self::These(names) => AllowedSpecial::These(names),
        };
        EncodeOptions { add_special_tokens, allowed_special }
    }
}

impl FromPyObject<'_, '_> for Allowed {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let expected = "allowed_special: expected \"none\", \"all\" or a set of added tokens, got";
        if let Ok(name) = value.cast::<PyString>() {
            return match name.to_str()? {
                "none" => Ok(Self::None),
                "all" => Ok(Self::All),
                other => Err(PyValueError::new_err(format!("{expected} {other:?}"))),
            };
        }
        let names = value.try_iter().and_then(|names| names.map(|name| name?.extract()).collect());
        names.map(Self::These).map_err(|_| PyTypeError::new_err(format!("{expected} {}", described(&value))))
    }
}

/// A text argument: a string, or UTF-8 bytes.
fn unicode<'a>(name: &str, value: &'a Bound<'_, PyAny>, errors: &str) -> PyResult<Cow<'a, str>> {
    if !matches!(errors, "strict" | "replace") {
        return Err(PyValueError::new_err(format!("errors: expected strict or replace, got {errors:?}")));
    }
    if let Ok(text) = value.cast::<PyString>() {
        return match text.to_str() {
            Ok(text) => Ok(Cow::Borrowed(text)),
            Err(_) if errors == "replace" => {
                // A lone surrogate, which only such strings of Python hold.
                Ok(Cow::Owned(text.to_string_lossy().into_owned()))
            }
            Err(error) => Err(PyValueError::new_err(format!("{name}: expected Unicode text: {error}"))),
        };
    }
    let Ok(bytes) = value.cast::<PyBytes>() else {
        return Err(PyTypeError::new_err(format!(
            "{name}: expected a string or bytes, got {}",
            described(value)
        )));
    };
    match std::str::from_utf8(bytes.as_bytes()) {
        Ok(text) => Ok(Cow::Borrowed(text)),
        Err(_) if errors == "replace" => Ok(String::from_utf8_lossy(bytes.as_bytes())),
        Err(error) => Err(PyValueError::new_err(format!(
            "{name}: expected UTF-8 text, got another byte at {} (errors=\"replace\" puts U+FFFD there)",
            error.valid_up_to()
        ))),
    }
}

#[pymethods]
impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// Args:
    ///     path: the file.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     ValueError: it is damaged or cannot be served exactly; the message names the key.
    #[staticmethod]
    fn from_file(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Self::load(py, || core::Tokenizer::from_file(&path))
    }

    /// Reads tokenizer.json from a checkpoint's directory. Nothing else there is read: the file alone decides.
    ///
    /// Args:
    ///     directory: the directory, or the file itself.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     ValueError: it is damaged or cannot be served exactly; the message names the key.
    #[staticmethod]
    fn from_pretrained(py: Python<'_>, directory: PathBuf) -> PyResult<Self> {
        let path = if directory.is_dir() { directory.join("tokenizer.json") } else { directory };
        Self::from_file(py, path)
    }

    /// Reads the text of a tokenizer.json.
    ///
    /// Args:
    ///     json: the file's text.
    ///
    /// Raises:
    ///     ValueError: it is damaged or cannot be served exactly; the message names the key.
    #[staticmethod]
    fn from_str(py: Python<'_>, json: &str) -> PyResult<Self> {
        Self::load(py, || core::Tokenizer::from_json(json))
    }

    /// Reads a tiktoken file: lines of a token in base64, a space, and its rank, which is its id.
    ///
    /// Args:
    ///     path: the file.
    ///     pattern: the regular expression that cuts a text into pieces; what it does not match is a piece, too.
    ///     special_tokens: added tokens and their ids, which follow the ranks.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     ValueError: it is damaged, the pattern cannot be served exactly, or an id is taken.
    #[staticmethod]
    #[pyo3(signature = (path, pattern, special_tokens=None))]
    fn from_tiktoken(
        py: Python<'_>,
        path: PathBuf,
        pattern: &str,
        special_tokens: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let special_tokens = special_tokens
            .map_or_else(
                || Ok(Vec::new()),
                |tokens| tokens.iter().map(|(token, id)| Ok((token.extract()?, id.extract()?))).collect(),
            )
            .map_err(|_: PyErr| {
                PyTypeError::new_err("special_tokens: expected a dict from strings to ids of at least 0")
            })?;
        Self::load(py, || core::Tokenizer::from_tiktoken(&path, pattern, special_tokens))
    }

    /// The ids of a text.
    ///
    /// Args:
    ///     text: a string, or UTF-8 bytes.
    ///     add_special_tokens: put the post-processor's tokens (a BOS, say) around the text.
    ///     allowed_special: which added tokens are recognised in the text, those not flagged special included: "none", so
    ///         that no text can forge a control token; "all", Hugging Face's ids; or a set of added tokens.
    ///     errors: what bytes that are not UTF-8 become: "strict" refuses them, "replace" puts U+FFFD for each maximal
    ///         part of a character, as `bytes.decode` does.
    ///
    /// Returns:
    ///     A list of ids.
    ///
    /// Raises:
    ///     ValueError: the text is not Unicode, or an allowed token is unknown.
    ///     TypeError: an argument has another type.
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors="strict"),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: &str,
    ) -> PyResult<Vec<u32>> {
        self.encoded(py, text, add_special_tokens, &allowed_special, errors)
    }

    /// `encode`, as an array: uint32 [N].
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors="strict"),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: &str,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(self.encoded(py, text, add_special_tokens, &allowed_special, errors)?.into_pyarray(py))
    }

    /// Number of ids that `encode` gives.
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors="strict"),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn count(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: &str,
    ) -> PyResult<usize> {
        Ok(self.encoded(py, text, add_special_tokens, &allowed_special, errors)?.len())
    }

    /// The ids of many texts, over the threads of `set_num_threads`; arguments and errors as for `encode`.
    ///
    /// Returns:
    ///     A list of ids for each text.
    #[pyo3(signature = (texts, *, add_special_tokens=false, allowed_special=Allowed::None, errors="strict"),
           text_signature = "(self, texts, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: &str,
    ) -> PyResult<Vec<Vec<u32>>> {
        if texts.is_instance_of::<PyString>() || texts.is_instance_of::<PyBytes>() {
            let got = described(texts);
            return Err(PyTypeError::new_err(format!("texts: expected a list of texts, got one {got}")));
        }
        let values = texts.try_iter()?.collect::<PyResult<Vec<_>>>()?;
        let named = |(index, value)| unicode(&format!("texts[{index}]"), value, errors);
        let texts = values.iter().enumerate().map(named).collect::<PyResult<Vec<_>>>()?;
        let encode = || self.core.encode_batch(&texts, allowed_special.options(add_special_tokens));
        py.detach(|| threads::install(encode)).map_err(errors::threads)?.map_err(errors::tokenizer)
    }

    /// The text of ids.
    ///
    /// Args:
    ///     ids: a sequence of ids, or an integer array [N]. An id without a token adds nothing.
    ///     skip_special_tokens: leave out the tokens that the file flags as special.
    ///
    /// Returns:
    ///     The text; U+FFFD stands for bytes that are not UTF-8.
    ///
    /// Raises:
    ///     ValueError: an id is negative or of more than 32 bits.
    ///     TypeError: these are no ids.
    #[pyo3(signature = (ids, *, skip_special_tokens=false))]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        skip_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyString>> {
        let bytes = Ids::new("ids", ids)?.decode(py, &self.core, skip_special_tokens)?;
        text(py, &bytes)
    }

    /// The bytes of ids; arguments and errors as for `decode`.
    #[pyo3(signature = (ids, *, skip_special_tokens=false))]
    fn decode_bytes<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        skip_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &Ids::new("ids", ids)?.decode(py, &self.core, skip_special_tokens)?))
    }

    /// The texts of many sequences of ids; arguments and errors as for `decode`.
    #[pyo3(signature = (batch, *, skip_special_tokens=false))]
    fn decode_batch<'py>(
        &self,
        py: Python<'py>,
        batch: &Bound<'py, PyAny>,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<Bound<'py, PyString>>> {
        let texts = batch.try_iter()?.enumerate().map(|(row, ids)| {
            let bytes =
                Ids::new(&format!("batch[{row}]"), &ids?)?.decode(py, &self.core, skip_special_tokens)?;
            text(py, &bytes)
        });
        texts.collect()
    }

    /// A `TokenStream` at its beginning.
    ///
    /// Args:
    ///     skip_special_tokens: leave out the tokens that the file flags as special.
    ///     prompt_ids: ids of the text before it, as `decode` takes them. If they end inside a character, the stream
    ///         completes it: the prompt's text up to that character and the stream's texts are `decode` of all ids.
    ///     stop: a string or strings that end the text; see `TokenStream`.
    ///     include_stop: whether the stop string found is part of the text.
    ///
    /// Raises:
    ///     ValueError: a stop string is empty, or an id is negative or of more than 32 bits.
    ///     TypeError: an argument has another type.
    #[pyo3(signature = (*, skip_special_tokens=false, prompt_ids=None, stop=None, include_stop=false),
           text_signature = "(self, *, skip_special_tokens=False, prompt_ids=None, stop=(), include_stop=False)")]
    fn stream(
        &self,
        skip_special_tokens: bool,
        prompt_ids: Option<&Bound<'_, PyAny>>,
        stop: Option<&Bound<'_, PyAny>>,
        include_stop: bool,
    ) -> PyResult<TokenStream> {
        TokenStream::new(&self.core, &self.texts, skip_special_tokens, prompt_ids, stop, include_stop)
    }

    /// One more than the highest id.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.core.vocab_size()
    }

    /// The id of a token's string, as tokenizer.json writes it ("Ġthe" for " the"); None if there is none.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.core.token_to_id(token)
    }

    /// A token's string, as tokenizer.json writes it; None for an id without a token.
    fn id_to_token(&self, id: i64) -> Option<String> {
        self.core.id_to_token(id.try_into().ok()?)
    }

    /// Added tokens that the file flags as special, and their ids.
    #[getter]
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.added(py, |token| token.special)
    }

    /// All added tokens and their ids. Role and tool marks are often among them without being flagged special.
    #[getter]
    fn added_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.added(py, |_| true)
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.core.vocab_size())
    }
}

/// Adds this file's names to `heedful._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
