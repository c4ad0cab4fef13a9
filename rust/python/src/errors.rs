//! The one place where errors of the core become Python exceptions.

use heedful_core::scheduler::SchedulerError;
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};

/// A call at the wrong time, a full queue or a broken invariant: RuntimeError; a wrong argument: ValueError.
pub fn scheduler(error: SchedulerError) -> PyErr {
    let text = error.to_string();
    match error {
        SchedulerError::QueueFull(_)
        | SchedulerError::StepInFlight
        | SchedulerError::NoStep
        | SchedulerError::Invariant(_) => PyRuntimeError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}
