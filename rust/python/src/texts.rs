//! The arguments of encoding: texts, what to do with bytes that are not UTF-8, and which added tokens are recognised.

use std::collections::HashSet;
use std::fmt::Display;

use heedful_core::tokenizer::{AllowedSpecial, EncodeOptions, Text};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::arguments::described;
use crate::utf8::{Utf8, length, utf8};

/// The argument `allowed_special`.
pub enum Allowed {
    None,
    All,
    Error,
    These(HashSet<String>),
}

impl Allowed {
    /// What the core takes.
    pub fn special(&self) -> AllowedSpecial<'_> {
        match self {
            Self::None => AllowedSpecial::None,
            Self::All => AllowedSpecial::All,
            Self::Error => AllowedSpecial::Error,
            Self::These(names) => AllowedSpecial::These(names),
        }
    }

    /// The same, with the other option.
    pub fn options(&self, add_special_tokens: bool) -> EncodeOptions<'_> {
        EncodeOptions { add_special_tokens, allowed_special: self.special() }
    }
}

impl FromPyObject<'_, '_> for Allowed {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let expected = "allowed_special: expected \"none\", \"all\", \"error\" or a set of added tokens, got";
        if let Ok(name) = value.cast::<PyString>() {
            return match name.to_str()? {
                "none" => Ok(Self::None),
                "all" => Ok(Self::All),
                "error" => Ok(Self::Error),
                other => Err(PyValueError::new_err(format!("{expected} {other:?}"))),
            };
        }
        let names = value.try_iter().and_then(|names| names.map(|name| name?.extract()).collect());
        names.map(Self::These).map_err(|_| PyTypeError::new_err(format!("{expected} {}", described(&value))))
    }
}

/// The argument `errors`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Errors {
    Strict,
    Replace,
    Raw,
}

impl FromPyObject<'_, '_> for Errors {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let expected = "errors: expected strict, replace or raw, got";
        let name = value
            .cast::<PyString>()
            .map_err(|_| PyTypeError::new_err(format!("{expected} {}", described(&value))))?;
        match name.to_str()? {
            "strict" => Ok(Self::Strict),
            "replace" => Ok(Self::Replace),
            "raw" => Ok(Self::Raw),
            other => Err(PyValueError::new_err(format!("{expected} {other:?}"))),
        }
    }
}

/// A text argument.
pub enum Input<'a> {
    Unicode(Utf8<'a>),
    /// Not UTF-8.
    Raw(&'a [u8]),
}

impl<'a> Input<'a> {
    /// Of a string, or of bytes.
    pub fn new(name: impl Display, value: &'a Bound<'_, PyAny>, errors: Errors) -> PyResult<Self> {
        match unicode(name, value, errors)? {
            Some(text) => Ok(Self::Unicode(text)),
            None => Ok(Self::Raw(value.cast::<PyBytes>()?.as_bytes())),
        }
    }

    /// What the core takes.
    pub fn text(&self) -> Text<'_> {
        match self {
            Self::Unicode(text) => Text::Unicode(text),
            Self::Raw(bytes) => Text::Raw(bytes),
        }
    }
}

/// A text argument that must be Unicode.
pub fn unicode_only<'a>(name: &str, value: &'a Bound<'_, PyAny>, errors: Errors) -> PyResult<Utf8<'a>> {
    unicode(name, value, errors)?.ok_or_else(|| {
        PyValueError::new_err(format!("{name}: expected UTF-8 text, which errors=\"raw\" does not ask for"))
    })
}

/// The text; None for bytes that are not UTF-8 where these are wanted as they are.
fn unicode<'a>(
    name: impl Display,
    value: &'a Bound<'_, PyAny>,
    errors: Errors,
) -> PyResult<Option<Utf8<'a>>> {
    if let Ok(text) = value.cast::<PyString>() {
        return match utf8(text) {
            Ok(text) => Ok(Some(text)),
            Err(_) if errors == Errors::Replace => {
                // A lone surrogate, which only such strings of Python hold.
                Ok(Some(text.to_string_lossy().into_owned().into()))
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
    match (std::str::from_utf8(bytes.as_bytes()), errors) {
        (Ok(text), _) => Ok(Some(Utf8::Borrowed(text))),
        (Err(_), Errors::Raw) => Ok(None),
        (Err(_), Errors::Replace) => Ok(Some(String::from_utf8_lossy(bytes.as_bytes()).into_owned().into())),
        (Err(error), Errors::Strict) => Err(PyValueError::new_err(format!(
            "{name}: expected UTF-8 text, got another byte at {} (errors=\"replace\" puts U+FFFD there)",
            error.valid_up_to()
        ))),
    }
}

/// How many bytes of UTF-8 a text is at least; 0 if it is none.
pub fn least_bytes(value: &Bound<'_, PyAny>) -> usize {
    match value.cast::<PyString>() {
        Ok(text) => length(text),
        Err(_) => value.cast::<PyBytes>().map_or(0, |bytes| bytes.as_bytes().len()),
    }
}

/// The texts of a list.
pub fn list_of<'py>(name: &str, values: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    if values.is_instance_of::<PyString>() || values.is_instance_of::<PyBytes>() {
        let got = described(values);
        return Err(PyTypeError::new_err(format!("{name}: expected a list of texts, got one {got}")));
    }
    values.try_iter()?.collect()
}
