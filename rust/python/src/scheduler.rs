//! `SchedulerConfig`, `Scheduler` and `Step`: bindings of `heedful_core::scheduler`.

mod config;
mod readers;
mod step;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use heedful_core::cache::snapshot::Part;
use heedful_core::cache::{CacheEvent, FetchPlan};
use heedful_core::scheduler as core;
use numpy::{IntoPyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::arguments::{ids, ids_of_len};
use crate::errors;
pub use config::{SchedulerConfig, eviction_policy};
use step::{Spares, Step};

/// Rows to read, rows to fetch, and where to.
type FetchArrays<'py> = (Bound<'py, PyArrayDyn<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

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
    spares: Spares,
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
        Ok(Self { inner: Mutex::new(inner), spares: Spares::default() })
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
    ///     fork_ids: names of further completions of the prompt. It is computed once; they begin with its last row, share its
    ///         blocks and copy the last one when they write to it. See Step.sample_branch.
    ///     cache_salt: rows are shared among requests of the same salt alone; None is shared by all without one. It must not
    ///         come from whom it protects against.
    ///     shared_prefix_len: tokens at the start of the prompt that are shared whatever the salt, in whole blocks.
    ///     skip_cache: compute all of it, whatever is cached, as for logits of the prompt.
    ///     tenant: who asks, under the policy "fair".
    ///     weight: the tenant's share beside the others' from now on.
    ///     deadline: when expire() ends it, on the caller's clock.
    ///
    /// Raises:
    ///     ValueError: the prompt is empty, too long for max_model_len or for the pool, or holds an id that is negative or
    ///         above 2**31 - 1; max_tokens is below 1; a name is in use; fork_ids has max_num_seqs names or more; the weight is
    ///         not positive.
    ///     TypeError: an argument is of another kind.
    ///     RuntimeError: max_waiting requests or max_waiting_tokens wait already.
    #[pyo3(signature = (request_id, token_ids, *, max_tokens, priority=0, stop_token_ids=None, fork_ids=Vec::new(),
                        cache_salt=None, shared_prefix_len=0, skip_cache=false, tenant="", weight=1.0, deadline=None),
           text_signature = "(self, request_id, token_ids, *, max_tokens, priority=0, stop_token_ids=None, fork_ids=(), \
                             cache_salt=None, shared_prefix_len=0, skip_cache=False, tenant='', weight=1.0, deadline=None)")]
    #[allow(clippy::too_many_arguments)]
    fn add(
        &self,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
        token_ids: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = readers::max_tokens)] max_tokens: usize,
        #[pyo3(from_py_with = readers::priority)] priority: i64,
        stop_token_ids: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = readers::fork_ids)] fork_ids: Vec<std::sync::Arc<str>>,
        #[pyo3(from_py_with = readers::cache_salt)] cache_salt: Option<&str>,
        #[pyo3(from_py_with = readers::shared_prefix_len)] shared_prefix_len: usize,
        skip_cache: bool,
        #[pyo3(from_py_with = readers::tenant)] tenant: &str,
        #[pyo3(from_py_with = readers::weight)] weight: f64,
        #[pyo3(from_py_with = readers::deadline)] deadline: Option<f64>,
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
            fork_ids,
            cache_salt: cache_salt.map(Into::into),
            shared_prefix_len,
            skip_cache,
            tenant: tenant.into(),
            weight,
            deadline,
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
        let mut step = self.spares.take();
        let planned = self.core().schedule_into(&mut step);
        match planned {
            Ok(true) => Step::new(py, step, self.spares.clone()).map(Some),
            other => {
                self.spares.put(step);
                other.map(|_| None).map_err(errors::scheduler)
            }
        }
    }

    /// Takes what was sampled in the last step.
    ///
    /// A draft is accepted when the sample row before it gave the same id; a request gets the ids up to the first that is not, and
    /// the rows of the drafts behind it are given back.
    ///
    /// Args:
    ///     sampled_ids: int32 [n], one id for each of the step's sample_rows; those of requests aborted since are dropped.
    ///     draft_ids: int32 [B, K] drafts for the next step, one row a request of this one, -1 past the last; at most
    ///         num_speculative_tokens. None gives none.
    ///
    /// Returns:
    ///     (request_id, reason) of each request that ended; the reason is "stop" or "length".
    ///
    /// Raises:
    ///     RuntimeError: there is no step to update.
    ///     ValueError: another number of ids than sample rows, a negative id, or an array of another dtype or shape.
    ///     TypeError: not an array.
    #[pyo3(signature = (sampled_ids, draft_ids=None))]
    fn update(
        &self,
        sampled_ids: &Bound<'_, PyAny>,
        draft_ids: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<(String, &'static str)>> {
        let sampled = readers::sampled_ids(sampled_ids)?;
        let drafts = readers::draft_ids(draft_ids)?;
        let drafts = drafts.as_ref().map(|(ids, width)| (&ids[..], *width));
        let finished = self.core().update(sampled.as_slice(), drafts).map_err(errors::scheduler)?;
        Ok(finished.into_iter().map(|(id, reason)| (id.to_string(), reason.as_str())).collect())
    }

    /// int32 [B]: tokens that each request of the last updated step got: 0 for a part of a prompt, more than 1 with accepted
    /// drafts. Tokens of its forks are not counted.
    #[getter]
    fn new_tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        PyArray1::from_slice(py, self.core().new_tokens())
    }

    /// Gives the last step up, as after an error: none of its tokens count as computed. Call it instead of update().
    ///
    /// Raises:
    ///     RuntimeError: there is no step.
    fn abandon(&self) -> PyResult<()> {
        self.core().abandon().map_err(errors::scheduler)
    }

    /// Gives a request draft tokens, to be checked in the next step. They count only behind a token that was sampled last; those
    /// that would make the request too long are dropped.
    ///
    /// Args:
    ///     request_id: a request that is there.
    ///     draft_ids: at most num_speculative_tokens ids.
    ///
    /// Raises:
    ///     ValueError: no such request, too many drafts, or an id that is no token.
    ///     RuntimeError: the last step has not been updated.
    fn speculate(
        &self,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
        draft_ids: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let drafts = ids("draft_ids", draft_ids)?;
        self.core().speculate(request_id, &drafts).map_err(errors::scheduler)
    }

    /// Begins another request where one is: the same tokens; blocks are shared, and copied when one of the two writes to them.
    ///
    /// Args:
    ///     request_id: a request that is there.
    ///     new_request_id: a name not in use.
    ///     max_tokens: tokens to generate at most, those of the origin included; None takes the origin's limit.
    ///
    /// Raises:
    ///     ValueError: there is no such request, the name is in use, or max_tokens are generated already.
    ///     RuntimeError: the last step has not been updated, or max_num_seqs requests run.
    #[pyo3(signature = (request_id, new_request_id, *, max_tokens=None))]
    fn fork(
        &self,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
        #[pyo3(from_py_with = readers::new_request_id)] new_request_id: &str,
        #[pyo3(from_py_with = readers::fork_max_tokens)] max_tokens: Option<usize>,
    ) -> PyResult<()> {
        self.core().fork(request_id, new_request_id.into(), max_tokens).map_err(errors::scheduler)
    }

    /// Ends a request at once; False if there is none of this name.
    ///
    /// Its blocks are free when this returns, unless a step that writes them is in flight: then after its update.
    fn abort(&self, #[pyo3(from_py_with = readers::request_id)] request_id: &str) -> bool {
        self.core().abort(request_id)
    }

    /// Ends, as abort() does, the requests whose deadline is at or before `now`; their names.
    fn expire(&self, #[pyo3(from_py_with = readers::now)] now: f64) -> Vec<String> {
        self.core().expire(now).iter().map(|id| id.to_string()).collect()
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

    /// Counts by name: what is there now, and sums since the start. Ages are in steps.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.core().stats();
        let dict = PyDict::new(py);
        for (name, value) in stats.named() {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// A request's account: whether it runs, what it waits for ("order", "seats", "blocks", "origin" or "nothing"), what it
    /// reused, what was kept for it, what it holds, latent rows fetched for it.
    ///
    /// Raises:
    ///     ValueError: there is no request of this name.
    fn explain<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = readers::request_id)] request_id: &str,
    ) -> PyResult<Bound<'py, PyDict>> {
        let account = self.core().explain(request_id).map_err(errors::scheduler)?;
        let dict = PyDict::new(py);
        dict.set_item("state", if account.running { "running" } else { "waiting" })?;
        dict.set_item("waits_for", account.waits_for.as_str())?;
        for (name, value) in [
            ("ahead", account.ahead),
            ("prompt_tokens", account.prompt_tokens),
            ("output_tokens", account.output_tokens),
            ("computed_tokens", account.computed_tokens),
            ("reused_tokens", account.reused_tokens),
            ("restored_tokens", account.restored_tokens),
            ("kept_tokens", account.kept_tokens),
            ("fetched_rows", account.fetched_rows as usize),
            ("cached_tokens", account.cached_tokens),
            ("blocks", account.blocks),
            ("shared_blocks", account.shared_blocks),
            ("host_blocks", account.host_blocks),
            ("missing_blocks", account.missing_blocks),
            ("available_blocks", account.available_blocks),
            ("draft_tokens", account.draft_tokens),
            ("preemptions", account.preemptions as usize),
            ("swaps", account.swaps as usize),
        ] {
            dict.set_item(name, value)?;
        }
        dict.set_item("age_steps", account.age_steps)?;
        dict.set_item("tenant", &*account.tenant)?;
        dict.set_item("tenant_counter", account.tenant_counter)?;
        dict.set_item("deadline", account.deadline)?;
        Ok(dict)
    }

    /// What happened to the prefix cache since the last call: dicts with the fields of the events that routers read, "type" being
    /// "BlockStored", "BlockRemoved" or "AllBlocksCleared". Hashes are 16 bytes. Empty unless enable_events is set.
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let (events, block_size) = {
            let mut core = self.core();
            (core.take_events(), core.config().block_size)
        };
        let bytes = |hash: &u128| PyBytes::new(py, &hash.to_be_bytes());
        let list = PyList::empty(py);
        for event in events {
            let dict = PyDict::new(py);
            match event {
                CacheEvent::Stored { block_hashes, parent_block_hash, token_ids } => {
                    dict.set_item("type", "BlockStored")?;
                    dict.set_item("block_hashes", block_hashes.iter().map(bytes).collect::<Vec<_>>())?;
                    dict.set_item("parent_block_hash", parent_block_hash.as_ref().map(bytes))?;
                    dict.set_item("token_ids", token_ids)?;
                    dict.set_item("block_size", block_size)?;
                    dict.set_item("lora_id", py.None())?;
                    dict.set_item("medium", "GPU")?;
                }
                CacheEvent::Removed { block_hashes } => {
                    dict.set_item("type", "BlockRemoved")?;
                    dict.set_item("block_hashes", block_hashes.iter().map(bytes).collect::<Vec<_>>())?;
                    dict.set_item("medium", "GPU")?;
                }
                CacheEvent::Cleared => dict.set_item("type", "AllBlocksCleared")?,
            }
            list.append(dict)?;
        }
        Ok(list)
    }

    /// Forgets all cached blocks that no request uses; how many.
    fn clear_cache(&self) -> usize {
        self.core().clear_cache()
    }

    /// Writes the prefix cache to a file, rows included.
    ///
    /// Args:
    ///     path: the file; it appears whole or not at all.
    ///     parts: the caches by name: uint8 arrays [num_blocks, bytes of a block], contiguous. With a host tier, latent caches as pairs:
    ///         [num_latent_blocks, bytes of a block] pages and [host_blocks, bytes of a block] on the host; the file is the same.
    ///     model: what the rows are of; restore() asks for the same.
    ///
    /// Returns:
    ///     Blocks written.
    ///
    /// Raises:
    ///     OSError: the file cannot be written.
    ///     ValueError: a part has another shape.
    ///     RuntimeError: prefix caching is off.
    #[pyo3(signature = (path, parts, *, model))]
    fn snapshot(
        &self,
        py: Python<'_>,
        path: PathBuf,
        parts: &Bound<'_, PyDict>,
        model: &str,
    ) -> PyResult<usize> {
        let arrays = readers::parts(parts, readers::part)?;
        let mut parts = Vec::with_capacity(arrays.len());
        for (name, array, host) in &arrays {
            let width = same_width(name, array.shape()[1], host.as_ref().map(|host| host.shape()[1]))?;
            let host = host.as_ref().map(|host| host.as_slice()).transpose()?;
            parts.push(Part { name, width, bytes: array.as_slice()?, host });
        }
        py.detach(|| self.core().snapshot(&path, model, &parts))
            .map_err(|error| errors::snapshot(error, &path))
    }

    /// Fills the empty prefix cache from a file that snapshot() wrote, rows included. Salted blocks come back where hash_seed is
    /// the same.
    ///
    /// Args:
    ///     path: the file.
    ///     parts: the caches by name and in the same order, as for snapshot(); written. Latent rows go to the host tier if there is one.
    ///     model: what the rows are of.
    ///
    /// Returns:
    ///     Blocks that came back.
    ///
    /// Raises:
    ///     OSError: the file cannot be read.
    ///     ValueError: it is damaged, or of another model, block size or set of caches; nothing is cached then.
    ///     RuntimeError: something is cached already, or prefix caching is off.
    #[pyo3(signature = (path, parts, *, model))]
    fn restore(
        &self,
        py: Python<'_>,
        path: PathBuf,
        parts: &Bound<'_, PyDict>,
        model: &str,
    ) -> PyResult<usize> {
        let mut arrays = readers::parts(parts, readers::part_mut)?;
        let mut parts = Vec::with_capacity(arrays.len());
        for (name, array, host) in &mut arrays {
            let width = same_width(name, array.shape()[1], host.as_ref().map(|host| host.shape()[1]))?;
            let host = host.as_mut().map(|host| host.as_slice_mut()).transpose()?;
            parts.push(Part { name, width, bytes: array.as_slice_mut()?, host });
        }
        py.detach(|| self.core().restore(&path, model, &mut parts))
            .map_err(|error| errors::snapshot(error, &path))
    }

    /// With a host tier: where a layer reads its selection, and what to fetch before.
    ///
    /// Rows whose blocks have a page are read there; the others are fetched into hot rows, which lie behind the pages in the latent
    /// cache and keep what was used last. What is planned counts as fetched: carry the plan out before the next one of the layer.
    ///
    /// Args:
    ///     layer: the layer's number, below 4096; layers that share a selection may share it.
    ///     slots: int64, any shape: block * block_size + offset of each selected row, -1 for none.
    ///
    /// Returns:
    ///     (rows, sources, targets): int64 rows of the latent cache, shaped as slots, -1 for -1; int64 [f] rows of the host tier;
    ///     int64 [f] rows of the latent cache that they are copied to.
    ///
    /// Raises:
    ///     RuntimeError: there is no host tier.
    ///     ValueError: a slot holds no row, or the selection has more than hot_rows rows of the host tier.
    fn plan_fetch<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = readers::layer)] layer: usize,
        slots: &Bound<'py, PyAny>,
    ) -> PyResult<FetchArrays<'py>> {
        let slots = readers::slots(slots)?;
        let mut plan = FetchPlan::default();
        self.core().plan_fetch(layer, slots.as_slice()?, &mut plan).map_err(errors::scheduler)?;
        let rows = plan.rows.into_pyarray(py).reshape(slots.shape().to_vec())?;
        Ok((rows, plan.sources.into_pyarray(py), plan.targets.into_pyarray(py)))
    }

    /// Checks everything that must hold between any two calls.
    ///
    /// Raises:
    ///     RuntimeError: says what is broken.
    fn check_invariants(&self) -> PyResult<()> {
        self.core().check_invariants().map_err(errors::scheduler)
    }
}

/// The width of a cache's blocks, which is the same on the host.
fn same_width(name: &str, width: usize, host: Option<usize>) -> PyResult<usize> {
    match host.filter(|&host| host != width) {
        None => Ok(width),
        Some(host) => Err(PyValueError::new_err(format!(
            "parts: expected {width} bytes a block of {name:?} on the host too, got {host}"
        ))),
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
