//! Why a tokenizer cannot be loaded or a call cannot be served.

use std::io;

use thiserror::Error;

/// What went wrong; the text names the place in the file or the argument.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is damaged or contradicts itself.
    #[error("{place}: expected {expected}, got {got}")]
    Invalid {
        /// Where: the key's path, or the line.
        place: String,
        /// What must be there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// The file asks for something that would not be computed exactly, so it is refused.
    #[error("{place}: {construct} is not supported")]
    Unsupported {
        /// Where: the key's path.
        place: String,
        /// The construction.
        construct: String,
    },
    /// A wrong argument.
    #[error("{name}: expected {expected}, got {got}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// What it must be.
        expected: String,
        /// What came.
        got: String,
    },
}

impl TokenizerError {
    /// The same error at a place that is told better.
    pub(super) fn at(self, place: &str) -> Self {
        match self {
            Self::Invalid { expected, got, .. } => Self::Invalid { place: place.into(), expected, got },
            other => other,
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, TokenizerError>;

/// A [`TokenizerError::Invalid`].
pub(super) fn invalid(
    place: impl Into<String>,
    expected: impl Into<String>,
    got: impl Into<String>,
) -> TokenizerError {
    TokenizerError::Invalid { place: place.into(), expected: expected.into(), got: got.into() }
}

/// A [`TokenizerError::Unsupported`].
pub(super) fn unsupported(place: impl Into<String>, construct: impl Into<String>) -> TokenizerError {
    TokenizerError::Unsupported { place: place.into(), construct: construct.into() }
}
