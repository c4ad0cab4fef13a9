//! `Tokenizer`: the binding of `heedful_core::tokenizer`.

use std::path::PathBuf;
use std::sync::Arc;

use heedful_core::threads;
use heedful_core::tokenizer as core;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict, PyString};

use crate::arguments::count;
use crate::errors;
use crate::texts::{self, Allowed, Errors, Input, unicode_only};
use crate::token_ids::Ids;
use crate::token_stream::TokenStream;
use crate::token_texts::{TokenTexts, text};

/// Longer texts are encoded with the GIL released; for shorter ones, giving it back and taking it costs more than the work.
const RELEASE_BYTES: usize = 1024;
/// So much of a batch's text for each of several threads is made ready at a time.
const PART_BYTES: usize = 1 << 20;

/// Ids: uint32 [N].
type IdArray<'py> = Bound<'py, PyArray1<u32>>;

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
        Self::made(py.detach(|| threads::install(load)).map_err(errors::threads)?)
    }

    fn made(core: core::Result<core::Tokenizer>) -> PyResult<Self> {
        Ok(Self { core: Arc::new(core.map_err(errors::tokenizer)?), texts: Arc::default() })
    }

    fn encoded(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: &Allowed,
        errors: Errors,
    ) -> PyResult<Vec<u32>> {
        let input = Input::new("text", text, errors)?;
        let text = input.text();
        run(py, text.len(), || self.core.encode(text, allowed_special.options(add_special_tokens)))
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

/// Runs `work` on so many bytes of text: with the GIL if they are few, over the thread pool if they are many.
fn run<R: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce() -> core::Result<R> + Send) -> PyResult<R> {
    let result = if bytes <= RELEASE_BYTES {
        work()
    } else if bytes < core::PARALLEL_BYTES || threads::num_threads().map_err(errors::threads)? == 1 {
        py.detach(work)
    } else {
        py.detach(|| threads::install(work)).map_err(errors::threads)?
    };
    result.map_err(errors::tokenizer)
}

/// Runs `work` on many texts, a part of them at a time, so that what one is converted in serves the next.
fn batch(
    py: Python<'_>,
    texts: &[Bound<'_, PyAny>],
    errors: Errors,
    mut work: impl FnMut(&[core::Text<'_>]) -> core::Result<()> + Send,
) -> PyResult<()> {
    let part = match threads::num_threads().map_err(errors::threads)? {
        1 => core::PARALLEL_BYTES,
        threads => threads * PART_BYTES,
    };
    let mut values = texts.iter().enumerate();
    while values.len() > 0 {
        let mut inputs = Vec::new();
        let mut bytes = 0;
        while bytes < part
            && let Some((index, value)) = values.next()
        {
            let input = Input::new(format_args!("texts[{index}]"), value, errors)?;
            bytes += input.text().len();
            inputs.push(input);
        }
        let texts: Vec<core::Text<'_>> = inputs.iter().map(Input::text).collect();
        run(py, bytes, || work(&texts))?;
    }
    Ok(())
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
    ///         that no text can forge a control token; "all", Hugging Face's ids; a set of added tokens; or "error", which
    ///         refuses a text with one in it.
    ///     errors: what bytes that are not UTF-8 become: "strict" refuses them; "replace" puts U+FFFD for each maximal
    ///         part of a character, as `bytes.decode` does; "raw" makes each its byte's token, so that `decode_bytes`
    ///         gives them back, and encodes what lies between by itself.
    ///
    /// Returns:
    ///     A list of ids.
    ///
    /// Raises:
    ///     ValueError: the text is not Unicode, an allowed token is unknown, or there is a token where none may be.
    ///     TypeError: an argument has another type.
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<Vec<u32>> {
        self.encoded(py, text, add_special_tokens, &allowed_special, errors)
    }

    /// `encode`, as an array: uint32 [N].
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(self.encoded(py, text, add_special_tokens, &allowed_special, errors)?.into_pyarray(py))
    }

    /// Number of ids that `encode` gives.
    #[pyo3(signature = (text, *, add_special_tokens=false, allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, text, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn count(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<usize> {
        Ok(self.encoded(py, text, add_special_tokens, &allowed_special, errors)?.len())
    }

    /// The ids of many texts, over the threads of `set_num_threads`; arguments and errors as for `encode`.
    ///
    /// Returns:
    ///     A list of ids for each text.
    #[pyo3(signature = (texts, *, add_special_tokens=false, allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, texts, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<Vec<Vec<u32>>> {
        let options = allowed_special.options(add_special_tokens);
        let texts = texts::list_of("texts", texts)?;
        let mut rows = Vec::with_capacity(texts.len());
        batch(py, &texts, errors, |texts| {
            rows.extend(self.core.encode_batch(texts, options)?);
            Ok(())
        })?;
        Ok(rows)
    }

    /// `encode_batch` in one buffer, which nothing has to be made for each text for.
    ///
    /// Returns:
    ///     `(ids, row_offsets)`: uint32 [N] and int64 [B + 1]; the ids of text i are `ids[row_offsets[i]:row_offsets[i + 1]]`.
    #[pyo3(signature = (texts, *, add_special_tokens=false, allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, texts, *, add_special_tokens=False, allowed_special='none', errors='strict')")]
    fn encode_batch_flat<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<(IdArray<'py>, Bound<'py, PyArray1<i64>>)> {
        let options = allowed_special.options(add_special_tokens);
        let texts = texts::list_of("texts", texts)?;
        let mut flat = core::Flat::with_room(texts.len(), texts.iter().map(texts::least_bytes).sum());
        batch(py, &texts, errors, |texts| self.core.encode_batch_flat(texts, options, &mut flat))?;
        Ok((flat.ids.into_pyarray(py), flat.row_offsets.into_pyarray(py)))
    }

    /// The ids of a text and the place of each in it, as Hugging Face's `Encoding.offsets` has it.
    ///
    /// Args:
    ///     text: a string, or UTF-8 bytes.
    ///     unit: what offsets count: "char", Unicode characters, or "byte", bytes of UTF-8.
    ///     add_special_tokens, allowed_special, errors: as for `encode`; "raw" is not for bytes that are not UTF-8.
    ///
    /// Returns:
    ///     `(ids, offsets)`: uint32 [N] and uint32 [N, 2], begin and end of each id. Ids inside one character have its
    ///     place, tokens put around the text (0, 0).
    ///
    /// Raises:
    ///     ValueError: as for `encode`, or an unknown unit.
    ///     TypeError: an argument has another type.
    #[pyo3(signature = (text, *, unit="char", add_special_tokens=false, allowed_special=Allowed::None,
                        errors=Errors::Strict),
           text_signature = "(self, text, *, unit='char', add_special_tokens=False, allowed_special='none', \
                             errors='strict')")]
    fn encode_with_offsets<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyAny>,
        unit: &str,
        add_special_tokens: bool,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<(IdArray<'py>, Bound<'py, PyArray2<u32>>)> {
        let unit = match unit {
            "char" => core::Unit::Char,
            "byte" => core::Unit::Byte,
            other => {
                return Err(PyValueError::new_err(format!("unit: expected char or byte, got {other:?}")));
            }
        };
        let text = unicode_only("text", text, errors)?;
        let options = allowed_special.options(add_special_tokens);
        let (ids, offsets) = run(py, text.len(), || self.core.encode_with_offsets(&text, options, unit))?;
        let shape = [offsets.len(), 2];
        let offsets = offsets.into_flattened().into_pyarray(py).reshape(shape)?;
        Ok((ids.into_pyarray(py), offsets))
    }

    /// The ids of several texts as one, in which added tokens are recognised in trusted texts alone: what a user wrote
    /// never becomes a control token, not even together with the texts around it.
    ///
    /// Args:
    ///     segments: pairs of a string and whether it is trusted.
    ///     add_special_tokens: put the post-processor's tokens around the whole.
    ///
    /// Returns:
    ///     A list of ids. Where no untrusted text holds an added token, they are those of the texts joined. A normalizer
    ///     works on each stretch of trusted or of untrusted texts by itself.
    ///
    /// Raises:
    ///     ValueError: a text is not Unicode.
    ///     TypeError: these are no pairs of a string and a bool.
    ///
    /// Example:
    ///     >>> from heedful import Tokenizer, builtin
    ///     >>> tokenizer = Tokenizer.from_pretrained(builtin.path())
    ///     >>> end = "<｜end▁of▁sentence｜>"
    ///     >>> ids = tokenizer.encode_segments([(end, False), (end, True)])
    ///     >>> ids.count(tokenizer.token_to_id(end))
    ///     1
    #[pyo3(signature = (segments, *, add_special_tokens=false))]
    fn encode_segments(
        &self,
        py: Python<'_>,
        segments: Vec<(PyBackedStr, bool)>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<u32>> {
        let bytes = segments.iter().map(|(text, _)| text.len()).sum();
        run(py, bytes, || self.core.encode_segments(&segments, add_special_tokens))
    }

    /// The longest part of a text that has at most so many tokens, cut between two tokens and between two characters.
    ///
    /// Args:
    ///     text: a string, or UTF-8 bytes.
    ///     max_tokens: tokens that the part may have when it is encoded by itself.
    ///     side: which end is cut off: "right" keeps the beginning, "left" the end.
    ///     allowed_special, errors: as for `encode`; "raw" is not for bytes that are not UTF-8.
    ///
    /// Returns:
    ///     The part, a string.
    ///
    /// Raises:
    ///     ValueError: as for `encode`, an unknown side, or a negative number.
    ///     TypeError: an argument has another type.
    #[pyo3(signature = (text, max_tokens, *, side="right", allowed_special=Allowed::None, errors=Errors::Strict),
           text_signature = "(self, text, max_tokens, *, side='right', allowed_special='none', errors='strict')")]
    fn truncate_to(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        max_tokens: &Bound<'_, PyAny>,
        side: &str,
        allowed_special: Allowed,
        errors: Errors,
    ) -> PyResult<String> {
        let side = match side {
            "right" => core::Side::Right,
            "left" => core::Side::Left,
            other => {
                return Err(PyValueError::new_err(format!("side: expected right or left, got {other:?}")));
            }
        };
        let max_tokens = count("max_tokens", max_tokens)?;
        let text = unicode_only("text", text, errors)?;
        let part = run(py, text.len(), || {
            self.core.truncate_to(&text, max_tokens, side, allowed_special.special())
        })?;
        Ok(part.to_owned())
    }

    /// Bytes of memory in which each thread that encodes keeps pieces of texts, to find them again quickly.
    #[classattr]
    const PIECE_CACHE_BYTES: usize = core::PIECE_CACHE_BYTES;

    /// Forgets the pieces of texts that are kept.
    fn clear_cache(&self) {
        self.core.clear_cache();
    }

    /// Writes the compiled form of this tokenizer to a file, from which `from_cache` loads it at once.
    ///
    /// Args:
    ///     path: the file; what was there is replaced when the new one is whole.
    ///
    /// Raises:
    ///     OSError: the file cannot be written.
    fn save_cache(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.core.save_cache(&path)).map_err(errors::tokenizer)
    }

    /// Loads a file that `save_cache` wrote. The file is mapped: processes share its memory, and it must not be rewritten
    /// while one of them uses it (`save_cache` replaces files and rewrites none).
    ///
    /// Args:
    ///     path: the file.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     ValueError: it is damaged, or of another version of heedful.
    #[staticmethod]
    fn from_cache(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Self::made(py.detach(|| core::Tokenizer::from_cache(&path)))
    }

    /// The compiled form, which `from_bytes` takes: what `save_cache` writes, and what pickling uses.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.core.compiled_form())
    }

    /// A tokenizer from its compiled form.
    ///
    /// Args:
    ///     data: what `to_bytes` gave.
    ///
    /// Raises:
    ///     ValueError: it is damaged, or of another version of heedful.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: PyBackedBytes) -> PyResult<Self> {
        Self::made(py.detach(|| core::Tokenizer::from_compiled_form(&data)))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let py = slf.py();
        Ok((py.get_type::<Self>().getattr("from_bytes")?, (slf.get().to_bytes(py),)))
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

    /// This tokenizer with the methods of `tokenizers.Tokenizer`: see `heedful.compat.hugging_face`.
    fn as_hf<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let module = slf.py().import("heedful.compat.hugging_face")?;
        module.getattr("HuggingFaceTokenizer")?.call1((slf,))
    }

    /// This tokenizer with the methods of `tiktoken.Encoding`: see `heedful.compat.tiktoken`.
    ///
    /// Args:
    ///     name: what it is called.
    #[pyo3(signature = (name=None))]
    fn as_tiktoken<'py>(slf: &Bound<'py, Self>, name: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        let module = slf.py().import("heedful.compat.tiktoken")?;
        module.getattr("TiktokenEncoding")?.call1((slf, name))
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
