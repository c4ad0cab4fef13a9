//! `Step`: a plan's arrays, which lie in the core's own buffers. Buffers that nobody looks at any more are used again.

use std::sync::{Arc, Mutex, PoisonError};

use heedful_core::scheduler as core;
use numpy::ndarray::{ArrayView1, ArrayView2};
use numpy::{Element, PyArray1, PyArray2};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyList;

/// Buffers kept for later steps at most: one that is read, one that is written, and one more.
const MOST_SPARE: usize = 3;

/// Buffers that no array looks at.
#[derive(Clone, Default)]
pub struct Spares(Arc<Mutex<Vec<core::Step>>>);

impl Spares {
    /// A step to fill: one that was used before, if there is one.
    pub fn take(&self) -> core::Step {
        self.lock().pop().unwrap_or_default()
    }

    /// Keeps a step's memory for another one.
    pub fn put(&self, step: core::Step) {
        let mut spares = self.lock();
        if spares.len() < MOST_SPARE {
            spares.push(step);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<core::Step>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner of the memory that a step's arrays show; it lives as long as the last of them.
#[pyclass(frozen)]
struct Buffers {
    step: core::Step,
    spares: Spares,
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.spares.put(std::mem::take(&mut self.step));
    }
}

/// What runs in one step: flat arrays over its N tokens and B requests.
///
/// Tokens of a request are consecutive; requests are in the order of service. The arrays are the step's own: they stay valid
/// after the next schedule() for as long as anyone holds them or the step.
#[pyclass(frozen, module = "heedful")]
pub struct Step {
    buffers: Py<Buffers>,
    /// int32 [B] small numbers, one for each request that is there.
    #[pyo3(get)]
    request_keys: Py<PyArray1<i32>>,
    /// int32 [N] ids to compute.
    #[pyo3(get)]
    token_ids: Py<PyArray1<i32>>,
    /// int64 [N] their positions in their sequences.
    #[pyo3(get)]
    positions: Py<PyArray1<i64>>,
    /// int64 [N] cache rows they are written to: block * block_size + offset.
    #[pyo3(get)]
    slot_mapping: Py<PyArray1<i64>>,
    /// int32 [B + 1] each request's first token among the N.
    #[pyo3(get)]
    query_start_loc: Py<PyArray1<i32>>,
    /// int32 [B] keys of each request, this step's included.
    #[pyo3(get)]
    seq_lens: Py<PyArray1<i32>>,
    /// int32 [B] draft tokens at the end of each request's tokens.
    #[pyo3(get)]
    num_drafts: Py<PyArray1<i32>>,
    /// int32 [B, M] blocks of each request, -1 past its end.
    #[pyo3(get)]
    block_tables: Py<PyArray2<i32>>,
    /// int32 [n] rows among the N whose logits are sampled; the last row of a prompt comes once for each completion.
    #[pyo3(get)]
    sample_rows: Py<PyArray1<i32>>,
    /// int32 [n] which of the B requests each sample row belongs to.
    #[pyo3(get)]
    sample_request: Py<PyArray1<i32>>,
    /// int32 [n] which completion each sample row is for: 0 is the request itself, i the i-th of its fork_ids.
    #[pyo3(get)]
    sample_branch: Py<PyArray1<i32>>,
    /// int32 [c, 2] blocks (source, target) to copy in every cache before the step's tokens are computed.
    #[pyo3(get)]
    copies: Py<PyArray2<i32>>,
    /// int32 [o, 2] with a host tier: (block, place) of the index keys, and of a draft model's rows, to copy out for preempted requests,
    /// before everything else of the step; there are SchedulerConfig.swap_blocks places.
    #[pyo3(get)]
    swap_outs: Py<PyArray2<i32>>,
    /// int32 [i, 2] (place, block) of those to copy back in, after swap_outs and before copies.
    #[pyo3(get)]
    swap_ins: Py<PyArray2<i32>>,
    /// int32 [s, 2] with a host tier: (latent page, place in the host tier) to store, before everything else of the step.
    #[pyo3(get)]
    stores: Py<PyArray2<i32>>,
    /// int32 [l, 2] with a host tier: (place in the host tier, latent page) to load, after the stores.
    #[pyo3(get)]
    loads: Py<PyArray2<i32>>,
    /// int32 [c, 2] latent pages (source, target) to copy, after the loads; without a host tier these are `copies`.
    #[pyo3(get)]
    latent_copies: Py<PyArray2<i32>>,
    /// int64 [N] rows of the latent caches that tokens are written to; without a host tier this is slot_mapping.
    #[pyo3(get)]
    latent_slot_mapping: Py<PyArray1<i64>>,
    /// int32 [B, M] latent pages of each request, -1 past its end and where rows are in the host tier alone; without a host tier
    /// these are block_tables.
    #[pyo3(get)]
    latent_tables: Py<PyArray2<i32>>,
    request_ids: PyOnceLock<Py<PyList>>,
    preempted: PyOnceLock<Py<PyList>>,
    swapped: PyOnceLock<Py<PyList>>,
}

impl Step {
    pub fn new(py: Python<'_>, step: core::Step, spares: Spares) -> PyResult<Self> {
        let buffers = Bound::new(py, Buffers { step, spares })?;
        let step = &buffers.get().step;
        let row = |values| vector(values, &buffers);
        let long = |values| vector(values, &buffers);
        let pairs = |values: &[[i32; 2]]| matrix(values.as_flattened(), 2, &buffers);
        let (slot_mapping, copies) = (long(&step.slot_mapping), pairs(&step.copies));
        let block_tables = matrix(&step.block_tables, step.table_width, &buffers);
        let tiered = !step.latent_tables.is_empty();
        Ok(Self {
            request_keys: row(&step.request_keys),
            token_ids: row(&step.token_ids),
            positions: long(&step.positions),
            latent_slot_mapping: if tiered {
                long(&step.latent_slot_mapping)
            } else {
                slot_mapping.clone_ref(py)
            },
            slot_mapping,
            query_start_loc: row(&step.query_start_loc),
            seq_lens: row(&step.seq_lens),
            num_drafts: row(&step.num_drafts),
            latent_tables: if tiered {
                matrix(&step.latent_tables, step.table_width, &buffers)
            } else {
                block_tables.clone_ref(py)
            },
            block_tables,
            sample_rows: row(&step.sample_rows),
            sample_request: row(&step.sample_request),
            sample_branch: row(&step.sample_branch),
            swap_outs: pairs(&step.swap_outs),
            swap_ins: pairs(&step.swap_ins),
            stores: pairs(&step.moves.stores),
            loads: pairs(&step.moves.loads),
            latent_copies: if tiered { pairs(&step.moves.copies) } else { copies.clone_ref(py) },
            copies,
            request_ids: PyOnceLock::new(),
            preempted: PyOnceLock::new(),
            swapped: PyOnceLock::new(),
            buffers: buffers.unbind(),
        })
    }
}

#[pymethods]
impl Step {
    /// [B] names. The list is made when it is first asked for.
    #[getter]
    fn request_ids(&self, py: Python<'_>) -> PyResult<Py<PyList>> {
        list(py, &self.request_ids, &self.buffers.get().step.request_ids)
    }

    /// Those of the preempted requests whose rows are kept; the others will be computed anew.
    #[getter]
    fn swapped(&self, py: Python<'_>) -> PyResult<Py<PyList>> {
        list(py, &self.swapped, &self.buffers.get().step.swapped)
    }

    /// Names of requests that gave their blocks away for this step.
    #[getter]
    fn preempted(&self, py: Python<'_>) -> PyResult<Py<PyList>> {
        list(py, &self.preempted, &self.buffers.get().step.preempted)
    }

    /// N, the tokens of this step.
    #[getter]
    fn num_tokens(&self) -> usize {
        self.buffers.get().step.num_tokens()
    }

    /// B, the requests of this step.
    #[getter]
    fn num_seqs(&self) -> usize {
        self.buffers.get().step.num_seqs()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (tokens, seqs) = (self.num_tokens(), self.num_seqs());
        let preempted = self.preempted(py)?;
        Ok(format!("Step(num_tokens={tokens}, num_seqs={seqs}, preempted={})", preempted.bind(py).repr()?))
    }
}

fn list(py: Python<'_>, made: &PyOnceLock<Py<PyList>>, names: &[Arc<str>]) -> PyResult<Py<PyList>> {
    let list =
        made.get_or_try_init(py, || PyList::new(py, names.iter().map(|name| &**name)).map(Bound::unbind))?;
    Ok(list.clone_ref(py))
}

/// An array that shows `values`, a part of `owner`.
fn vector<T: Element>(values: &[T], owner: &Bound<'_, Buffers>) -> Py<PyArray1<T>> {
    // SAFETY: `values` lie on the heap of `owner`, which neither moves nor frees them before it is dropped, and the array holds a
    // reference to it. The core does not look at a step that it gave away, so writing through the array meets no other access.
    unsafe { PyArray1::borrow_from_array(&ArrayView1::from(values), owner.clone().into_any()) }.unbind()
}

/// The same as rows of `width` values.
fn matrix<T: Element>(values: &[T], width: usize, owner: &Bound<'_, Buffers>) -> Py<PyArray2<T>> {
    let shape = (values.len() / width.max(1), width);
    let view = ArrayView2::from_shape(shape, values).expect("rows are whole");
    // SAFETY: as above.
    unsafe { PyArray2::borrow_from_array(&view, owner.clone().into_any()) }.unbind()
}
