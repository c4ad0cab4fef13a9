//! The scheduler's state and what callers ask of it between steps. `plan` makes a step, `apply` takes what came of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::flight::Flight;
use super::request::{NewRequest, Phase, Rank, Requests, Terms};
use super::stats::Counts;
use super::tenants::Tenants;
use super::tier::Tier;
use super::waiting::Waiting;
use super::{Policy, SchedulerConfig, SchedulerError};
use crate::cache::eviction::Evictor;
use crate::cache::snapshot::{self, Part, SnapshotError};
use crate::cache::{
    BlockHasher, BlockPool, CacheEvent, Found, MOST_BLOCK_TOKENS, MOST_EXPECTED, Namespace, PUBLIC,
    PrefixIndex,
};

/// Blocks in the log of events at most; a reader that comes later is told everything anew.
const MOST_EVENT_BLOCKS: usize = 1 << 16;

/// Continuous batching over a pool of blocks.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) pool: BlockPool,
    pub(super) requests: Requests,
    /// Keys by name. The name of a fork that has not begun leads to its origin.
    pub(super) names: HashMap<Arc<str>, u32>,
    /// Keys of those that hold blocks, by rank.
    pub(super) running: Vec<u32>,
    /// Seats kept for the forks of those that run.
    pub(super) kept_seats: usize,
    /// A preempted request keeps its rank, so it is first again among those that wait.
    pub(super) waiting: Waiting,
    pub(super) tenants: Tenants,
    pub(super) tier: Option<Tier>,
    pub(super) arrivals: u64,
    pub(super) forks: u64,
    pub(super) flight: Flight,
    pub(super) counts: Counts,
    /// What the last lookup found; kept for its memory.
    pub(super) found: Found,
}

impl Scheduler {
    /// A scheduler with every block free.
    pub fn new(config: SchedulerConfig) -> Result<Self, SchedulerError> {
        config.check()?;
        let total = config.usable_blocks() as u32;
        let mut pool = if config.enable_prefix_caching && config.block_size <= MOST_BLOCK_TOKENS {
            let events = config.enable_events.then_some(MOST_EVENT_BLOCKS);
            let hasher = BlockHasher::new(config.hash_seed);
            let index =
                PrefixIndex::new(config.block_size, hasher, events, MOST_EXPECTED.min(total as usize));
            BlockPool::with_cache(total, index, Evictor::new(config.eviction, total))
        } else {
            BlockPool::new(total)
        };
        let tier = Tier::new(&config);
        if tier.is_some() {
            pool.note_freed();
        }
        Ok(Self {
            pool,
            tier,
            config,
            requests: Requests::default(),
            names: HashMap::new(),
            running: Vec::new(),
            kept_seats: 0,
            waiting: Waiting::default(),
            tenants: Tenants::default(),
            arrivals: 0,
            forks: 0,
            flight: Flight::default(),
            counts: Counts::default(),
            found: Found::default(),
        })
    }

    /// The limits it was made with.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Whether a prompt of this many tokens can be served; to be asked before a long one is copied.
    pub fn check_prompt_len(&mut self, len: usize) -> Result<(), SchedulerError> {
        let checked = self.prompt_len_fits(len);
        self.counts.refused_invalid += u64::from(checked.is_err());
        checked
    }

    fn prompt_len_fits(&self, len: usize) -> Result<(), SchedulerError> {
        if len == 0 {
            return Err(SchedulerError::EmptyPrompt);
        }
        if let Some(limit) = self.config.max_model_len.filter(|&limit| len >= limit) {
            return Err(SchedulerError::LongerThanModel { len, limit });
        }
        let capacity = self.config.capacity();
        if len > capacity {
            return Err(SchedulerError::LargerThanPool { len, capacity });
        }
        Ok(())
    }

    /// Queues a request.
    pub fn add(&mut self, new: NewRequest) -> Result<(), SchedulerError> {
        let checked = self.check_new(&new);
        match checked {
            Ok(()) => self.queue(new),
            Err(SchedulerError::QueueFull(_) | SchedulerError::QueueFullOfTokens { .. }) => {
                self.counts.refused_full += 1;
            }
            Err(_) => self.counts.refused_invalid += 1,
        }
        checked
    }

    fn check_new(&self, new: &NewRequest) -> Result<(), SchedulerError> {
        let len = new.token_ids.len();
        self.prompt_len_fits(len)?;
        for (name, ids) in [("token_ids", &new.token_ids), ("stop_token_ids", &new.stop_token_ids)] {
            check_ids(name, ids)?;
        }
        if new.max_tokens == 0 {
            return Err(SchedulerError::NoTokensWanted);
        }
        if !(new.weight > 0.0 && new.weight.is_finite()) {
            return Err(SchedulerError::Weight(new.weight));
        }
        if new.deadline.is_some_and(f64::is_nan) {
            return Err(SchedulerError::Deadline);
        }
        if new.fork_ids.len() >= self.config.max_num_seqs {
            return Err(SchedulerError::TooManyForks {
                most: self.config.max_num_seqs - 1,
                got: new.fork_ids.len(),
            });
        }
        if self.names.contains_key(&new.id) {
            return Err(SchedulerError::DuplicateId { name: "request_id", id: new.id.to_string() });
        }
        for (place, id) in new.fork_ids.iter().enumerate() {
            if self.names.contains_key(id) || *id == new.id || new.fork_ids[..place].contains(id) {
                return Err(SchedulerError::DuplicateId { name: "fork_ids", id: id.to_string() });
            }
        }
        if self.config.max_waiting.is_some_and(|most| self.waiting.len() >= most) {
            return Err(SchedulerError::QueueFull(self.waiting.len()));
        }
        if let Some(most) = self.config.max_waiting_tokens.filter(|&most| self.waiting.tokens() + len > most)
            && self.waiting.len() > 0
        {
            return Err(SchedulerError::QueueFullOfTokens { waiting: self.waiting.tokens(), len, most });
        }
        Ok(())
    }

    fn queue(&mut self, new: NewRequest) {
        let len = new.token_ids.len();
        let rank = Rank { key: self.rank_key(&new), arrival: self.arrivals, fork: 0 };
        self.arrivals += 1;
        let space = match (&new.cache_salt, self.pool.index()) {
            (Some(salt), Some(index)) => index.hasher().space(salt),
            _ => PUBLIC,
        };
        let terms = Terms {
            id: new.id.clone(),
            prompt_len: len as u32,
            stop_token_ids: new.stop_token_ids.into(),
            namespace: Namespace { space, shared_prefix_len: new.shared_prefix_len },
            skip_cache: new.skip_cache,
            tenant: self.tenants.enter(&new.tenant, new.weight),
            deadline: new.deadline,
            branch: 0,
            forks: (1..).zip(new.fork_ids.iter().cloned()).collect(),
            since: self.pool.clock,
            preemptions: 0,
            swaps: 0,
            reused: 0,
            restored: 0,
            matched: None,
        };
        let max_len = self.config.max_len().min(len.saturating_add(new.max_tokens)).max(len) as u32;
        let key = self.requests.insert(rank, new.token_ids, max_len, terms);
        self.names.insert(new.id, key as u32);
        self.names.extend(new.fork_ids.into_iter().map(|id| (id, key as u32)));
        self.flight.names_changed();
        self.waiting.insert(&self.config, &self.requests, key);
    }

    /// Begins another request where one is: the same tokens, sharing the blocks of all rows that are computed.
    ///
    /// Of `max_tokens`, those that the origin has generated count as used. It runs in the next step, right behind its origin.
    pub fn fork(
        &mut self,
        id: &str,
        new_id: Arc<str>,
        max_tokens: Option<usize>,
    ) -> Result<(), SchedulerError> {
        let key = self.named(id)?;
        if self.names.contains_key(&new_id) {
            return Err(SchedulerError::DuplicateId { name: "new_request_id", id: new_id.to_string() });
        }
        if self.flight.is_in() {
            return Err(SchedulerError::ForkInFlight);
        }
        if max_tokens == Some(0) {
            return Err(SchedulerError::NoTokensWanted);
        }
        let terms = self.requests.terms(key);
        if *terms.id != *id {
            return Err(SchedulerError::NotBegun(id.into()));
        }
        let running = self.requests.phase[key] == Phase::Running;
        if running && self.running.len() + self.kept_seats >= self.config.max_num_seqs {
            return Err(SchedulerError::NoSeat(self.config.max_num_seqs));
        }
        let prompt_len = terms.prompt_len as usize;
        let max_len = match max_tokens {
            None => self.requests.max_len[key] as usize,
            Some(most) => self.config.max_len().min(prompt_len.saturating_add(most)),
        };
        let len = self.requests.len[key] as usize;
        if max_len <= len && self.requests.max_len[key] as usize > len {
            return Err(SchedulerError::ForkTooShort { generated: len - prompt_len });
        }
        let terms = Terms { id: new_id, forks: Vec::new(), branch: 0, ..terms.clone() };
        self.begin_fork(key, terms, max_len as u32);
        Ok(())
    }

    /// Ends a request at once; false if there is none of this name.
    ///
    /// Its blocks are free when this returns, unless a step that writes them is in flight: then after its `update`.
    pub fn abort(&mut self, id: &str) -> bool {
        let Some(key) = self.names.remove(id).map(|key| key as usize) else { return false };
        self.counts.aborted += 1;
        self.flight.names_changed();
        let running = self.requests.phase[key] == Phase::Running;
        let terms = self.requests.terms_mut(key);
        if *terms.id != *id {
            terms.forks.retain(|(_, fork)| **fork != *id);
            self.kept_seats -= usize::from(running);
            return true;
        }
        if !terms.forks.is_empty() {
            // The prompt is computed for the others: one of them takes its place.
            (terms.branch, terms.id) = terms.forks.remove(0);
            self.kept_seats -= usize::from(running);
            return true;
        }
        self.waiting.remove(&self.config, &self.requests, key);
        if running {
            self.leave_running(key);
        }
        if self.requests.planned[key] > 0 {
            self.requests.phase[key] = Phase::Doomed;
        } else {
            self.forget(key);
        }
        true
    }

    /// Ends, as `abort` does, the requests whose deadline is at or before `now`; their names.
    pub fn expire(&mut self, now: f64) -> Vec<Arc<str>> {
        let mut late = Vec::new();
        for key in self.requests.keys() {
            let terms = self.requests.terms(key);
            if self.requests.phase[key] != Phase::Doomed && terms.deadline.is_some_and(|at| at <= now) {
                late.push(terms.id.clone());
                late.extend(terms.forks.iter().map(|(_, id)| id.clone()));
            }
        }
        for id in &late {
            self.abort(id);
        }
        self.counts.aborted -= late.len() as u64;
        self.counts.expired += late.len() as u64;
        late
    }

    /// Gives a request draft tokens, to be checked in the next step; they take the place of those it had.
    pub fn speculate(&mut self, id: &str, drafts: &[u32]) -> Result<(), SchedulerError> {
        let key = self.named(id)?;
        check_ids("draft_ids", drafts)?;
        if self.flight.is_in() {
            return Err(SchedulerError::SpeculateInFlight);
        }
        let most = self.config.num_speculative_tokens;
        if drafts.len() > most {
            return Err(SchedulerError::TooManyDrafts { most, got: drafts.len() });
        }
        self.set_drafts(key, drafts.iter().copied());
        Ok(())
    }

    /// Whether any request is there.
    pub fn has_unfinished(&self) -> bool {
        !self.names.is_empty()
    }

    /// A request's prompt and output so far.
    pub fn token_ids(&self, id: &str) -> Result<&[u32], SchedulerError> {
        Ok(self.requests.known(self.named(id)?))
    }

    /// A request's output so far.
    pub fn output_token_ids(&self, id: &str) -> Result<&[u32], SchedulerError> {
        let key = self.named(id)?;
        Ok(&self.requests.known(key)[self.requests.terms(key).prompt_len as usize..])
    }

    /// What happened to the prefix cache since the last call.
    pub fn take_events(&mut self) -> Vec<CacheEvent> {
        self.pool.index_mut().map_or(Vec::new(), PrefixIndex::take_events)
    }

    /// Forgets all cached blocks that no request uses; how many.
    pub fn clear_cache(&mut self) -> usize {
        self.pool.clear_idle()
    }

    /// Writes the prefix cache to a file, rows included; how many blocks. Each part is the memory of one cache; `model` says what the rows are of.
    pub fn snapshot(&self, path: &Path, model: &str, parts: &[Part<&[u8]>]) -> Result<usize, SnapshotError> {
        let sizes = (self.config.num_latent_blocks.unwrap_or(0), self.config.host_blocks());
        let tier = self.tier.as_ref().map(|tier| (sizes.0, sizes.1, &tier.residencies));
        snapshot::write(&self.pool, tier, path, model, parts)
    }

    /// Fills the empty prefix cache from a file, rows included; how many blocks. A file that is damaged or of something else is
    /// refused, and the cache stays empty.
    pub fn restore(
        &mut self,
        path: &Path,
        model: &str,
        parts: &mut [Part<&mut [u8]>],
    ) -> Result<usize, SnapshotError> {
        self.forget_freed();
        let sizes = (self.config.num_latent_blocks.unwrap_or(0), self.config.host_blocks());
        let tier = self.tier.as_mut().map(|tier| (sizes.0, sizes.1, &mut tier.residencies));
        snapshot::read(&mut self.pool, tier, path, model, parts)
    }

    pub(super) fn named(&self, id: &str) -> Result<usize, SchedulerError> {
        self.names.get(id).map(|&key| key as usize).ok_or_else(|| SchedulerError::UnknownId(id.into()))
    }

    /// What the policy says of a new request's place, by itself.
    fn rank_key(&self, new: &NewRequest) -> i128 {
        match self.config.policy {
            // All that wait age alike, so the order among them never changes.
            Policy::Priority => {
                i128::from(new.priority) * self.config.ageing_steps as i128 + i128::from(self.pool.clock)
            }
            Policy::Deadline => new.deadline.map_or(i128::MAX, ordered_bits),
            Policy::Fcfs | Policy::LongestPrefix | Policy::Fair => 0,
        }
    }

    /// Makes a request with the tokens of the one of `key`: it runs if that one does, with the same blocks.
    pub(super) fn begin_fork(&mut self, key: usize, terms: Terms, max_len: u32) -> usize {
        self.forks += 1;
        self.offer(key, self.requests.computed[key] as usize / self.config.block_size);
        let rank = Rank { fork: self.forks, ..self.requests.rank[key] };
        let tokens = self.requests.known(key).to_vec();
        self.tenants.enter_fork(terms.tenant);
        let id = terms.id.clone();
        let fork = self.requests.insert(rank, tokens, max_len, terms);
        self.requests.charged[fork] = self.requests.charged[key];
        self.names.insert(id, fork as u32);
        self.flight.names_changed();
        if self.requests.phase[key] == Phase::Running {
            self.requests.phase[fork] = Phase::Running;
            self.requests.computed[fork] = self.requests.computed[key];
            self.requests.offered[fork] = self.requests.offered[key];
            let blocks = self.config.blocks_for(self.requests.computed[key] as usize);
            self.requests.tables[fork] = self.pool.share(&self.requests.tables[key], blocks);
            self.enter_running(fork);
        } else {
            self.waiting.insert(&self.config, &self.requests, fork);
        }
        fork
    }

    pub(super) fn set_drafts(&mut self, key: usize, drafts: impl Iterator<Item = u32>) {
        self.requests.drop_drafts(key);
        // Drafts follow a token that waits for its row alone: behind a prompt's they would only be recomputed.
        let decodes = self.requests.computed[key] > 0 && self.requests.wanted(key) == 1;
        if decodes && self.requests.terms(key).forks.is_empty() {
            let most = self.requests.most_drafts(key, &self.config);
            self.requests.tokens[key].extend(drafts.take(most));
        }
    }

    /// Adds a key to those that run.
    pub(super) fn enter_running(&mut self, key: usize) {
        self.requests.reserve_table(key, &self.config);
        let place = self.place_in_running(key);
        self.running.insert(place, key as u32);
        self.kept_seats += self.requests.terms(key).forks.len();
    }

    /// Takes a key from those that run.
    pub(super) fn leave_running(&mut self, key: usize) {
        let place = self.place_in_running(key);
        debug_assert_eq!(self.running[place], key as u32);
        self.running.remove(place);
        self.kept_seats -= self.requests.terms(key).forks.len();
    }

    fn place_in_running(&self, key: usize) -> usize {
        let rank = self.requests.rank[key];
        self.running.partition_point(|&other| self.requests.rank[other as usize] < rank)
    }

    /// Gives all blocks of a request back; their rows stay for reuse, those of the last, partly filled one too.
    pub(super) fn release_blocks(&mut self, key: usize) {
        let computed = self.requests.computed[key] as usize;
        let (full, rest) = (computed / self.config.block_size, computed % self.config.block_size);
        self.offer(key, full);
        let table = &mut self.requests.tables[key];
        if rest > 0 && full < table.len() {
            let block = table.blocks()[full];
            if !self.pool.is_shared(block) && !self.pool.is_cached(block) {
                let tokens = &self.requests.tokens[key][computed - rest..computed];
                let namespace = self.requests.terms[key].as_ref().expect("it is live").namespace;
                self.pool.cache_block(table, full, namespace, tokens);
            }
        }
        let output = self.requests.len[key] - self.requests.terms(key).prompt_len;
        self.pool.release_after(&mut self.requests.tables[key], output as usize);
        self.requests.computed[key] = 0;
        self.requests.offered[key] = 0;
    }

    /// Ends a request's life: its blocks and its key are free.
    pub(super) fn forget(&mut self, key: usize) -> Terms {
        self.release_blocks(key);
        self.forget_kept(key);
        let terms = self.requests.remove(key);
        self.tenants.leave(terms.tenant);
        terms
    }
}

fn check_ids(name: &'static str, ids: &[u32]) -> Result<(), SchedulerError> {
    match ids.iter().find(|&&id| i32::try_from(id).is_err()) {
        Some(&id) => Err(SchedulerError::TokenId { name, id }),
        None => Ok(()),
    }
}

/// Integers in the order of the numbers, NaN aside.
fn ordered_bits(number: f64) -> i128 {
    let bits = (number + 0.0).to_bits() as i64; // -0 becomes 0
    i128::from(bits ^ ((bits >> 63) as u64 >> 1) as i64)
}
