//! Paged caches: the block pool, block tables and the byte layouts of a page.

pub mod fp8;
pub mod layout;
pub mod pages;
