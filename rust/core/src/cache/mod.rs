//! Paged caches: the block pool, block tables and the byte layouts of a page.
