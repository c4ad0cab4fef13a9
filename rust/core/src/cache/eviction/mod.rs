//! Which cached block to give up: least recently used, or the one least likely to be used again soon.
//!
//! The prefix cache says what happens to its blocks (inserted, used, pinned, unpinned) and asks for a victim. A block can go only
//! while no request holds it and no cached block continues it. Both policies keep unpinned blocks in lists ordered by the time
//! they were given up: one list for LRU; one for each (class, age) where reuse is learned ([`reuse`]), taken in the order of
//! what a block of that class and age is worth. Every operation takes constant time, amortised, and allocates nothing
//! once each block has been seen.

mod ghosts;
mod list;
mod ranking;
mod reuse;
#[cfg(test)]
mod tests;

use std::str::FromStr;

use self::ghosts::Ghost;
use self::list::List;
use self::reuse::{Class, Reuse};
use super::prefix_index::MOST_EXPECTED;

/// How a victim is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// The block that was given up first.
    Lru,
    /// The block with the smallest expected number of uses for each unit of time that it is kept, as learned from the traffic.
    #[default]
    Reuse,
}

impl EvictionPolicy {
    /// The name that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Reuse => "reuse",
        }
    }
}

impl FromStr for EvictionPolicy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Lru, Self::Reuse]
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| format!("eviction: expected \"lru\" or \"reuse\", got {name:?}"))
    }
}

const NONE: u32 = u32::MAX;

/// Where a block stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Not cached.
    #[default]
    Absent,
    /// Held by a request.
    Pinned,
    /// In a list, ready to go.
    Listed,
    /// Held by nobody, but it came up as victim while a cached block continued it; listed again when the last of those goes.
    Deferred,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    key: u64,
    parent: u32,
    children: u32,
    previous: u32,
    next: u32,
    /// The epoch in which it was given up last.
    epoch: u32,
    /// How often its content was used again.
    uses: u8,
    class: Class,
    /// Whether the request that brought it continued something known.
    continues: bool,
    state: State,
}

/// Chooses the blocks that a prefix cache gives up.
#[derive(Debug)]
pub struct Evictor {
    entries: Vec<Entry>,
    /// One list under LRU; one for each class and epoch, and one for what is older, under reuse.
    lists: Vec<List>,
    /// What is learned under reuse; None under LRU.
    reuse: Option<Reuse>,
    cached: usize,
    pinned: usize,
}

impl Evictor {
    /// For a pool of this many blocks, none of them cached.
    pub fn new(policy: EvictionPolicy, num_blocks: u32) -> Self {
        let reuse = (policy == EvictionPolicy::Reuse).then(|| Reuse::new(num_blocks));
        Self {
            entries: Vec::with_capacity(MOST_EXPECTED.min(num_blocks as usize)),
            lists: vec![List::EMPTY; if reuse.is_some() { ranking::LISTS } else { 1 }],
            reuse,
            cached: 0,
            pinned: 0,
        }
    }

    /// The policy.
    pub fn policy(&self) -> EvictionPolicy {
        if self.reuse.is_some() { EvictionPolicy::Reuse } else { EvictionPolicy::Lru }
    }

    /// Number of cached blocks.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Number of cached blocks that nobody holds. All of them can be evicted, one after the other, as long as whoever holds a
    /// block holds those before it too.
    pub fn evictable(&self) -> usize {
        self.cached - self.pinned
    }

    /// A block enters the cache, held by the request that computed it.
    ///
    /// Args: `key` tells its content (and all before it) from any other; `parent` is the cached block that it continues.
    /// Panics when the block is cached or the parent is not.
    pub fn insert(&mut self, block: u32, key: u64, parent: Option<u32>) {
        if self.entries.len() <= block as usize {
            self.entries.resize(block as usize + 1, Entry::default());
        }
        assert!(self.entry(block).state == State::Absent, "block {block} is cached already");
        let mut entry = Entry { key: key.max(1), parent: NONE, state: State::Pinned, ..Entry::default() };
        if let Some(parent) = parent {
            let before = self.entry_mut(parent);
            assert!(before.state != State::Absent, "parent {parent} of block {block} is not cached");
            before.children += 1;
            entry.parent = parent;
            entry.continues = before.continues || before.uses > 0;
        }
        self.tick();
        if let Some(uses) = self.reuse.as_mut().and_then(|reuse| reuse.recall(key.max(1))) {
            entry.uses = uses.saturating_add(1);
        }
        *self.entry_mut(block) = entry;
        self.cached += 1;
        self.pinned += 1;
    }

    /// A request takes a cached block; `pinned` afterwards.
    pub fn use_again(&mut self, block: u32) {
        self.tick();
        let Entry { state, class, epoch, .. } = *self.entry(block);
        match state {
            State::Absent => panic!("block {block} is not cached"),
            State::Pinned => {}
            State::Listed | State::Deferred => {
                if state == State::Listed {
                    self.unlink(block);
                }
                if let Some(reuse) = &mut self.reuse {
                    reuse.used_again(class, epoch);
                }
                self.pinned += 1;
            }
        }
        let entry = self.entry_mut(block);
        entry.state = State::Pinned;
        entry.uses = entry.uses.saturating_add(1);
    }

    /// The last request that held a block gave it up; give up the blocks of a request from its last to its first.
    ///
    /// `output_tokens`: how many the request generated so far; short and long answers come from different kinds of traffic.
    pub fn unpin(&mut self, block: u32, output_tokens: usize) {
        let entry = &mut self.entries[block as usize];
        assert!(entry.state == State::Pinned, "block {block} is not held");
        if let Some(reuse) = &mut self.reuse {
            entry.class = Class::of(entry.uses, entry.continues, output_tokens);
            entry.epoch = reuse.given_up(entry.class);
        }
        self.pinned -= 1;
        self.list(block, List::push_back);
    }

    /// The next victim, which is not cached any more; None when all cached blocks are held.
    pub fn evict(&mut self) -> Option<u32> {
        loop {
            let list = match &mut self.reuse {
                None => 0,
                Some(reuse) => reuse.cheapest(|list| !self.lists[list].is_empty())?,
            };
            let block = self.lists[list].front()?;
            self.lists[list].unlink(&mut self.entries, block);
            let entry = self.entry_mut(block);
            if entry.children > 0 {
                entry.state = State::Deferred;
                continue;
            }
            let Entry { key, class, epoch, uses, .. } = *entry;
            if let Some(reuse) = &mut self.reuse {
                reuse.remember(Ghost { key, epoch, class, uses });
            }
            self.leave(block);
            return Some(block);
        }
    }

    /// A block leaves the cache for another reason than its place: held or not, but nothing cached continues it.
    pub fn remove(&mut self, block: u32) {
        let Entry { state, children, class, epoch, .. } = *self.entry(block);
        assert!(state != State::Absent, "block {block} is not cached");
        assert!(children == 0, "block {block} is continued by {children} cached blocks");
        if state == State::Pinned {
            self.pinned -= 1;
        } else {
            if state == State::Listed {
                self.unlink(block);
            }
            if let Some(reuse) = &mut self.reuse {
                reuse.lost(class, epoch);
            }
        }
        self.leave(block);
    }

    /// Ends a block's life in the cache; its parent may become a victim.
    fn leave(&mut self, block: u32) {
        let parent = self.entry(block).parent;
        *self.entry_mut(block) = Entry::default();
        self.cached -= 1;
        if parent == NONE {
            return;
        }
        let before = self.entry_mut(parent);
        before.children -= 1;
        if before.children == 0 && before.state == State::Deferred {
            // It came up before all that are in its list now.
            self.list(parent, List::push_front);
        }
    }

    fn list(&mut self, block: u32, push: fn(&mut List, &mut [Entry], u32)) {
        let list = self.list_of(block);
        self.entry_mut(block).state = State::Listed;
        push(&mut self.lists[list], &mut self.entries, block);
        if let Some(reuse) = &mut self.reuse {
            reuse.listed(list);
        }
    }

    fn unlink(&mut self, block: u32) {
        let list = self.list_of(block);
        self.lists[list].unlink(&mut self.entries, block);
    }

    fn list_of(&self, block: u32) -> usize {
        let entry = self.entry(block);
        self.reuse.as_ref().map_or(0, |reuse| reuse.list(entry.class, entry.epoch))
    }

    /// Time goes on by one use of a block.
    fn tick(&mut self) {
        let Some(reuse) = &mut self.reuse else { return };
        if reuse.tick() {
            // The lists of the epoch that left the horizon join the oldest one; their places are the new epoch's.
            for (from, to) in reuse.retired() {
                let (from, to) = (std::mem::replace(&mut self.lists[from], List::EMPTY), &mut self.lists[to]);
                to.append(&mut self.entries, from);
            }
        }
    }

    fn entry(&self, block: u32) -> &Entry {
        &self.entries[block as usize]
    }

    fn entry_mut(&mut self, block: u32) -> &mut Entry {
        &mut self.entries[block as usize]
    }

    /// Checks the lists, the counts and, under reuse, the life tables.
    pub fn check_invariants(&self) -> Result<(), String> {
        let mut listed = vec![None; self.entries.len()];
        for (place, list) in self.lists.iter().enumerate() {
            let (mut block, mut previous) = (list.front(), NONE);
            while let Some(this) = block {
                if self.entry(this).previous != previous || listed[this as usize].replace(place).is_some() {
                    return Err(format!("block {this} is linked wrongly"));
                }
                previous = this;
                block = Some(self.entry(this).next).filter(|&next| next != NONE);
            }
        }
        let mut children = vec![0; self.entries.len()];
        let [mut cached, mut pinned] = [0; 2];
        for (block, entry) in (0u32..).zip(&self.entries) {
            let place = (entry.state == State::Listed).then(|| self.list_of(block));
            if listed[block as usize] != place {
                return Err(format!(
                    "block {block} is in list {:?} and not in {place:?}",
                    listed[block as usize]
                ));
            }
            cached += usize::from(entry.state != State::Absent);
            pinned += usize::from(entry.state == State::Pinned);
            if entry.state != State::Absent && entry.parent != NONE {
                children[entry.parent as usize] += 1;
            }
        }
        let wrong = self.entries.iter().zip(&children).position(|(entry, &count)| entry.children != count);
        if let Some(block) = wrong {
            return Err(format!("block {block} is continued by {} blocks", children[block]));
        }
        if (cached, pinned) != (self.cached, self.pinned) {
            return Err(format!("{cached} blocks are cached and {pinned} of them held"));
        }
        let given_up =
            self.entries.iter().filter(|entry| matches!(entry.state, State::Listed | State::Deferred));
        match &self.reuse {
            Some(reuse) => reuse.check(given_up.map(|entry| (entry.class, entry.epoch))),
            None => Ok(()),
        }
    }
}
