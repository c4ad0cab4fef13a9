//! The scheduler's limits.

use super::SchedulerError;

/// Block numbers and lengths leave as int32.
const MOST: usize = i32::MAX as usize;

/// Which request goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In the order of arrival.
    Fcfs,
    /// By priority, the lower number first; by arrival among equals. Who runs is not pushed out by who waits.
    Priority,
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
    /// Share of the blocks left free when a request is admitted beside others, for those to grow into.
    pub watermark: f64,
    /// Longest prompt and output together; `None` leaves the pool's size as the limit.
    pub max_model_len: Option<usize>,
}

impl SchedulerConfig {
    /// Slots of the whole pool, as far as an int32 length counts them: the longest sequence that can be held.
    pub fn capacity(&self) -> usize {
        self.num_blocks.saturating_mul(self.block_size).min(MOST)
    }

    /// Longest prompt and output together.
    pub fn max_len(&self) -> usize {
        self.max_model_len.unwrap_or(usize::MAX).min(self.capacity())
    }

    /// Blocks that hold this many tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Checks that every limit is in its range.
    pub fn check(&self) -> Result<(), SchedulerError> {
        let sizes = [
            ("num_blocks", self.num_blocks),
            ("block_size", self.block_size),
            ("max_batched_tokens", self.max_batched_tokens),
            ("max_num_seqs", self.max_num_seqs),
            ("max_waiting", self.max_waiting.unwrap_or(1)),
            ("max_model_len", self.max_model_len.unwrap_or(1)),
        ];
        for (name, value) in sizes {
            if value == 0 || value > MOST {
                let expected = format!("an integer from 1 to {MOST}");
                return Err(SchedulerError::Config { name, expected, got: value.to_string() });
            }
        }
        if !(0.0..1.0).contains(&self.watermark) {
            let expected = "a number from 0 to below 1".to_string();
            return Err(SchedulerError::Config {
                name: "watermark",
                expected,
                got: self.watermark.to_string(),
            });
        }
        Ok(())
    }
}
