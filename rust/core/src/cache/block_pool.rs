//! The pool of cache blocks and the tables through which sequences own them.
//!
//! A block is one identity for a token's rows in every cache: latent rows, index keys and a draft model's. It is free, or in use by
//! one or more tables, or idle: its rows are cached for reuse and nobody uses it. Only the pool makes and ends ownership: a table
//! cannot be copied, and grows, is shared and empties through the pool alone. Who uses a cached block uses every block before it
//! too, so idle blocks are whole branches of the prefix index and a leaf can always be evicted.

use super::block_hash::{Namespace, Space};
use super::eviction::Evictor;
use super::prefix_index::{Inserted, MOST_EXPECTED, PrefixIndex};

/// Blocks that a sequence uses, in the order of its tokens.
#[derive(Debug, Default, PartialEq)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// The blocks, first tokens first.
    #[inline]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Number of blocks.
    #[inline]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Takes memory for this many blocks in all.
    pub fn reserve(&mut self, len: usize) {
        self.blocks.reserve(len.saturating_sub(self.blocks.len()));
    }

    /// Whether the sequence uses no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// What a lookup found. It holds until the pool changes.
#[derive(Debug, Default)]
pub struct Found {
    /// Blocks whose rows are all of use.
    pub full: Vec<u32>,
    /// A block of which some first rows are of use, and how many.
    pub part: Option<(u32, usize)>,
    /// How many of `full` are idle.
    pub idle: usize,
}

/// What happened in a pool so far. Ages are in steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// Idle blocks that were used again.
    pub hit_blocks: u64,
    /// Steps that these had been idle, summed.
    pub hit_age_steps: u64,
    /// Idle blocks that were given up for others.
    pub evicted_blocks: u64,
    /// Steps that these had been idle, summed.
    pub evict_age_steps: u64,
}

/// A cache of idle blocks.
#[derive(Debug)]
struct Cache {
    index: PrefixIndex,
    evictor: Evictor,
    /// When a block became idle, by block.
    idle_since: Vec<u64>,
}

/// A fixed number of blocks, handed out and taken back in constant time a block.
///
/// Its memory grows with the blocks that were ever in use, not with the pool. Blocks that were given back go out again first, then
/// fresh ones, then idle ones.
#[derive(Debug)]
pub struct BlockPool {
    /// Tables that use a block, by block.
    users: Vec<u32>,
    /// Blocks given back, the last one first in line.
    returned: Vec<u32>,
    total: u32,
    idle: usize,
    peak_used: usize,
    cache: Option<Cache>,
    /// Blocks whose rows became nobody's, where somebody wants to know.
    freed: Option<Vec<u32>>,
    /// Steps so far.
    pub clock: u64,
    counts: PoolCounts,
}

impl BlockPool {
    /// A pool of blocks 0 to `total` - 1, all free.
    pub fn new(total: u32) -> Self {
        Self {
            users: Vec::with_capacity(MOST_EXPECTED.min(total as usize)),
            returned: Vec::with_capacity(MOST_EXPECTED.min(total as usize)),
            total,
            idle: 0,
            peak_used: 0,
            cache: None,
            freed: None,
            clock: 0,
            counts: PoolCounts::default(),
        }
    }

    /// A pool that keeps the rows of blocks nobody uses until it needs the blocks.
    pub fn with_cache(total: u32, index: PrefixIndex, evictor: Evictor) -> Self {
        let idle_since = Vec::with_capacity(MOST_EXPECTED.min(total as usize));
        Self { cache: Some(Cache { index, evictor, idle_since }), ..Self::new(total) }
    }

    /// Keeps a list of the blocks whose rows become nobody's from now on.
    pub fn note_freed(&mut self) {
        self.freed = Some(Vec::new());
    }

    /// Takes that list.
    pub fn take_freed(&mut self) -> impl Iterator<Item = u32> {
        self.freed.iter_mut().flat_map(|freed| freed.drain(..))
    }

    /// Number of blocks, free or not.
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Number of blocks that can be had: free or idle.
    #[inline]
    pub fn free(&self) -> usize {
        self.returned.len() + (self.total as usize - self.users.len()) + self.idle
    }

    /// Number of idle blocks.
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// The most blocks that were in use at the same time.
    pub fn peak_used(&self) -> usize {
        self.peak_used
    }

    /// What happened so far.
    pub fn counts(&self) -> PoolCounts {
        self.counts
    }

    /// The prefix index, if blocks are cached.
    pub fn index(&self) -> Option<&PrefixIndex> {
        self.cache.as_ref().map(|cache| &cache.index)
    }

    /// The same, to take its events.
    pub fn index_mut(&mut self) -> Option<&mut PrefixIndex> {
        self.cache.as_mut().map(|cache| &mut cache.index)
    }

    /// Whether more than one table uses a block.
    #[inline]
    pub fn is_shared(&self, block: u32) -> bool {
        self.users[block as usize] > 1
    }

    /// Whether more than one table uses a block, `held` aside.
    #[inline]
    pub fn is_shared_beside(&self, block: u32, held: &BlockTable) -> bool {
        let users = self.users[block as usize] as usize;
        users > 1 && users > 1 + held.blocks.iter().filter(|&&other| other == block).count()
    }

    /// Fills `blocks` with blocks for one user, or changes nothing and returns false when there are not enough.
    #[must_use]
    pub fn take(&mut self, blocks: &mut [u32]) -> bool {
        if blocks.len() > self.free() {
            return false;
        }
        for block in blocks {
            *block = self.take_one();
        }
        self.note_peak();
        true
    }

    /// Ends one use of each of these blocks. The first that is not in use is named, and nothing changes.
    pub fn give(&mut self, blocks: &[u32]) -> Result<(), u32> {
        for (place, &block) in blocks.iter().enumerate() {
            match self.users.get(block as usize) {
                Some(1..) => self.end_use(block, 0),
                _ => {
                    // Each given back so far is free or idle now, and is taken again as it was.
                    for &given in blocks[..place].iter().rev() {
                        if self.users[given as usize] == 0 && self.returned.last() == Some(&given) {
                            self.returned.pop();
                            self.users[given as usize] = 1;
                        } else {
                            self.begin_use(given);
                        }
                    }
                    return Err(block);
                }
            }
        }
        Ok(())
    }

    /// Gives `table` this many blocks more, or changes nothing and returns false when there are not enough.
    #[inline]
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, count: usize) -> bool {
        if count == 0 {
            return true;
        }
        if count > self.free() {
            return false;
        }
        for _ in 0..count {
            table.blocks.push(self.take_one());
        }
        self.note_peak();
        true
    }

    /// Takes a table's blocks behind the first `len` back, the last one first.
    pub fn truncate(&mut self, table: &mut BlockTable, len: usize) {
        self.shorten(table, len, 0);
    }

    /// Takes all of a table's blocks back.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.shorten(table, 0, 0);
    }

    /// The same for a request that generated this many tokens, which tells how likely its rows are wanted again.
    pub fn release_after(&mut self, table: &mut BlockTable, output_tokens: usize) {
        self.shorten(table, 0, output_tokens);
    }

    fn shorten(&mut self, table: &mut BlockTable, len: usize, output_tokens: usize) {
        while table.blocks.len() > len {
            let block = table.blocks.pop().expect("it is longer");
            self.end_use(block, output_tokens);
        }
    }

    /// A table that uses the first `len` blocks of another one too.
    pub fn share(&mut self, table: &BlockTable, len: usize) -> BlockTable {
        let blocks = table.blocks[..len].to_vec();
        for &block in &blocks {
            self.users[block as usize] += 1;
        }
        BlockTable { blocks }
    }

    /// Puts a block of the table's own in the place of one that others use too, which goes to `held`: (theirs, its own) to be copied,
    /// or `None` when no block is free.
    pub fn copy_on_write(
        &mut self,
        table: &mut BlockTable,
        place: usize,
        held: &mut BlockTable,
    ) -> Option<(u32, u32)> {
        if self.free() == 0 {
            return None;
        }
        let own = self.take_one();
        self.note_peak();
        let theirs = std::mem::replace(&mut table.blocks[place], own);
        held.blocks.push(theirs);
        Some((theirs, own))
    }

    /// Looks for the blocks that hold the longest cached prefix of `tokens`; nothing is used yet.
    pub fn find(&self, namespace: Namespace, tokens: &[u32], found: &mut Found) {
        found.full.clear();
        (found.part, found.idle) = (None, 0);
        let Some(cache) = &self.cache else { return };
        found.part = cache.index.find(namespace, tokens, &mut found.full);
        // Who uses a block uses those before it, so the idle ones are the last.
        let used = found.full.partition_point(|&block| self.users[block as usize] > 0);
        found.idle = found.full.len() - used;
    }

    /// Whether nobody uses a block.
    pub fn is_idle(&self, block: u32) -> bool {
        self.users[block as usize] == 0
    }

    /// Adds blocks that were found to a table.
    pub fn acquire(&mut self, blocks: &[u32], table: &mut BlockTable) {
        for &block in blocks {
            self.begin_use(block);
        }
        table.blocks.extend_from_slice(blocks);
        self.note_peak();
    }

    /// Makes the rows of the table's block at `place` reusable: `tokens` are those it holds. Blocks before it must have been cached.
    /// Where another block holds the same rows already, a full block is given up for that one.
    pub fn cache_block(
        &mut self,
        table: &mut BlockTable,
        place: usize,
        namespace: Namespace,
        tokens: &[u32],
    ) {
        let block = table.blocks[place];
        let Some(cache) = &mut self.cache else { return };
        let size = cache.index.block_size();
        let parent = place.checked_sub(1).map(|before| table.blocks[before]);
        if parent.is_some_and(|parent| !cache.index.contains(parent)) {
            return; // behind a collision
        }
        let space = namespace.of_block((place + 1) * size);
        match cache.index.insert(parent, space, tokens, block) {
            Inserted::New => cache.evictor.insert(block, cache.index.hash(block) as u64, parent),
            Inserted::Same(other) if tokens.len() == size => {
                self.begin_use(other);
                table.blocks[place] = other;
                self.end_use(block, 0);
            }
            Inserted::Same(_) | Inserted::Collision => {}
        }
    }

    /// A block for rows that come from elsewhere, cached behind `parent` and used by `table`; `None` when none is free or the rows
    /// are there already.
    pub fn adopt(
        &mut self,
        parent: Option<u32>,
        space: Space,
        tokens: &[u32],
        table: &mut BlockTable,
    ) -> Option<u32> {
        if self.cache.is_none() || !self.grow(table, 1) {
            return None;
        }
        let block = *table.blocks.last()?;
        let cache = self.cache.as_mut()?;
        let full = |parent| cache.index.tokens(parent).len() == cache.index.block_size();
        if parent.is_none_or(full) && cache.index.insert(parent, space, tokens, block) == Inserted::New {
            cache.evictor.insert(block, cache.index.hash(block) as u64, parent);
            return Some(block);
        }
        self.truncate(table, table.blocks.len() - 1);
        None
    }

    /// Whether a block's rows are cached.
    pub fn is_cached(&self, block: u32) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.index.contains(block))
    }

    /// Forgets all idle blocks; how many.
    pub fn clear_idle(&mut self) -> usize {
        let count = self.idle;
        for _ in 0..count {
            let block = self.evict();
            self.returned.push(block);
        }
        if let Some(cache) = &mut self.cache
            && cache.index.is_empty()
        {
            cache.index.log_cleared();
        }
        count
    }

    /// Checks that every block is free, idle, or in use by as many tables as it counts, and the prefix index.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut users = vec![0u32; self.users.len()];
        for &block in tables.flat_map(|table| table.blocks.iter()) {
            *users.get_mut(block as usize).ok_or_else(|| format!("block {block} was never handed out"))? += 1;
        }
        let mut free = vec![false; self.users.len()];
        for &block in &self.returned {
            let seen =
                free.get_mut(block as usize).ok_or_else(|| format!("block {block} was never handed out"))?;
            if std::mem::replace(seen, true) {
                return Err(format!("block {block} is free twice"));
            }
        }
        let mut idle = 0;
        for (block, (&counted, &used)) in self.users.iter().zip(&users).enumerate() {
            let cached = self.is_cached(block as u32);
            let is_free = free[block];
            if used > counted {
                return Err(format!("block {block} is in use by {used} tables and counts {counted}"));
            }
            if used < counted {
                return Err(format!("block {block} is lost"));
            }
            if is_free && (used > 0 || cached) {
                return Err(format!("block {block} is free and in use"));
            }
            if !is_free && used == 0 && !cached {
                return Err(format!("block {block} is lost"));
            }
            idle += usize::from(used == 0 && cached);
            if used > 0
                && let Some(parent) = self.index().and_then(|index| index.parent(block as u32))
                && self.users[parent as usize] == 0
            {
                return Err(format!("block {block} is in use and the block before it is idle"));
            }
        }
        if idle != self.idle {
            return Err(format!("{idle} blocks are idle and {} count so", self.idle));
        }
        match &self.cache {
            Some(cache) if cache.evictor.evictable() != idle => {
                Err(format!("{idle} blocks are idle and {} can be evicted", cache.evictor.evictable()))
            }
            Some(cache) => cache.index.check().and_then(|()| cache.evictor.check_invariants()),
            None => Ok(()),
        }
    }

    /// A block that can be had, which there must be.
    #[inline]
    fn take_one(&mut self) -> u32 {
        if let Some(block) = self.returned.pop() {
            self.users[block as usize] = 1;
            return block;
        }
        if (self.users.len() as u32) < self.total {
            self.users.push(1);
            return self.users.len() as u32 - 1;
        }
        let block = self.evict();
        self.users[block as usize] = 1;
        block
    }

    /// Takes the idle leaf that goes first out of the cache.
    #[cold]
    fn evict(&mut self) -> u32 {
        let cache = self.cache.as_mut().expect("blocks are idle in a cache");
        let block = cache.evictor.evict().expect("a block is idle");
        cache.index.remove(block);
        self.idle -= 1;
        self.counts.evicted_blocks += 1;
        self.counts.evict_age_steps += self.clock - cache.idle_since[block as usize];
        self.log_freed(block);
        block
    }

    /// One more use of a block that is in use or idle.
    #[inline]
    fn begin_use(&mut self, block: u32) {
        let users = &mut self.users[block as usize];
        *users += 1;
        let first = *users == 1;
        let Some(cache) = &mut self.cache else { return };
        if cache.index.contains(block) {
            cache.evictor.use_again(block);
        }
        if first {
            self.idle -= 1;
            self.counts.hit_blocks += 1;
            self.counts.hit_age_steps += self.clock - cache.idle_since[block as usize];
        }
    }

    /// One use less; the last one makes the block idle, or free where its rows are not cached.
    #[inline]
    fn end_use(&mut self, block: u32, output_tokens: usize) {
        let users = &mut self.users[block as usize];
        *users -= 1;
        if *users > 0 {
            return;
        }
        match &mut self.cache {
            Some(cache) if cache.index.contains(block) => {
                cache.evictor.unpin(block, output_tokens);
                if cache.idle_since.len() <= block as usize {
                    cache.idle_since.resize(block as usize + 1, 0);
                }
                cache.idle_since[block as usize] = self.clock;
                self.idle += 1;
            }
            _ => {
                self.returned.push(block);
                self.log_freed(block);
            }
        }
    }

    #[inline]
    fn log_freed(&mut self, block: u32) {
        if let Some(freed) = &mut self.freed {
            freed.push(block);
        }
    }

    #[inline]
    fn note_peak(&mut self) {
        self.peak_used = self.peak_used.max(self.total() - self.free());
    }
}

#[cfg(test)]
mod tests;
