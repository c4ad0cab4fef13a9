//! The pool in statements, and against sets.

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
    let pool = BlockPool { users: vec![1, 0], returned: vec![1], ..BlockPool::new(3) };
    let holding = |blocks: &[u32]| BlockTable { blocks: blocks.to_vec() };
    assert_eq!(pool.check([&holding(&[0])].into_iter()), Ok(()));
    assert_eq!(pool.check([].into_iter()), Err("block 0 is lost".into()));
    let twice = Err("block 1 is in use by 1 tables and counts 0".to_string());
    assert_eq!(pool.check([&holding(&[0, 1])].into_iter()), twice);
    let twice = Err("block 0 is in use by 2 tables and counts 1".to_string());
    assert_eq!(pool.check([&holding(&[0]), &holding(&[0])].into_iter()), twice);
    assert_eq!(pool.check([&holding(&[2])].into_iter()), Err("block 2 was never handed out".into()));
    let lost = BlockPool { users: vec![0], ..BlockPool::new(3) };
    assert_eq!(lost.check([].into_iter()), Err("block 0 is lost".into()));
    let doubled = BlockPool { users: vec![0], returned: vec![0, 0], ..BlockPool::new(3) };
    assert_eq!(doubled.check([].into_iter()), Err("block 0 is free twice".into()));
}

#[test]
fn blocks_given_by_number_must_be_in_use() {
    let mut pool = BlockPool::new(5);
    let mut blocks = [0; 3];
    assert!(pool.take(&mut blocks) && !pool.take(&mut [0; 3]));
    for (given, wrong) in [(&[0, 3][..], 3), (&[2, 2], 2), (&[9], 9), (&[1, 0, 1, 2], 1)] {
        assert_eq!(pool.give(given), Err(wrong));
        assert_eq!(pool.free(), 2);
        assert_eq!(pool.check([&BlockTable { blocks: vec![0, 1, 2] }].into_iter()), Ok(()));
    }
    assert_eq!((pool.give(&[2, 0, 1]), pool.free()), (Ok(()), 5));
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
