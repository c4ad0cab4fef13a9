//! The reference: a toy model over a toy cache, and what any step must look like. To be read first.
//!
//! A cache row is a hash of the row before it, of its token and of its position, so of its whole prefix; the next token is a
//! function of the last row. The simulation computes rows from the arrays of a step alone, reading back through the block
//! tables as a model does. A row that is stale, another sequence's or never recomputed gives other rows and other tokens than
//! the request gives when it is served alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::scheduler::{
    FinishReason, NewRequest, Policy, Scheduler, SchedulerConfig, SchedulerError, Stats, Step,
};

pub const VOCAB: u32 = 29;

/// A token's cache row, from the row before it (0 at the start).
fn row(before: u64, token: u32, position: usize) -> u64 {
    let mut x = before ^ ((position as u64) << 32 | u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn next_token(last_row: u64) -> u32 {
    (last_row % u64::from(VOCAB)) as u32
}

/// All tokens of a request that is served alone, and why it ends.
pub fn alone(config: &SchedulerConfig, new: &NewRequest) -> (Vec<u32>, FinishReason) {
    let mut tokens = new.token_ids.clone();
    let mut last = 0;
    for position in 0.. {
        last = row(last, tokens[position], position);
        if position + 1 < tokens.len() {
            continue;
        }
        tokens.push(next_token(last));
        if new.stop_token_ids.contains(&next_token(last)) {
            return (tokens, FinishReason::Stop);
        }
        if tokens.len() >= (new.token_ids.len() + new.max_tokens).min(config.max_len()) {
            return (tokens, FinishReason::Length);
        }
    }
    unreachable!()
}

/// A live request as the simulation knows it.
struct Tracked {
    new: NewRequest,
    rank: (i64, u64),
    tokens: Vec<u32>,
    computed: usize,
}

/// A step that was scheduled and not updated.
struct Flight {
    /// Who runs: name and arrival, since a name may have been aborted and given anew.
    requests: Vec<(Arc<str>, u64)>,
    sample_request: Vec<usize>,
    sampled: Vec<i32>,
    lens: Vec<usize>,
}

/// A scheduler and the world around it; every call checks what came of it.
pub struct Simulation {
    pub scheduler: Scheduler,
    config: SchedulerConfig,
    cache: Vec<u64>,
    live: BTreeMap<Arc<str>, Tracked>,
    flight: Option<Flight>,
    arrivals: u64,
}

impl Simulation {
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()).unwrap(),
            cache: vec![0; config.capacity()],
            config,
            live: BTreeMap::new(),
            flight: None,
            arrivals: 0,
        }
    }

    /// Adds a request, which must be refused exactly when a limit says so.
    pub fn add(&mut self, new: NewRequest) {
        let before = self.scheduler.stats();
        let len = new.token_ids.len();
        let limit = self.config.max_model_len.unwrap_or(usize::MAX);
        let expected = if len >= limit {
            Err(SchedulerError::LongerThanModel { len, limit })
        } else if len > self.cache.len() {
            Err(SchedulerError::LargerThanPool { len, capacity: self.cache.len() })
        } else if self.live.contains_key(&new.id) {
            Err(SchedulerError::DuplicateId { name: "request_id", id: new.id.to_string() })
        } else if self.config.max_waiting.is_some_and(|most| before.waiting >= most) {
            Err(SchedulerError::QueueFull(before.waiting))
        } else {
            Ok(())
        };
        assert_eq!(self.scheduler.add(new.clone()), expected);
        if expected.is_ok() {
            let priority = if self.config.policy == Policy::Fcfs { 0 } else { new.priority };
            let tracked =
                Tracked { rank: (priority, self.arrivals), tokens: new.token_ids.clone(), computed: 0, new };
            self.arrivals += 1;
            self.live.insert(tracked.new.id.clone(), tracked);
        } else {
            let stats = self.scheduler.stats();
            assert_eq!(
                stats.refused_full + stats.refused_invalid,
                before.refused_full + before.refused_invalid + 1
            );
            let (refused_full, refused_invalid) = (before.refused_full, before.refused_invalid);
            let stats = Stats { refused_full, refused_invalid, ..stats };
            assert_eq!(stats, before, "a refused request changed something");
        }
        self.check();
    }

    pub fn abort(&mut self, id: &str) {
        assert_eq!(self.scheduler.abort(id), self.live.remove(id).is_some());
        self.check();
    }

    /// Plans a step and computes it; whether there was one.
    pub fn schedule(&mut self) -> bool {
        if self.flight.is_some() {
            assert_eq!(self.scheduler.schedule(), Err(SchedulerError::StepInFlight));
            return true;
        }
        let step = self.scheduler.schedule().unwrap();
        self.check_invariants();
        let Some(step) = step else {
            assert!(self.live.is_empty(), "nothing runs although requests are there");
            return false;
        };
        self.check_plan(&step);
        self.check_shapes(&step);
        self.compute(&step);
        self.flight = Some(Flight {
            requests: step.request_ids.iter().map(|id| (id.clone(), self.live[id].rank.1)).collect(),
            sample_request: step.sample_request.iter().map(|&place| place as usize).collect(),
            sampled: step
                .sample_rows
                .iter()
                .map(|&i| next_token(self.cache[step.slot_mapping[i as usize] as usize]) as i32)
                .collect(),
            lens: step.seq_lens.iter().map(|&len| len as usize).collect(),
        });
        self.check();
        true
    }

    /// Gives the sampled ids back; requests must end when and as they would alone.
    pub fn update(&mut self) {
        let Some(flight) = self.flight.take() else {
            assert_eq!(self.scheduler.update(&[], None), Err(SchedulerError::NoStep));
            return;
        };
        let mut expected = Vec::new();
        let mut sampled: Vec<Option<i32>> = vec![None; flight.requests.len()];
        for (&place, &id) in flight.sample_request.iter().zip(&flight.sampled) {
            sampled[place] = Some(id);
        }
        for (((id, arrival), sampled), len) in flight.requests.iter().zip(sampled).zip(&flight.lens) {
            let Some(tracked) = self.live.get_mut(id).filter(|tracked| tracked.rank.1 == *arrival) else {
                continue;
            };
            tracked.computed = *len;
            tracked.tokens.extend(sampled.map(|id| id as u32));
            let (tokens, reason) = alone(&self.config, &tracked.new);
            assert!(tokens.starts_with(&tracked.tokens), "{id} got another token than it gets alone");
            if tokens == tracked.tokens {
                expected.push((id.clone(), reason));
                self.live.remove(id);
            }
        }
        assert_eq!(self.scheduler.update(&flight.sampled, None), Ok(expected));
        self.check();
    }

    /// Updates that must be refused, and change nothing.
    pub fn update_wrongly(&mut self) {
        let before = self.scheduler.stats();
        let mut ids = self.flight.as_ref().map_or(Vec::new(), |flight| flight.sampled.clone());
        if let Some(first) = ids.first_mut() {
            *first = -1;
            assert!(self.scheduler.update(&ids, None).is_err());
        }
        ids.push(0);
        assert!(self.scheduler.update(&ids, None).is_err());
        assert_eq!(self.scheduler.stats(), before);
        self.check();
    }

    /// Serves all that is left, within a number of steps that no starved request would leave room for.
    pub fn drain(&mut self) {
        if self.flight.is_some() {
            self.update();
        }
        // The first in order among those that run is never preempted and gets a token or more in each step. Under fcfs it is the
        // first of all; by priority the first of all may have to wait until each of the others has ended.
        let total: usize = self.live.values().map(|r| alone(&self.config, &r.new).0.len()).sum();
        let mut left = if self.config.policy == Policy::Fcfs { total } else { total * self.live.len() };
        while self.schedule() {
            assert!(left > 0, "starvation");
            left -= 1;
            self.update();
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.used_blocks), (0, 0, 0));
    }

    /// Names of live requests, in the order of service.
    fn in_order(&self) -> Vec<&Tracked> {
        let mut order: Vec<_> = self.live.values().collect();
        order.sort_by_key(|tracked| tracked.rank);
        order
    }

    /// Who runs and how much of them; gives preempted requests their rows to compute again.
    fn check_plan(&mut self, step: &Step) {
        let budget = self.config.max_batched_tokens;
        assert!((1..=budget).contains(&step.token_ids.len()), "{} tokens", step.token_ids.len());
        let ran: Vec<Arc<str>> =
            self.in_order().iter().filter(|r| r.computed > 0).map(|r| r.new.id.clone()).collect();
        for (gone, id) in step.preempted.iter().enumerate() {
            assert_eq!(id, &ran[ran.len() - 1 - gone], "the last in the order gives way");
            assert!(!step.request_ids.contains(id), "a preempted request runs");
            self.live.get_mut(id).unwrap().computed = 0;
        }
        assert_eq!(step.preempted.iter().collect::<BTreeSet<_>>().len(), step.preempted.len());
        let runs: BTreeSet<_> = step.request_ids.iter().collect();
        assert_eq!(runs.len(), step.request_ids.len(), "a request runs twice");
        if let Some(first) = ran.first() {
            assert_eq!(first, &step.request_ids[0], "the first in the order is held up");
        }
        if self.config.policy == Policy::Fcfs {
            assert_eq!(step.request_ids[0], self.in_order()[0].new.id, "the oldest request is held up");
        }
        if step.token_ids.len() < budget {
            let left = &ran[..ran.len() - step.preempted.len()];
            assert!(left.iter().all(|id| runs.contains(id)), "budget is left and a running request idles");
        }
        // Those that ran go first, then newcomers; both in the order of service.
        let (old, new): (Vec<_>, Vec<_>) =
            step.request_ids.iter().map(|id| &self.live[id]).partition(|tracked| tracked.computed > 0);
        let order = |part: &[&Tracked]| part.iter().map(|tracked| tracked.rank).collect::<Vec<_>>();
        assert!(order(&old).is_sorted() && order(&new).is_sorted(), "not in the order of service");
        let expected: Vec<_> = old.iter().chain(&new).map(|tracked| tracked.new.id.clone()).collect();
        assert_eq!(*step.request_ids, expected);
        // No newcomer passes another one.
        let waiting: Vec<_> =
            self.in_order().into_iter().filter(|r| r.computed == 0).map(|r| r.rank).collect();
        assert!(waiting.starts_with(&order(&new)));
        assert!(new.is_empty() || step.preempted.is_empty(), "admitted while others give way");
    }

    /// The arrays against each other and against the requests' tokens.
    fn check_shapes(&self, step: &Step) {
        let (B, N, M) = (step.request_ids.len(), step.token_ids.len(), step.table_width);
        assert_eq!((step.positions.len(), step.slot_mapping.len()), (N, N));
        assert_eq!((step.query_start_loc.len(), step.seq_lens.len()), (B + 1, B));
        assert_eq!(step.block_tables.len(), B * M);
        assert_eq!((step.query_start_loc[0], step.query_start_loc[B]), (0, N as i32));
        let mut owned = BTreeSet::new();
        let mut samples = Vec::new();
        let mut widest = 0;
        for (place, id) in step.request_ids.iter().enumerate() {
            let tracked = &self.live[id];
            let rows = step.query_start_loc[place] as usize..step.query_start_loc[place + 1] as usize;
            let end = step.seq_lens[place] as usize;
            assert!(!rows.is_empty() && end <= tracked.tokens.len());
            assert_eq!(end, tracked.computed + rows.len(), "it goes on where it was");
            let whole = end == tracked.tokens.len();
            assert!(whole || place + 1 == B, "a request is cut although another one follows");
            if whole {
                samples.push((rows.end as i32 - 1, place as i32));
            } else {
                assert_eq!(N, self.config.max_batched_tokens, "a request is cut although budget is left");
            }
            let blocks = end.div_ceil(self.config.block_size);
            widest = widest.max(blocks);
            let table = &step.block_tables[place * M..(place + 1) * M];
            assert!(table[blocks..].iter().all(|&block| block == -1));
            for &block in &table[..blocks] {
                assert!((0..self.config.num_blocks as i32).contains(&block));
                assert!(owned.insert(block), "block {block} is in two places");
            }
            for (i, position) in rows.zip(tracked.computed..) {
                assert_eq!(step.token_ids[i], tracked.tokens[position] as i32);
                assert_eq!(step.positions[i], position as i64);
                assert_eq!(step.slot_mapping[i] as usize, self.slot(step, place, position));
            }
        }
        assert_eq!(M, widest);
        assert_eq!(
            step.sample_rows.iter().copied().zip(step.sample_request.iter().copied()).collect::<Vec<_>>(),
            samples
        );
    }

    /// Runs the toy model, from the step's arrays alone, then checks every row that it could read.
    fn compute(&mut self, step: &Step) {
        for place in 0..step.request_ids.len() {
            for i in step.query_start_loc[place] as usize..step.query_start_loc[place + 1] as usize {
                let position = step.positions[i] as usize;
                let before = if position == 0 { 0 } else { self.cache[self.slot(step, place, position - 1)] };
                self.cache[step.slot_mapping[i] as usize] = row(before, step.token_ids[i] as u32, position);
            }
        }
        for (place, id) in step.request_ids.iter().enumerate() {
            let mut expected = 0;
            for position in 0..step.seq_lens[place] as usize {
                expected = row(expected, self.live[id].tokens[position], position);
                let read = self.cache[self.slot(step, place, position)];
                assert_eq!(read, expected, "{id} reads a row at {position} that is not its own");
            }
        }
    }

    /// The slot of a position, through the block table.
    fn slot(&self, step: &Step, place: usize, position: usize) -> usize {
        let block = step.block_tables[place * step.table_width + position / self.config.block_size];
        block as usize * self.config.block_size + position % self.config.block_size
    }

    fn check_invariants(&self) {
        assert_eq!(self.scheduler.check_invariants(), Ok(()));
    }

    /// What can be seen from outside between two calls.
    fn check(&self) {
        self.check_invariants();
        let stats = self.scheduler.stats();
        assert_eq!(stats.running + stats.waiting, self.live.len());
        assert_eq!(self.scheduler.has_unfinished(), !self.live.is_empty());
        assert_eq!(stats.free_blocks + stats.used_blocks, stats.total_blocks);
        for (id, tracked) in &self.live {
            assert_eq!(self.scheduler.token_ids(id), Ok(&tracked.tokens[..]));
            assert_eq!(
                self.scheduler.output_token_ids(id),
                Ok(&tracked.tokens[tracked.new.token_ids.len()..])
            );
        }
        if self.flight.is_none() {
            let used: usize = self.live.values().map(|r| r.computed.div_ceil(self.config.block_size)).sum();
            assert_eq!(stats.used_blocks, used);
            assert_eq!(stats.running, self.live.values().filter(|r| r.computed > 0).count());
        }
    }
}
