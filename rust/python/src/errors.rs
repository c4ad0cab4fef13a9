//! The one place where errors of the core become Python exceptions.

use heedful_core::argument::ArgumentError;
use heedful_core::cache::snapshot::SnapshotError;
use heedful_core::scheduler::SchedulerError;
use heedful_core::threads::ThreadsError;
use heedful_core::tokenizer::TokenizerError;
use pyo3::PyErr;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};

/// A wrong argument or setting: ValueError with the core's text, which names it.
pub fn argument(error: ArgumentError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// A call at the wrong time, a full queue or a broken invariant: RuntimeError; a wrong argument: ValueError.
pub fn scheduler(error: SchedulerError) -> PyErr {
    let text = error.to_string();
    match error {
        SchedulerError::QueueFull(_)
        | SchedulerError::QueueFullOfTokens { .. }
        | SchedulerError::NoSeat(_)
        | SchedulerError::NoHostTier
        | SchedulerError::ForkInFlight
        | SchedulerError::SpeculateInFlight
        | SchedulerError::StepInFlight
        | SchedulerError::NoStep
        | SchedulerError::Invariant(_) => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// A file that cannot be read or written: the OSError of its reason; a refused one, or a wrong argument: ValueError; a call at the
/// wrong time: RuntimeError.
pub fn snapshot(error: SnapshotError, path: &std::path::Path) -> PyErr {
    match error {
        SnapshotError::Io(source) => io(source, path.display().to_string()),
        SnapshotError::NotEmpty | SnapshotError::NoCache => PyRuntimeError::new_err(error.to_string()),
        error => PyValueError::new_err(error.to_string()),
    }
}

/// No thread pool: ValueError for a bad count, RuntimeError when the system refuses.
pub fn threads(error: ThreadsError) -> PyErr {
    match error {
        ThreadsError::Count { .. } => PyValueError::new_err(error.to_string()),
        ThreadsError::Start { .. } => PyRuntimeError::new_err(error.to_string()),
    }
}

/// A file that cannot be read: the OSError of its reason; anything else about a tokenizer: ValueError.
pub fn tokenizer(error: TokenizerError) -> PyErr {
    match error {
        TokenizerError::Io { path, source } => io(source, path),
        error => PyValueError::new_err(error.to_string()),
    }
}

fn io(source: std::io::Error, path: String) -> PyErr {
    match source.raw_os_error() {
        // With these three arguments Python picks the subclass, FileNotFoundError for one.
        Some(code) => PyOSError::new_err((code, source.to_string(), path)),
        None => PyOSError::new_err(format!("{path}: {source}")),
    }
}
