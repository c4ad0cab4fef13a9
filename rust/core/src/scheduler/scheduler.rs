//! The scheduler: `schedule` plans a step, `update` takes what was sampled in it.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use super::request::{FinishReason, NewRequest, Rank, Request};
use super::{Policy, SchedulerConfig, SchedulerError, Step};
use crate::cache::{BlockPool, BlockTable};

/// Counts of a scheduler's state and past.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that hold blocks.
    pub running: usize,
    /// Requests that hold none.
    pub waiting: usize,
    /// Blocks in the pool.
    pub total_blocks: usize,
    /// Blocks nobody holds.
    pub free_blocks: usize,
    /// Blocks in use.
    pub used_blocks: usize,
    /// The most blocks in use at the same time so far.
    pub peak_used_blocks: usize,
    /// Steps planned so far.
    pub steps: u64,
    /// Tokens planned so far.
    pub scheduled_tokens: u64,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Requests that ended by themselves so far.
    pub finished: u64,
    /// Requests aborted so far.
    pub aborted: u64,
}

/// A request's place in the step in flight.
#[derive(Clone, Copy, Debug)]
struct Planned {
    key: usize,
    tokens: usize,
    sampled: bool,
}

/// Continuous batching over a pool of blocks.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    /// Live requests by key; keys are reused.
    requests: Vec<Option<Request>>,
    free_keys: Vec<usize>,
    keys: HashMap<String, usize>,
    /// Both queues by rank: a preempted request keeps its rank, so it is first again among those that wait.
    running: BTreeMap<Rank, usize>,
    waiting: BTreeMap<Rank, usize>,
    arrivals: u64,
    in_flight: Option<Vec<Planned>>,
    counts: Stats,
}

impl Scheduler {
    /// A scheduler with every block free.
    pub fn new(config: SchedulerConfig) -> Result<Self, SchedulerError> {
        config.check()?;
        Ok(Self {
            pool: BlockPool::new(config.num_blocks as u32),
            config,
            requests: Vec::new(),
            free_keys: Vec::new(),
            keys: HashMap::new(),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            arrivals: 0,
            in_flight: None,
            counts: Stats::default(),
        })
    }

    /// The limits it was made with.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Queues a request.
    pub fn add(&mut self, new: NewRequest) -> Result<(), SchedulerError> {
        let len = new.token_ids.len();
        if len == 0 {
            return Err(SchedulerError::EmptyPrompt);
        }
        if let Some(&id) = new.token_ids.iter().find(|&&id| i32::try_from(id).is_err()) {
            return Err(SchedulerError::TokenId(id));
        }
        if new.max_tokens == 0 {
            return Err(SchedulerError::NoTokensWanted);
        }
        if let Some(limit) = self.config.max_model_len.filter(|&limit| len >= limit) {
            return Err(SchedulerError::LongerThanModel { len, limit });
        }
        let capacity = self.config.capacity();
        if len > capacity {
            return Err(SchedulerError::LargerThanPool { len, capacity });
        }
        if self.keys.contains_key(&new.id) {
            return Err(SchedulerError::DuplicateId(new.id));
        }
        if self.config.max_waiting.is_some_and(|most| self.waiting.len() >= most) {
            return Err(SchedulerError::QueueFull(self.waiting.len()));
        }
        let priority = match self.config.policy {
            Policy::Fcfs => 0,
            Policy::Priority => new.priority,
        };
        let rank = (priority, self.arrivals);
        self.arrivals += 1;
        let request = Request {
            id: new.id.clone(),
            rank,
            tokens: new.token_ids,
            prompt_len: len,
            max_len: self.config.max_len().min(len.saturating_add(new.max_tokens)),
            stop_token_ids: new.stop_token_ids,
            computed: 0,
            table: BlockTable::default(),
            aborted: false,
        };
        let key = match self.free_keys.pop() {
            Some(key) => {
                self.requests[key] = Some(request);
                key
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() - 1
            }
        };
        self.keys.insert(new.id, key);
        self.waiting.insert(rank, key);
        Ok(())
    }

    /// Plans the next step; `None` when no request is there.
    ///
    /// Running requests go first, in the order of service. One that finds no block takes those of the last in the order, which
    /// then waits to be computed anew. Waiting requests follow while budget, `max_num_seqs` and blocks allow.
    pub fn schedule(&mut self) -> Result<Option<Step>, SchedulerError> {
        if self.in_flight.is_some() {
            return Err(SchedulerError::StepInFlight);
        }
        let mut step = Step::default();
        let mut planned = Vec::with_capacity(self.running.len() + 1);
        let mut budget = self.config.max_batched_tokens;
        self.plan_running(&mut budget, &mut planned, &mut step.preempted);
        if step.preempted.is_empty() {
            self.plan_waiting(&mut budget, &mut planned);
        }
        if planned.is_empty() {
            return Ok(None);
        }
        self.fill(&mut step, &planned);
        self.counts.steps += 1;
        self.counts.scheduled_tokens += step.token_ids.len() as u64;
        self.in_flight = Some(planned);
        Ok(Some(step))
    }

    /// Takes the ids sampled in the last step, one a sample row; returns the requests that ended, with their reasons.
    ///
    /// Ids of requests aborted since `schedule` are dropped.
    pub fn update(&mut self, sampled: &[i32]) -> Result<Vec<(String, FinishReason)>, SchedulerError> {
        let planned = self.in_flight.as_ref().ok_or(SchedulerError::NoStep)?;
        let expected = planned.iter().filter(|plan| plan.sampled).count();
        if sampled.len() != expected {
            return Err(SchedulerError::SampleCount { expected, got: sampled.len() });
        }
        if let Some(&id) = sampled.iter().find(|&&id| id < 0) {
            return Err(SchedulerError::SampledId(id));
        }
        let planned = self.in_flight.take().unwrap_or_default();
        let mut sampled = sampled.iter();
        let mut finished = Vec::new();
        for plan in planned {
            let request = live(&mut self.requests, plan.key);
            request.computed += plan.tokens;
            let token = if plan.sampled { sampled.next() } else { None };
            if request.aborted {
                self.forget(plan.key);
            } else if let Some(reason) = token.and_then(|&token| request.append(token as u32)) {
                let rank = request.rank;
                let request = self.forget(plan.key);
                self.running.remove(&rank);
                self.keys.remove(&request.id);
                self.counts.finished += 1;
                finished.push((request.id, reason));
            }
        }
        Ok(finished)
    }

    /// Ends a request at once; false if there is none of this name.
    ///
    /// Its blocks are free when this returns, unless a step that writes them is in flight: then after its `update`.
    pub fn abort(&mut self, id: &str) -> bool {
        let Some(key) = self.keys.remove(id) else { return false };
        let request = live(&mut self.requests, key);
        let rank = request.rank;
        self.counts.aborted += 1;
        self.waiting.remove(&rank);
        self.running.remove(&rank);
        if self.in_flight.iter().flatten().any(|plan| plan.key == key) {
            live(&mut self.requests, key).aborted = true;
        } else {
            self.forget(key);
        }
        true
    }

    /// Whether any request is there.
    pub fn has_unfinished(&self) -> bool {
        !self.keys.is_empty()
    }

    /// A request's prompt and output so far.
    pub fn token_ids(&self, id: &str) -> Result<&[u32], SchedulerError> {
        self.request(id).map(|request| &request.tokens[..])
    }

    /// A request's output so far.
    pub fn output_token_ids(&self, id: &str) -> Result<&[u32], SchedulerError> {
        self.request(id).map(|request| &request.tokens[request.prompt_len..])
    }

    /// Counts of state and past.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            total_blocks: self.pool.total(),
            free_blocks: self.pool.free(),
            used_blocks: self.pool.total() - self.pool.free(),
            peak_used_blocks: self.pool.peak_used(),
            ..self.counts
        }
    }

    /// Checks everything that must hold between any two calls.
    pub fn check_invariants(&self) -> Result<(), SchedulerError> {
        self.find_broken().map_err(SchedulerError::Invariant)
    }

    fn request(&self, id: &str) -> Result<&Request, SchedulerError> {
        let key = self.keys.get(id).ok_or_else(|| SchedulerError::UnknownId(id.into()))?;
        Ok(self.requests[*key].as_ref().expect("a named request is live"))
    }

    fn plan_running(&mut self, budget: &mut usize, planned: &mut Vec<Planned>, preempted: &mut Vec<String>) {
        let mut behind = Bound::Unbounded;
        while let Some((&rank, &key)) = self.running.range((behind, Bound::Unbounded)).next() {
            if *budget == 0 {
                return;
            }
            let request = live(&mut self.requests, key);
            let tokens = request.wanted().min(*budget);
            let missing = self.config.blocks_for(request.computed + tokens) - request.table.len();
            if self.pool.grow(&mut request.table, missing) {
                *budget -= tokens;
                planned.push(Planned { key, tokens, sampled: tokens == request.wanted() });
                behind = Bound::Excluded(rank);
                continue;
            }
            // Requests before this one have their blocks; the last in the order gives way, and may be this one itself.
            let (_, victim) = self.running.pop_last().expect("this request runs");
            preempted.push(self.preempt(victim));
            if victim == key {
                return;
            }
        }
    }

    fn plan_waiting(&mut self, budget: &mut usize, planned: &mut Vec<Planned>) {
        // Blocks that running requests still need for tokens they have, which a newcomer must not take.
        let mut promised: usize = 0;
        for &key in self.running.values() {
            let request = live(&mut self.requests, key);
            promised += self.config.blocks_for(request.tokens.len()).saturating_sub(request.table.len());
        }
        let reserve = (self.config.watermark * self.pool.total() as f64).ceil() as usize;
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some((&rank, &key)) = self.waiting.first_key_value() else { return };
            let request = live(&mut self.requests, key);
            let whole = self.config.blocks_for(request.tokens.len());
            let kept = if self.running.is_empty() { 0 } else { promised + reserve };
            if whole + kept > self.pool.free() {
                return; // the first in the order is not passed by a smaller one behind it
            }
            let tokens = request.wanted().min(*budget);
            let now = self.config.blocks_for(tokens);
            let grown = self.pool.grow(&mut request.table, now);
            debug_assert!(grown, "free blocks were counted");
            promised += whole - now;
            *budget -= tokens;
            planned.push(Planned { key, tokens, sampled: tokens == request.wanted() });
            self.waiting.pop_first();
            self.running.insert(rank, key);
        }
    }

    /// Writes the plan out as flat arrays.
    fn fill(&self, step: &mut Step, planned: &[Planned]) {
        let total = planned.iter().map(|plan| plan.tokens).sum();
        step.token_ids.reserve_exact(total);
        step.positions.reserve_exact(total);
        step.slot_mapping.reserve_exact(total);
        step.query_start_loc.push(0);
        step.table_width = planned.iter().map(|plan| self.planned(plan).table.len()).max().unwrap_or(0);
        let block_size = self.config.block_size;
        for (place, plan) in planned.iter().enumerate() {
            let request = self.planned(plan);
            let range = request.computed..request.computed + plan.tokens;
            let blocks = request.table.blocks();
            step.request_ids.push(request.id.clone());
            step.token_ids.extend(request.tokens[range.clone()].iter().map(|&id| id as i32));
            step.positions.extend(range.clone().map(|position| position as i64));
            step.slot_mapping.extend(range.clone().map(|position| {
                let block = i64::from(blocks[position / block_size]);
                block * block_size as i64 + (position % block_size) as i64
            }));
            step.query_start_loc.push(step.token_ids.len() as i32);
            step.seq_lens.push(range.end as i32);
            step.block_tables.extend(blocks.iter().map(|&block| block as i32));
            step.block_tables.resize((place + 1) * step.table_width, -1);
            if plan.sampled {
                step.sample_rows.push(step.token_ids.len() as i32 - 1);
                step.sample_request.push(place as i32);
            }
        }
    }

    fn planned(&self, plan: &Planned) -> &Request {
        self.requests[plan.key].as_ref().expect("a planned request is live")
    }

    /// Takes a running request's blocks and lets it wait; its name.
    fn preempt(&mut self, key: usize) -> String {
        let request = live(&mut self.requests, key);
        self.pool.release(&mut request.table);
        request.computed = 0;
        self.waiting.insert(request.rank, key);
        self.counts.preemptions += 1;
        request.id.clone()
    }

    /// Ends a request's life: its blocks and its key are free.
    fn forget(&mut self, key: usize) -> Request {
        let mut request = self.requests[key].take().expect("a request is forgotten once");
        self.pool.release(&mut request.table);
        self.free_keys.push(key);
        request
    }

    fn find_broken(&self) -> Result<(), String> {
        let live =
            || self.requests.iter().enumerate().filter_map(|(key, slot)| slot.as_ref().map(|r| (key, r)));
        self.pool.check(live().map(|(_, request)| &request.table))?;
        let flights: HashMap<usize, usize> =
            self.in_flight.iter().flatten().map(|plan| (plan.key, plan.tokens)).collect();
        let ensure = |holds: bool, what: &str, of: &str| {
            if holds { Ok(()) } else { Err(format!("{what}: {of:?}")) }
        };
        for (key, request) in live() {
            let id = &request.id;
            let flight = flights.get(&key).copied();
            let runs = self.running.get(&request.rank) == Some(&key);
            let waits = self.waiting.get(&request.rank) == Some(&key);
            if request.aborted {
                ensure(flight.is_some() && !runs && !waits, "an aborted request lives on", id)?;
                continue;
            }
            ensure(runs != waits, "a request is in both queues or in none", id)?;
            ensure(self.keys.get(id) == Some(&key), "a request's name is lost", id)?;
            ensure(request.computed < request.tokens.len(), "a request has nothing to compute", id)?;
            ensure(
                request.tokens.len() <= request.max_len.max(request.prompt_len),
                "a request is too long",
                id,
            )?;
            ensure(
                !waits || (request.computed == 0 && request.table.is_empty()),
                "a waiting request has blocks",
                id,
            )?;
            ensure(
                waits || request.computed > 0 || flight.is_some(),
                "a running request computed nothing",
                id,
            )?;
            let held = request.computed + flight.unwrap_or(0);
            ensure(held <= request.tokens.len(), "more is computed than there is", id)?;
            ensure(request.table.len() == self.config.blocks_for(held), "a table has another length", id)?;
        }
        let count = live().filter(|(_, request)| !request.aborted).count();
        ensure(count == self.keys.len(), "names and requests differ in number", "")?;
        ensure(count == self.running.len() + self.waiting.len(), "queues and requests differ in number", "")?;
        ensure(self.running.len() <= self.config.max_num_seqs, "more requests run than max_num_seqs", "")?;
        let dead = self.requests.iter().filter(|slot| slot.is_none()).count();
        ensure(dead == self.free_keys.len(), "free keys and empty slots differ in number", "")
    }
}

/// The request of a key that is known to be live. Not a method, so that other fields stay borrowable.
fn live(requests: &mut [Option<Request>], key: usize) -> &mut Request {
    requests[key].as_mut().expect("keys in queues and plans are live")
}
