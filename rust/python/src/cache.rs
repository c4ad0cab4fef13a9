//! `BlockPool` and `PrefixCache`: the caches' bookkeeping without a scheduler.

use std::sync::{Mutex, MutexGuard, PoisonError};

use heedful_core::cache as core;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::{count, described, ids, optional_count, optional_text, refused, text};
use crate::scheduler::eviction_policy;

/// Block numbers leave as int32.
const MOST: usize = i32::MAX as usize;

/// A fixed number of blocks, each in use or free.
///
/// Args:
///     num_blocks: blocks 0 to num_blocks - 1.
///
/// Raises:
///     ValueError: num_blocks is not an integer from 1 to 2**31 - 1.
#[pyclass(frozen, module = "heedful")]
pub struct BlockPool {
    inner: Mutex<core::BlockPool>,
}

impl BlockPool {
    fn core(&self) -> MutexGuard<'_, core::BlockPool> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl BlockPool {
    #[new]
    fn new(num_blocks: &Bound<'_, PyAny>) -> PyResult<Self> {
        let total = in_range("num_blocks", count("num_blocks", num_blocks)?)?;
        Ok(Self { inner: Mutex::new(core::BlockPool::new(total as u32)) })
    }

    /// Takes blocks: int32 [count].
    ///
    /// Raises:
    ///     RuntimeError: fewer are free; none is taken.
    fn allocate<'py>(&self, py: Python<'py>, count: usize) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let mut pool = self.core();
        if count > pool.free() {
            let free = pool.free();
            return Err(PyRuntimeError::new_err(format!("count: {free} blocks are free, not {count}")));
        }
        let array = PyArray1::<i32>::zeros(py, [count], false);
        // SAFETY: nobody else has the array yet.
        let blocks = unsafe { array.as_slice_mut() }?;
        let taken = pool.take(bytemuck::cast_slice_mut(blocks));
        debug_assert!(taken, "free blocks were counted");
        Ok(array)
    }

    /// Gives blocks back.
    ///
    /// Args:
    ///     blocks: int32 [n], each in use.
    ///
    /// Raises:
    ///     ValueError: a block is not in use or comes twice, or the array is none of int32; nothing is given back.
    fn release(&self, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let array: PyReadonlyArray1<'_, i32> = blocks.extract().map_err(|_| {
            PyTypeError::new_err(format!("blocks: expected an int32 array [n], got {}", described(blocks)))
        })?;
        let copied;
        let blocks = match array.as_slice() {
            Ok(blocks) => blocks,
            Err(_) => {
                copied = array.call_method0("tolist")?.extract::<Vec<i32>>()?;
                &copied
            }
        };
        let given = self.core().give(bytemuck::cast_slice(blocks));
        given.map_err(|block| PyValueError::new_err(format!("blocks: block {} is not in use", block as i32)))
    }

    /// Blocks that are free.
    #[getter]
    fn num_free(&self) -> usize {
        self.core().free()
    }
}

/// Cached sequences of tokens in a fixed number of blocks: which prefix of a prompt is there?
///
/// Args:
///     num_blocks: blocks that it holds.
///     block_size: tokens in a block.
///     eviction: which block is given up first.
///     hash_seed: key of the block hashes; None draws one.
///
/// Raises:
///     ValueError: an argument is out of range; the message names it.
///
/// Example:
///     >>> import heedful
///     >>> cache = heedful.PrefixCache(8, 4)
///     >>> cache.insert([1, 2, 3, 4, 5, 6, 7, 8, 9])
///     2
///     >>> cache.match([1, 2, 3, 4, 5, 6]).tolist()
///     [0]
#[pyclass(frozen, module = "heedful")]
pub struct PrefixCache {
    inner: Mutex<core::PrefixCache>,
}

impl PrefixCache {
    fn core(&self) -> MutexGuard<'_, core::PrefixCache> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PrefixCache {
    #[new]
    #[pyo3(signature = (num_blocks, block_size=None, *, eviction=None, hash_seed=None),
           text_signature = "(num_blocks, block_size=64, *, eviction='reuse', hash_seed=None)")]
    fn new(
        num_blocks: &Bound<'_, PyAny>,
        block_size: Option<&Bound<'_, PyAny>>,
        eviction: Option<&Bound<'_, PyAny>>,
        hash_seed: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let total = in_range("num_blocks", count("num_blocks", num_blocks)?)?;
        let size = block_size.map_or(Ok(64), |value| count("block_size", value))?;
        if !(1..=core::MOST_BLOCK_TOKENS).contains(&size) {
            return Err(PyValueError::new_err(format!(
                "block_size: expected an integer from 1 to {}, got {size}",
                core::MOST_BLOCK_TOKENS
            )));
        }
        let kind =
            eviction.map_or(Ok(Default::default()), |name| eviction_policy(text("eviction", name)?))?;
        let seed = hash_seed.map_or(Ok(None), |value| optional_count("hash_seed", value))?;
        let hasher = core::BlockHasher::new(seed.map(|seed| seed as u64));
        Ok(Self { inner: Mutex::new(core::PrefixCache::new(total as u32, size, kind, hasher)) })
    }

    /// Hashes of the full blocks of a sequence: uint8 [n, 16]. A block's hash covers everything before it.
    #[pyo3(signature = (token_ids, *, cache_salt=None))]
    fn hash_blocks<'py>(
        &self,
        py: Python<'py>,
        token_ids: &Bound<'py, PyAny>,
        cache_salt: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<u8>>> {
        let tokens = Tokens::new(token_ids)?;
        let salt = salt_of(cache_salt)?;
        let cache = self.core();
        let hashes = cache.hash_blocks(cache.namespace(salt), tokens.as_slice()?);
        let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_be_bytes()).collect();
        bytes.into_pyarray(py).reshape([hashes.len(), 16])
    }

    /// The blocks of a sequence's longest cached prefix, which counts as a use of them: int32 [m].
    #[pyo3(signature = (token_ids, *, cache_salt=None))]
    fn r#match<'py>(
        &self,
        py: Python<'py>,
        token_ids: &Bound<'py, PyAny>,
        cache_salt: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let tokens = Tokens::unchecked(token_ids)?;
        let salt = salt_of(cache_salt)?;
        let mut cache = self.core();
        let namespace = cache.namespace(salt);
        match cache.find(namespace, tokens.as_slice()?) {
            Ok((blocks, _)) => Ok(PyArray1::from_slice(py, bytemuck::cast_slice(blocks))),
            Err(id) => Err(refused("token_ids", tokens.given(id))),
        }
    }

    /// Caches the full blocks of a sequence, as far as they fit; how many were not there before.
    #[pyo3(signature = (token_ids, *, cache_salt=None))]
    fn insert(&self, token_ids: &Bound<'_, PyAny>, cache_salt: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
        let tokens = Tokens::new(token_ids)?;
        let salt = salt_of(cache_salt)?;
        let mut cache = self.core();
        let namespace = cache.namespace(salt);
        Ok(cache.insert(namespace, tokens.as_slice()?))
    }

    /// Counts by name: total_blocks, cached_blocks, and since the start hit_blocks, hit_age_steps, evicted_blocks and
    /// evict_age_steps; a step is a call.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let cache = self.core();
        let ((total, cached), counts) = (cache.size(), cache.counts());
        let dict = PyDict::new(py);
        for (name, value) in [
            ("total_blocks", total as u64),
            ("cached_blocks", cached as u64),
            ("hit_blocks", counts.hit_blocks),
            ("hit_age_steps", counts.hit_age_steps),
            ("evicted_blocks", counts.evicted_blocks),
            ("evict_age_steps", counts.evict_age_steps),
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
        self.core().check().map_err(|broken| PyRuntimeError::new_err(format!("invariant broken: {broken}")))
    }
}

/// Token ids, where they lie if they are an int32 array.
enum Tokens<'py> {
    Array(PyReadonlyArray1<'py, i32>),
    Copied(Vec<u32>),
}

impl<'py> Tokens<'py> {
    fn new(values: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = values.extract::<PyReadonlyArray1<'py, i32>>()
            && let Ok(ids) = array.as_slice()
            // The sum of the sign bits: one pass that the compiler turns into vector code.
            && ids.iter().fold(0, |signs, &id| signs | id) >= 0
        {
            return Ok(Self::Array(array));
        }
        let ids = ids("token_ids", values)?;
        match ids.iter().find(|&&id| i32::try_from(id).is_err()) {
            Some(&id) => Err(refused("token_ids", id)),
            None => Ok(Self::Copied(ids)),
        }
    }

    /// The same, where negative ids become ids that no int32 holds.
    fn unchecked(values: &Bound<'py, PyAny>) -> PyResult<Self> {
        match values.extract::<PyReadonlyArray1<'py, i32>>() {
            Ok(array) if array.as_slice().is_ok() => Ok(Self::Array(array)),
            _ => Self::new(values),
        }
    }

    /// An id as it was given.
    fn given(&self, id: u32) -> i64 {
        match self {
            Self::Array(_) => i64::from(id as i32),
            Self::Copied(_) => i64::from(id),
        }
    }

    fn as_slice(&self) -> PyResult<&[u32]> {
        match self {
            Self::Array(array) => Ok(bytemuck::cast_slice(array.as_slice()?)),
            Self::Copied(ids) => Ok(ids),
        }
    }
}

fn salt_of<'a>(salt: Option<&'a Bound<'_, PyAny>>) -> PyResult<Option<&'a str>> {
    salt.map_or(Ok(None), |value| optional_text("cache_salt", value))
}

fn in_range(name: &str, value: usize) -> PyResult<usize> {
    if (1..=MOST).contains(&value) {
        return Ok(value);
    }
    Err(PyValueError::new_err(format!("{name}: expected an integer from 1 to {MOST}, got {value}")))
}

/// Adds this file's names to `heedful._core`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<BlockPool>()?;
    module.add_class::<PrefixCache>()
}
