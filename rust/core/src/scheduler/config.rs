//! The scheduler's limits.

use super::SchedulerError;
use crate::cache::eviction::EvictionPolicy;

/// Block numbers and lengths leave as int32.
const MOST: usize = i32::MAX as usize;

/// Which request goes first. None lets a request wait for ever: each says who may pass it, and the first in order gets a token in each
/// step and as many blocks as it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In the order of arrival: nobody passes.
    Fcfs,
    /// By priority, the lower number first; by arrival among equals. Each `ageing_steps` of waiting make up for one unit, so one that is n
    /// units before another passes it if it comes no later than n times so many steps. Who runs is not pushed out by who waits.
    Priority,
    /// Who shares the longest cached prefix; who has waited for `ageing_steps` goes before that, in the order of arrival.
    LongestPrefix,
    /// Of the tenant that got the least for its weight; in the order of arrival within a tenant. Another tenant passes with what makes
    /// its counter the larger one: a prompt, and the answers of what it has running.
    Fair,
    /// By deadline, the earlier first, so nothing that comes after a deadline goes before it. Those without one go last, in the order of
    /// arrival; who has waited for `ageing_steps` goes first at every second admission, and is not pushed out afterwards.
    Deadline,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 5] = [Self::Fcfs, Self::Priority, Self::LongestPrefix, Self::Fair, Self::Deadline];

    /// The policy of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fcfs => "fcfs",
            Self::Priority => "priority",
            Self::LongestPrefix => "longest_prefix",
            Self::Fair => "fair",
            Self::Deadline => "deadline",
        }
    }
}

/// What becomes of the computed rows of a request that is preempted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preemption {
    /// They are kept in the host tier where that costs less than computing those that no other request uses anew.
    #[default]
    Auto,
    /// They are computed anew, as far as they are not found in the prefix cache.
    Recompute,
    /// They are kept in the host tier as long as there is room.
    Swap,
}

impl Preemption {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Recompute, Self::Swap];

    /// The one of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preemption| preemption.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Recompute => "recompute",
            Self::Swap => "swap",
        }
    }
}

/// Limits of a scheduler, checked when it is made.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Tokens computed in one step at most.
    pub max_batched_tokens: usize,
    /// Requests running at the same time at most.
    pub max_num_seqs: usize,
    /// Which request goes first.
    pub policy: Policy,
    /// Requests waiting at most; `None` sets no limit.
    pub max_waiting: Option<usize>,
    /// Tokens of waiting requests at most; `None` sets no limit.
    pub max_waiting_tokens: Option<usize>,
    /// Share of the blocks left free when a request is admitted beside others, for those to grow into.
    pub watermark: f64,
    /// Longest prompt and output together; `None` leaves the pool's size as the limit.
    pub max_model_len: Option<usize>,
    /// Whether rows of ended requests are kept for others that begin alike.
    pub enable_prefix_caching: bool,
    /// Which cached block is given up first.
    pub eviction: EvictionPolicy,
    /// Key of the block hashes; `None` draws one.
    pub hash_seed: Option<u64>,
    /// Whether events of the prefix cache are kept until they are taken.
    pub enable_events: bool,
    /// Pages of the draft model's caches; `None` means one for each block.
    pub num_draft_blocks: Option<usize>,
    /// Device pages for latent rows; the rows of further blocks are in a host tier. `None` means one for each block, and no tier.
    pub num_latent_blocks: Option<usize>,
    /// Rows fetched from the host tier that the device keeps, for each layer.
    pub hot_rows: usize,
    /// What becomes of the rows of a request that is preempted.
    pub preemption: Preemption,
    /// Blocks of preempted requests that the host tier keeps beside those of the pool. `None` means a quarter of `num_blocks` with a
    /// host tier and 0 without one.
    pub num_swap_blocks: Option<usize>,
    /// Cost of moving a token's index keys to the host tier and back, where computing it at position 0 costs 1.
    pub swap_cost: f64,
    /// Draft tokens of a request in one step at most.
    pub num_speculative_tokens: usize,
    /// A token at position p costs 1 + `context_cost` * p.
    pub context_cost: f64,
    /// Cost of a step at most; `None` lets tokens alone count.
    pub max_batched_cost: Option<f64>,
    /// Steps of waiting that make up for one unit of priority, for any prefix, or for having no deadline.
    pub ageing_steps: usize,
}

impl SchedulerConfig {
    /// The defaults over a pool of this size.
    pub fn new(num_blocks: usize) -> Self {
        Self {
            num_blocks,
            block_size: 64,
            max_batched_tokens: 8192,
            max_num_seqs: 256,
            policy: Policy::Fcfs,
            max_waiting: None,
            max_waiting_tokens: None,
            watermark: 0.01,
            max_model_len: None,
            enable_prefix_caching: true,
            eviction: EvictionPolicy::default(),
            hash_seed: None,
            enable_events: false,
            num_draft_blocks: None,
            num_latent_blocks: None,
            hot_rows: 0,
            preemption: Preemption::default(),
            num_swap_blocks: None,
            swap_cost: 0.05,
            num_speculative_tokens: 0,
            context_cost: 0.0,
            max_batched_cost: None,
            ageing_steps: 1024,
        }
    }

    /// Blocks that can be handed out: each has its rows in every cache, so the smallest cache counts, a draft model's among them.
    pub fn usable_blocks(&self) -> usize {
        self.num_blocks.min(self.num_draft_blocks.unwrap_or(usize::MAX))
    }

    /// Blocks of preempted requests that the host tier keeps.
    pub fn swap_blocks(&self) -> usize {
        match (self.num_latent_blocks, self.num_swap_blocks) {
            (Some(_), None) if self.preemption != Preemption::Recompute => self.num_blocks / 4,
            (_, most) => most.unwrap_or(0),
        }
    }

    /// Places for a block's latent rows in the host tier: for each block of the pool and each that is kept for a preempted request.
    pub fn host_blocks(&self) -> usize {
        if self.num_latent_blocks.is_some() { self.num_blocks.saturating_add(self.swap_blocks()) } else { 0 }
    }

    /// Slots of the whole pool, as far as an int32 length counts them: the longest sequence that can be held.
    pub fn capacity(&self) -> usize {
        self.usable_blocks().saturating_mul(self.block_size).min(MOST)
    }

    /// Longest prompt and output together.
    pub fn max_len(&self) -> usize {
        self.max_model_len.unwrap_or(usize::MAX).min(self.capacity())
    }

    /// Blocks that hold this many tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Cost of computing `count` tokens from position `start` on.
    pub fn cost(&self, start: usize, count: usize) -> f64 {
        let (start, count) = (start as f64, count as f64);
        count + self.context_cost * count * (start + (count - 1.0) / 2.0)
    }

    /// The most tokens from position `start` on, `most` at most, that cost no more than `budget`.
    pub fn affordable(&self, start: usize, most: usize, budget: f64) -> usize {
        if self.cost(start, most) <= budget {
            return most;
        }
        let (mut enough, mut too_many) = (0, most);
        while too_many - enough > 1 {
            let middle = enough + (too_many - enough) / 2;
            if self.cost(start, middle) <= budget {
                enough = middle;
            } else {
                too_many = middle;
            }
        }
        enough
    }

    /// Checks that every limit is in its range.
    pub fn check(&self) -> Result<(), SchedulerError> {
        let sizes = [
            ("num_blocks", self.num_blocks),
            ("block_size", self.block_size),
            ("max_batched_tokens", self.max_batched_tokens),
            ("max_num_seqs", self.max_num_seqs),
            ("max_waiting", self.max_waiting.unwrap_or(1)),
            ("max_waiting_tokens", self.max_waiting_tokens.unwrap_or(1)),
            ("max_model_len", self.max_model_len.unwrap_or(1)),
            ("num_draft_blocks", self.num_draft_blocks.unwrap_or(1)),
            ("num_latent_blocks", self.num_latent_blocks.unwrap_or(1)),
            ("ageing_steps", self.ageing_steps),
        ];
        for (name, value) in sizes {
            if value == 0 || value > MOST {
                let expected = format!("an integer from 1 to {MOST}");
                return Err(SchedulerError::Config { name, expected, got: value.to_string() });
            }
        }
        for (name, value) in [
            ("num_speculative_tokens", self.num_speculative_tokens),
            ("hot_rows", self.hot_rows),
            ("num_swap_blocks", self.swap_blocks()),
        ] {
            if value >= MOST {
                let expected = format!("an integer from 0 to {}", MOST - 1);
                return Err(SchedulerError::Config { name, expected, got: value.to_string() });
            }
        }
        if let Some(pages) = self.num_latent_blocks {
            let least = self.most_written_blocks().saturating_mul(2);
            if pages < least {
                let name = "num_latent_blocks";
                let expected = format!(
                    "at least {least}, twice what a step of max_batched_tokens and max_num_seqs writes"
                );
                return Err(SchedulerError::Config { name, expected, got: pages.to_string() });
            }
        }
        self.check_preemption()?;
        let numbers = [
            ("swap_cost", self.swap_cost, self.swap_cost >= 0.0, "a number of at least 0"),
            ("watermark", self.watermark, (0.0..1.0).contains(&self.watermark), "a number from 0 to below 1"),
            (
                "context_cost",
                self.context_cost,
                self.context_cost.is_finite() && self.context_cost >= 0.0,
                "a number of at least 0",
            ),
            (
                "max_batched_cost",
                self.max_batched_cost.unwrap_or(1.0),
                self.max_batched_cost.is_none_or(|cost| cost >= 1.0),
                "a number of at least 1",
            ),
        ];
        for (name, value, holds, expected) in numbers {
            if !holds {
                let expected = expected.to_string();
                return Err(SchedulerError::Config { name, expected, got: value.to_string() });
            }
        }
        Ok(())
    }

    fn check_preemption(&self) -> Result<(), SchedulerError> {
        let blocks = self.swap_blocks();
        let (name, expected, got) = if blocks > 0 && self.num_latent_blocks.is_none() {
            ("num_swap_blocks", "0 without a host tier (num_latent_blocks)", blocks.to_string())
        } else if self.host_blocks() > MOST {
            ("num_swap_blocks", "no more than an int32 counts together with num_blocks", blocks.to_string())
        } else if self.preemption == Preemption::Swap && blocks == 0 {
            (
                "preemption",
                "\"auto\" or \"recompute\" without room in a host tier (num_swap_blocks)",
                "\"swap\"".into(),
            )
        } else {
            return Ok(());
        };
        Err(SchedulerError::Config { name, expected: expected.into(), got })
    }
}
