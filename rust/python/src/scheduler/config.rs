//! `SchedulerConfig`: the limits, read by name.

use heedful_core::cache::eviction::EvictionPolicy;
use heedful_core::scheduler as core;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::readers;
use crate::errors;

/// Limits of a scheduler.
///
/// Args:
///     num_blocks: blocks in the pool; each holds its tokens' rows in every cache.
///     block_size: tokens in a block.
///     max_batched_tokens: tokens computed in one step at most.
///     max_num_seqs: requests running at the same time at most.
///     policy: which request goes first: "fcfs" (in order of arrival), "priority" (lower numbers first; each ageing_steps of
///         waiting make up for one), "longest_prefix" (most tokens cached; after ageing_steps in order of arrival), "fair" (of
///         the tenant that got the least for its weight) or "deadline" (the earliest; of those without one, who has waited for
///         ageing_steps goes first at every second admission).
///     max_waiting: requests waiting at most; None sets no limit.
///     watermark: share of the blocks left free when a request is admitted beside others; in [0, 1).
///     max_model_len: longest prompt and output together; None leaves the pool's size as the limit.
///     max_waiting_tokens: tokens of waiting requests at most; None sets no limit.
///     enable_prefix_caching: keep the rows of ended requests for others that begin alike, until their blocks are needed.
///     eviction: which cached block is given up first: "lru" (the least recently used) or "reuse" (the one that is least likely to
///         be used again, as learned from the traffic).
///     hash_seed: key of the block hashes, for events that several processes compare; None draws one.
///     enable_events: keep events of the prefix cache for events().
///     num_draft_blocks: pages of a draft model's caches; None means one for each block.
///     num_latent_blocks: device pages for latent rows. With fewer than num_blocks, the latent rows of the others are in a host tier
///         (index keys stay on the device), see Step.stores and plan_fetch(). None means one for each block, and no tier.
///     hot_rows: rows fetched from the host tier that the device keeps, for each layer.
///     preemption: what becomes of the computed rows of a request that gives its blocks away: "recompute" (they are computed anew),
///         "swap" (the host tier keeps them as long as there is room) or "auto" (whichever costs less for that request).
///     num_swap_blocks: blocks of preempted requests that the host tier keeps, beside those of the pool; see Step.swap_outs. None means
///         a quarter of num_blocks with a host tier (0 with "recompute") and 0 without one.
///     swap_cost: cost of moving a token's index keys to the host and back, where computing it at position 0 costs 1; for "auto".
///     num_speculative_tokens: draft tokens of a request in one step at most.
///     context_cost: a token at position p costs 1 + context_cost * p.
///     max_batched_cost: cost of a step at most; None lets tokens alone count.
///     ageing_steps: see policy.
///
/// Raises:
///     ValueError: a limit is out of range; the message names it.
#[pyclass(frozen, eq, module = "heedful")]
#[derive(Clone, PartialEq)]
pub struct SchedulerConfig {
    pub limits: core::SchedulerConfig,
}

#[pymethods]
impl SchedulerConfig {
    #[new]
    #[pyo3(signature = (num_blocks, block_size=64, max_batched_tokens=8192, max_num_seqs=256, policy="fcfs",
                        max_waiting=None, watermark=0.01, max_model_len=None, *, max_waiting_tokens=None,
                        enable_prefix_caching=true, eviction="reuse", hash_seed=None, enable_events=false,
                        num_draft_blocks=None, num_latent_blocks=None, hot_rows=0, preemption="auto", num_swap_blocks=None, swap_cost=0.05,
                        num_speculative_tokens=0, context_cost=0.0, max_batched_cost=None, ageing_steps=1024))]
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
        #[pyo3(from_py_with = readers::max_waiting_tokens)] max_waiting_tokens: Option<usize>,
        enable_prefix_caching: bool,
        #[pyo3(from_py_with = readers::eviction)] eviction: &str,
        #[pyo3(from_py_with = readers::hash_seed)] hash_seed: Option<usize>,
        enable_events: bool,
        #[pyo3(from_py_with = readers::num_draft_blocks)] num_draft_blocks: Option<usize>,
        #[pyo3(from_py_with = readers::num_latent_blocks)] num_latent_blocks: Option<usize>,
        #[pyo3(from_py_with = readers::hot_rows)] hot_rows: usize,
        #[pyo3(from_py_with = readers::preemption)] preemption: &str,
        #[pyo3(from_py_with = readers::num_swap_blocks)] num_swap_blocks: Option<usize>,
        #[pyo3(from_py_with = readers::swap_cost)] swap_cost: f64,
        #[pyo3(from_py_with = readers::num_speculative_tokens)] num_speculative_tokens: usize,
        #[pyo3(from_py_with = readers::context_cost)] context_cost: f64,
        #[pyo3(from_py_with = readers::max_batched_cost)] max_batched_cost: Option<f64>,
        #[pyo3(from_py_with = readers::ageing_steps)] ageing_steps: usize,
    ) -> PyResult<Self> {
        let policy = core::Policy::parse(policy).ok_or_else(|| unknown_policy(policy))?;
        let names = core::Preemption::ALL.map(core::Preemption::as_str);
        let preemption = core::Preemption::parse(preemption).ok_or_else(|| {
            let names = names.join(", ");
            PyValueError::new_err(format!("preemption: expected one of {names}, got {preemption:?}"))
        })?;
        let limits = core::SchedulerConfig {
            num_blocks,
            block_size,
            max_batched_tokens,
            max_num_seqs,
            policy,
            max_waiting,
            max_waiting_tokens,
            watermark,
            max_model_len,
            enable_prefix_caching,
            eviction: eviction_policy(eviction)?,
            hash_seed: hash_seed.map(|seed| seed as u64),
            enable_events,
            num_draft_blocks,
            num_latent_blocks,
            hot_rows,
            preemption,
            num_swap_blocks,
            swap_cost,
            num_speculative_tokens,
            context_cost,
            max_batched_cost,
            ageing_steps,
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
        self.limits.policy.as_str()
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

    #[getter]
    fn max_waiting_tokens(&self) -> Option<usize> {
        self.limits.max_waiting_tokens
    }

    #[getter]
    fn enable_prefix_caching(&self) -> bool {
        self.limits.enable_prefix_caching
    }

    #[getter]
    fn eviction(&self) -> &'static str {
        self.limits.eviction.name()
    }

    #[getter]
    fn hash_seed(&self) -> Option<u64> {
        self.limits.hash_seed
    }

    #[getter]
    fn enable_events(&self) -> bool {
        self.limits.enable_events
    }

    #[getter]
    fn num_draft_blocks(&self) -> Option<usize> {
        self.limits.num_draft_blocks
    }

    #[getter]
    fn num_latent_blocks(&self) -> Option<usize> {
        self.limits.num_latent_blocks
    }

    #[getter]
    fn hot_rows(&self) -> usize {
        self.limits.hot_rows
    }

    #[getter]
    fn preemption(&self) -> &'static str {
        self.limits.preemption.as_str()
    }

    /// As it was given; `swap_blocks` is what it means.
    #[getter]
    fn num_swap_blocks(&self) -> Option<usize> {
        self.limits.num_swap_blocks
    }

    #[getter]
    fn swap_cost(&self) -> f64 {
        self.limits.swap_cost
    }

    /// Places for index keys, and a draft model's rows, of preempted requests in the host tier: Step.swap_outs and swap_ins.
    #[getter]
    fn swap_blocks(&self) -> usize {
        self.limits.swap_blocks()
    }

    /// Places for latent rows of a block in the host tier: Step.stores and loads, and plan_fetch(). 0 without a host tier.
    #[getter]
    fn host_blocks(&self) -> usize {
        self.limits.host_blocks()
    }

    #[getter]
    fn num_speculative_tokens(&self) -> usize {
        self.limits.num_speculative_tokens
    }

    #[getter]
    fn context_cost(&self) -> f64 {
        self.limits.context_cost
    }

    #[getter]
    fn max_batched_cost(&self) -> Option<f64> {
        self.limits.max_batched_cost
    }

    #[getter]
    fn ageing_steps(&self) -> usize {
        self.limits.ageing_steps
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let names = [
            "num_blocks",
            "block_size",
            "max_batched_tokens",
            "max_num_seqs",
            "policy",
            "max_waiting",
            "watermark",
            "max_model_len",
            "max_waiting_tokens",
            "enable_prefix_caching",
            "eviction",
            "hash_seed",
            "enable_events",
            "num_draft_blocks",
            "num_latent_blocks",
            "hot_rows",
            "preemption",
            "num_swap_blocks",
            "swap_cost",
            "num_speculative_tokens",
            "context_cost",
            "max_batched_cost",
            "ageing_steps",
        ];
        let shown = |name: &str| Ok(format!("{name}={}", slf.getattr(name)?.repr()?));
        let shown: Vec<String> = names.into_iter().map(shown).collect::<PyResult<_>>()?;
        Ok(format!("SchedulerConfig({})", shown.join(", ")))
    }
}

/// The eviction policy of this name.
pub fn eviction_policy(name: &str) -> PyResult<EvictionPolicy> {
    name.parse().map_err(PyValueError::new_err)
}

fn unknown_policy(got: &str) -> PyErr {
    let names = core::Policy::ALL.map(core::Policy::as_str).join(", ");
    PyValueError::new_err(format!("policy: expected one of {names}, got {got:?}"))
}
