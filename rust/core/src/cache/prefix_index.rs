//! Which sequences of tokens have their rows in which blocks: a tree of blocks, found by tokens or by hash.
//!
//! A node is a block whose rows are computed; its path from the root is the sequence before it. A lookup follows the newest child as
//! long as the tokens agree, which costs a memory compare, and asks the hash table where they do not. Children that hold only a
//! part of a block end their path. The tree knows nothing of who uses a block; `BlockPool` does.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::block_hash::{BlockHasher, Namespace, ROOT_HASH, Space};
use super::events::{CacheEvent, EventLog};

/// Larger blocks are not cached: nobody fills one.
pub const MOST_BLOCK_TOKENS: usize = 1 << 16;

/// Tokens of one piece of the token store: 16 KiB, which are soon zeroed.
const CHUNK_TOKENS: usize = 1 << 12;

/// Memory is set aside for this many blocks at most.
pub const MOST_EXPECTED: usize = 1 << 18;

/// Children looked at for the longest common part of a block.
const SIBLINGS: usize = 16;

/// A block is copied for this share of its tokens or more.
const LEAST_PART: usize = 8;

const NONE: u32 = u32::MAX;

/// A block's place in the tree; a block that is not in it has no tokens.
#[derive(Clone, Copy, Debug)]
struct Node {
    hash: u128,
    space: Space,
    parent: u32,
    /// The newest child; older ones follow through `next`.
    first_child: u32,
    next: u32,
    previous: u32,
    /// Tokens whose rows are computed: a whole block's, or fewer at the end of a path.
    filled: u32,
    /// Blocks before this one.
    depth: u32,
}

const ABSENT: Node = Node {
    hash: ROOT_HASH,
    space: 0,
    parent: NONE,
    first_child: NONE,
    next: NONE,
    previous: NONE,
    filled: 0,
    depth: 0,
};

/// What came of putting a block into the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is in the tree now.
    New,
    /// This other block holds the same rows already.
    Same(u32),
    /// Another block has its hash and not its tokens; it stays outside.
    Collision,
}

/// Keys are keyed hashes already.
#[derive(Clone, Copy, Debug, Default)]
struct Truncated(u64);

impl Hasher for Truncated {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u128 keys are hashed")
    }

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

/// The tree of cached blocks.
#[derive(Debug)]
pub struct PrefixIndex {
    block_size: usize,
    hasher: BlockHasher,
    /// By block.
    nodes: Vec<Node>,
    /// Tokens by block, in pieces that never move: `blocks_a_chunk` blocks each.
    tokens: Vec<Box<[u32]>>,
    chunk_shift: u32,
    /// Newest child of the root.
    first_root: u32,
    /// Full blocks by hash.
    by_hash: HashMap<u128, u32, BuildHasherDefault<Truncated>>,
    len: usize,
    /// Counts every change, so that a lookup can be known to be still right.
    epoch: u64,
    events: Option<EventLog>,
}

impl PrefixIndex {
    /// An empty tree. `events` is the most blocks that a log of events holds, if there is one.
    ///
    /// Memory for `expected` blocks is set aside, so that the first of them cost no more than later ones.
    pub fn new(block_size: usize, hasher: BlockHasher, events: Option<usize>, expected: usize) -> Self {
        let chunk_shift = (CHUNK_TOKENS / block_size.min(CHUNK_TOKENS)).ilog2();
        Self {
            block_size,
            hasher,
            nodes: Vec::with_capacity(expected),
            tokens: Vec::new(),
            chunk_shift,
            first_root: NONE,
            by_hash: HashMap::with_capacity_and_hasher(expected, BuildHasherDefault::default()),
            len: 0,
            epoch: 0,
            events: events.map(EventLog::new),
        }
    }

    /// Tokens of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The keyed hash.
    pub fn hasher(&self) -> &BlockHasher {
        &self.hasher
    }

    /// Blocks in the tree.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no block is in the tree.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another number after every change.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a block is in the tree.
    pub fn contains(&self, block: u32) -> bool {
        self.node(block).filled > 0
    }

    /// Hash of a block's tokens and all before them.
    pub fn hash(&self, block: u32) -> u128 {
        self.node(block).hash
    }

    /// The block before this one.
    pub fn parent(&self, block: u32) -> Option<u32> {
        some(self.node(block).parent)
    }

    /// The tokens whose rows a block in the tree holds.
    pub fn tokens(&self, block: u32) -> &[u32] {
        &self.slot(block)[..self.node(block).filled as usize]
    }

    /// The space a block stands in.
    pub fn space(&self, block: u32) -> Space {
        self.node(block).space
    }

    /// Blocks in the tree, each after the one before it.
    pub fn blocks(&self) -> Vec<u32> {
        let mut order: Vec<u32> =
            (0..self.nodes.len() as u32).filter(|&block| self.contains(block)).collect();
        order.sort_by_key(|&block| (self.node(block).depth, block));
        order
    }

    /// Adds the blocks of the longest cached prefix of `tokens` to `found`; returns the child behind them that shares the most
    /// further tokens, and how many.
    pub fn find(&self, namespace: Namespace, tokens: &[u32], found: &mut Vec<u32>) -> Option<(u32, usize)> {
        let (mut at, mut rest, mut end) = (NONE, tokens, self.block_size);
        while let Some((block, behind)) = rest.split_at_checked(self.block_size)
            && let Some(child) = self.find_child(at, namespace.of_block(end), block)
        {
            found.push(child);
            (at, rest, end) = (child, behind, end + self.block_size);
        }
        let part = self.find_part(at, namespace.of_block(end), rest);
        part.filter(|&(_, common)| common * LEAST_PART >= self.block_size)
    }

    /// Puts a block behind `parent` (`None`: at the start). `tokens` are those whose rows it holds, at most a block's.
    pub fn insert(&mut self, parent: Option<u32>, space: Space, tokens: &[u32], block: u32) -> Inserted {
        debug_assert!((1..=self.block_size).contains(&tokens.len()) && !self.contains(block));
        let at = parent.unwrap_or(NONE);
        let (parent_hash, depth) = match parent {
            Some(parent) => (self.node(parent).hash, self.node(parent).depth + 1),
            None => (ROOT_HASH, 0),
        };
        let full = tokens.len() == self.block_size;
        let same = if full {
            self.newest_child_with(at, space, tokens)
        } else {
            self.find_part(at, space, tokens)
                .filter(|&(_, common)| common == tokens.len())
                .map(|(other, _)| other)
        };
        if let Some(other) = same {
            return Inserted::Same(other);
        }
        let hash = self.hasher.block(parent_hash, space, tokens);
        if full {
            match self.by_hash.get(&hash) {
                Some(&other) if self.is_child(other, at, space, tokens) => return Inserted::Same(other),
                Some(_) => return Inserted::Collision,
                None => self.by_hash.insert(hash, block),
            };
        }
        self.make_room(block);
        self.slot_mut(block)[..tokens.len()].copy_from_slice(tokens);
        let next = self.first_child_of(at);
        self.nodes[block as usize] = Node {
            hash,
            space,
            parent: at,
            first_child: NONE,
            next,
            previous: NONE,
            filled: tokens.len() as u32,
            depth,
        };
        if next != NONE {
            self.nodes[next as usize].previous = block;
        }
        *self.first_child_mut(at) = block;
        self.len += 1;
        self.epoch += 1;
        if full && let Some(events) = &mut self.events {
            events.stored(parent.map(|_| parent_hash), hash, tokens);
        }
        Inserted::New
    }

    /// Takes a block without children out of the tree.
    pub fn remove(&mut self, block: u32) {
        let node = *self.node(block);
        debug_assert!(node.filled > 0 && node.first_child == NONE, "a leaf is removed");
        match node.previous {
            NONE => *self.first_child_mut(node.parent) = node.next,
            previous => self.nodes[previous as usize].next = node.next,
        }
        if node.next != NONE {
            self.nodes[node.next as usize].previous = node.previous;
        }
        if node.filled as usize == self.block_size {
            self.by_hash.remove(&node.hash);
            if let Some(events) = &mut self.events {
                events.removed(node.hash);
            }
        }
        self.nodes[block as usize] = ABSENT;
        self.len -= 1;
        self.epoch += 1;
    }

    /// Events since they were last taken; none without a log.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        let Some(events) = &mut self.events else { return Vec::new() };
        if let Some(taken) = events.take() {
            return taken;
        }
        let mut log = EventLog::new(usize::MAX);
        log.cleared();
        for block in self.blocks() {
            let node = self.node(block);
            if node.filled as usize == self.block_size {
                log.stored(
                    some(node.parent).map(|parent| self.node(parent).hash),
                    node.hash,
                    self.tokens(block),
                );
            }
        }
        log.take().expect("this log has no limit")
    }

    /// Tells the log that the tree was emptied on purpose.
    pub fn log_cleared(&mut self) {
        debug_assert!(self.is_empty());
        if let Some(events) = &mut self.events {
            events.cleared();
        }
    }

    /// Checks the links, the hashes and the counts.
    pub fn check(&self) -> Result<(), String> {
        let mut len = 0;
        let mut full = 0;
        for (block, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.filled > 0) {
            let block = block as u32;
            let ensure =
                |holds: bool, what: &str| if holds { Ok(()) } else { Err(format!("block {block} {what}")) };
            len += 1;
            let whole = node.filled as usize == self.block_size;
            let (parent_hash, depth) = match some(node.parent) {
                None => (ROOT_HASH, 0),
                Some(parent) => {
                    let parent = self.node(parent);
                    ensure(parent.filled as usize == self.block_size, "has a parent that is not full")?;
                    (parent.hash, parent.depth + 1)
                }
            };
            ensure(node.depth == depth, "has another depth")?;
            ensure(node.first_child == NONE || whole, "is a part and has children")?;
            let hash = self.hasher.block(parent_hash, node.space, self.tokens(block));
            ensure(node.hash == hash, "has another hash")?;
            if whole {
                full += 1;
                ensure(self.by_hash.get(&hash) == Some(&block), "is not found by its hash")?;
            }
            let linked = match node.previous {
                NONE => self.first_child_of(node.parent) == block,
                previous => {
                    let previous = self.node(previous);
                    previous.next == block && previous.parent == node.parent && previous.filled > 0
                }
            };
            ensure(linked, "is not linked among its siblings")?;
            ensure(node.next == NONE || self.node(node.next).previous == block, "has a stray sibling")?;
        }
        if (len, full) != (self.len, self.by_hash.len()) {
            return Err("the prefix index counts wrongly".into());
        }
        Ok(())
    }

    /// The child of `at` with exactly these tokens, a block's.
    fn find_child(&self, at: u32, space: Space, tokens: &[u32]) -> Option<u32> {
        if let Some(child) = self.newest_child_with(at, space, tokens) {
            return Some(child);
        }
        let first = self.first_child_of(at);
        if first == NONE || self.node(first).next == NONE {
            return None; // no other child
        }
        let parent_hash = some(at).map_or(ROOT_HASH, |at| self.node(at).hash);
        let hash = self.hasher.block(parent_hash, space, tokens);
        self.by_hash.get(&hash).copied().filter(|&child| self.is_child(child, at, space, tokens))
    }

    fn newest_child_with(&self, at: u32, space: Space, tokens: &[u32]) -> Option<u32> {
        some(self.first_child_of(at)).filter(|&child| self.is_child(child, at, space, tokens))
    }

    #[inline]
    fn is_child(&self, block: u32, at: u32, space: Space, tokens: &[u32]) -> bool {
        let node = self.node(block);
        node.parent == at
            && node.space == space
            && node.filled as usize == tokens.len()
            && self.slot(block)[..tokens.len()] == *tokens
    }

    /// Among the newest children of `at`, the one that shares the most tokens from their start.
    fn find_part(&self, at: u32, space: Space, tokens: &[u32]) -> Option<(u32, usize)> {
        let mut best = None;
        let mut child = self.first_child_of(at);
        for _ in 0..SIBLINGS {
            let Some(block) = some(child) else { break };
            let node = self.node(block);
            if node.space == space {
                let common = common_len(self.tokens(block), tokens);
                if common > best.map_or(0, |(_, most)| most) {
                    best = Some((block, common));
                }
            }
            child = node.next;
        }
        best
    }

    #[inline]
    fn node(&self, block: u32) -> &Node {
        self.nodes.get(block as usize).unwrap_or(&ABSENT)
    }

    fn first_child_of(&self, at: u32) -> u32 {
        if at == NONE { self.first_root } else { self.node(at).first_child }
    }

    fn first_child_mut(&mut self, at: u32) -> &mut u32 {
        if at == NONE { &mut self.first_root } else { &mut self.nodes[at as usize].first_child }
    }

    #[inline]
    fn slot(&self, block: u32) -> &[u32] {
        let Some(chunk) = self.tokens.get((block >> self.chunk_shift) as usize) else { return &[] };
        let start = (block & ((1 << self.chunk_shift) - 1)) as usize * self.block_size;
        &chunk[start..start + self.block_size]
    }

    fn slot_mut(&mut self, block: u32) -> &mut [u32] {
        let start = (block & ((1 << self.chunk_shift) - 1)) as usize * self.block_size;
        &mut self.tokens[(block >> self.chunk_shift) as usize][start..start + self.block_size]
    }

    fn make_room(&mut self, block: u32) {
        if self.nodes.len() <= block as usize {
            self.nodes.resize(block as usize + 1, ABSENT);
        }
        while self.tokens.len() <= (block >> self.chunk_shift) as usize {
            self.tokens.push(vec![0; self.block_size << self.chunk_shift].into_boxed_slice());
        }
    }
}

fn some(block: u32) -> Option<u32> {
    (block != NONE).then_some(block)
}

fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests;
