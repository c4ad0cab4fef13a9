//! Index scores and top-k.

use heedful_core::attention::batch::PagedBatch;
use heedful_core::attention::index::{IndexArena, IndexQueries, Indexer};
use heedful_core::threads::Arena;
use heedful_core::topk::{self, Scores, Selector};
use pyo3::prelude::*;

use super::arrays::{Numbers, Read, Write, dims};
use super::pages::cache_of_index;
use super::{compute, level};
use crate::errors::argument;

/// Working memory of every call.
static SELECTORS: Arena<Selector> = Arena::new();
static INDEXERS: IndexArena = IndexArena::new();

fn queries<'a>(q: &'a Numbers<'_>, weights: &'a Read<'_, f32>) -> PyResult<IndexQueries<'a>> {
    let [count, heads, dim] = dims("q", q.shape())?;
    Ok(IndexQueries { values: q.elements()?, weights: weights.slice()?, count, heads, dim })
}

#[pyfunction]
fn top_k(
    py: Python<'_>,
    scores: &Bound<'_, PyAny>,
    lengths: Option<&Bound<'_, PyAny>>,
    sorted: bool,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let scores = Numbers::new("scores", scores)?;
    let lengths = Read::<i64>::optional("lengths", lengths)?;
    let mut out = Write::<i32>::new("out", out)?;
    let ([rows, columns], [_, k]) = (dims("scores", scores.shape())?, dims("out", out.shape())?);
    let (values, out, level) = (scores.elements()?, out.slice()?, level()?);
    let lengths = lengths.as_ref().map(Read::slice).transpose()?;
    let scores = Scores { values, rows, columns, lengths };
    let select = || topk::top_k(level, scores, k, sorted, out, &SELECTORS);
    // One row is selected on this thread: it takes no longer than waking one of the pool.
    if rows == 1 { py.detach(select).map_err(argument) } else { compute(py, select) }
}

/// What the caller wants of an indexer: all scores [T, S], or the best positions [T, k], best first or rising.
enum Wanted<'py> {
    Scores(Write<'py, f32>),
    TopK { out: Write<'py, i32>, sorted: bool },
}

impl<'py> Wanted<'py> {
    /// Positions if it is said whether they shall be sorted, scores otherwise.
    fn new(out: &Bound<'py, PyAny>, sorted: Option<bool>) -> PyResult<Self> {
        Ok(match sorted {
            Some(sorted) => Self::TopK { out: Write::new("out", out)?, sorted },
            None => Self::Scores(Write::new("out", out)?),
        })
    }

    fn fill(&mut self, py: Python<'_>, indexer: &Indexer<'_>) -> PyResult<()> {
        match self {
            Self::Scores(out) => {
                let [_, columns] = dims("out", out.shape())?;
                let out = out.slice()?;
                compute(py, || indexer.scores(columns, out, &INDEXERS))
            }
            Self::TopK { out, sorted } => {
                let [_, k] = dims("out", out.shape())?;
                let out = out.slice()?;
                compute(py, || indexer.top_k(k, *sorted, out, &INDEXERS))
            }
        }
    }
}

/// Writes scores (without `sorted`, out f32 [T, S]) or the best positions (with it, out int32 [T, k]).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn index(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    q_positions: Option<&Bound<'_, PyAny>>,
    k_scale: Option<&Bound<'_, PyAny>>,
    sorted: Option<bool>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (q, k, weights) = (Numbers::new("q", q)?, Numbers::new("k", k)?, Read::new("weights", weights)?);
    let (positions, scale) =
        (Read::optional("q_positions", q_positions)?, Read::optional("k_scale", k_scale)?);
    let mut wanted = Wanted::new(out, sorted)?;
    let [keys, _] = dims("k", k.shape())?;
    let scale = scale.as_ref().map(Read::slice).transpose()?;
    let positions = positions.as_ref().map(Read::slice).transpose()?;
    let indexer =
        Indexer::contiguous(level()?, queries(&q, &weights)?, k.elements()?, keys, scale, positions)
            .map_err(argument)?;
    wanted.fill(py, &indexer)
}

/// Checks a ragged batch against the rows of q and the blocks of a cache.
#[pyfunction]
fn check_batch(
    queries: usize,
    blocks: usize,
    block_tables: &Bound<'_, PyAny>,
    seq_lens: &Bound<'_, PyAny>,
    query_start_loc: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let tables = Read::new("block_tables", block_tables)?;
    let (lens, starts) = (Read::new("seq_lens", seq_lens)?, Read::new("query_start_loc", query_start_loc)?);
    let batch = PagedBatch {
        block_tables: tables.slice()?,
        seq_lens: lens.slice()?,
        query_start_loc: starts.slice()?,
    };
    batch.check(queries, blocks).map_err(argument)
}

/// As `index`, over a paged cache.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn index_paged(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    cache: &Bound<'_, PyAny>,
    block_tables: &Bound<'_, PyAny>,
    seq_lens: &Bound<'_, PyAny>,
    query_start_loc: &Bound<'_, PyAny>,
    sorted: Option<bool>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (q, weights, cache) =
        (Numbers::new("q", q)?, Read::new("weights", weights)?, Numbers::new("cache", cache)?);
    let tables = Read::new("block_tables", block_tables)?;
    let (lens, starts) = (Read::new("seq_lens", seq_lens)?, Read::new("query_start_loc", query_start_loc)?);
    let mut wanted = Wanted::new(out, sorted)?;
    let batch = PagedBatch {
        block_tables: tables.slice()?,
        seq_lens: lens.slice()?,
        query_start_loc: starts.slice()?,
    };
    let queries = queries(&q, &weights)?;
    let cache = cache_of_index(&cache, queries.dim)?;
    let indexer = Indexer::paged(level()?, queries, cache, batch).map_err(argument)?;
    wanted.fill(py, &indexer)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(top_k, module)?)?;
    module.add_function(wrap_pyfunction!(check_batch, module)?)?;
    module.add_function(wrap_pyfunction!(index, module)?)?;
    module.add_function(wrap_pyfunction!(index_paged, module)?)
}
