//! How likely blocks are to be used again, learned from what happened to blocks like them.
//!
//! Time is counted in uses of blocks and cut into epochs; a block's age is the number of epochs since it was given up. For each
//! class of blocks a life table tells, for each age, how many blocks reached it and how many of them were used again then: the
//! hazard. Evicted blocks stay in the table as ghosts, so that it does not depend on what the cache kept.
//!
//! What a block is worth is the best it promises over any time it might be kept from now on: the uses expected until then,
//! divided by the time it is expected to take up room until it is used or that time is over (Gittins' index; Beckmann, Chen and
//! Cidon's "LHD", NSDI 2018, takes one horizon in place of the best one). Where a hazard falls with age this is least recently
//! used; where blocks come back after a pause, as those of conversations do, young blocks are given up before those that are
//! about to come back; and where one class returns more often than another, it is kept longer.

use super::ghosts::{Ghost, Ghosts};
use super::ranking::{Counts, NextRanking, Ranking, STAGES};

/// Ages told apart; older blocks go first.
pub const AGES: usize = 64;

/// Epochs in the time in which as many blocks are used as the pool has.
const EPOCHS_PER_POOL: u32 = 8;

/// Uses in an epoch at least: tiny pools would spend their time on tables.
const MIN_EPOCH: u32 = 16;

/// Lengths of answers that are told apart.
const OUTPUTS: usize = 7;

/// New and continuing nothing, new and continuing something known, used before.
const KINDS: usize = 3;

/// Classes of blocks.
pub const CLASSES: usize = KINDS * OUTPUTS;

/// The list of blocks older than any age that is told apart.
pub const OLDEST: usize = CLASSES * AGES;

/// What the tables keep from one epoch to the next: traffic changes.
const MEMORY: f32 = 0.998;

/// What is known of a block when it is given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class(u8);

impl Class {
    /// Args: how often the block was used again; whether it continued something known; the length of the answer.
    pub fn of(uses: u8, continues: bool, output_tokens: usize) -> Self {
        let kind = if uses > 0 { 2 } else { usize::from(continues) };
        // Powers of 2^1.5: 2, 7, 22, 63, 180 and 511 tokens are the limits.
        let output = [2, 7, 22, 63, 180, 511].iter().filter(|&&limit| output_tokens >= limit).count();
        Self((kind * OUTPUTS + output) as u8)
    }

    fn row(self) -> usize {
        usize::from(self.0)
    }
}

/// A number for each class and age.
pub type Table = Vec<[f32; AGES]>;

/// Life tables, and the lists of blocks in the order of their worth.
#[derive(Debug)]
pub struct Reuse {
    epoch_uses: u32,
    epoch: u32,
    uses: u32,
    /// Blocks, cached or ghosts, by class and by epoch of their giving up modulo AGES, not yet used again.
    alive: Table,
    /// Blocks that reached an age, and those used again at it.
    reached: Table,
    used: Table,
    /// The order of the lists in this epoch, and the one of the next.
    ranking: Ranking,
    next: NextRanking,
    ghosts: Ghosts,
}

impl Reuse {
    /// For a pool of this many blocks.
    pub fn new(num_blocks: u32) -> Self {
        let table = vec![[0.0; AGES]; CLASSES];
        let mut next = NextRanking::new();
        for _ in 0..STAGES {
            next.advance(Counts { alive: &table, reached: &table, used: &table }, 0);
        }
        let (ranking, next) = next.finished();
        Self {
            epoch_uses: (num_blocks / EPOCHS_PER_POOL).max(MIN_EPOCH),
            epoch: 0,
            uses: 0,
            alive: table.clone(),
            reached: table.clone(),
            used: table,
            ranking,
            next,
            ghosts: Ghosts::new(num_blocks),
        }
    }

    /// The list of the blocks of a class that were given up in an epoch.
    pub fn list(&self, class: Class, epoch: u32) -> usize {
        if self.age(epoch) < AGES { class.row() * AGES + epoch as usize % AGES } else { OLDEST }
    }

    /// A list holds blocks.
    pub fn listed(&mut self, list: usize) {
        self.ranking.listed(list);
    }

    /// The list of the least worth that holds blocks.
    pub fn cheapest(&mut self, holds_blocks: impl Fn(usize) -> bool) -> Option<usize> {
        self.ranking.cheapest(holds_blocks)
    }

    /// A block is given up; the epoch.
    pub fn given_up(&mut self, class: Class) -> u32 {
        self.alive[class.row()][self.epoch as usize % AGES] += 1.0;
        self.reached[class.row()][0] += 1.0;
        self.epoch
    }

    /// A block that was given up in this epoch is used again.
    pub fn used_again(&mut self, class: Class, epoch: u32) {
        let age = self.age(epoch);
        if age < AGES {
            self.alive[class.row()][epoch as usize % AGES] -= 1.0;
            self.used[class.row()][age] += 1.0;
        }
    }

    /// A block is evicted, and remembered for some time.
    pub fn remember(&mut self, ghost: Ghost) {
        if let Some(old) = self.ghosts.put(ghost) {
            self.lost(old.class, old.epoch);
        }
    }

    /// A block comes again that was evicted; how often it had been used again before, if it is remembered and not past all ages.
    pub fn recall(&mut self, key: u64) -> Option<u8> {
        let ghost = self.ghosts.take(key).filter(|ghost| self.age(ghost.epoch) < AGES)?;
        self.used_again(ghost.class, ghost.epoch);
        Some(ghost.uses)
    }

    /// Nothing more will be known of a block that was given up in this epoch.
    pub fn lost(&mut self, class: Class, epoch: u32) {
        if self.age(epoch) < AGES {
            self.alive[class.row()][epoch as usize % AGES] -= 1.0;
        }
    }

    /// One more use; whether an epoch began with it.
    #[inline]
    pub fn tick(&mut self) -> bool {
        self.uses += 1;
        // The next epoch's order is made in even parts, and is there when it begins.
        while self.next.stage() * (self.epoch_uses as usize) < STAGES * self.uses as usize {
            let counts = Counts { alive: &self.alive, reached: &self.reached, used: &self.used };
            self.next.advance(counts, self.epoch.wrapping_add(1));
        }
        if self.uses < self.epoch_uses {
            return false;
        }
        self.begin_epoch();
        true
    }

    #[cold]
    fn begin_epoch(&mut self) {
        self.uses = 0;
        self.epoch = self.epoch.wrapping_add(1);
        let now = self.epoch as usize % AGES;
        for ((alive, used), reached) in self.alive.iter_mut().zip(&mut self.used).zip(&mut self.reached) {
            alive[now] = 0.0;
            used.iter_mut().chain(&mut *reached).for_each(|count| *count *= MEMORY);
            reach(reached, alive, self.epoch);
        }
        self.next.swap(&mut self.ranking);
    }

    /// Lists whose epoch has just left the horizon, and the list that takes their blocks.
    pub fn retired(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let now = self.epoch as usize % AGES;
        (0..CLASSES).map(move |class| (class * AGES + now, OLDEST))
    }

    /// What the blocks of a list are worth.
    #[cfg(test)]
    pub fn worth_of(&self, list: usize) -> f32 {
        self.ranking.worth(list)
    }

    /// Checks the count of blocks alive against those that are cached and given up, and the ghosts.
    pub fn check(&self, given_up: impl Iterator<Item = (Class, u32)>) -> Result<(), String> {
        let mut alive = vec![[0.0; AGES]; CLASSES];
        let remembered = self.ghosts.iter().map(|ghost| (ghost.class, ghost.epoch));
        for (class, epoch) in given_up.chain(remembered) {
            if self.age(epoch) < AGES {
                alive[class.row()][epoch as usize % AGES] += 1.0;
            }
        }
        if alive == self.alive {
            Ok(())
        } else {
            Err("the life tables count blocks that are not there".into())
        }
    }

    fn age(&self, epoch: u32) -> usize {
        self.epoch.wrapping_sub(epoch) as usize
    }
}

/// Adds, at each age from 1 on, the blocks that reach it when `epoch` begins.
pub fn reach(reached: &mut [f32; AGES], alive: &[f32; AGES], epoch: u32) {
    let now = epoch as usize % AGES;
    // The epochs before this one, then those before the horizon's end.
    let epochs = alive[..now].iter().rev().chain(alive[now + 1..].iter().rev());
    reached[1..].iter_mut().zip(epochs).for_each(|(reached, alive)| *reached += alive);
}
