//! `SchedulerConfig`, `Scheduler` and `Step`: bindings of `heedful_core::scheduler`.

mod readers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heedful_core::scheduler as core;
use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::arguments::{ids, ids_of_len};
use crate::errors;

/// Limits of a scheduler.
///
/// Args:
///     num_blocks: blocks in the pool.
///     block_size: tokens in a block.
///     max_batched_tokens: tokens computed in one step at most.
///     max_num_seqs: requests running at the same time at most.
///     policy: "fcfs" (in order of arrival) or "priority" (lower numbers first).
///     max_waiting: requests waiting at most; None sets no limit.
///     watermark: share of the blocks left free when a request is admitted beside others; in [0, 1).
///     max_model_len: longest prompt and output together; None leaves the pool's size as the limit.
///
/// Raises:
///     ValueError: a limit is out of range; the message names it.
#[pyclass(frozen, eq, module = "heedful")]
#[derive(Clone, PartialEq)]
pub struct SchedulerConfig {
    limits: core::SchedulerConfig,
}

#[pymethods]
impl SchedulerConfig {
    #[new]
    #[pyo3(signature = (num_blocks, block_size=64, max_batched_tokens=8192, max_num_seqs=256, policy="fcfs",
                        max_waiting=None, watermark=0.01, max_model_len=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        #[pyo3(from_py_with = readers::num_blocks)] num_blocks: usize,
        #[pyo3(from_py_with = readers::block_size)] block_size: usize,
        #[pyo3(from_py_with = readers::max_batched_tokens)] max_batched_tokens: usize,
        #[pyo3(from_py_with = readers::max_num_seqs)] max_num_seqs: usize,
        #[pyo3(from_py_with = readers::policy)] policy: &str,
        #[pyo3(from_py_with = readers::max_waiting)] max_waiting: Option<usize>,
        #[pyo3(from_py_with = readers::watermark)] watermark: f64,
        #[pyo3(from_py_with = readers::max_model_len)] max_model_len: Option<usize>,
    ) -> PyResult<Self> {
        let policy = match policy {
            "fcfs" => core::Policy::Fcfs,
            "priority" => core::Policy::Priority,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "policy: expected fcfs or priority, got {policy:?}"
                )));
            }
        };
        let limits = core::SchedulerConfig {
            num_blocks,
            block_size,
            max_batched_tokens,
            max_num_seqs,
            policy,
            max_waiting,
            watermark,
            max_model_len,
        };
        limits.check().map_err(errors::scheduler)?;
        Ok(Self { limits })
    }

    #[getter]
    fn num_blocks(&self) -> usize {
        self.limits.num_blocks
    }

    #[getter]
    fn block_size(&self) -> usize {
        self.limits.block_size
    }

    #[getter]
    fn max_batched_tokens(&self) -> usize {
        self.limits.max_batched_tokens
    }

    #[getter]
    fn max_num_seqs(&self) -> usize {
        self.limits.max_num_seqs
    }

    #[getter]
    fn policy(&self) -> &'static str {
        match self.limits.policy {
            core::Policy::Fcfs => "fcfs",
            core::Policy::Priority => "priority",
        }
    }

    #[getter]
    fn max_waiting(&self) -> Option<usize> {
        self.limits.max_waiting
    }

    #[getter]
    fn watermark(&self) -> f64 {
        self.limits.watermark
    }

    #[getter]
    fn max_model_len(&self) -> Option<usize> {
        self.limits.max_model_len
    }

    fn __repr__(&self) -> String {
        let none = || "None".to_string();
        format!(
            "SchedulerConfig(num_blocks={}, block_size={}, max_batched_tokens={}, max_num_seqs={}, policy={:?}, \
             max_waiting={}, watermark={}, max_model_len={})",
            self.limits.num_blocks,
            self.limits.block_size,
            self.limits.max_batched_tokens,
            self.limits.max_num_seqs,
            self.policy(),
            self.limits.max_waiting.map_or_else(none, |value| value.to_string()),
            self.limits.watermark,
            self.limits.max_model_len.map_or_else(none, |value| value.to_string()),
        )
    }
}

/// Continuous batching over a pool of cache blocks: which tokens of which requests run next, and where their rows go.
///
/// A call that raises changes nothing. Threads may share a scheduler; each call is one whole.
///
/// Args:
///     config: its limits.
///
/// Example:
///     >>> import heedful, numpy
///     >>> scheduler = heedful.Scheduler(heedful.SchedulerConfig(num_blocks=8))
///     >>> scheduler.add("a", [5, 6, 7], max_tokens=1)
///     >>> scheduler.schedule().positions.tolist()
///     [0, 1, 2]
///     >>> scheduler.update(numpy.array([9], dtype=numpy.int32))
///     [('a', 'length')]
#[pyclass(frozen, module = "heedful")]
pub struct Scheduler {
    inner: Mutex<core::Scheduler>,
}

impl Scheduler {
    /// The core's scheduler. No Python runs while it is held, so threads wait for nothing but the core's own work.
    fn core(&self) -> MutexGuard<'_, core::Scheduler> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    fn new(config: &SchedulerConfig) -> PyResult<Self> {
        let inner = core::Scheduler::new(config.limits.clone()).map_err(errors::scheduler)?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// The limits it was made with.
    #[getter]
    fn config(&self) -> SchedulerConfig {
        SchedulerConfig { limits: self.core().config().clone() }
    }

    /// Queues a request.
    ///
    /// Args:
    ///     request_id: a name not in use.
    ///     token_ids: the prompt: a list of ints or an integer array [len], copied.
    ///     max_tokens: tokens to generate at most.
    ///     priority: lower runs earlier under the policy "priority".
    ///     stop_token_ids: ids that end the request; they are part of its output.
    ///
    /// Raises:
    ///     ValueError: the prompt is empty, too long for max_model_len or for the pool, or holds an id that is negative or
    ///         above 2**31 - 1; max_tokens is below 1; the name is in use.
    ///     TypeError: an argument is of another kind.
    ///     RuntimeError: max_waiting requests wait already.
    #[pyo3(signature = (request_id, token_ids, *, max_tokens, priority=0, stop_token_ids=None))]
    fn add(
        &self,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
        token_ids: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = readers::max_tokens)] max_tokens: usize,
        #[pyo3(from_py_with = readers::priority)] priority: i64,
        stop_token_ids: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let prompt_len = |len| self.core().check_prompt_len(len).map_err(errors::scheduler);
        let new = core::NewRequest {
            id: request_id.into(),
            token_ids: ids_of_len("token_ids", token_ids, prompt_len)?,
            max_tokens,
            priority,
            stop_token_ids: match stop_token_ids {
                Some(values) => ids("stop_token_ids", values)?,
                None => Vec::new(),
            },
        };
        self.core().add(new).map_err(errors::scheduler)
    }

    /// Plans the next step.
    ///
    /// Returns:
    ///     The step, or None when no request is there.
    ///
    /// Raises:
    ///     RuntimeError: the last step has not been updated.
    fn schedule(&self, py: Python<'_>) -> PyResult<Option<Step>> {
        let step = self.core().schedule().map_err(errors::scheduler)?;
        step.map(|step| Step::new(py, step)).transpose()
    }

    /// Takes what was sampled in the last step.
    ///
    /// Args:
    ///     sampled_ids: int32 [n], one id for each of the step's sample_rows; those of requests aborted since are dropped.
    ///
    /// Returns:
    ///     (request_id, reason) of each request that ended; the reason is "stop" or "length".
    ///
    /// Raises:
    ///     RuntimeError: there is no step to update.
    ///     ValueError: another number of ids than sample rows, a negative id, or an array of another dtype or shape.
    ///     TypeError: not an array.
    fn update(&self, sampled_ids: &Bound<'_, PyAny>) -> PyResult<Vec<(String, &'static str)>> {
        let sampled = readers::sampled_ids(sampled_ids)?;
        let finished = self.core().update(&sampled).map_err(errors::scheduler)?;
        Ok(finished.into_iter().map(|(id, reason)| (id.to_string(), reason.as_str())).collect())
    }

    /// Ends a request at once; False if there is none of this name.
    ///
    /// Its blocks are free when this returns, unless a step that writes them is in flight: then after its update.
    fn abort(&self, #[pyo3(from_py_with = readers::request_id)] request_id: &str) -> bool {
        self.core().abort(request_id)
    }

    /// Whether any request is there.
    fn has_unfinished(&self) -> bool {
        self.core().has_unfinished()
    }

    /// Requests that hold blocks.
    #[getter]
    fn num_running(&self) -> usize {
        self.core().stats().running
    }

    /// Requests that hold none.
    #[getter]
    fn num_waiting(&self) -> usize {
        self.core().stats().waiting
    }

    /// A request's prompt and output so far: int32 [len].
    ///
    /// Raises:
    ///     ValueError: there is no request of this name.
    fn token_ids<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let ids = self.core().token_ids(request_id).map(signed).map_err(errors::scheduler)?;
        Ok(ids.into_pyarray(py))
    }

    /// A request's output so far: int32 [len].
    ///
    /// Raises:
    ///     ValueError: there is no request of this name.
    fn output_token_ids<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let ids = self.core().output_token_ids(request_id).map(signed).map_err(errors::scheduler)?;
        Ok(ids.into_pyarray(py))
    }

    /// Counts: running, waiting, total_blocks, free_blocks, used_blocks, peak_used_blocks, and since the start steps,
    /// scheduled_tokens, preemptions, finished, aborted.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.core().stats();
        let dict = PyDict::new(py);
        for (name, value) in [
            ("running", stats.running),
            ("waiting", stats.waiting),
            ("total_blocks", stats.total_blocks),
            ("free_blocks", stats.free_blocks),
            ("used_blocks", stats.used_blocks),
            ("peak_used_blocks", stats.peak_used_blocks),
        ] {
            dict.set_item(name, value)?;
        }
        for (name, value) in [
            ("steps", stats.steps),
            ("scheduled_tokens", stats.scheduled_tokens),
            ("preemptions", stats.preemptions),
            ("finished", stats.finished),
            ("aborted", stats.aborted),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// Checks everything that must hold between any two calls.
    ///
    /// Raises:
    ///     RuntimeError: says what is broken.
    fn check_invariants(&self) -> PyResult<()> {
        self.core().check_invariants().map_err(errors::scheduler)
    }
}

/// What runs in one step: flat arrays over its N tokens and B requests.
///
/// Tokens of a request are consecutive; requests are in the order of service. The arrays are the step's own: they stay valid
/// after the next schedule().
#[pyclass(frozen, get_all, module = "heedful")]
pub struct Step {
    /// [B] names.
    request_ids: Py<PyList>,
    /// int32 [N] ids to compute.
    token_ids: Py<PyArray1<i32>>,
    /// int64 [N] their positions in their sequences.
    positions: Py<PyArray1<i64>>,
    /// int64 [N] cache rows they are written to: block * block_size + offset.
    slot_mapping: Py<PyArray1<i64>>,
    /// int32 [B + 1] each request's first token among the N.
    query_start_loc: Py<PyArray1<i32>>,
    /// int32 [B] keys of each request, this step's included.
    seq_lens: Py<PyArray1<i32>>,
    /// int32 [B, M] blocks of each request, -1 past its end.
    block_tables: Py<PyArray2<i32>>,
    /// int32 [n] rows among the N whose logits are sampled.
    sample_rows: Py<PyArray1<i32>>,
    /// int32 [n] which of the B requests each sample row belongs to.
    sample_request: Py<PyArray1<i32>>,
    /// Names of requests that gave their blocks away for this step and will be computed anew.
    preempted: Py<PyList>,
}

impl Step {
    fn new(py: Python<'_>, step: core::Step) -> PyResult<Self> {
        fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
            values.into_pyarray(py).unbind()
        }
        // Made once: a getter that builds a list anew would make a loop over the requests quadratic.
        let names = |ids: &[Arc<str>]| PyList::new(py, ids.iter().map(|id| &**id)).map(Bound::unbind);
        let shape = [step.request_ids.len(), step.table_width];
        Ok(Self {
            request_ids: names(&step.request_ids)?,
            token_ids: array(py, step.token_ids),
            positions: array(py, step.positions),
            slot_mapping: array(py, step.slot_mapping),
            query_start_loc: array(py, step.query_start_loc),
            seq_lens: array(py, step.seq_lens),
            block_tables: step.block_tables.into_pyarray(py).reshape(shape)?.unbind(),
            sample_rows: array(py, step.sample_rows),
            sample_request: array(py, step.sample_request),
            preempted: names(&step.preempted)?,
        })
    }
}

#[pymethods]
impl Step {
    /// N, the tokens of this step.
    #[getter]
    fn num_tokens(&self, py: Python<'_>) -> usize {
        self.token_ids.bind(py).len()
    }

    /// B, the requests of this step.
    #[getter]
    fn num_seqs(&self, py: Python<'_>) -> usize {
        self.seq_lens.bind(py).len()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "Step(num_tokens={}, num_seqs={}, preempted={})",
            self.num_tokens(py),
            self.num_seqs(py),
            self.preempted.bind(py).repr()?
        ))
    }
}

fn signed(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| id as i32).collect()
}

/// Adds this file's names to `heedful._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<SchedulerConfig>()?;
    module.add_class::<Scheduler>()?;
    module.add_class::<Step>()
}
