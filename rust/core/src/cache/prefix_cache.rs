//! A prefix cache by itself: what a router or a simulation needs of one, without a scheduler.

use super::block_hash::{BlockHasher, Namespace, ROOT_HASH};
use super::block_pool::{BlockPool, BlockTable, Found, PoolCounts};
use super::eviction::{EvictionPolicy, Evictor};
use super::prefix_index::{MOST_EXPECTED, PrefixIndex};

/// Cached sequences in a fixed number of blocks.
#[derive(Debug)]
pub struct PrefixCache {
    pool: BlockPool,
    hasher: BlockHasher,
    block_size: usize,
    found: Found,
}

impl PrefixCache {
    /// An empty cache.
    pub fn new(num_blocks: u32, block_size: usize, eviction: EvictionPolicy, hasher: BlockHasher) -> Self {
        let index =
            PrefixIndex::new(block_size, hasher.clone(), None, MOST_EXPECTED.min(num_blocks as usize));
        let pool = BlockPool::with_cache(num_blocks, index, Evictor::new(eviction, num_blocks));
        Self { pool, hasher, block_size, found: Found::default() }
    }

    /// The namespace of a salt.
    pub fn namespace(&self, salt: Option<&str>) -> Namespace {
        Namespace { space: salt.map_or(super::PUBLIC, |salt| self.hasher.space(salt)), shared_prefix_len: 0 }
    }

    /// Hashes of the full blocks of `tokens`.
    pub fn hash_blocks(&self, namespace: Namespace, tokens: &[u32]) -> Vec<u128> {
        let mut parent = ROOT_HASH;
        let mut hashes = Vec::with_capacity(tokens.len() / self.block_size);
        for block in tokens.chunks_exact(self.block_size) {
            parent = self.hasher.block(parent, namespace.space, block);
            hashes.push(parent);
        }
        hashes
    }

    /// The blocks of the longest cached prefix of `tokens`, which counts as a use of them, and how many tokens are cached.
    ///
    /// # Errors
    /// The first id that no int32 holds, which can only stand behind what is cached; nothing is used then.
    pub fn find(&mut self, namespace: Namespace, tokens: &[u32]) -> Result<(&[u32], usize), u32> {
        self.pool.find(namespace, tokens, &mut self.found);
        let rest = &tokens[self.found.full.len() * self.block_size..];
        if let Some(&id) = rest.iter().find(|&&id| i32::try_from(id).is_err()) {
            return Err(id);
        }
        self.pool.clock += 1;
        let mut table = BlockTable::default();
        self.pool.acquire(&self.found.full, &mut table);
        self.pool.release(&mut table);
        let part = self.found.part.map_or(0, |(_, tokens)| tokens);
        Ok((&self.found.full, self.found.full.len() * self.block_size + part))
    }

    /// Caches the full blocks of `tokens`, as far as they fit; how many were not there before.
    pub fn insert(&mut self, namespace: Namespace, tokens: &[u32]) -> usize {
        self.pool.clock += 1;
        self.pool.find(namespace, tokens, &mut self.found);
        let mut table = BlockTable::default();
        self.pool.acquire(&self.found.full, &mut table);
        let before = table.len();
        let wanted = (tokens.len() / self.block_size).min(before + self.pool.free());
        let grown = self.pool.grow(&mut table, wanted - before);
        debug_assert!(grown, "free blocks were counted");
        for place in before..wanted {
            let block = &tokens[place * self.block_size..(place + 1) * self.block_size];
            self.pool.cache_block(&mut table, place, namespace, block);
        }
        self.pool.release(&mut table);
        wanted - before
    }

    /// Blocks, and how many of them are cached.
    pub fn size(&self) -> (usize, usize) {
        (self.pool.total(), self.pool.idle())
    }

    /// What happened so far.
    pub fn counts(&self) -> PoolCounts {
        self.pool.counts()
    }

    /// Checks everything that must hold between two calls.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check(std::iter::empty())
    }
}
