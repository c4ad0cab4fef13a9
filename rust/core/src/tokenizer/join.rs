//! Byte pair encoding of a few symbols by the definition: join the neighbours of lowest rank, leftmost first, until no pair
//! has a rank.
//!
//! The tables of the merges are larger than the nearest caches. A step therefore asks for what the next step will look up;
//! whoever has several pieces to join takes a step of each in turn and waits for none.

use crate::tokenizer::merges::{Merges, Pair};

/// So many symbols are few: the order of a pair holds its place beside its rank, and a word has a bit for each.
pub const FEW: usize = 64;
/// So many of them are looked at together.
const GROUP: usize = 4;
/// Behind every pair that can be joined.
const LAST: i32 = i32::MAX;

/// Symbols on their way to tokens.
pub struct Join {
    /// What is joined; the caller writes the symbols here.
    pub ids: [u32; FEW],
    /// Of each symbol with the next: the pair's rank and, behind it, its place.
    order: [i32; FEW],
    /// What they become.
    made: [u32; FEW],
    /// Pairs that may have a rank, asked for and not yet looked up.
    asked: [Asked; FEW],
    asked_count: usize,
    /// A bit for each symbol that is still there.
    alive: u64,
    groups: usize,
}

#[derive(Clone, Copy)]
struct Asked {
    hash: u64,
    left: u8,
    right: u8,
}

impl Default for Join {
    fn default() -> Self {
        let asked = [Asked { hash: 0, left: 0, right: 0 }; FEW];
        Self { ids: [0; FEW], order: [0; FEW], made: [0; FEW], asked, asked_count: 0, alive: 0, groups: 0 }
    }
}

/// Ranks are below 2^24, so that rank and place fit an i32, whose least of several every machine finds quickly.
#[inline]
fn in_order(pair: Pair, at: usize) -> i32 {
    (pair.rank as i32) << FEW.ilog2() | at as i32
}

impl Join {
    /// Begins with the first `count` symbols, at least one.
    #[inline(always)]
    pub fn begin(&mut self, merges: &Merges<'_>, count: usize) {
        self.groups = count.div_ceil(GROUP);
        self.order[..self.groups * GROUP].fill(LAST);
        self.alive = u64::MAX >> (FEW - count);
        let mut asked = 0;
        for right in 1..count {
            let hash = merges.hasher.pair(self.ids[right - 1], self.ids[right]);
            self.asked[asked] = Asked { hash, left: right as u8 - 1, right: right as u8 };
            asked += usize::from(merges.filter.has(hash));
        }
        self.asked[..asked].iter().for_each(|asked| merges.ask(asked.hash));
        self.asked_count = asked;
    }

    /// Joins one pair; false if none is left.
    #[inline(always)]
    pub fn step(&mut self, merges: &Merges<'_>) -> bool {
        for &Asked { hash, left, right } in &self.asked[..self.asked_count] {
            let (left, right) = (usize::from(left), usize::from(right));
            if let Some(pair) = merges.find_hashed(hash, self.ids[left], self.ids[right]) {
                (self.order[left], self.made[left]) = (in_order(pair, left), pair.id);
            }
        }
        let mut firsts = [LAST; GROUP];
        for group in self.order[..self.groups * GROUP].chunks_exact(GROUP) {
            firsts.iter_mut().zip(group).for_each(|(first, &other)| *first = (*first).min(other));
        }
        let first = firsts.into_iter().fold(LAST, i32::min);
        if first == LAST {
            return false;
        }
        let at = first as usize % FEW;
        self.ids[at] = self.made[at];
        let behind = self.alive & (u64::MAX - 1) << at; // the first of them is what was joined
        self.alive &= !(behind & behind.wrapping_neg());
        self.order[behind.trailing_zeros() as usize] = LAST;
        self.order[at] = LAST;
        self.asked_count = 0;
        let before = self.alive & ((1 << at) - 1);
        if before != 0 {
            let before = before.ilog2() as usize;
            self.order[before] = LAST;
            self.ask(merges, before, at);
        }
        let behind = self.alive & (u64::MAX - 1) << at;
        if behind != 0 {
            self.ask(merges, at, behind.trailing_zeros() as usize);
        }
        true
    }

    #[inline(always)]
    fn ask(&mut self, merges: &Merges<'_>, left: usize, right: usize) {
        let hash = merges.hasher.pair(self.ids[left], self.ids[right]);
        // Whether the filter has it cannot be foretold, so no branch asks.
        let has = merges.filter.has(hash);
        merges.ask(if has { hash } else { 0 });
        self.asked[self.asked_count] = Asked { hash, left: left as u8, right: right as u8 };
        self.asked_count += usize::from(has);
    }

    /// Appends what is there.
    #[inline(always)]
    pub fn finish(&self, out: &mut Vec<u32>) {
        let mut alive = self.alive;
        while alive != 0 {
            out.push(self.ids[alive.trailing_zeros() as usize]);
            alive &= alive - 1;
        }
    }

    /// Joins the first `count` symbols and appends what they become.
    pub fn run(&mut self, merges: &Merges<'_>, count: usize, out: &mut Vec<u32>) {
        self.begin(merges, count);
        while self.step(merges) {}
        self.finish(out);
    }
}
