//! Paged caches: the block pool, block tables and the byte layouts of a page.

mod block_pool;
pub mod eviction;
pub mod fp8;
pub mod layout;
pub mod pages;

pub use block_pool::{BlockPool, BlockTable};
