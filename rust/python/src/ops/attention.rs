//! Sparse and dense attention, and the Hadamard transform.

use heedful_core::attention::attend::{Attention, AttentionQueries, KeyValueRows, Selection};
use heedful_core::attention::batch::PagedBatch;
use heedful_core::attention::hadamard as transform;
use pyo3::prelude::*;

use super::arrays::{Numbers, Output, Read, Write, dims};
use super::pages::cache_of_latents;
use super::{compute, level};
use crate::errors::argument;

fn queries<'a>(
    q: &'a Numbers<'_>,
    scale: f32,
    sink: Option<&'a Read<'_, f32>>,
) -> PyResult<AttentionQueries<'a>> {
    let [count, heads, dim] = dims("q", q.shape())?;
    Ok(AttentionQueries {
        values: q.elements()?,
        count,
        heads,
        dim,
        scale,
        sink: sink.map(Read::slice).transpose()?,
    })
}

/// Runs sparse attention when there are indices [T, K], dense attention otherwise.
fn run(
    py: Python<'_>,
    attention: &Attention<'_>,
    indices: Option<&Read<'_, i32>>,
    out: &mut Output<'_>,
    lse: &mut Write<'_, f32>,
) -> PyResult<()> {
    let (out, lse) = (out.elements()?, lse.slice()?);
    match indices {
        Some(indices) => {
            let [_, width] = dims("indices", indices.shape())?;
            let selection = Selection { indices: indices.slice()?, width };
            compute(py, || attention.sparse(selection, out, lse))
        }
        None => compute(py, || attention.dense(out, lse)),
    }
}

/// Attention over contiguous keys kv [S, Hkv, Dk] and values v [S, Hkv, Dv] (None: the first `value_dim` of kv).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn attention(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    kv: &Bound<'_, PyAny>,
    v: Option<&Bound<'_, PyAny>>,
    indices: Option<&Bound<'_, PyAny>>,
    q_positions: Option<&Bound<'_, PyAny>>,
    scale: f32,
    value_dim: usize,
    sink: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (q, kv) = (Numbers::new("q", q)?, Numbers::new("kv", kv)?);
    let v = v.map(|v| Numbers::new("v", v)).transpose()?;
    let (indices, sink) = (Read::optional("indices", indices)?, Read::optional("sink", sink)?);
    let positions = Read::optional("q_positions", q_positions)?;
    let (mut out, mut lse) = (Output::new("out", out)?, Write::new("lse", lse)?);
    let [count, heads, _] = dims("kv", kv.shape())?;
    let values = v.as_ref().map(Numbers::elements).transpose()?;
    let rows = KeyValueRows { keys: kv.elements()?, values, count, heads, value_dim };
    let positions = positions.as_ref().map(Read::slice).transpose()?;
    let attention = Attention::contiguous(level()?, queries(&q, scale, sink.as_ref())?, rows, positions)
        .map_err(argument)?;
    run(py, &attention, indices.as_ref(), &mut out, &mut lse)
}

/// As `attention`, over a paged latent cache.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn attention_paged(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    indices: Option<&Bound<'_, PyAny>>,
    cache: &Bound<'_, PyAny>,
    block_tables: &Bound<'_, PyAny>,
    seq_lens: &Bound<'_, PyAny>,
    query_start_loc: &Bound<'_, PyAny>,
    scale: f32,
    value_dim: usize,
    sink: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (q, cache) = (Numbers::new("q", q)?, Numbers::new("cache", cache)?);
    let (indices, sink) = (Read::optional("indices", indices)?, Read::optional("sink", sink)?);
    let tables = Read::new("block_tables", block_tables)?;
    let (lens, starts) = (Read::new("seq_lens", seq_lens)?, Read::new("query_start_loc", query_start_loc)?);
    let (mut out, mut lse) = (Output::new("out", out)?, Write::new("lse", lse)?);
    let batch = PagedBatch {
        block_tables: tables.slice()?,
        seq_lens: lens.slice()?,
        query_start_loc: starts.slice()?,
    };
    let queries = queries(&q, scale, sink.as_ref())?;
    let cache = cache_of_latents(&cache, queries.dim, value_dim)?;
    let attention = Attention::paged(level()?, queries, cache, batch).map_err(argument)?;
    run(py, &attention, indices.as_ref(), &mut out, &mut lse)
}

/// Orthonormal Walsh-Hadamard transform of rows of `dim` values.
#[pyfunction]
fn hadamard(py: Python<'_>, x: &Bound<'_, PyAny>, dim: usize, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let (x, mut out) = (Numbers::new("x", x)?, Output::new("out", out)?);
    let (x, out) = (x.elements()?, out.elements()?);
    compute(py, || transform::hadamard(x, dim, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention_paged, module)?)?;
    module.add_function(wrap_pyfunction!(hadamard, module)?)
}
