//! What is remembered of evicted blocks: a hash table of a fixed size in which the oldest gives way.

use super::reuse::Class;

/// An evicted block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ghost {
    /// Tells the content; not 0.
    pub key: u64,
    /// When it was given up.
    pub epoch: u32,
    /// What it was then.
    pub class: Class,
    /// How often it had been used again.
    pub uses: u8,
}

/// Ghosts a bucket: with 16 bytes each, a cache line.
const WAYS: usize = 4;

/// Ghosts for each block of the pool.
const GHOSTS_PER_BLOCK: u64 = 16;

/// 64 MiB of ghosts; a larger pool gets no more.
const MAX_GHOSTS: u64 = 1 << 22;

/// Ghosts by key.
#[derive(Debug)]
pub struct Ghosts {
    /// Key 0 is an empty place. Zeroed memory costs nothing until it is written.
    places: Vec<[Ghost; WAYS]>,
}

impl Ghosts {
    /// Sized for a pool.
    pub fn new(num_blocks: u32) -> Self {
        let ghosts = (u64::from(num_blocks) * GHOSTS_PER_BLOCK).min(MAX_GHOSTS) as usize;
        let buckets = (ghosts / WAYS).next_power_of_two();
        Self { places: vec![[Ghost::default(); WAYS]; buckets] }
    }

    /// Remembers a block; the one that is forgotten for it, the oldest of its bucket, when that is full.
    pub fn put(&mut self, ghost: Ghost) -> Option<Ghost> {
        let bucket = self.bucket(ghost.key);
        let fitting = bucket.iter().position(|place| place.key == ghost.key || place.key == 0);
        let oldest = || (0..WAYS).min_by_key(|&way| bucket[way].epoch).unwrap_or(0);
        let way = fitting.unwrap_or_else(oldest);
        let old = std::mem::replace(&mut bucket[way], ghost);
        (old.key != 0).then_some(old)
    }

    /// What is remembered of a block, which is not a ghost any more.
    pub fn take(&mut self, key: u64) -> Option<Ghost> {
        let place = self.bucket(key).iter_mut().find(|place| place.key == key)?;
        Some(std::mem::take(place))
    }

    /// All that are remembered.
    pub fn iter(&self) -> impl Iterator<Item = &Ghost> {
        self.places.iter().flatten().filter(|place| place.key != 0)
    }

    fn bucket(&mut self, key: u64) -> &mut [Ghost; WAYS] {
        // Keys may be small numbers: Fibonacci hashing spreads them over the high bits.
        let place = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let mask = self.places.len() - 1;
        &mut self.places[place as usize & mask]
    }
}
