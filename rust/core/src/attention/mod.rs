//! Indexer scoring, sparse attention and dense attention on the CPU.
//!
//! `batch` says which keys each query sees (contiguous or paged, one sequence or a ragged batch); `index` scores and selects
//! keys; `attend` is the softmax attention over selected or over all visible keys, `wave` its course, on bfloat16 pairs
//! (`paired`, `pairs`) or in f32 (`single`, `gemm`); `softmax` and `rows` serve both.
//! No result depends on the number of threads, nor a row's result on the other rows: work is cut at fixed key counts.

pub mod attend;
pub mod batch;
mod gemm;
pub mod hadamard;
pub mod index;
mod paired;
mod pairs;
mod rows;
mod single;
mod softmax;
#[cfg(test)]
mod tests;
mod wave;
