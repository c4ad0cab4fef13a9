//! `update` and `abandon`: what came of a step.

use std::sync::Arc;

use super::request::{FinishReason, Phase};
use super::{Scheduler, SchedulerError};

/// Blocks that are made reusable in any step, if so many are full.
const LEAST_OFFERS: usize = 1;

/// A request that ended: its name and why.
pub type Finished = (Arc<str>, FinishReason);

impl Scheduler {
    /// Takes the ids sampled in the last step, one a sample row; returns the requests that ended, with their reasons.
    ///
    /// A draft is accepted when the row before it gave the same id; the first that is not ends its request's tokens of this step.
    /// `drafts` are those for the next step: [B, `most`] row by row, a negative one ends a row. Ids of requests aborted since
    /// `schedule` are dropped.
    pub fn update(
        &mut self,
        sampled: &[i32],
        drafts: Option<(&[i32], usize)>,
    ) -> Result<Vec<Finished>, SchedulerError> {
        if !self.flight.is_in() {
            return Err(SchedulerError::NoStep);
        }
        let expected = self.flight.rows.len();
        if sampled.len() != expected {
            return Err(SchedulerError::SampleCount { expected, got: sampled.len() });
        }
        if let Some(&id) = sampled.iter().find(|&&id| id < 0) {
            return Err(SchedulerError::SampledId(id));
        }
        if let Some((ids, width)) = drafts {
            let (rows, most) = (self.flight.keys.len(), self.config.num_speculative_tokens);
            if width > most || ids.len() != rows * width {
                return Err(SchedulerError::DraftShape {
                    rows,
                    most,
                    got: (ids.len() / width.max(1), width),
                });
            }
        }
        self.flight.land();
        if let Some(tier) = &mut self.tier {
            tier.residencies.land();
        }
        self.land_swaps();
        self.flight.new_tokens.clear();
        // Twice what the step's tokens fill on average, so that no backlog stays.
        let planned: usize =
            self.flight.keys.iter().map(|&key| self.requests.planned[key as usize] as usize).sum();
        self.flight.offers_left = 2 * self.config.blocks_for(planned) + LEAST_OFFERS;
        let mut finished = Vec::new();
        let mut row = 0;
        for place in 0..self.flight.keys.len() {
            let first = row;
            while self.flight.rows.get(row).is_some_and(|sample| sample.place as usize == place) {
                row += 1;
            }
            let key = self.flight.keys[place] as usize;
            let got = self.apply(key, &sampled[first..row], first, &mut finished);
            self.flight.new_tokens.push(got as i32);
            if let Some((ids, width)) = drafts.filter(|_| self.requests.phase[key] == Phase::Running) {
                let own = &ids[place * width..(place + 1) * width];
                self.set_drafts(key, own.iter().take_while(|&&id| id >= 0).map(|&id| id as u32));
            }
        }
        self.pool.release(&mut self.flight.held);
        Ok(finished)
    }

    /// Gives the last step up, as after an error: none of its tokens count as computed, and requests that began from a copy of
    /// another's rows begin anew.
    pub fn abandon(&mut self) -> Result<(), SchedulerError> {
        if !self.flight.is_in() {
            return Err(SchedulerError::NoStep);
        }
        self.flight.land();
        if let Some(tier) = &mut self.tier {
            tier.residencies.abandon();
            tier.hot_rows.clear();
        }
        self.abandon_swaps();
        for place in 0..self.flight.keys.len() {
            let key = self.flight.keys[place] as usize;
            let copied = self.flight.copied.contains(&(key as u32));
            self.requests.planned[key] = 0;
            if copied {
                // The rows of the last block are not there.
                let full = self.requests.offered[key] as usize;
                self.requests.computed[key] = (full * self.config.block_size) as u32;
            }
            if self.requests.phase[key] == Phase::Doomed {
                self.forget(key);
                continue;
            }
            self.requests.drop_drafts(key);
            let blocks = self.config.blocks_for(self.requests.computed[key] as usize);
            self.pool.truncate(&mut self.requests.tables[key], blocks);
        }
        self.pool.release(&mut self.flight.held);
        Ok(())
    }

    /// Tokens that each request of the last step got, in its order: 0 for a part of a prompt, more than 1 with accepted drafts.
    pub fn new_tokens(&self) -> &[i32] {
        &self.flight.new_tokens
    }

    /// Takes what one request got in the step, `first` being the first of its rows; how many tokens it has more.
    fn apply(&mut self, key: usize, sampled: &[i32], first: usize, finished: &mut Vec<Finished>) -> usize {
        let planned = std::mem::take(&mut self.requests.planned[key]);
        self.requests.computed[key] += planned;
        if self.requests.phase[key] == Phase::Doomed {
            // Drafts' rows may be wrong.
            self.requests.computed[key] = self.requests.computed[key].min(self.requests.len[key]);
            self.offer_blocks(key);
            self.forget(key);
            return 0;
        }
        let Some((&token, more)) = sampled.split_first() else {
            self.offer_blocks(key);
            return 0;
        };
        let drafted = (self.requests.computed[key] - self.requests.len[key]) as usize;
        if drafted > 0 {
            return self.verify(key, drafted, sampled, finished);
        }
        if !more.is_empty() || !self.requests.terms(key).forks.is_empty() {
            self.branch(key, sampled, first, finished);
            return 1;
        }
        self.requests.drop_drafts(key);
        let reason = self.requests.append(key, token as u32);
        self.settle(key, reason, finished);
        1
    }

    /// Compares the drafts with what the model gave in their places, and forgets those that differ.
    fn verify(&mut self, key: usize, drafted: usize, sampled: &[i32], finished: &mut Vec<Finished>) -> usize {
        let known = self.requests.len[key] as usize;
        let tokens = &self.requests.tokens[key];
        let accepted = tokens[known..known + drafted]
            .iter()
            .zip(sampled)
            .take_while(|&(&draft, &id)| draft == id as u32)
            .count();
        self.counts.drafted_tokens += drafted as u64;
        self.requests.drop_drafts(key);
        let mut reason = None;
        for &id in &sampled[..=accepted] {
            reason = self.requests.append(key, id as u32);
            if reason.is_some() {
                break;
            }
        }
        let got = self.requests.len[key] as usize - known;
        self.counts.accepted_tokens += (got - 1) as u64;
        self.requests.computed[key] = (known + got - 1) as u32;
        self.settle(key, reason, finished);
        got
    }

    /// Begins the completions of a prompt that was computed in this step.
    fn branch(&mut self, key: usize, sampled: &[i32], first: usize, finished: &mut Vec<Finished>) {
        self.offer_blocks(key);
        let forks = std::mem::take(&mut self.requests.terms_mut(key).forks);
        self.kept_seats -= forks.len();
        let token_of = |flight: &super::flight::Flight, branch: u32| {
            let row = flight.rows[first..first + sampled.len()].iter().position(|row| row.branch == branch);
            sampled[row.expect("each completion has a row")] as u32
        };
        for (branch, id) in forks {
            let token = token_of(&self.flight, branch);
            let terms = super::request::Terms { id, branch, ..self.requests.terms(key).clone() };
            let fork = self.begin_fork(key, terms, self.requests.max_len[key]);
            let reason = self.requests.append(fork, token);
            self.settle(fork, reason, finished);
        }
        let own = token_of(&self.flight, self.requests.terms(key).branch);
        let reason = self.requests.append(key, own);
        self.settle(key, reason, finished);
    }

    /// Offers the blocks that became full, gives back those behind the computed rows, and ends the request if there is a reason to.
    fn settle(&mut self, key: usize, reason: Option<FinishReason>, finished: &mut Vec<Finished>) {
        self.offer_blocks(key);
        if let Some(reason) = reason {
            self.leave_running(key);
            let terms = self.forget(key);
            self.names.remove(&terms.id);
            self.flight.names_changed();
            self.counts.finished += 1;
            finished.push((terms.id, reason));
            return;
        }
        let table = &mut self.requests.tables[key];
        let computed = self.requests.computed[key] as usize;
        if table.len() * self.config.block_size >= computed + self.config.block_size {
            self.pool.truncate(table, self.config.blocks_for(computed));
        }
    }

    /// Makes blocks that became full reusable, as many as this step's share allows: when those of all requests fill in the same step,
    /// it takes no longer than others. The rest follows in the next steps, or when the request gives its blocks back.
    #[inline]
    fn offer_blocks(&mut self, key: usize) {
        let size = self.config.block_size;
        let full = self.requests.computed[key] as usize / size;
        let offered = self.requests.offered[key] as usize;
        if offered < full {
            let count = (full - offered).min(self.flight.offers_left);
            self.flight.offers_left -= count;
            self.offer(key, offered + count);
        }
    }

    /// Makes the first `full` blocks of a request reusable.
    pub(super) fn offer(&mut self, key: usize, full: usize) {
        let size = self.config.block_size;
        for place in self.requests.offered[key] as usize..full {
            let tokens = &self.requests.tokens[key][place * size..(place + 1) * size];
            let namespace = self.requests.terms[key].as_ref().expect("it is live").namespace;
            self.pool.cache_block(&mut self.requests.tables[key], place, namespace, tokens);
        }
        self.requests.offered[key] = full as u32;
    }
}
