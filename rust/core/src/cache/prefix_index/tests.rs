use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::block_hash::PUBLIC;
use super::*;

const SIZE: usize = 8;

fn index() -> PrefixIndex {
    PrefixIndex::new(SIZE, BlockHasher::new(Some(3)), Some(1000), 16)
}

fn public(shared_prefix_len: usize) -> Namespace {
    Namespace { space: PUBLIC, shared_prefix_len }
}

/// A sequence's blocks put in from block number `first` on; the blocks it stands in.
fn put(index: &mut PrefixIndex, namespace: Namespace, tokens: &[u32], first: u32) -> Vec<u32> {
    let mut path: Vec<u32> = Vec::new();
    for (place, piece) in tokens.chunks(SIZE).enumerate() {
        let space = namespace.of_block((place + 1) * SIZE);
        let block = first + place as u32;
        match index.insert(path.last().copied(), space, piece, block) {
            Inserted::New => path.push(block),
            Inserted::Same(other) => path.push(other),
            Inserted::Collision => panic!("hashes of 128 bits collide"),
        }
    }
    path
}

fn find(index: &PrefixIndex, namespace: Namespace, tokens: &[u32]) -> (Vec<u32>, Option<(u32, usize)>) {
    let mut found = Vec::new();
    let part = index.find(namespace, tokens, &mut found);
    (found, part)
}

proptest! {
    /// Against a plain map of all prefixes: what is found is the longest run of whole blocks, and behind it a part that is there.
    #[test]
    fn the_longest_prefix_is_found(
        sequences in prop::collection::vec((prop::collection::vec(0u32..2, 1..40), 0u128..3), 1..30),
        removals in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut index = index();
        let mut plain: BTreeMap<(u128, Vec<u32>), u32> = BTreeMap::new();
        let mut next = 0;
        for (tokens, space) in &sequences {
            let namespace = Namespace { space: *space, shared_prefix_len: 0 };
            let path = put(&mut index, namespace, tokens, next);
            next += path.len() as u32;
            for (place, &block) in path.iter().enumerate() {
                let end = ((place + 1) * SIZE).min(tokens.len());
                // A part is the same as any longer one that begins with it.
                if end % SIZE == 0 {
                    prop_assert_eq!(*plain.entry((*space, tokens[..end].to_vec())).or_insert(block), block);
                }
            }
        }
        for removal in removals {
            let leaves: Vec<u32> = index.blocks().into_iter().filter(|&block| index.node(block).first_child == NONE).collect();
            if leaves.is_empty() {
                break;
            }
            let leaf = leaves[removal.index(leaves.len())];
            index.remove(leaf);
            plain.retain(|_, &mut block| block != leaf);
        }
        prop_assert_eq!(index.check(), Ok(()));
        for (tokens, space) in &sequences {
            let (found, part) = find(&index, Namespace { space: *space, shared_prefix_len: 0 }, tokens);
            let expected: Vec<u32> = (1..=tokens.len() / SIZE)
                .map_while(|blocks| plain.get(&(*space, tokens[..blocks * SIZE].to_vec())).copied())
                .collect();
            let whole = expected.len() * SIZE;
            prop_assert_eq!(found, expected);
            if let Some((block, common)) = part {
                prop_assert_eq!(&index.tokens(block)[..common], &tokens[whole..whole + common]);
                prop_assert!(common * LEAST_PART >= SIZE);
            }
        }
    }
}

#[test]
fn a_part_of_a_block_is_found_by_its_longest_child() {
    let mut index = index();
    put(&mut index, public(0), &[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9], 0);
    put(&mut index, public(0), &[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 5], 2);
    assert_eq!(find(&index, public(0), &[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 5, 5]), (vec![0], Some((3, 4))));
    assert_eq!(find(&index, public(0), &[1, 2, 3, 0]), (vec![], Some((0, 3))));
    assert_eq!(find(&index, public(0), &[0, 2, 3, 0]), (vec![], None));
}

#[test]
fn spaces_part_behind_the_shared_prefix() {
    let mut index = index();
    let tokens: Vec<u32> = (0..24).collect();
    let salted = |salt| Namespace { space: index_space(salt), shared_prefix_len: 8 };
    put(&mut index, salted("a"), &tokens, 0);
    assert_eq!(find(&index, salted("a"), &tokens).0, [0, 1, 2]);
    assert_eq!(find(&index, salted("b"), &tokens), (vec![0], None));
    assert_eq!(find(&index, public(0), &tokens), (vec![0], None));
}

fn index_space(salt: &str) -> Space {
    BlockHasher::new(Some(3)).space(salt)
}

#[test]
fn the_same_rows_are_kept_once() {
    let mut index = index();
    let tokens = [4; SIZE];
    assert_eq!(index.insert(None, PUBLIC, &tokens, 0), Inserted::New);
    assert_eq!(index.insert(None, PUBLIC, &tokens, 1), Inserted::Same(0));
    // A part is held by the whole block; a longer part is new.
    assert_eq!(index.insert(None, PUBLIC, &tokens[..3], 1), Inserted::Same(0));
    assert_eq!(index.insert(Some(0), PUBLIC, &tokens[..3], 1), Inserted::New);
    assert_eq!(index.insert(Some(0), PUBLIC, &tokens[..4], 2), Inserted::New);
    assert_eq!((index.len(), index.check()), (3, Ok(())));
}

#[test]
fn older_siblings_are_found_by_their_hash() {
    let mut index = index();
    for first in 0..100 {
        put(&mut index, public(0), &[first; SIZE], first);
    }
    for first in 0..100 {
        assert_eq!(find(&index, public(0), &[first; SIZE]).0, [first]);
    }
}

#[test]
fn the_epoch_tells_of_every_change() {
    let mut index = index();
    let before = index.epoch();
    put(&mut index, public(0), &[1; SIZE], 0);
    let between = index.epoch();
    find(&index, public(0), &[1; SIZE]);
    assert_eq!(index.epoch(), between);
    index.remove(0);
    assert!(before != between && between != index.epoch());
}

#[test]
fn a_reader_who_missed_events_is_told_what_is_there() {
    let mut index = PrefixIndex::new(SIZE, BlockHasher::new(Some(3)), Some(2), 16);
    put(&mut index, public(0), &[7; 4 * SIZE], 0);
    let events = index.take_events();
    let [CacheEvent::Cleared, CacheEvent::Stored { block_hashes, parent_block_hash: None, token_ids }] =
        &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!((block_hashes.len(), &token_ids[..]), (4, &[7; 4 * SIZE][..]));
    index.remove(3);
    assert_eq!(index.take_events(), [CacheEvent::Removed { block_hashes: vec![block_hashes[3]] }]);
}

#[test]
fn check_finds_damage() {
    let filled = || {
        let mut index = index();
        put(&mut index, public(0), &[7; 3 * SIZE], 0);
        index
    };
    type Damage = fn(&mut PrefixIndex);
    let damages: [Damage; 6] = [
        |index| index.nodes[1].hash += 1,
        |index| index.nodes[1].depth = 5,
        |index| index.nodes[2].previous = 0,
        |index| index.slot_mut(1)[0] = 9,
        |index| index.len += 1,
        |index| index.first_root = NONE,
    ];
    assert_eq!(filled().check(), Ok(()));
    for (number, damage) in damages.iter().enumerate() {
        let mut index = filled();
        damage(&mut index);
        assert!(index.check().is_err(), "damage {number}");
    }
}
