//! The pool of cache blocks and the table of blocks that one sequence owns.
//!
//! A block is in the free list or in exactly one table. Only the pool makes and ends ownership: a table cannot be copied, and
//! grows and empties through the pool alone.

/// Blocks that a sequence owns, in the order of its tokens.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// The blocks, first tokens first.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the sequence owns no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// A fixed number of blocks, handed out and taken back in constant time a block.
///
/// Its memory grows with the blocks in use, not with the pool. Blocks that were given back go out again first, so a fresh block
/// goes out only when every other is in use, and `fresh` is also the most that were in use at the same time.
#[derive(Debug)]
pub struct BlockPool {
    /// Blocks given back, the last one first in line.
    returned: Vec<u32>,
    /// The first block that was never handed out; those after it were not either.
    fresh: u32,
    total: u32,
}

impl BlockPool {
    /// A pool of blocks 0 to `total` - 1, all free.
    pub fn new(total: u32) -> Self {
        Self { returned: Vec::new(), fresh: 0, total }
    }

    /// Number of blocks, free or not.
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Number of free blocks.
    pub fn free(&self) -> usize {
        self.returned.len() + (self.total - self.fresh) as usize
    }

    /// The most blocks that were in use at the same time.
    pub fn peak_used(&self) -> usize {
        self.fresh as usize
    }

    /// Gives `table` this many blocks more, or changes nothing and returns false when there are not enough.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, count: usize) -> bool {
        if count > self.free() {
            return false;
        }
        let kept = self.returned.len().saturating_sub(count);
        let fresh = self.fresh + (count - (self.returned.len() - kept)) as u32;
        table.blocks.extend(self.returned.drain(kept..).rev());
        table.blocks.extend(self.fresh..fresh);
        self.fresh = fresh;
        true
    }

    /// Takes all of a table's blocks back.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.returned.extend(table.blocks.drain(..).rev());
    }

    /// Checks that every block is free or in exactly one of these tables.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut accounted = vec![false; self.fresh as usize];
        let owned = tables.flat_map(|table| table.blocks.iter());
        for &block in self.returned.iter().chain(owned) {
            let seen = accounted
                .get_mut(block as usize)
                .ok_or_else(|| format!("block {block} was never handed out"))?;
            if std::mem::replace(seen, true) {
                return Err(format!("block {block} is owned twice"));
            }
        }
        match accounted.iter().position(|&seen| !seen) {
            Some(block) => Err(format!("block {block} is lost")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn grow_is_all_or_nothing() {
        let mut pool = BlockPool::new(3);
        let mut table = BlockTable::default();
        assert!(pool.grow(&mut table, 2));
        assert!(!pool.grow(&mut table, 2));
        assert_eq!((table.blocks(), pool.free()), (&[0, 1][..], 1));
        assert!(pool.grow(&mut table, 0));
        pool.release(&mut table);
        assert_eq!((table.len(), pool.free(), pool.peak_used()), (0, 3, 2));
    }

    #[test]
    fn returned_blocks_go_out_before_fresh_ones() {
        let mut pool = BlockPool::new(5);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        assert!(pool.grow(&mut a, 2));
        pool.release(&mut a);
        assert!(pool.grow(&mut b, 3));
        assert_eq!(b.blocks(), [0, 1, 2]);
    }

    #[test]
    fn the_largest_pool_costs_nothing_until_it_is_used() {
        let mut pool = BlockPool::new(u32::MAX);
        let mut table = BlockTable::default();
        assert!(pool.grow(&mut table, 1));
        assert!(!pool.grow(&mut table, usize::MAX));
        assert_eq!((pool.total(), pool.free()), (u32::MAX as usize, u32::MAX as usize - 1));
        assert_eq!(pool.check([&table].into_iter()), Ok(()));
    }

    #[test]
    fn check_finds_lost_doubled_and_foreign_blocks() {
        let pool = BlockPool { returned: vec![1], fresh: 2, total: 3 };
        let holding = |blocks: &[u32]| BlockTable { blocks: blocks.to_vec() };
        assert_eq!(pool.check([&holding(&[0])].into_iter()), Ok(()));
        assert_eq!(pool.check([].into_iter()), Err("block 0 is lost".into()));
        assert_eq!(pool.check([&holding(&[0, 1])].into_iter()), Err("block 1 is owned twice".into()));
        assert_eq!(
            pool.check([&holding(&[0]), &holding(&[0])].into_iter()),
            Err("block 0 is owned twice".into())
        );
        assert_eq!(pool.check([&holding(&[2])].into_iter()), Err("block 2 was never handed out".into()));
    }

    proptest! {
        /// Against sets: what a table holds, what is free, and the peak.
        #[test]
        fn the_pool_is_a_partition_of_its_blocks(
            total in 0u32..14,
            operations in prop::collection::vec((0usize..4, 0usize..6, any::<bool>()), 0..60),
        ) {
            let mut pool = BlockPool::new(total);
            let mut tables: [BlockTable; 4] = Default::default();
            let mut free: BTreeSet<u32> = (0..total).collect();
            let mut held: [Vec<u32>; 4] = Default::default();
            let mut peak = 0;
            for (which, count, release) in operations {
                if release {
                    pool.release(&mut tables[which]);
                    free.extend(held[which].drain(..));
                } else {
                    prop_assert_eq!(pool.grow(&mut tables[which], count), count <= free.len());
                    // Blocks that were there stay in place, and those that came were free.
                    let (old, new) = tables[which].blocks().split_at(held[which].len());
                    prop_assert_eq!(old, &held[which][..]);
                    prop_assert_eq!(new.len(), if count <= free.len() { count } else { 0 });
                    for block in new {
                        prop_assert!(free.remove(block), "{} was not free", block);
                    }
                    held[which] = tables[which].blocks().to_vec();
                }
                peak = peak.max(total as usize - free.len());
                prop_assert_eq!((pool.free(), pool.peak_used(), pool.total()), (free.len(), peak, total as usize));
                prop_assert_eq!(pool.check(tables.iter()), Ok(()));
            }
        }
    }
}
