//! A doubly linked list of blocks through their entries.

use super::{Entry, NONE};

/// Blocks in the order in which they were given up.
#[derive(Clone, Copy, Debug)]
pub struct List {
    front: u32,
    back: u32,
}

impl List {
    /// No block.
    pub const EMPTY: Self = Self { front: NONE, back: NONE };

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.front == NONE
    }

    /// The first block.
    pub fn front(&self) -> Option<u32> {
        (!self.is_empty()).then_some(self.front)
    }

    /// A block comes last.
    pub fn push_back(&mut self, entries: &mut [Entry], block: u32) {
        let single = Self::single(entries, block);
        self.append(entries, single);
    }

    /// A block comes first.
    pub fn push_front(&mut self, entries: &mut [Entry], block: u32) {
        let mut list = Self::single(entries, block);
        list.append(entries, *self);
        *self = list;
    }

    /// All blocks of another list come last.
    pub fn append(&mut self, entries: &mut [Entry], other: Self) {
        if other.is_empty() {
            return;
        }
        entries[other.front as usize].previous = self.back;
        match self.back {
            NONE => self.front = other.front,
            back => entries[back as usize].next = other.front,
        }
        self.back = other.back;
    }

    fn single(entries: &mut [Entry], block: u32) -> Self {
        let entry = &mut entries[block as usize];
        (entry.previous, entry.next) = (NONE, NONE);
        Self { front: block, back: block }
    }

    /// A block of this list leaves it.
    pub fn unlink(&mut self, entries: &mut [Entry], block: u32) {
        let Entry { previous, next, .. } = entries[block as usize];
        match previous {
            NONE => self.front = next,
            previous => entries[previous as usize].next = next,
        }
        match next {
            NONE => self.back = previous,
            next => entries[next as usize].previous = previous,
        }
    }
}
