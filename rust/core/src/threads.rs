//! The thread pool of the CPU operators and the tokenizer.
//!
//! One pool of our own, not rayon's global one: it can be resized at run time, other rayon users of the process keep theirs,
//! and a forked child gets new threads (a fork copies the pool but not its threads, so using it would wait for ever).

use std::env::VarError;
use std::ops::{Deref, DerefMut};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

use crossbeam_utils::atomic::AtomicCell;
use rayon::{ThreadPool, ThreadPoolBuilder};
use thiserror::Error;

/// The environment variable that sets the default number of threads.
pub const ENVIRONMENT: &str = "HEEDFUL_NUM_THREADS";

/// More threads than this is taken for a mistake.
pub const MAX_THREADS: usize = 1024;

/// Why there is no pool.
#[derive(Debug, Error)]
pub enum ThreadsError {
    /// The number asked for is not usable.
    #[error("{name}: expected a number of threads from 1 to {MAX_THREADS}, got {got}")]
    Count {
        /// The argument or environment variable.
        name: &'static str,
        /// What came.
        got: String,
    },
    /// The system refused to start the threads.
    #[error("could not start {count} threads: {source}")]
    Start {
        /// Threads asked for.
        count: usize,
        /// rayon's reason.
        source: rayon::ThreadPoolBuildError,
    },
}

struct Pool {
    pid: u32,
    threads: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Pool>> {
    // The guarded value is replaced whole, so a panic elsewhere cannot have left it half written.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn default_threads() -> Result<usize, ThreadsError> {
    match std::env::var(ENVIRONMENT) {
        Err(VarError::NotPresent) => Ok(available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
        Err(VarError::NotUnicode(raw)) => {
            Err(ThreadsError::Count { name: ENVIRONMENT, got: format!("{raw:?}") })
        }
        Ok(text) => match text.trim().parse() {
            Ok(count) if (1..=MAX_THREADS).contains(&count) => Ok(count),
            _ => Err(ThreadsError::Count { name: ENVIRONMENT, got: format!("{text:?}") }),
        },
    }
}

fn build(count: usize) -> Result<Pool, ThreadsError> {
    let threads = ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|i| format!("heedful-{i}"))
        .build()
        .map_err(|source| ThreadsError::Start { count, source })?;
    Ok(Pool { pid: process::id(), threads: Arc::new(threads) })
}

/// Puts `new` in the place of the pool.
fn replace(slot: &mut Option<Pool>, new: Pool) {
    if let Some(old) = slot.replace(new)
        && old.pid != process::id()
    {
        // Its threads stayed in the parent; dropping it here would signal, through locks they may have held, nobody.
        std::mem::forget(old.threads);
    }
}

fn current() -> Result<Arc<ThreadPool>, ThreadsError> {
    let mut slot = lock();
    if let Some(pool) = slot.as_ref() {
        if pool.pid == process::id() {
            return Ok(Arc::clone(&pool.threads));
        }
        let count = pool.threads.current_num_threads();
        replace(&mut slot, build(count)?);
    } else {
        *slot = Some(build(default_threads()?)?);
    }
    Ok(Arc::clone(&slot.as_ref().expect("set by both branches above").threads))
}

/// Runs `work` inside the pool, so that rayon's parallel iterators use its threads; starts the pool on first use.
///
/// # Errors
/// [`ThreadsError`] when the environment variable is not a number or the threads cannot be started.
pub fn install<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R, ThreadsError> {
    Ok(current()?.install(work))
}

/// Number of threads of the pool.
///
/// # Errors
/// As [`install`].
pub fn num_threads() -> Result<usize, ThreadsError> {
    Ok(current()?.current_num_threads())
}

/// Replaces the pool by one of `count` threads; work already running ends on the old one.
///
/// # Errors
/// [`ThreadsError`] when `count` is 0 or above [`MAX_THREADS`], or the threads cannot be started; the old pool stays then.
pub fn set_num_threads(count: usize) -> Result<(), ThreadsError> {
    if !(1..=MAX_THREADS).contains(&count) {
        return Err(ThreadsError::Count { name: "n", got: count.to_string() });
    }
    let new = build(count)?;
    replace(&mut lock(), new);
    Ok(())
}

/// Places of an arena; so many leases keep their memory from call to call.
const PLACES: usize = 64;

/// Working memory in the caller's hands: what a task has lent goes back when its lease ends, and the next task finds it there
/// with its buffers grown, so that a call like the last one allocates nothing. Takes no lock, and so survives a fork.
pub struct Arena<T> {
    places: [AtomicCell<Option<Box<T>>>; PLACES],
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Arena<T> {
    /// An arena without memory.
    pub const fn new() -> Self {
        Self { places: [const { AtomicCell::new(None) }; PLACES] }
    }

    /// The places, those that this thread is likely to have used first.
    fn places(&self) -> impl Iterator<Item = &AtomicCell<Option<Box<T>>>> {
        let first = rayon::current_thread_index().unwrap_or(0) % PLACES;
        self.places[first..].iter().chain(&self.places[..first])
    }

    /// Memory for one task; its contents are what an earlier task left.
    pub fn lend(&self) -> Lease<'_, T>
    where
        T: Default,
    {
        let memory = self.places().find_map(AtomicCell::take).unwrap_or_default();
        Lease { arena: self, memory: Some(memory) }
    }
}

/// Memory lent by an [`Arena`].
pub struct Lease<'a, T> {
    arena: &'a Arena<T>,
    /// Always there until the lease ends.
    memory: Option<Box<T>>,
}

impl<T> Deref for Lease<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.memory.as_ref().expect("taken by drop alone")
    }
}

impl<T> DerefMut for Lease<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.memory.as_mut().expect("taken by drop alone")
    }
}

impl<T> Drop for Lease<'_, T> {
    fn drop(&mut self) {
        let mut memory = self.memory.take();
        for place in self.arena.places() {
            memory = place.swap(memory);
            if memory.is_none() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn the_pool_can_be_resized_and_refuses_bad_counts() {
        set_num_threads(3).unwrap();
        assert_eq!(num_threads().unwrap(), 3);
        assert!(set_num_threads(0).is_err());
        assert!(set_num_threads(MAX_THREADS + 1).is_err());
        assert_eq!(num_threads().unwrap(), 3);
        assert_eq!(install(|| (0..1000u64).into_par_iter().sum::<u64>()).unwrap(), 499_500);
    }

    #[test]
    fn a_lease_finds_what_an_earlier_one_left_and_two_at_a_time_are_apart() {
        assert!(AtomicCell::<Option<Box<Vec<i32>>>>::is_lock_free());
        let arena = Arena::<Vec<i32>>::new();
        arena.lend().push(1);
        let mut first = arena.lend();
        let second = arena.lend();
        assert_eq!((&first[..], &second[..]), (&[1][..], &[][..]));
        first.push(2);
        drop((second, first));
        let (a, b) = (arena.lend(), arena.lend());
        assert_eq!(a.len() + b.len(), 2);
    }
}
