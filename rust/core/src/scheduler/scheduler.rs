//! The scheduler: `schedule` plans a step, `update` takes what was sampled in it.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

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

/// Continuous batching over a pool of blocks.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) pool: BlockPool,
    /// Live requests by key; keys are reused.
    pub(super) requests: Vec<Option<Request>>,
    pub(super) free_keys: Vec<usize>,
    pub(super) keys: HashMap<Arc<str>, usize>,
    /// Both queues by rank: a preempted request keeps its rank, so it is first again among those that wait.
    pub(super) running: BTreeMap<Rank, usize>,
    pub(super) waiting: BTreeMap<Rank, usize>,
    arrivals: u64,
    /// Keys of the requests in the step in flight, in its order.
    pub(super) in_flight: Option<Vec<usize>>,
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

    /// Whether a prompt of this many tokens can be served; to be asked before a long one is copied.
    pub fn check_prompt_len(&self, len: usize) -> Result<(), SchedulerError> {
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
        let len = new.token_ids.len();
        self.check_prompt_len(len)?;
        for (name, ids) in [("token_ids", &new.token_ids), ("stop_token_ids", &new.stop_token_ids)] {
            if let Some(&id) = ids.iter().find(|&&id| i32::try_from(id).is_err()) {
                return Err(SchedulerError::TokenId { name, id });
            }
        }
        if new.max_tokens == 0 {
            return Err(SchedulerError::NoTokensWanted);
        }
        if self.keys.contains_key(&new.id) {
            return Err(SchedulerError::DuplicateId(new.id.to_string()));
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
            planned: 0,
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
        let mut keys = Vec::with_capacity(self.running.len() + 1);
        let mut budget = self.config.max_batched_tokens;
        self.plan_running(&mut budget, &mut keys, &mut step.preempted);
        if step.preempted.is_empty() {
            self.plan_waiting(&mut budget, &mut keys);
        }
        if keys.is_empty() {
            return Ok(None);
        }
        self.fill(&mut step, &keys);
        self.counts.steps += 1;
        self.counts.scheduled_tokens += step.token_ids.len() as u64;
        self.in_flight = Some(keys);
        Ok(Some(step))
    }

    /// Takes the ids sampled in the last step, one a sample row; returns the requests that ended, with their reasons.
    ///
    /// Ids of requests aborted since `schedule` are dropped.
    pub fn update(&mut self, sampled: &[i32]) -> Result<Vec<(Arc<str>, FinishReason)>, SchedulerError> {
        let step = self.in_flight.as_ref().ok_or(SchedulerError::NoStep)?;
        let expected = step.iter().filter(|&&key| self.request(key).is_sampled()).count();
        if sampled.len() != expected {
            return Err(SchedulerError::SampleCount { expected, got: sampled.len() });
        }
        if let Some(&id) = sampled.iter().find(|&&id| id < 0) {
            return Err(SchedulerError::SampledId(id));
        }
        let mut sampled = sampled.iter();
        let mut finished = Vec::new();
        for key in self.in_flight.take().unwrap_or_default() {
            let request = live(&mut self.requests, key);
            let token = if request.is_sampled() { sampled.next() } else { None };
            request.computed += std::mem::take(&mut request.planned);
            if request.aborted {
                self.forget(key);
            } else if let Some(reason) = token.and_then(|&token| request.append(token as u32)) {
                let request = self.forget(key);
                self.running.remove(&request.rank);
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
        self.counts.aborted += 1;
        let request = live(&mut self.requests, key);
        self.waiting.remove(&request.rank);
        self.running.remove(&request.rank);
        if request.planned > 0 {
            request.aborted = true;
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
        self.named(id).map(|request| &request.tokens[..])
    }

    /// A request's output so far.
    pub fn output_token_ids(&self, id: &str) -> Result<&[u32], SchedulerError> {
        self.named(id).map(|request| &request.tokens[request.prompt_len..])
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

    fn named(&self, id: &str) -> Result<&Request, SchedulerError> {
        self.keys.get(id).map(|&key| self.request(key)).ok_or_else(|| SchedulerError::UnknownId(id.into()))
    }

    fn request(&self, key: usize) -> &Request {
        self.requests[key].as_ref().expect("keys in queues and steps are live")
    }

    fn plan_running(&mut self, budget: &mut usize, keys: &mut Vec<usize>, preempted: &mut Vec<Arc<str>>) {
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
                request.planned = tokens;
                keys.push(key);
                behind = Bound::Excluded(rank);
                continue;
            }
            // Requests before this one have their blocks; the last in the order gives way, and may be this one itself.
            let (_, victim) = self.running.pop_last().expect("this request runs");
            preempted.push(self.preempt(victim));
        }
    }

    fn plan_waiting(&mut self, budget: &mut usize, keys: &mut Vec<usize>) {
        // Budget is left only when all that run have blocks for every token they have, so no free block is promised to one.
        let reserve = (self.config.watermark * self.pool.total() as f64).ceil() as usize;
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some((&rank, &key)) = self.waiting.first_key_value() else { return };
            let request = live(&mut self.requests, key);
            let whole = self.config.blocks_for(request.tokens.len());
            let kept = if self.running.is_empty() { 0 } else { reserve };
            if whole + kept > self.pool.free() {
                return; // the first in the order is not passed by a smaller one behind it
            }
            let tokens = request.wanted().min(*budget);
            let grown = self.pool.grow(&mut request.table, self.config.blocks_for(tokens));
            debug_assert!(grown, "free blocks were counted");
            *budget -= tokens;
            request.planned = tokens;
            keys.push(key);
            self.waiting.pop_first();
            self.running.insert(rank, key);
        }
    }

    /// Writes the plan out as flat arrays.
    fn fill(&self, step: &mut Step, keys: &[usize]) {
        let block_size = self.config.block_size;
        let total = keys.iter().map(|&key| self.request(key).planned).sum();
        step.table_width = keys.iter().map(|&key| self.request(key).table.len()).max().unwrap_or(0);
        step.request_ids.reserve_exact(keys.len());
        step.token_ids.reserve_exact(total);
        step.positions.reserve_exact(total);
        step.slot_mapping.reserve_exact(total);
        step.query_start_loc.reserve_exact(keys.len() + 1);
        step.seq_lens.reserve_exact(keys.len());
        step.block_tables.reserve_exact(keys.len() * step.table_width);
        step.query_start_loc.push(0);
        for (place, &key) in keys.iter().enumerate() {
            let request = self.request(key);
            let range = request.computed..request.computed + request.planned;
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
            if request.is_sampled() {
                step.sample_rows.push(step.token_ids.len() as i32 - 1);
                step.sample_request.push(place as i32);
            }
        }
    }

    /// Takes a running request's blocks and lets it wait; its name.
    fn preempt(&mut self, key: usize) -> Arc<str> {
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
}

/// The request of a key that is known to be live. Not a method, so that other fields stay borrowable.
fn live(requests: &mut [Option<Request>], key: usize) -> &mut Request {
    requests[key].as_mut().expect("keys in queues and plans are live")
}
