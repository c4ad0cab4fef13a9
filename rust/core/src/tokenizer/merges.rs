//! The merges of a vocabulary: what two neighbours become, and whether two tokens can stand side by side.
//!
//! Where each token is made by one merge, and by one that ranks behind those of its parts, merging a piece takes the merges
//! in order of their ranks. Then the tokens of a piece are the only sequence in which each two neighbours are
//! *compatible*: merging their bytes gives those two again. `bpe` finds that sequence from left to right.

use rayon::prelude::*;

use crate::prefetch::fetch_value;
use crate::tokenizer::error::{Result, invalid};
use crate::tokenizer::key::{Filter, Hasher, place};
use crate::tokenizer::vocabulary::Vocabulary;

/// More merges than ids are no real file's.
const MAX_MERGES: usize = 1 << 24;
const MAX_PROBES: usize = 256;
const SEEDS: u64 = 4;
const NONE: u32 = u32::MAX;
/// Words of a bit for each pair of bytes.
const CROSSINGS: usize = 65536 / 64;
/// The rank of what no merge makes; the first merge has rank 1.
const BASE: u32 = 0;

/// Two neighbours, the merge's rank, and what they become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Pair {
    left: u32,
    right: u32,
    /// From 1.
    pub rank: u32,
    /// The token they become.
    pub id: u32,
}

const EMPTY: Pair = Pair { left: NONE, right: NONE, rank: NONE, id: NONE };

/// How a token is made; of a byte, nothing with rank 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Parts {
    left: u32,
    right: u32,
    rank: u32,
}

/// What no merge makes.
const WHOLE: Parts = Parts { left: NONE, right: NONE, rank: BASE };

/// The tables of the merges.
#[derive(Clone, Copy)]
pub struct Merges<'i> {
    /// By the hash of both neighbours.
    pub pairs: &'i [Pair],
    /// The hashes that `pairs` has.
    pub filter: Filter<'i>,
    /// By id. Empty when tokens do not come about as the module's text says.
    pub parts: &'i [Parts],
    /// The token of each byte.
    pub byte_ids: &'i [u32],
    /// A bit for each pair of bytes: a merge joins a part of a character with something beyond the character, and these two
    /// bytes face each other at the border.
    pub crossings: &'i [u64],
    /// The hash function of these tables.
    pub hasher: Hasher,
}

impl Merges<'_> {
    /// Whether the tables fit each other and a vocabulary of `ids`.
    pub fn fit(&self, ids: usize) -> bool {
        !self.pairs.is_empty()
            && self.filter.fits()
            && self.byte_ids.len() == 256
            && self.crossings.len() == CROSSINGS
            && self.parts.len() <= ids
            && are_ordered(self.parts)
            && self.pairs.iter().all(|pair| pair.id == NONE || pair.rank as usize <= MAX_MERGES)
    }

    /// The merge of two neighbours.
    #[inline]
    pub fn find(&self, left: u32, right: u32) -> Option<Pair> {
        let hash = self.hasher.pair(left, right);
        if self.filter.has(hash) { self.find_hashed(hash, left, right) } else { None }
    }

    /// Asks for the memory where the search for a hash begins.
    #[inline]
    pub fn ask(&self, hash: u64) {
        fetch_value(&self.pairs[place(hash, self.pairs.len())]);
    }

    /// The merge of two neighbours with this hash, which the filter has.
    #[inline]
    pub fn find_hashed(&self, hash: u64, left: u32, right: u32) -> Option<Pair> {
        let mut at = place(hash, self.pairs.len());
        for _ in 0..MAX_PROBES {
            let pair = self.pairs[at];
            if pair.left == left && pair.right == right {
                return Some(pair);
            }
            if pair.id == NONE {
                return None;
            }
            at += 1;
            if at == self.pairs.len() {
                at = 0;
            }
        }
        None
    }

    /// The token of a byte.
    #[inline]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[usize::from(byte)]
    }

    /// Whether at a border between characters, where these bytes face each other, something may be joined before both
    /// characters are whole.
    #[inline]
    pub fn cross(&self, last: u8, first: u8) -> bool {
        let pair = usize::from(last) << 8 | usize::from(first);
        self.crossings[pair / 64] >> (pair % 64) & 1 == 1
    }

    /// Whether [`Merges::compatible`] decides.
    pub fn are_ordered(&self) -> bool {
        !self.parts.is_empty()
    }

    /// Whether merging the bytes of two tokens, with the merges below `limit`, leaves these two.
    ///
    /// Goes back in time: the merge of the higher rank is undone on its side of the border, and what then faces each other
    /// must not have had a merge of its own before. Of merges of the same rank the left one came first.
    #[inline]
    pub fn compatible(&self, mut left: u32, mut right: u32, mut limit: u32) -> bool {
        let parts = |id: u32| self.parts.get(id as usize).copied().unwrap_or(WHOLE);
        let (mut of_left, mut of_right) = (parts(left), parts(right));
        loop {
            if self.find(left, right).is_some_and(|pair| pair.rank < limit) {
                return false;
            }
            if of_left.rank > of_right.rank {
                limit = of_left.rank;
                left = of_left.right;
                of_left = parts(left);
            } else if of_right.rank != BASE {
                limit = of_right.rank + 1;
                right = of_right.left;
                of_right = parts(right);
            } else {
                return true;
            }
        }
    }
}

/// Marks the borders between characters inside a token that begins or ends with a part of a character.
fn mark_crossings(token: &[u8], crossings: &mut [u64]) {
    let is_inside = |&byte: &u8| byte & 0xC0 == 0x80;
    let Some(last) = token.iter().rposition(|byte| !is_inside(byte)) else { return };
    let whole = std::str::from_utf8(&token[last..]).is_ok();
    if is_inside(&token[0]) || !whole {
        for at in (1..token.len()).filter(|&at| !is_inside(&token[at])) {
            let pair = usize::from(token[at - 1]) << 8 | usize::from(token[at]);
            crossings[pair / 64] |= 1 << (pair % 64);
        }
    }
}

/// Whether each merge ranks behind those of its parts.
fn are_ordered(parts: &[Parts]) -> bool {
    let rank = |id: u32| parts.get(id as usize).map_or(NONE, |parts| parts.rank);
    parts.iter().all(|made| made.rank == BASE || rank(made.left).max(rank(made.right)) < made.rank)
}

/// The merges while they are built.
pub struct MergesTables {
    pub pairs: Vec<Pair>,
    pub filter: Vec<u64>,
    pub parts: Vec<Parts>,
    pub byte_ids: Vec<u32>,
    pub crossings: Vec<u64>,
    pub seed: u64,
}

impl MergesTables {
    /// From pairs of ids and what they become, in order of rank; of a pair that comes twice the last rank counts.
    pub fn new(vocabulary: &Vocabulary<'_>, merges: &[(u32, u32, u32)], place_name: &str) -> Result<Self> {
        if merges.len() >= MAX_MERGES {
            return Err(invalid(
                place_name,
                format!("less than {MAX_MERGES} merges"),
                merges.len().to_string(),
            ));
        }
        let byte_ids = (0..=255u8)
            .map(|byte| vocabulary.id_of_bytes(&[byte]).expect("a vocabulary has every byte"))
            .collect();
        let mut tables = Self {
            pairs: Vec::new(),
            filter: Vec::new(),
            parts: vec![WHOLE; vocabulary.len()],
            byte_ids,
            crossings: vec![0; CROSSINGS],
            seed: 0,
        };
        let filled = (0..SEEDS).any(|seed| {
            tables.seed = seed;
            tables.fill(merges)
        });
        if !filled {
            let got = "merges that collide";
            return Err(invalid(place_name, "merges that can be told apart by a hash", got));
        }
        let hasher = Hasher::new(tables.seed);
        let found = || tables.pairs.iter().filter(|pair| pair.id != NONE);
        tables.filter =
            Filter::build(found().map(|pair| hasher.pair(pair.left, pair.right)), found().count());
        let mut made_twice = false;
        for pair in tables.pairs.iter().filter(|pair| pair.id != NONE) {
            mark_crossings(vocabulary.bytes(pair.id), &mut tables.crossings);
            let Some(parts) = tables.parts.get_mut(pair.id as usize) else { continue };
            made_twice |= parts.rank != BASE;
            *parts = Parts { left: pair.left, right: pair.right, rank: pair.rank };
        }
        if made_twice || !are_ordered(&tables.parts) {
            tables.parts = Vec::new();
        }
        Ok(tables)
    }

    /// Fills the table of pairs; false if too many collide.
    fn fill(&mut self, merges: &[(u32, u32, u32)]) -> bool {
        let hasher = Hasher::new(self.seed);
        self.pairs = vec![EMPTY; merges.len() * 3 / 2 + 1];
        'merges: for (&(left, right, id), rank) in merges.iter().zip(1..) {
            let mut at = place(hasher.pair(left, right), self.pairs.len());
            for _ in 0..MAX_PROBES {
                let pair = &mut self.pairs[at];
                if pair.id == NONE || (pair.left, pair.right) == (left, right) {
                    *pair = Pair { left, right, rank, id };
                    continue 'merges;
                }
                at = (at + 1) % self.pairs.len();
            }
            return false;
        }
        true
    }

    /// Of each id whether merges make it of its own bytes. Only for ordered merges.
    pub fn made_whole(&self, vocabulary: &Vocabulary<'_>) -> Vec<bool> {
        let view = self.view();
        let agree = |id: usize| {
            let parts = self.parts[id];
            match parts.rank {
                BASE => vocabulary.bytes(id as u32).len() == 1 && self.byte_ids.contains(&(id as u32)),
                rank => view.compatible(parts.left, parts.right, rank),
            }
        };
        let mut whole: Vec<bool> = (0..self.parts.len()).into_par_iter().map(agree).collect();
        let mut made: Vec<u32> =
            (0..self.parts.len() as u32).filter(|&id| self.parts[id as usize].rank != BASE).collect();
        made.sort_unstable_by_key(|&id| self.parts[id as usize].rank);
        for id in made {
            let Parts { left, right, .. } = self.parts[id as usize];
            whole[id as usize] &= whole[left as usize] && whole[right as usize];
        }
        whole
    }

    /// The tables, to be read.
    pub fn view(&self) -> Merges<'_> {
        Merges {
            pairs: &self.pairs,
            filter: Filter(&self.filter),
            parts: &self.parts,
            byte_ids: &self.byte_ids,
            crossings: &self.crossings,
            hasher: Hasher::new(self.seed),
        }
    }
}
