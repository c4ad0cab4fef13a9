//! Paged caches: the block pool, the prefix index, and the byte layouts of a page.

mod block_hash;
mod block_pool;
mod events;
pub mod eviction;
pub mod fp8;
mod fp8_half;
mod hot_rows;
pub mod int8;
pub mod layout;
pub mod pages;
mod prefix_cache;
mod prefix_index;
mod residency;
pub mod snapshot;

pub use block_hash::{BlockHasher, Namespace, PUBLIC, ROOT_HASH, Space};
pub use block_pool::{BlockPool, BlockTable, Found, PoolCounts};
pub use events::CacheEvent;
pub use hot_rows::{FetchError, FetchPlan, HotRows};
pub use prefix_cache::PrefixCache;
pub use prefix_index::{MOST_BLOCK_TOKENS, MOST_EXPECTED, PrefixIndex};
pub use residency::{MoveCounts, Moves, Residencies, Residency};
