//! `schedule`: which tokens of which requests run next, in which blocks.

use super::flight::SampleRow;
use super::request::Phase;
use super::waiting::reusable;
use super::{Policy, Scheduler, SchedulerError, Step};
use crate::cache::Found;

/// What is left of a step's limits.
#[derive(Clone, Copy, Debug)]
struct Budget {
    tokens: usize,
    cost: f64,
}

impl Scheduler {
    /// Plans the next step; `None` when no request is there.
    pub fn schedule(&mut self) -> Result<Option<Step>, SchedulerError> {
        let mut step = Step::default();
        Ok(self.schedule_into(&mut step)?.then_some(step))
    }

    /// The same, in the memory of a step that was used before; false when no request is there.
    ///
    /// Running requests go first, in the order of service. One that finds no block takes those of the last in the order, which
    /// then waits to be computed anew. Waiting requests follow while budget, `max_num_seqs` and blocks allow.
    pub fn schedule_into(&mut self, step: &mut Step) -> Result<bool, SchedulerError> {
        if self.flight.is_in() {
            return Err(SchedulerError::StepInFlight);
        }
        step.clear();
        self.flight.clear();
        self.pool.clock += 1;
        self.begin_moves(step);
        let mut budget = Budget {
            tokens: self.config.max_batched_tokens,
            cost: self.config.max_batched_cost.unwrap_or(f64::INFINITY),
        };
        let whole = self.plan_running(&mut budget, step);
        if whole && step.preempted.is_empty() {
            self.plan_waiting(&mut budget, step);
        }
        if self.flight.keys.is_empty() {
            return Ok(false);
        }
        self.fill(step);
        self.plan_pages(step);
        self.counts.steps += 1;
        self.counts.scheduled_tokens += step.num_tokens() as u64;
        self.flight.start();
        Ok(true)
    }

    /// Plans those that run; whether each got all that it wants.
    fn plan_running(&mut self, budget: &mut Budget, step: &mut Step) -> bool {
        let mut place = 0;
        while place < self.running.len() {
            let key = self.running[place] as usize;
            let Some(tokens) = self.allowed(key, budget) else { return false };
            if self.reserve(key, tokens, step) {
                self.take(key, tokens, budget);
                place += 1;
            } else if self.requests.tokens[key].len() > self.requests.len[key] as usize {
                self.requests.drop_drafts(key); // guesses push nobody out
            } else {
                // Requests before this one have their blocks; the last in the order gives way, and may be this one itself.
                let victim = *self.running.last().expect("this request runs") as usize;
                self.preempt(victim, step);
            }
        }
        true
    }

    /// Admits requests that wait. Those that run have blocks for every token they have, so no free block is promised to one.
    fn plan_waiting(&mut self, budget: &mut Budget, step: &mut Step) {
        let reserve = (self.config.watermark * self.pool.total() as f64).ceil() as usize;
        let mut found = std::mem::take(&mut self.found);
        while budget.tokens > 0
            && let Some(key) = self.next_waiting(&mut found)
        {
            let forks = self.requests.terms(key).forks.len();
            if self.running.len() + self.kept_seats + 1 + forks > self.config.max_num_seqs {
                break;
            }
            let known = self.requests.len[key] as usize;
            // A fork soon needs a block of its own. Alone, a request may take all there is.
            let kept = if self.running.is_empty() { 0 } else { reserve + forks };
            let whole = self.config.blocks_for(known) + kept;
            self.pool.find(self.requests.terms(key).namespace, reusable(&self.requests, key), &mut found);
            let left = self.pool.free() - found.idle;
            let part_idle = found.part.is_some_and(|(block, _)| self.pool.is_idle(block));
            let kept_rows = self.kept_rows(key);
            if kept_rows > found.full.len() * self.config.block_size
                || whole - found.full.len() + usize::from(part_idle) > left
            {
                found.part = None; // more is kept, or its block would be held for a step: do without
            }
            if whole - found.full.len() > left {
                break; // the first in the order is not passed by a smaller one behind it
            }
            let part_tokens = found.part.map_or(0, |(_, tokens)| tokens);
            let reused = found.full.len() * self.config.block_size + part_tokens;
            let begun = reused.max(kept_rows);
            self.requests.computed[key] = begun as u32;
            let Some(tokens) = self.allowed(key, budget) else {
                self.requests.computed[key] = 0;
                break;
            };
            self.waiting.admit(&self.config, &mut self.requests, &self.pool, key);
            self.requests.phase[key] = Phase::Running;
            self.enter_running(key);
            let table = &mut self.requests.tables[key];
            self.pool.acquire(&found.full, table);
            self.requests.offered[key] = found.full.len() as u32;
            if let Some((part, _)) = found.part {
                self.pool.acquire(&[part], &mut self.flight.held);
            }
            let grown = self.pool.grow(table, self.config.blocks_for(begun + tokens) - table.len());
            debug_assert!(grown, "free blocks were counted");
            if let Some((part, _)) = found.part {
                step.copies.push([part as i32, table.blocks()[found.full.len()] as i32]);
                self.flight.copied.push(key as u32);
            }
            if begun > reused {
                self.flight.swapped_in.push(key as u32);
                self.flight.copied.push(key as u32);
            } else {
                self.forget_kept(key);
            }
            self.charge(key, begun, known);
            self.take(key, tokens, budget);
            let terms = self.requests.terms_mut(key);
            (terms.reused, terms.restored) = (reused as u32, (begun - reused) as u32);
            self.counts.restored_tokens += (begun - reused) as u64;
            self.counts.queried_tokens += known as u64;
            self.counts.cached_tokens += reused as u64;
        }
        self.found = found;
    }

    fn next_waiting(&mut self, found: &mut Found) -> Option<usize> {
        self.waiting.first(&self.config, &mut self.requests, &self.tenants, &self.pool, found)
    }

    /// Tokens of a request that the budget allows; the first in a step gets one in any case. Drafts are cut first.
    fn allowed(&self, key: usize, budget: &Budget) -> Option<usize> {
        let most = self.requests.wanted(key).min(budget.tokens);
        let start = self.requests.computed[key] as usize;
        let tokens = if budget.cost == f64::INFINITY {
            most
        } else {
            self.config.affordable(start, most, budget.cost)
        };
        let least = usize::from(self.flight.keys.is_empty());
        Some(tokens.max(least.min(most))).filter(|&tokens| tokens > 0)
    }

    /// Blocks for a running request's next tokens: all of them, or none.
    fn reserve(&mut self, key: usize, tokens: usize, step: &mut Step) -> bool {
        let table = &mut self.requests.tables[key];
        let (start, size) = (self.requests.computed[key] as usize, self.config.block_size);
        let missing = (start + tokens).div_ceil(size) - table.len();
        let tail = start / size;
        let shared =
            tail < table.len() && self.pool.is_shared_beside(table.blocks()[tail], &self.flight.held);
        if missing + usize::from(shared) > self.pool.free() {
            return false;
        }
        if shared && let Some((theirs, own)) = self.pool.copy_on_write(table, tail, &mut self.flight.held) {
            step.copies.push([theirs as i32, own as i32]);
            self.flight.copied.push(key as u32);
            self.counts.copied_blocks += 1;
        }
        self.pool.grow(table, missing)
    }

    /// Puts a request's next tokens into the step.
    fn take(&mut self, key: usize, tokens: usize, budget: &mut Budget) {
        let start = self.requests.computed[key] as usize;
        self.requests.planned[key] = tokens as u32;
        self.flight.keys.push(key as u32);
        budget.tokens -= tokens;
        if budget.cost != f64::INFINITY {
            budget.cost = (budget.cost - self.config.cost(start, tokens)).max(0.0);
        }
        self.charge(key, start, start + tokens);
    }

    /// Charges a request's tenant for its tokens from `start` to `end`, for each place once: not again when a preemption has it computed
    /// anew.
    fn charge(&mut self, key: usize, start: usize, end: usize) {
        let start = start.max(self.requests.charged[key] as usize);
        if self.config.policy == Policy::Fair && end > start {
            self.requests.charged[key] = end as u32;
            self.tenants.charge(self.requests.terms(key).tenant, self.config.cost(start, end - start));
        }
    }

    /// Takes a running request's blocks and lets it wait.
    pub(super) fn preempt(&mut self, key: usize, step: &mut Step) {
        self.requests.drop_drafts(key);
        self.leave_running(key);
        let swapped = self.swap_out(key, step);
        self.release_blocks(key);
        self.requests.phase[key] = Phase::Waiting;
        self.waiting.insert(&self.config, &self.requests, key);
        self.counts.preemptions += 1;
        let terms = self.requests.terms_mut(key);
        terms.preemptions += 1;
        step.preempted.push(terms.id.clone());
        if swapped {
            terms.swaps += 1;
            step.swapped.push(terms.id.clone());
            self.counts.swaps += 1;
        }
    }

    /// Writes the plan out as flat arrays.
    fn fill(&mut self, step: &mut Step) {
        let size = self.config.block_size;
        step.request_ids = self.flight.names(&self.requests);
        let requests = &self.requests;
        let keys = &self.flight.keys;
        step.table_width = keys.iter().map(|&key| requests.tables[key as usize].len()).max().unwrap_or(0);
        step.query_start_loc.push(0);
        for (place, &key) in keys.iter().enumerate() {
            let key = key as usize;
            let start = requests.computed[key] as usize;
            let end = start + requests.planned[key] as usize;
            let blocks = requests.tables[key].blocks();
            step.request_keys.push(key as i32);
            let row_of = |position: usize| {
                let block = i64::from(blocks[position / size]);
                block * size as i64 + (position % size) as i64
            };
            if end - start == 1 {
                step.token_ids.push(requests.tokens[key][start] as i32);
                step.positions.push(start as i64);
                step.slot_mapping.push(row_of(start));
            } else {
                step.token_ids.extend(requests.tokens[key][start..end].iter().map(|&id| id as i32));
                step.positions.extend((start..end).map(|position| position as i64));
                step.slot_mapping.extend((start..end).map(row_of));
            }
            step.query_start_loc.push(step.token_ids.len() as i32);
            step.seq_lens.push(end as i32);
            step.block_tables.extend(blocks.iter().map(|&block| block as i32));
            step.block_tables.resize((place + 1) * step.table_width, -1);
            let known = requests.len[key] as usize;
            step.num_drafts.push(end.saturating_sub(known) as i32);
            if end < known {
                continue; // a part of its prompt
            }
            let terms = requests.terms(key);
            let mut sample = |row: usize, branch: u32| {
                step.sample_rows.push(row as i32);
                step.sample_request.push(place as i32);
                step.sample_branch.push(branch as i32);
                self.flight.rows.push(SampleRow { place: place as u32, branch });
            };
            let last = step.token_ids.len();
            for row in last - (end - known) - 1..last {
                sample(row, terms.branch);
            }
            for &(branch, _) in &terms.forks {
                sample(last - 1, branch);
            }
        }
    }
}
