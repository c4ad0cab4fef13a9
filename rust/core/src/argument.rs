//! The one error of the operators and codecs: an argument that is not what the contract says.

use thiserror::Error;

/// A wrong argument of an operator; the text names it, what was expected and what came.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgumentError {
    /// A shape, a value or a length that does not fit.
    #[error("{name}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument, as the caller spells it.
        name: &'static str,
        /// What the contract asks for.
        expected: String,
        /// What came.
        got: String,
    },
    /// A setting of the environment that this machine or this version does not know.
    #[error("{name}: {reason}")]
    Setting {
        /// The environment variable.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result of an operator.
pub type Result<T> = std::result::Result<T, ArgumentError>;

/// Fails with a [`ArgumentError::Mismatch`] unless `holds`.
pub(crate) fn ensure(
    holds: bool,
    name: &'static str,
    expected: impl FnOnce() -> String,
    got: impl FnOnce() -> String,
) -> Result<()> {
    if holds { Ok(()) } else { Err(ArgumentError::Mismatch { name, expected: expected(), got: got() }) }
}

/// The product of `dims`, or an error naming `name` when it does not fit memory addresses.
pub(crate) fn volume(name: &'static str, dims: &[usize]) -> Result<usize> {
    dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d)).ok_or_else(|| {
        ArgumentError::Mismatch { name, expected: "a size that fits memory".into(), got: format!("{dims:?}") }
    })
}

/// Fails unless a buffer of `len` values holds exactly `dims`.
pub(crate) fn ensure_volume(name: &'static str, dims: &[usize], len: usize) -> Result<()> {
    let expected = volume(name, dims)?;
    ensure(
        len == expected,
        name,
        || format!("{expected} values of shape {dims:?}"),
        || format!("{len} values"),
    )
}
