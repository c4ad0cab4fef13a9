//! Working memory of an encoding, and the places where it waits for the next one.
//!
//! A tokenizer is one object for all threads and takes no lock: a call takes the memory that waits at its thread's place,
//! with one atomic exchange, and puts it back. A call that finds nothing there makes its own. After a fork the child finds
//! what was not in use.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::atomic::AtomicCell;

use crate::tokenizer::bpe;
use crate::tokenizer::encode::Misses;
use crate::tokenizer::piece_cache::PieceCache;
use crate::tokenizer::pre_tokenizer::Caches;
use crate::tokenizer::scan::BATCH;

/// Places; so many threads keep their memory from call to call.
const PLACES: usize = 64;
/// Places that a call looks at.
const TRIES: usize = 2;
/// Memory for longer pieces than this many symbols is given back after the call.
const KEPT_SYMBOLS: usize = 1 << 16;

/// Working memory.
pub struct Scratch {
    /// What pieces became.
    pub pieces: PieceCache,
    /// Of BPE.
    pub bpe: bpe::Scratch,
    /// Of patterns that no scanner serves.
    pub patterns: Option<Caches>,
    /// Where a scanner found ends.
    pub ends: Box<[u32; BATCH]>,
    /// Ids on their way out.
    pub ids: Vec<u32>,
    /// Pieces that the cache does not have.
    pub misses: Misses,
    epoch: u64,
}

/// The places.
pub struct Pool {
    places: [AtomicCell<Option<Box<Scratch>>>; PLACES],
    epoch: AtomicU64,
}

thread_local! {
    static PLACE: Cell<usize> = Cell::new({
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    });
}

impl Pool {
    /// Empty places.
    pub fn new() -> Self {
        Self { places: std::array::from_fn(|_| AtomicCell::new(None)), epoch: AtomicU64::new(0) }
    }

    /// Runs `work` with working memory.
    #[inline]
    pub fn with<R>(&self, work: impl FnOnce(&mut Scratch) -> R) -> R {
        let first = PLACE.get();
        let place = |try_: usize| &self.places[(first + try_) % PLACES];
        let mut scratch = (0..TRIES).find_map(|try_| place(try_).take()).unwrap_or_else(|| self.make());
        let result = work(&mut scratch);
        scratch.bpe.shrink(KEPT_SYMBOLS);
        scratch.misses.shrink(KEPT_SYMBOLS);
        if scratch.epoch == self.epoch.load(Ordering::Acquire) {
            let mut waiting = Some(scratch);
            for try_ in 0..TRIES {
                waiting = place(try_).swap(waiting);
                if waiting.is_none() {
                    break;
                }
            }
        }
        result
    }

    #[cold]
    fn make(&self) -> Box<Scratch> {
        Box::new(Scratch {
            pieces: PieceCache::new(),
            bpe: bpe::Scratch::default(),
            patterns: None,
            ends: Box::new([0; BATCH]),
            ids: Vec::new(),
            misses: Misses::default(),
            epoch: self.epoch.load(Ordering::Acquire),
        })
    }

    /// Forgets every piece: what waits is dropped now, what is in use when its call ends.
    pub fn clear(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.places.iter().for_each(|place| drop(place.take()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_finds_its_memory_again_until_it_is_cleared() {
        assert!(AtomicCell::<Option<Box<Scratch>>>::is_lock_free());
        let pool = Pool::new();
        pool.with(|scratch| scratch.ids.push(7));
        assert_eq!(pool.with(|scratch| scratch.ids.clone()), [7]);
        pool.clear();
        pool.with(|scratch| assert!(scratch.ids.is_empty()));
        pool.with(|scratch| {
            scratch.ids.push(8);
            pool.clear();
        });
        pool.with(|scratch| assert!(scratch.ids.is_empty()));
    }

    #[test]
    fn a_call_inside_a_call_has_memory_of_its_own() {
        let pool = Pool::new();
        pool.with(|outer| {
            outer.ids.push(1);
            pool.with(|inner| assert!(inner.ids.is_empty()));
        });
    }
}
