//! Preemption by swap: what a preempted request has computed is kept in the host tier until it runs again.
//!
//! Latent rows need no move of their own: the host tier has a place for them, which the record uses beside the block, so that they
//! stay when the block goes. Rows that are on the device alone are stored. Index keys, and a draft model's rows, are copied out to
//! places kept for this (`num_swap_blocks`), and back into new blocks. Blocks that were cached stay cached; what of them is still
//! there when the request runs again is used where it is.

use std::collections::HashMap;

use super::SchedulerConfig;

/// What the rows of one block are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Of its index keys.
    pub place: u32,
    /// Of its latent rows.
    pub latent_place: u32,
}

/// What is kept for a request.
#[derive(Debug)]
pub(super) struct Record {
    /// Computed rows, from its start on.
    pub rows: u32,
    /// By place in its table.
    pub blocks: Vec<Kept>,
}

/// Places for index keys in the host tier, and who has which.
#[derive(Debug)]
pub(super) struct Swap {
    total: u32,
    /// Places given back; those from `fresh` on were never used.
    returned: Vec<u32>,
    fresh: u32,
    records: HashMap<u32, Record>,
}

impl Swap {
    pub fn new(config: &SchedulerConfig) -> Self {
        let total = config.swap_blocks() as u32;
        Self { total, returned: Vec::new(), fresh: 0, records: HashMap::new() }
    }

    /// Places in all.
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Places that nobody has.
    pub fn free(&self) -> usize {
        self.returned.len() + (self.total - self.fresh) as usize
    }

    /// A free place, which there must be.
    pub fn take(&mut self) -> u32 {
        self.returned.pop().unwrap_or_else(|| {
            debug_assert!(self.fresh < self.total, "free places are counted first");
            self.fresh += 1;
            self.fresh - 1
        })
    }

    /// Keeps a request's rows.
    pub fn keep(&mut self, key: usize, record: Record) {
        let before = self.records.insert(key as u32, record);
        debug_assert!(before.is_none(), "who waits is not preempted again");
    }

    /// What is kept for a request.
    pub fn of(&self, key: usize) -> Option<&Record> {
        self.records.get(&(key as u32))
    }

    /// Gives a request's places back; what was kept.
    pub fn release(&mut self, key: usize) -> Option<Record> {
        let record = self.records.remove(&(key as u32))?;
        self.returned.extend(record.blocks.iter().map(|kept| kept.place));
        Some(record)
    }

    /// All that is kept, by request.
    pub fn records(&self) -> impl Iterator<Item = (usize, &Record)> {
        self.records.iter().map(|(&key, record)| (key as usize, record))
    }

    /// Checks that each place is free or kept once.
    pub fn check(&self) -> Result<(), String> {
        let kept = self.records.values().flat_map(|record| record.blocks.iter().map(|kept| kept.place));
        let mut places: Vec<u32> = kept.chain(self.returned.iter().copied()).collect();
        places.sort_unstable();
        if places.iter().copied().eq(0..self.fresh) && self.fresh <= self.total {
            Ok(())
        } else {
            Err("a swap place is lost or kept twice".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swap(places: usize) -> Swap {
        let config = SchedulerConfig {
            num_latent_blocks: Some(8),
            num_swap_blocks: Some(places),
            ..SchedulerConfig::new(8)
        };
        Swap::new(&config)
    }

    fn keep(swap: &mut Swap, key: usize, blocks: usize) -> Vec<u32> {
        let places: Vec<u32> = (0..blocks).map(|_| swap.take()).collect();
        let kept = places.iter().map(|&place| Kept { place, latent_place: 100 + place }).collect();
        swap.keep(key, Record { rows: 64 * blocks as u32, blocks: kept });
        places
    }

    #[test]
    fn places_go_round() {
        let mut swap = swap(5);
        let first = keep(&mut swap, 7, 3);
        let second = keep(&mut swap, 2, 2);
        assert_eq!((swap.free(), swap.total(), swap.check()), (0, 5, Ok(())));
        assert!(first.iter().all(|place| !second.contains(place)));
        assert_eq!(swap.release(7).map(|record| record.rows), Some(192));
        assert!(swap.release(7).is_none());
        assert_eq!((swap.free(), swap.check()), (3, Ok(())));
        assert_eq!(swap.of(2).map(|record| record.blocks.len()), Some(2));
        let mut third = keep(&mut swap, 7, 3);
        third.sort_unstable();
        assert_eq!((third, swap.check()), (first, Ok(())));
    }

    #[test]
    fn a_lost_place_is_found_out() {
        let mut swap = swap(5);
        keep(&mut swap, 0, 2);
        swap.take();
        assert!(swap.check().is_err());
    }
}
