//! Lists of blocks in the order of what their blocks are worth. The order of the next epoch is made a little at a time during this
//! one, so no use of a block pays for a whole sort.

use super::reuse::{AGES, CLASSES, OLDEST, Table, reach};

/// Parts of the work, each about a microsecond: sums by class, what is common to all, and the order by class.
pub const STAGES: usize = 2 * CLASSES + 1;

/// Number of lists: one for each class and epoch that is told apart, and one for all that is older.
pub const LISTS: usize = CLASSES * AGES + 1;

/// Blocks' worth of evidence that the hazard of all classes together counts for in each class, and a prior in that of all.
const PRIOR: f32 = 50.0;

/// Hazard at age 0 before anything is known. With a prior that falls with age, a cache that has learned nothing is least recently
/// used.
const PRIOR_HAZARD: f32 = 0.02;

/// A hazard is taken over the ages around it, this share of them to each side.
const SMOOTHING: f32 = 0.3;

/// The lists of each class from the least worth on, and how far they are known to be empty.
#[derive(Debug)]
pub struct Ranking {
    sorted: Vec<[u64; AGES]>,
    /// Where each list stands in its class.
    places: Vec<u8>,
    /// All lists of a class before this place are empty.
    cursors: [usize; CLASSES],
    /// The list there; `u64::MAX` behind the last.
    heads: [u64; CLASSES],
}

impl Ranking {
    fn new() -> Self {
        Self {
            sorted: vec![[0; AGES]; CLASSES],
            places: vec![0; OLDEST],
            cursors: [0; CLASSES],
            heads: [0; CLASSES],
        }
    }

    /// The list of the least worth that holds blocks. What is older than any age comes first.
    pub fn cheapest(&mut self, holds_blocks: impl Fn(usize) -> bool) -> Option<usize> {
        if holds_blocks(OLDEST) {
            return Some(OLDEST);
        }
        loop {
            let first = self.heads.into_iter().fold(u64::MAX, u64::min);
            if first == u64::MAX {
                return None;
            }
            let list = list_of(first);
            if holds_blocks(list) {
                return Some(list);
            }
            self.move_to(list / AGES, self.cursors[list / AGES] + 1);
        }
    }

    /// A list holds blocks.
    #[inline]
    pub fn listed(&mut self, list: usize) {
        let Some(&place) = self.places.get(list) else { return };
        if usize::from(place) < self.cursors[list / AGES] {
            self.move_to(list / AGES, usize::from(place));
        }
    }

    /// What the blocks of a list are worth.
    #[cfg(test)]
    pub fn worth(&self, list: usize) -> f32 {
        let Some(&place) = self.places.get(list) else { return 0.0 };
        f32::from_bits((self.sorted[list / AGES][usize::from(place)] >> 32) as u32)
    }

    fn move_to(&mut self, class: usize, place: usize) {
        self.cursors[class] = place;
        self.heads[class] = self.sorted[class].get(place).copied().unwrap_or(u64::MAX);
    }
}

/// What is known of the blocks of each class so far.
#[derive(Clone, Copy)]
pub struct Counts<'a> {
    /// Those not yet used again, by the epoch in which they were given up.
    pub alive: &'a Table,
    /// Those that reached an age.
    pub reached: &'a Table,
    /// Those used again at an age.
    pub used: &'a Table,
}

/// The next order in the making.
#[derive(Debug)]
pub struct NextRanking {
    stage: usize,
    /// Sums over the ages around each, of blocks used again and of those that reached an age: by class, and of all classes.
    used: Table,
    reached: Table,
    all: ([f32; AGES], [f32; AGES]),
    common: [f32; AGES],
    /// What blocks are worth of which nothing else is known.
    common_worth: [f32; AGES],
    ranking: Ranking,
}

impl NextRanking {
    /// Nothing is done yet.
    pub fn new() -> Self {
        let table = vec![[0.0; AGES]; CLASSES];
        Self {
            stage: 0,
            used: table.clone(),
            reached: table,
            all: ([0.0; AGES], [0.0; AGES]),
            common: [0.0; AGES],
            common_worth: [0.0; AGES],
            ranking: Ranking::new(),
        }
    }

    /// Stages that are done.
    #[inline]
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// Does one stage more, if any is left. `epoch` is the one that the order is for.
    #[cold]
    pub fn advance(&mut self, counts: Counts, epoch: u32) {
        match self.stage {
            stage if stage < CLASSES => self.sum(stage, counts, epoch),
            CLASSES => self.find_common(),
            stage if stage < STAGES => self.sort(stage - CLASSES - 1, epoch),
            _ => return,
        }
        self.stage += 1;
    }

    /// Puts the finished order in the place of the last one, and begins anew.
    pub fn swap(&mut self, ranking: &mut Ranking) {
        debug_assert_eq!(self.stage, STAGES);
        std::mem::swap(&mut self.ranking, ranking);
        self.stage = 0;
        self.all = ([0.0; AGES], [0.0; AGES]);
        (0..CLASSES).for_each(|class| ranking.move_to(class, 0));
    }

    /// The finished order, and what the next one is made in.
    pub fn finished(mut self) -> (Ranking, Self) {
        let mut ranking = Ranking::new();
        self.swap(&mut ranking);
        (ranking, self)
    }

    fn sum(&mut self, class: usize, counts: Counts, epoch: u32) {
        // What is alive now will have reached its next age then.
        let mut reached = counts.reached[class];
        reach(&mut reached, &counts.alive[class], epoch);
        (self.used[class], self.reached[class]) = (smooth(&counts.used[class]), smooth(&reached));
        for age in 0..AGES {
            self.all.0[age] += self.used[class][age];
            self.all.1[age] += self.reached[class][age];
        }
    }

    fn find_common(&mut self) {
        // Where nothing is known of an age it is taken to be a little less than that before.
        let mut prior = PRIOR_HAZARD;
        for age in 0..AGES {
            let common = (self.all.0[age] + PRIOR * prior) / (self.all.1[age] + PRIOR);
            prior = common * (age as f32 + 1.0) / (age as f32 + 2.0);
            self.common[age] = common;
        }
        self.common_worth = worth(&self.common.map(|hazard| hazard.min(1.0)));
    }

    fn sort(&mut self, class: usize, epoch: u32) {
        let (used, reached) = (&self.used[class], &self.reached[class]);
        let worth = if reached[0] == 0.0 {
            self.common_worth // no block of this class was ever given up
        } else {
            worth(&std::array::from_fn(|age| {
                ((used[age] + PRIOR * self.common[age]) / (reached[age] + PRIOR)).min(1.0)
            }))
        };
        let now = epoch as usize % AGES;
        let Ranking { sorted, places, .. } = &mut self.ranking;
        for (age, worth) in worth.into_iter().enumerate() {
            sorted[class][age] = key(worth, age, class * AGES + (now + AGES - age) % AGES);
        }
        sorted[class].sort_unstable();
        for (place, &key) in sorted[class].iter().enumerate() {
            places[list_of(key)] = place as u8;
        }
    }
}

/// A list's place in the order as a number: what its blocks are worth, which is not negative, then older ones first, then the list's
/// own number, so that the order is the same on every machine.
fn key(worth: f32, age: usize, list: usize) -> u64 {
    u64::from(worth.to_bits()) << 32 | ((AGES - 1 - age) as u64) << 16 | list as u64
}

fn list_of(key: u64) -> usize {
    usize::from(key as u16)
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
