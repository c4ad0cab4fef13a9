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

/// Ages told apart; older blocks go first.
const AGES: usize = 64;

/// Epochs in the time in which as many blocks are used as the pool has.
const EPOCHS_PER_POOL: u32 = 8;

/// Uses in an epoch at least: tiny pools would spend their time on tables.
const MIN_EPOCH: u32 = 16;

/// Lengths of answers that are told apart.
const OUTPUTS: usize = 7;

/// New and continuing nothing, new and continuing something known, used before.
const KINDS: usize = 3;

const CLASSES: usize = KINDS * OUTPUTS;

/// The list of blocks older than any age that is told apart.
const OLDEST: usize = CLASSES * AGES;

/// What the tables keep from one epoch to the next: traffic changes.
const MEMORY: f32 = 0.998;

/// Blocks' worth of evidence that the hazard of all classes together counts for in each class, and a prior in that of all.
const PRIOR: f32 = 50.0;

/// Hazard at age 0 before anything is known. With a prior that falls with age, a cache that has learned nothing is least recently
/// used.
const PRIOR_HAZARD: f32 = 0.02;

/// A hazard is taken over the ages around it, this share of them to each side.
const SMOOTHING: f32 = 0.3;

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

type Table = Vec<[f32; AGES]>;

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
    /// The lists from the least worth on, and where each stands among them.
    order: Vec<u16>,
    rank: Vec<u16>,
    /// All lists before this rank are empty.
    cursor: usize,
    worth: Vec<f32>,
    ghosts: Ghosts,
}

impl Reuse {
    /// Number of lists.
    pub const LISTS: usize = CLASSES * AGES + 1;

    /// For a pool of this many blocks.
    pub fn new(num_blocks: u32) -> Self {
        let table = vec![[0.0; AGES]; CLASSES];
        let mut reuse = Self {
            epoch_uses: (num_blocks / EPOCHS_PER_POOL).max(MIN_EPOCH),
            epoch: 0,
            uses: 0,
            alive: table.clone(),
            reached: table.clone(),
            used: table,
            order: (0..Self::LISTS as u16).collect(),
            rank: vec![0; Self::LISTS],
            cursor: 0,
            worth: vec![0.0; Self::LISTS],
            ghosts: Ghosts::new(num_blocks),
        };
        reuse.sort();
        reuse
    }

    /// The list of the blocks of a class that were given up in an epoch.
    pub fn list(&self, class: Class, epoch: u32) -> usize {
        if self.age(epoch) < AGES { class.row() * AGES + epoch as usize % AGES } else { OLDEST }
    }

    /// A list may have become the least worth of those that hold blocks.
    pub fn listed(&mut self, list: usize) {
        self.cursor = self.cursor.min(usize::from(self.rank[list]));
    }

    /// The list of the least worth that holds blocks.
    pub fn cheapest(&mut self, holds_blocks: impl Fn(usize) -> bool) -> Option<usize> {
        while let Some(&list) = self.order.get(self.cursor) {
            if holds_blocks(usize::from(list)) {
                return Some(usize::from(list));
            }
            self.cursor += 1;
        }
        None
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
    pub fn tick(&mut self) -> bool {
        self.uses += 1;
        if self.uses < self.epoch_uses {
            return false;
        }
        self.uses = 0;
        self.epoch = self.epoch.wrapping_add(1);
        let now = self.epoch as usize % AGES;
        for class in 0..CLASSES {
            self.alive[class][now] = 0.0;
            for age in 0..AGES {
                self.used[class][age] *= MEMORY;
                self.reached[class][age] *= MEMORY;
                if age > 0 {
                    self.reached[class][age] += self.alive[class][(now + AGES - age) % AGES];
                }
            }
        }
        self.sort();
        true
    }

    /// Lists whose epoch has just left the horizon, and the list that takes their blocks.
    pub fn retired(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let now = self.epoch as usize % AGES;
        (0..CLASSES).map(move |class| (class * AGES + now, OLDEST))
    }

    /// What the blocks of a list are worth.
    #[cfg(test)]
    pub fn worth_of(&self, list: usize) -> f32 {
        self.worth[list]
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

    /// Brings the lists into the order of what their blocks are worth.
    fn sort(&mut self) {
        let mut all = ([0.0; AGES], [0.0; AGES]);
        let rows: Vec<_> = self
            .used
            .iter()
            .zip(&self.reached)
            .map(|(used, reached)| (smooth(used), smooth(reached)))
            .collect();
        for (used, reached) in &rows {
            for age in 0..AGES {
                all.0[age] += used[age];
                all.1[age] += reached[age];
            }
        }
        // Where nothing is known of an age it is taken to be a little less than that before.
        let mut prior = PRIOR_HAZARD;
        let common: [f32; AGES] = std::array::from_fn(|age| {
            let common = (all.0[age] + PRIOR * prior) / (all.1[age] + PRIOR);
            prior = common * (age as f32 + 1.0) / (age as f32 + 2.0);
            common
        });
        let now = self.epoch as usize % AGES;
        for (class, (used, reached)) in rows.iter().enumerate() {
            let hazard = std::array::from_fn(|age| {
                ((used[age] + PRIOR * common[age]) / (reached[age] + PRIOR)).min(1.0)
            });
            for (age, worth) in worth(&hazard).into_iter().enumerate() {
                self.worth[class * AGES + (now + AGES - age) % AGES] = worth;
            }
        }
        self.worth[OLDEST] = 0.0;
        let worth = &self.worth;
        // Older ones first among equals; the list number makes the order the same on every machine.
        let age = |list: u16| (now + AGES - usize::from(list) % AGES) % AGES;
        self.order.sort_unstable_by(|&a, &b| {
            let by_worth = worth[usize::from(a)].total_cmp(&worth[usize::from(b)]);
            by_worth.then_with(|| age(b).cmp(&age(a))).then(a.cmp(&b))
        });
        for (rank, &list) in self.order.iter().enumerate() {
            self.rank[usize::from(list)] = rank as u16;
        }
        self.cursor = 0;
    }
}

/// Sums over the ages around each.
fn smooth(counts: &[f32; AGES]) -> [f32; AGES] {
    let mut before = [0.0; AGES + 1];
    for age in 0..AGES {
        before[age + 1] = before[age] + counts[age];
    }
    std::array::from_fn(|age| {
        let reach = (age as f32 * SMOOTHING) as usize;
        before[(age + reach + 1).min(AGES)] - before[age - reach]
    })
}

/// What a block is worth at each age: the steepest line from there to any later point of the curve of expected uses over expected
/// time kept, which is the next corner of the curve's upper hull.
fn worth(hazard: &[f32; AGES]) -> [f32; AGES] {
    // Points of the curve; `alive` is the share that was not used again before that age.
    let (mut time, mut uses) = ([0.0; AGES + 1], [0.0; AGES + 1]);
    let mut alive = 1.0;
    for age in 0..AGES {
        time[age + 1] = time[age] + alive * (1.0 - 0.5 * hazard[age]);
        uses[age + 1] = uses[age] + alive * hazard[age];
        alive *= 1.0 - hazard[age];
    }
    let slope =
        |from: usize, to: usize| (uses[to] - uses[from]) / (time[to] - time[from]).max(f32::MIN_POSITIVE);
    let mut result = [0.0; AGES];
    let mut hull = [0usize; AGES + 1];
    let mut corners = 1;
    hull[0] = AGES;
    for age in (0..AGES).rev() {
        while corners > 1 && slope(age, hull[corners - 1]) <= slope(hull[corners - 1], hull[corners - 2]) {
            corners -= 1;
        }
        result[age] = slope(age, hull[corners - 1]);
        hull[corners] = age;
        corners += 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against every time that a block might be kept.
        #[test]
        fn worth_is_the_best_over_all_times(hazard in prop::array::uniform32(0f32..1.0), zeros in 0usize..40) {
            let hazard: [f32; AGES] = std::array::from_fn(|age| if age < zeros { 0.0 } else { hazard[age % 32] });
            let found = worth(&hazard);
            for from in 0..AGES {
                let (mut alive, mut uses, mut time, mut best) = (1.0, 0.0, 0.0, 0f64);
                for &hazard in &hazard[from..] {
                    uses += alive * f64::from(hazard);
                    time += alive * (1.0 - 0.5 * f64::from(hazard));
                    alive *= 1.0 - f64::from(hazard);
                    best = best.max(uses / time);
                }
                // Late ages are reached by so few that float32 tells their differences no more.
                let scale = if found[from].is_finite() { 1e-3 + 0.02 * best } else { 0.0 };
                let survival: f64 = hazard[..from].iter().map(|&hazard| 1.0 - f64::from(hazard)).product();
                if survival > 1e-3 {
                    prop_assert!((f64::from(found[from]) - best).abs() <= scale, "{from}: {} against {best}", found[from]);
                }
            }
        }
    }

    #[test]
    fn a_falling_hazard_makes_older_blocks_worth_less() {
        let hazard: [f32; AGES] = std::array::from_fn(|age| 0.3 / (age as f32 + 1.0));
        assert!(worth(&hazard).is_sorted_by(|younger, older| younger > older));
    }

    #[test]
    fn a_late_return_makes_blocks_worth_more_as_it_comes_near() {
        let mut hazard = [0.0; AGES];
        hazard[40] = 0.9;
        let worth = worth(&hazard);
        assert!(worth[..=40].is_sorted_by(|younger, older| younger < older));
        assert!(worth[41..].iter().all(|&worth| worth == 0.0));
    }
}
