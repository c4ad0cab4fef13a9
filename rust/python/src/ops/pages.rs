//! Paged caches: writing, reading, and the FP8 codec alone.

use half::slice::HalfBitsSliceExt;
use heedful_core::cache::layout::LatentLayout;
use heedful_core::cache::pages::{self, Cache, Layout, Pages, PagesMut};
use heedful_core::cache::{fp8, int8};
use heedful_core::elements::Elements;
use numpy::PyArrayDyn;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::arrays::{Numbers, Read, Write, dims};
use super::compute;
use crate::errors::argument;

fn blocks(shape: &[usize]) -> PyResult<usize> {
    shape
        .first()
        .copied()
        .ok_or_else(|| PyValueError::new_err("cache: expected [num_blocks, ...], got a scalar"))
}

fn cache<'a>(array: &'a Numbers<'_>, layout: Layout) -> PyResult<Cache<'a>> {
    let storage = match array.elements()? {
        Elements::E4m3(bytes) => Pages::Fp8(bytes),
        Elements::I8(bytes) => Pages::Int8(bytes),
        values => Pages::Rows(values),
    };
    Cache::new(storage, layout, blocks(array.shape())?).map_err(argument)
}

/// A cache of latent rows of `dim` values.
pub fn cache_of_latents<'a>(array: &'a Numbers<'_>, dim: usize, value_dim: usize) -> PyResult<Cache<'a>> {
    cache(array, latents(dim, value_dim)?)
}

/// A cache of index keys of `dim` values.
pub fn cache_of_index<'a>(array: &'a Numbers<'_>, dim: usize) -> PyResult<Cache<'a>> {
    cache(array, Layout::Index(dim))
}

fn latents(dim: usize, value_dim: usize) -> PyResult<Layout> {
    Ok(Layout::Latent(LatentLayout::new(dim, value_dim).map_err(argument)?))
}

/// A latent layout when there is a `value_dim`, an index layout otherwise.
fn layout(dim: usize, value_dim: Option<usize>) -> PyResult<Layout> {
    value_dim.map_or(Ok(Layout::Index(dim)), |value_dim| latents(dim, value_dim))
}

/// Writes rows [N, dim] to the slots of a latent cache (`value_dim` given) or an index cache.
#[pyfunction]
fn write_cache(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    cache: &Bound<'_, PyAny>,
    slot_mapping: &Bound<'_, PyAny>,
    value_dim: Option<usize>,
) -> PyResult<()> {
    let name = if value_dim.is_some() { "latent" } else { "keys" };
    let (rows, slots) = (Numbers::new(name, rows)?, Read::<i64>::new("slot_mapping", slot_mapping)?);
    let [_, dim] = dims(name, rows.shape())?;
    let layout = layout(dim, value_dim)?;
    let (values, slots) = (rows.elements()?, slots.slice()?);
    if cache.cast::<PyArrayDyn<u8>>().is_ok() {
        let mut storage = Write::<u8>::new("cache", cache)?;
        let (count, storage) = (blocks(storage.shape())?, PagesMut::Fp8(storage.slice()?));
        compute(py, || pages::write(name, values, slots, storage, layout, count))
    } else if cache.cast::<PyArrayDyn<i8>>().is_ok() {
        let mut storage = Write::<i8>::new("cache", cache)?;
        let (count, storage) = (blocks(storage.shape())?, PagesMut::Int8(storage.slice()?));
        compute(py, || pages::write(name, values, slots, storage, layout, count))
    } else if cache.cast::<PyArrayDyn<u16>>().is_ok() {
        let mut storage = Write::<u16>::new("cache", cache)?;
        let (count, storage) =
            (blocks(storage.shape())?, PagesMut::Bf16(storage.slice()?.reinterpret_cast_mut()));
        compute(py, || pages::write(name, values, slots, storage, layout, count))
    } else {
        let mut storage = Write::<f32>::new("cache", cache)?;
        let (count, storage) = (blocks(storage.shape())?, PagesMut::F32(storage.slice()?));
        compute(py, || pages::write(name, values, slots, storage, layout, count))
    }
}

/// Reads slots of a latent cache (`value_dim` given) or an index cache to out f32 [N, dim].
#[pyfunction]
fn read_cache(
    py: Python<'_>,
    cache: &Bound<'_, PyAny>,
    slots: &Bound<'_, PyAny>,
    value_dim: Option<usize>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (cache, slots) = (Numbers::new("cache", cache)?, Read::<i64>::new("slots", slots)?);
    let mut out = Write::<f32>::new("out", out)?;
    let [_, dim] = dims("out", out.shape())?;
    let cache = self::cache(&cache, layout(dim, value_dim)?)?;
    let (slots, out) = (slots.slice()?, out.slice()?);
    compute(py, || cache.gather(slots, out))
}

/// Quantises rows of `dim` values to e4m3 codes and one scale for each `group` of them.
#[pyfunction]
fn quantize_fp8(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    dim: usize,
    group: usize,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let x = Numbers::new("x", x)?;
    let (mut codes, mut scales) = (Write::<u8>::new("codes", codes)?, Write::<f32>::new("scales", scales)?);
    let (x, codes, scales) = (x.elements()?, codes.slice()?, scales.slice()?);
    compute(py, || fp8::quantize(x, dim, group, codes, scales))
}

/// Quantises rows of `dim` values to int8 codes and one scale each.
#[pyfunction]
fn quantize_int8(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    dim: usize,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let x = Numbers::new("x", x)?;
    let (mut codes, mut scales) = (Write::<i8>::new("codes", codes)?, Write::<f32>::new("scales", scales)?);
    let (x, codes, scales) = (x.elements()?, codes.slice()?, scales.slice()?);
    compute(py, || int8::quantize(x, dim, codes, scales))
}

/// Codes times scales, f32.
#[pyfunction]
fn dequantize_fp8(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    dim: usize,
    group: usize,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (codes, scales) = (Read::<u8>::new("codes", codes)?, Read::<f32>::new("scales", scales)?);
    let mut out = Write::<f32>::new("out", out)?;
    let (codes, scales, out) = (codes.slice()?, scales.slice()?, out.slice()?);
    compute(py, || fp8::dequantize(codes, scales, dim, group, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(write_cache, module)?)?;
    module.add_function(wrap_pyfunction!(read_cache, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_fp8, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_int8, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_fp8, module)?)
}
