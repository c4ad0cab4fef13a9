//! `SchedulerConfig`, `Scheduler` and `Step`: bindings of `heedful_core::scheduler`.

use heedful_core::scheduler as core;
use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::{described, ids};
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
        num_blocks: i64,
        block_size: i64,
        max_batched_tokens: i64,
        max_num_seqs: i64,
        policy: &str,
        max_waiting: Option<i64>,
        watermark: f64,
        max_model_len: Option<i64>,
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
            num_blocks: count("num_blocks", num_blocks)?,
            block_size: count("block_size", block_size)?,
            max_batched_tokens: count("max_batched_tokens", max_batched_tokens)?,
            max_num_seqs: count("max_num_seqs", max_num_seqs)?,
            policy,
            max_waiting: max_waiting.map(|value| count("max_waiting", value)).transpose()?,
            watermark,
            max_model_len: max_model_len.map(|value| count("max_model_len", value)).transpose()?,
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
#[pyclass(module = "heedful")]
pub struct Scheduler {
    inner: core::Scheduler,
}

#[pymethods]
impl Scheduler {
    #[new]
    fn new(config: &SchedulerConfig) -> PyResult<Self> {
        let inner = core::Scheduler::new(config.limits.clone()).map_err(errors::scheduler)?;
        Ok(Self { inner })
    }

    /// The limits it was made with.
    #[getter]
    fn config(&self) -> SchedulerConfig {
        SchedulerConfig { limits: self.inner.config().clone() }
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
    ///     RuntimeError: max_waiting requests wait already.
    #[pyo3(signature = (request_id, token_ids, *, max_tokens, priority=0, stop_token_ids=None))]
    fn add(
        &mut self,
        request_id: String,
        token_ids: &Bound<'_, PyAny>,
        max_tokens: i64,
        priority: i64,
        stop_token_ids: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let new = core::NewRequest {
            id: request_id,
            token_ids: ids("token_ids", token_ids)?,
            max_tokens: count("max_tokens", max_tokens)?,
            priority,
            stop_token_ids: stop_token_ids.map_or(Ok(Vec::new()), |values| ids("stop_token_ids", values))?,
        };
        self.inner.add(new).map_err(errors::scheduler)
    }

    /// Plans the next step.
    ///
    /// Returns:
    ///     The step, or None when no request is there.
    ///
    /// Raises:
    ///     RuntimeError: the last step has not been updated.
    fn schedule(&mut self, py: Python<'_>) -> PyResult<Option<Step>> {
        let step = self.inner.schedule().map_err(errors::scheduler)?;
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
    ///     ValueError: another number of ids than sample rows, or a negative id. Nothing is changed then.
    ///     TypeError: not a contiguous int32 array.
    fn update(&mut self, sampled_ids: &Bound<'_, PyAny>) -> PyResult<Vec<(String, &'static str)>> {
        let sampled: PyReadonlyArray1<'_, i32> = sampled_ids.extract().map_err(|_| {
            PyTypeError::new_err(format!("sampled_ids: expected int32 [n], got {}", described(sampled_ids)))
        })?;
        let sampled = sampled.as_slice().map_err(|_| {
            PyTypeError::new_err("sampled_ids: expected a contiguous array, got a strided one")
        })?;
        let finished = self.inner.update(sampled).map_err(errors::scheduler)?;
        Ok(finished.into_iter().map(|(id, reason)| (id, reason.as_str())).collect())
    }

    /// Ends a request at once; False if there is none of this name.
    ///
    /// Its blocks are free when this returns, unless a step that writes them is in flight: then after its update.
    fn abort(&mut self, request_id: &str) -> bool {
        self.inner.abort(request_id)
    }

    /// Whether any request is there.
    fn has_unfinished(&self) -> bool {
        self.inner.has_unfinished()
    }

    /// Requests that hold blocks.
    #[getter]
    fn num_running(&self) -> usize {
        self.inner.stats().running
    }

    /// Requests that hold none.
    #[getter]
    fn num_waiting(&self) -> usize {
        self.inner.stats().waiting
    }

    /// A request's prompt and output so far: int32 [len].
    ///
    /// Raises:
    ///     ValueError: there is no request of this name.
    fn token_ids<'py>(&self, py: Python<'py>, request_id: &str) -> PyResult<Bound<'py, PyArray1<i32>>> {
        Ok(signed(self.inner.token_ids(request_id).map_err(errors::scheduler)?).into_pyarray(py))
    }

    /// A request's output so far: int32 [len].
    ///
    /// Raises:
    ///     ValueError: there is no request of this name.
    fn output_token_ids<'py>(
        &self,
        py: Python<'py>,
        request_id: &str,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        Ok(signed(self.inner.output_token_ids(request_id).map_err(errors::scheduler)?).into_pyarray(py))
    }

    /// Counts: running, waiting, total_blocks, free_blocks, used_blocks, peak_used_blocks, and since the start steps,
    /// scheduled_tokens, preemptions, finished, aborted.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
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
        self.inner.check_invariants().map_err(errors::scheduler)
    }
}

/// What runs in one step: flat arrays over its N tokens and B requests.
///
/// Tokens of a request are consecutive; requests are in the order of service. The arrays are the step's own: they stay valid
/// after the next schedule().
#[pyclass(frozen, get_all, module = "heedful")]
pub struct Step {
    /// [B] names.
    request_ids: Vec<String>,
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
    preempted: Vec<String>,
}

impl Step {
    fn new(py: Python<'_>, step: core::Step) -> PyResult<Self> {
        fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
            values.into_pyarray(py).unbind()
        }
        let shape = [step.request_ids.len(), step.table_width];
        Ok(Self {
            request_ids: step.request_ids,
            token_ids: array(py, step.token_ids),
            positions: array(py, step.positions),
            slot_mapping: array(py, step.slot_mapping),
            query_start_loc: array(py, step.query_start_loc),
            seq_lens: array(py, step.seq_lens),
            block_tables: step.block_tables.into_pyarray(py).reshape(shape)?.unbind(),
            sample_rows: array(py, step.sample_rows),
            sample_request: array(py, step.sample_request),
            preempted: step.preempted,
        })
    }
}

#[pymethods]
impl Step {
    /// N, the tokens of this step.
    #[getter]
    fn num_tokens(&self, py: Python<'_>) -> PyResult<usize> {
        self.token_ids.bind(py).len()
    }

    /// B, the requests of this step.
    #[getter]
    fn num_seqs(&self) -> usize {
        self.request_ids.len()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "Step(num_tokens={}, num_seqs={}, preempted={:?})",
            self.num_tokens(py)?,
            self.num_seqs(),
            self.preempted
        ))
    }
}

/// A count that may not be negative.
fn count(name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value)
        .map_err(|_| PyValueError::new_err(format!("{name}: expected an integer of at least 0, got {value}")))
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
