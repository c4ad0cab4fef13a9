//! Why a request is where it is.

use std::sync::Arc;

use super::request::Phase;
use super::waiting::reusable;
use super::{Scheduler, SchedulerError};
use crate::cache::{Found, Residency};

/// What keeps a request from running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// It runs in the next step, as far as the step's budget reaches.
    Nothing,
    /// Others go before it.
    Order,
    /// `max_num_seqs` requests run.
    Seats,
    /// Too few blocks can be had.
    Blocks,
    /// Its prompt is computed as part of the request it is forked from.
    Origin,
}

impl WaitReason {
    /// A word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Order => "order",
            Self::Seats => "seats",
            Self::Blocks => "blocks",
            Self::Origin => "origin",
        }
    }
}

/// A request's account.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Whether it holds blocks.
    pub running: bool,
    /// What it waits for, if it does.
    pub waits_for: WaitReason,
    /// Requests that wait and go before it, under the policies whose order is fixed.
    pub ahead: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub output_tokens: usize,
    /// Tokens whose rows are computed or were reused.
    pub computed_tokens: usize,
    /// Tokens whose rows it found in the cache when it last began to run.
    pub reused_tokens: usize,
    /// Tokens behind those whose rows had been kept for it over a preemption.
    pub restored_tokens: usize,
    /// While it waits: tokens whose rows are kept for it in the host tier.
    pub kept_tokens: usize,
    /// Latent rows fetched from the host tier for its steps so far. A row of a block that several requests of a step use counts for
    /// one of them.
    pub fetched_rows: u64,
    /// While it waits: tokens whose rows are in the cache now.
    pub cached_tokens: usize,
    /// Blocks it uses.
    pub blocks: usize,
    /// How many of these others use too.
    pub shared_blocks: usize,
    /// How many have their latent rows in the host tier alone.
    pub host_blocks: usize,
    /// Blocks it still needs to begin.
    pub missing_blocks: usize,
    /// Blocks that can be had, less those that are kept free for those that run.
    pub available_blocks: usize,
    /// Draft tokens that wait to be checked.
    pub draft_tokens: usize,
    /// Times that it gave its blocks away.
    pub preemptions: u32,
    /// How many of these its rows were kept over.
    pub swaps: u32,
    /// Steps since it came.
    pub age_steps: u64,
    /// Who asked.
    pub tenant: Arc<str>,
    /// The tenant's cost over its weight so far.
    pub tenant_counter: f64,
    /// When it is ended.
    pub deadline: Option<f64>,
}

impl Scheduler {
    /// Why a request waits, what it reused and what it holds.
    pub fn explain(&self, id: &str) -> Result<Explanation, SchedulerError> {
        let key = self.named(id)?;
        let (requests, terms) = (&self.requests, self.requests.terms(key));
        let running = requests.phase[key] == Phase::Running;
        let table = requests.tables[key].blocks();
        let mut found = Found::default();
        let mut missing = 0;
        let reserve = if self.running.is_empty() {
            0
        } else {
            (self.config.watermark * self.pool.total() as f64).ceil() as usize + terms.forks.len()
        };
        let mut available = self.pool.free().saturating_sub(reserve);
        let ahead = self.waiting.keys().filter(|&other| requests.rank[other] < requests.rank[key]).count();
        let mut waits_for = WaitReason::Nothing;
        if !running {
            self.pool.find(terms.namespace, reusable(requests, key), &mut found);
            missing = self.config.blocks_for(requests.len[key] as usize) - found.full.len();
            available = available.saturating_sub(found.idle);
            if ahead > 0 {
                waits_for = WaitReason::Order;
            } else if self.running.len() + self.kept_seats + 1 + terms.forks.len() > self.config.max_num_seqs
            {
                waits_for = WaitReason::Seats;
            } else if missing > available {
                waits_for = WaitReason::Blocks;
            }
        }
        if *terms.id != *id {
            waits_for = WaitReason::Origin;
        }
        Ok(Explanation {
            running,
            waits_for,
            ahead: if running { 0 } else { ahead },
            prompt_tokens: terms.prompt_len as usize,
            output_tokens: (requests.len[key] - terms.prompt_len) as usize,
            computed_tokens: requests.computed[key] as usize,
            reused_tokens: terms.reused as usize,
            restored_tokens: terms.restored as usize,
            kept_tokens: if running { 0 } else { self.kept_rows(key) },
            fetched_rows: requests.fetched[key],
            cached_tokens: found.full.len() * self.config.block_size
                + found.part.map_or(0, |(_, tokens)| tokens),
            blocks: table.len(),
            shared_blocks: table.iter().filter(|&&block| self.pool.is_shared(block)).count(),
            host_blocks: self.tier.as_ref().map_or(0, |tier| {
                table.iter().filter(|&&block| tier.residencies.of(block) == Residency::Host).count()
            }),
            missing_blocks: missing,
            available_blocks: available,
            draft_tokens: requests.tokens[key].len() - requests.len[key] as usize,
            preemptions: terms.preemptions,
            swaps: terms.swaps,
            age_steps: self.pool.clock - terms.since,
            tenant: self.tenants.name(terms.tenant).clone(),
            tenant_counter: self.tenants.counter(terms.tenant),
            deadline: terms.deadline,
        })
    }
}
