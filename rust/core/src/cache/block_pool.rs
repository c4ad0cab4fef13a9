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
#[derive(Debug)]
pub struct BlockPool {
    free: Vec<u32>,
    total: usize,
    least_free: usize,
}

impl BlockPool {
    /// A pool of blocks 0 to `total` - 1, all free.
    pub fn new(total: u32) -> Self {
        let total = total as usize;
        // Taken from the end, so that block 0 goes first.
        Self { free: (0..total as u32).rev().collect(), total, least_free: total }
    }

    /// Number of blocks, free or not.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Number of free blocks.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The most blocks that were in use at the same time.
    pub fn peak_used(&self) -> usize {
        self.total - self.least_free
    }

    /// Gives `table` this many blocks more, or changes nothing and returns false when there are not enough.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, count: usize) -> bool {
        let Some(left) = self.free.len().checked_sub(count) else { return false };
        table.blocks.extend(self.free.drain(left..).rev());
        self.least_free = self.least_free.min(left);
        true
    }

    /// Takes all of a table's blocks back.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.free.extend(table.blocks.drain(..).rev());
    }

    /// Checks that every block is free or in exactly one of these tables.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut owner = vec![None; self.total];
        let owned =
            tables.enumerate().flat_map(|(at, table)| table.blocks.iter().map(move |&block| (block, at + 1)));
        for (block, name) in self.free.iter().map(|&block| (block, 0)).chain(owned) {
            let slot =
                owner.get_mut(block as usize).ok_or_else(|| format!("block {block} does not exist"))?;
            if slot.replace(name).is_some() {
                return Err(format!("block {block} is owned twice"));
            }
        }
        match owner.iter().position(Option::is_none) {
            Some(block) => Err(format!("block {block} is lost")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn check_finds_lost_and_doubled_blocks() {
        let pool = BlockPool::new(2);
        assert!(pool.check([].into_iter()).is_ok());
        let doubled = BlockTable { blocks: vec![1] };
        assert_eq!(pool.check([&doubled].into_iter()), Err("block 1 is owned twice".into()));
        let lost = BlockPool { free: vec![0], total: 2, least_free: 1 };
        assert_eq!(lost.check([].into_iter()), Err("block 1 is lost".into()));
        let foreign = BlockTable { blocks: vec![7] };
        assert_eq!(pool.check([&foreign].into_iter()), Err("block 7 does not exist".into()));
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_shared(operations in prop::collection::vec((0usize..4, 0usize..6, any::<bool>()), 0..60)) {
            let mut pool = BlockPool::new(11);
            let mut tables: [BlockTable; 4] = Default::default();
            for (which, count, release) in operations {
                let (free, held) = (pool.free(), tables[which].len());
                if release {
                    pool.release(&mut tables[which]);
                    prop_assert_eq!(pool.free(), free + held);
                } else {
                    prop_assert_eq!(pool.grow(&mut tables[which], count), count <= free);
                }
                prop_assert_eq!(pool.check(tables.iter()), Ok(()));
            }
        }
    }
}
