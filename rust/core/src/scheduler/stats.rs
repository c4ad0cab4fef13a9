//! Counts of a scheduler's state and past.

use super::Scheduler;

/// What was counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub steps: u64,
    pub scheduled_tokens: u64,
    pub preemptions: u64,
    pub refused_full: u64,
    pub refused_invalid: u64,
    pub swaps: u64,
    pub restored_tokens: u64,
    pub finished: u64,
    pub aborted: u64,
    pub expired: u64,
    pub queried_tokens: u64,
    pub cached_tokens: u64,
    pub copied_blocks: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
}

macro_rules! stats {
    ($($(#[$doc:meta])+ $name:ident: $type:ty,)+) => {
        /// Counts of a scheduler's state and past.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])+ pub $name: $type,)+
        }

        impl Stats {
            /// Each count with its name.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name as u64),)+].into_iter()
            }
        }
    };
}

stats! {
    /// Requests that hold blocks.
    running: usize,
    /// Requests that hold none.
    waiting: usize,
    /// Tokens of those.
    waiting_tokens: usize,
    /// Blocks in the pool.
    total_blocks: usize,
    /// Blocks that can be had: free or cached and not in use.
    free_blocks: usize,
    /// Blocks in use.
    used_blocks: usize,
    /// Blocks that are cached and not in use.
    idle_blocks: usize,
    /// Blocks that are cached, in use or not.
    cached_blocks: usize,
    /// The most blocks in use at the same time so far.
    peak_used_blocks: usize,
    /// Steps planned so far.
    steps: u64,
    /// Tokens planned so far.
    scheduled_tokens: u64,
    /// Preemptions so far.
    preemptions: u64,
    /// How many of these the rows were kept over.
    swaps: u64,
    /// Tokens whose rows had been kept for requests when they began to run again.
    restored_tokens: u64,
    /// Blocks that the host tier keeps for preempted requests at most.
    swap_blocks: usize,
    /// How many of these nobody has.
    free_swap_blocks: usize,
    /// Requests refused because too many waited, or too many tokens.
    refused_full: u64,
    /// Requests refused because no scheduler like this one could serve them, or because an argument was wrong.
    refused_invalid: u64,
    /// Requests that ended by themselves so far.
    finished: u64,
    /// Requests aborted so far.
    aborted: u64,
    /// Requests ended at their deadlines so far.
    expired: u64,
    /// Tokens of requests that began to run so far, each time they did.
    queried_tokens: u64,
    /// How many of these had their rows in the cache.
    cached_tokens: u64,
    /// Blocks copied because another request used them.
    copied_blocks: u64,
    /// Draft tokens computed so far.
    drafted_tokens: u64,
    /// How many of these were accepted.
    accepted_tokens: u64,
    /// Device pages for latent rows; 0 without a host tier, as all of the following.
    latent_pages: usize,
    /// How many of these hold nothing.
    free_latent_pages: usize,
    /// How many of these hold rows that the host tier has too.
    clean_latent_pages: usize,
    /// Blocks whose latent rows were written to the host tier so far.
    stored_blocks: u64,
    /// Blocks whose latent rows were read from it whole so far.
    loaded_blocks: u64,
    /// Pages given up because the host tier has their rows.
    dropped_pages: u64,
    /// Single rows fetched from the host tier so far.
    fetched_rows: u64,
    /// Rows of the host tier that were on the device when they were selected.
    hot_row_hits: u64,
    /// Idle blocks used again so far.
    hit_blocks: u64,
    /// Steps that these had been idle, summed.
    hit_age_steps: u64,
    /// Idle blocks given up for others so far.
    evicted_blocks: u64,
    /// Steps that these had been idle, summed.
    evict_age_steps: u64,
}

impl Scheduler {
    /// Counts of state and past.
    pub fn stats(&self) -> Stats {
        let (counts, pool) = (&self.counts, self.pool.counts());
        let pages = self.tier.as_ref().map(|tier| &tier.residencies);
        let swap = self.tier.as_ref().map(|tier| &tier.swap);
        let hot = self.tier.as_ref().map(|tier| &tier.hot_rows);
        let moves = pages.map_or(Default::default(), |pages| pages.counts());
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            waiting_tokens: self.waiting.tokens(),
            total_blocks: self.pool.total(),
            free_blocks: self.pool.free(),
            used_blocks: self.pool.total() - self.pool.free(),
            idle_blocks: self.pool.idle(),
            cached_blocks: self.pool.index().map_or(0, |index| index.len()),
            peak_used_blocks: self.pool.peak_used(),
            steps: counts.steps,
            scheduled_tokens: counts.scheduled_tokens,
            preemptions: counts.preemptions,
            refused_full: counts.refused_full,
            refused_invalid: counts.refused_invalid,
            swaps: counts.swaps,
            restored_tokens: counts.restored_tokens,
            swap_blocks: swap.map_or(0, |swap| swap.total()),
            free_swap_blocks: swap.map_or(0, |swap| swap.free()),
            finished: counts.finished,
            aborted: counts.aborted,
            expired: counts.expired,
            queried_tokens: counts.queried_tokens,
            cached_tokens: counts.cached_tokens,
            copied_blocks: counts.copied_blocks,
            drafted_tokens: counts.drafted_tokens,
            accepted_tokens: counts.accepted_tokens,
            latent_pages: pages.map_or(0, |pages| pages.total()),
            free_latent_pages: pages.map_or(0, |pages| pages.free()),
            clean_latent_pages: pages.map_or(0, |pages| pages.clean()),
            stored_blocks: moves.stored_blocks,
            loaded_blocks: moves.loaded_blocks,
            dropped_pages: moves.dropped_pages,
            fetched_rows: hot.map_or(0, |hot| hot.fetched),
            hot_row_hits: hot.map_or(0, |hot| hot.hits),
            hit_blocks: pool.hit_blocks,
            hit_age_steps: pool.hit_age_steps,
            evicted_blocks: pool.evicted_blocks,
            evict_age_steps: pool.evict_age_steps,
        }
    }
}
