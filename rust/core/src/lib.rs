//! All algorithms of heedful, with no Python in them: `cargo test -p heedful-core` needs no interpreter.
//!
//! Data flows one way: `tokenizer` makes ids, `scheduler` plans a step over blocks of `cache`, `attention` and `topk`
//! compute it. No module calls back into a caller.

pub mod argument;
pub mod attention;
pub mod cache;
pub mod elements;
mod prefetch;
pub mod scheduler;
pub mod simd;
pub mod threads;
pub mod tokenizer;
pub mod topk;
