//! What happened to the prefix cache, for routers: blocks stored, removed, cleared, as vLLM and SGLang publish it.

/// One event. Hashes are those of full blocks; a block is removed by the hash it was stored under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks that follow each other became reusable.
    Stored {
        /// One a block.
        block_hashes: Vec<u128>,
        /// The block before the first of them; `None` at the start of a sequence.
        parent_block_hash: Option<u128>,
        /// Tokens of all of them.
        token_ids: Vec<u32>,
    },
    /// Blocks are no longer there.
    Removed {
        /// One a block.
        block_hashes: Vec<u128>,
    },
    /// Nothing that was stored before is there.
    Cleared,
}

/// Events since they were last taken, in order. It holds at most a number of blocks: a reader that comes too late is told that
/// everything was cleared, and then what is there.
#[derive(Debug)]
pub struct EventLog {
    events: Vec<CacheEvent>,
    blocks: usize,
    most_blocks: usize,
    overflowed: bool,
}

impl EventLog {
    /// A log of at most this many blocks.
    pub fn new(most_blocks: usize) -> Self {
        Self { events: Vec::new(), blocks: 0, most_blocks, overflowed: false }
    }

    /// A block became reusable.
    pub fn stored(&mut self, parent: Option<u128>, hash: u128, tokens: &[u32]) {
        if !self.count() {
            return;
        }
        if let Some(CacheEvent::Stored { block_hashes, token_ids, .. }) = self.events.last_mut()
            && block_hashes.last().copied() == parent
        {
            block_hashes.push(hash);
            token_ids.extend_from_slice(tokens);
            return;
        }
        self.events.push(CacheEvent::Stored {
            block_hashes: vec![hash],
            parent_block_hash: parent,
            token_ids: tokens.to_vec(),
        });
    }

    /// A block is gone.
    pub fn removed(&mut self, hash: u128) {
        if !self.count() {
            return;
        }
        match self.events.last_mut() {
            Some(CacheEvent::Removed { block_hashes }) => block_hashes.push(hash),
            _ => self.events.push(CacheEvent::Removed { block_hashes: vec![hash] }),
        }
    }

    /// Everything is gone.
    pub fn cleared(&mut self) {
        self.events = vec![CacheEvent::Cleared];
        (self.blocks, self.overflowed) = (0, false);
    }

    /// Takes the events. `None` when some were lost: what is there must be told anew.
    pub fn take(&mut self) -> Option<Vec<CacheEvent>> {
        self.blocks = 0;
        let events = std::mem::take(&mut self.events);
        if std::mem::take(&mut self.overflowed) { None } else { Some(events) }
    }

    fn count(&mut self) -> bool {
        if self.blocks >= self.most_blocks {
            self.overflowed = true;
            self.events.clear();
        }
        self.blocks += 1;
        !self.overflowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(parent: Option<u128>, hashes: &[u128], tokens: &[u32]) -> CacheEvent {
        CacheEvent::Stored {
            block_hashes: hashes.to_vec(),
            parent_block_hash: parent,
            token_ids: tokens.to_vec(),
        }
    }

    #[test]
    fn blocks_that_follow_each_other_are_one_event() {
        let mut log = EventLog::new(100);
        log.stored(None, 1, &[10, 11]);
        log.stored(Some(1), 2, &[12, 13]);
        log.stored(Some(1), 3, &[14, 15]);
        log.removed(3);
        log.removed(2);
        log.stored(None, 4, &[16, 17]);
        let expected = vec![
            stored(None, &[1, 2], &[10, 11, 12, 13]),
            stored(Some(1), &[3], &[14, 15]),
            CacheEvent::Removed { block_hashes: vec![3, 2] },
            stored(None, &[4], &[16, 17]),
        ];
        assert_eq!(log.take(), Some(expected));
        assert_eq!(log.take(), Some(vec![]));
    }

    #[test]
    fn a_reader_that_comes_too_late_is_told_so_once() {
        let mut log = EventLog::new(2);
        for hash in 1..=3 {
            log.stored(None, hash, &[0]);
        }
        assert_eq!(log.take(), None);
        log.stored(None, 4, &[0]);
        assert_eq!(log.take(), Some(vec![stored(None, &[4], &[0])]));
    }

    #[test]
    fn clearing_makes_up_for_what_was_lost() {
        let mut log = EventLog::new(1);
        log.stored(None, 1, &[0]);
        log.stored(None, 2, &[0]);
        log.cleared();
        log.stored(None, 3, &[0]);
        assert_eq!(log.take(), Some(vec![CacheEvent::Cleared, stored(None, &[3], &[0])]));
    }
}
