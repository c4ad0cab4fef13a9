//! The thread pool of the CPU operators and the tokenizer.
//!
//! One pool of our own, not rayon's global one: it can be resized at run time, other rayon users of the process keep theirs,
//! and a forked child gets new threads (a fork copies the pool but not its threads, so using it would wait for ever).

use std::env::VarError;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

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
}
