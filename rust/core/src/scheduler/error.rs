//! What can be wrong with a call to the scheduler. A failed call changes nothing.

use thiserror::Error;

use crate::cache::FetchError;

/// Why a call was refused.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum SchedulerError {
    /// A limit is out of range.
    #[error("{name}: expected {expected}, got {got}")]
    Config {
        /// The limit.
        name: &'static str,
        /// What it must be.
        expected: String,
        /// What it was.
        got: String,
    },
    /// A prompt without tokens.
    #[error("token_ids: expected at least one token, got an empty prompt")]
    EmptyPrompt,
    /// A token id that no int32 holds.
    #[error("{name}: expected ids from 0 to {most}, got {id}", most = i32::MAX)]
    TokenId {
        /// The argument it came in.
        name: &'static str,
        /// The id.
        id: u32,
    },
    /// No token may be generated.
    #[error("max_tokens: expected at least 1, got 0")]
    NoTokensWanted,
    /// The prompt leaves no room to generate.
    #[error("token_ids: expected fewer than {limit} tokens (max_model_len), got {len}")]
    LongerThanModel {
        /// Tokens in the prompt.
        len: usize,
        /// The configured longest sequence.
        limit: usize,
    },
    /// The prompt does not fit in the whole pool.
    #[error("token_ids: expected at most {capacity} tokens (num_blocks * block_size), got {len}")]
    LargerThanPool {
        /// Tokens in the prompt.
        len: usize,
        /// Slots of the pool.
        capacity: usize,
    },
    /// Another request has this name.
    #[error("{name}: {id:?} is in use")]
    DuplicateId {
        /// The argument it came in.
        name: &'static str,
        /// The name.
        id: String,
    },
    /// No request has this name.
    #[error("request_id: there is no request {0:?}")]
    UnknownId(String),
    /// The waiting queue is at its limit.
    #[error("the waiting queue is full: {0} requests wait (max_waiting)")]
    QueueFull(usize),
    /// The waiting queue is at its limit of tokens.
    #[error(
        "the waiting queue is full: {waiting} tokens wait, {len} more are above {most} (max_waiting_tokens)"
    )]
    QueueFullOfTokens {
        /// Tokens that wait.
        waiting: usize,
        /// Tokens of the refused prompt.
        len: usize,
        /// The limit.
        most: usize,
    },
    /// A tenant's weight is no share.
    #[error("weight: expected a positive number, got {0}")]
    Weight(f64),
    /// A deadline that no clock reaches.
    #[error("deadline: expected a number, got NaN")]
    Deadline,
    /// More completions than can run.
    #[error("fork_ids: expected at most {most} names (max_num_seqs - 1), got {got}")]
    TooManyForks {
        /// The limit.
        most: usize,
        /// Names given.
        got: usize,
    },
    /// A fork of a fork that waits for its origin.
    #[error("request_id: {0:?} has not begun; fork the request it belongs to")]
    NotBegun(String),
    /// A fork would have to end at once.
    #[error("max_tokens: expected more than the {generated} tokens that are generated")]
    ForkTooShort {
        /// Tokens generated.
        generated: usize,
    },
    /// No seat is free for a fork.
    #[error("fork: {0} requests run already (max_num_seqs)")]
    NoSeat(usize),
    /// `fork` was called before the last step's `update`.
    #[error("fork: the last step has not been updated; call update with its sampled ids first")]
    ForkInFlight,
    /// `speculate` was called before the last step's `update`.
    #[error("speculate: the last step has not been updated; call update with its sampled ids first")]
    SpeculateInFlight,
    /// More drafts than slots are kept for.
    #[error("draft_ids: expected at most {most} ids (num_speculative_tokens), got {got}")]
    TooManyDrafts {
        /// The limit.
        most: usize,
        /// Ids given.
        got: usize,
    },
    /// Drafts in another shape.
    #[error("draft_ids: expected [{rows}, at most {most}] ids, one row a request of the step, got [{}, {}]", got.0, got.1)]
    DraftShape {
        /// Requests of the step.
        rows: usize,
        /// The limit of a row.
        most: usize,
        /// Rows and columns given.
        got: (usize, usize),
    },
    /// A fetch was asked for and every row is on the device.
    #[error("plan_fetch: there is no host tier (num_latent_blocks)")]
    NoHostTier,
    /// A selection that cannot be fetched.
    #[error(transparent)]
    Fetch(FetchError),
    /// `schedule` was called before the last step's `update`.
    #[error("schedule: the last step has not been updated; call update with its sampled ids first")]
    StepInFlight,
    /// `update` was called without a step.
    #[error("update: there is no step to update; call schedule first")]
    NoStep,
    /// `update` got another number of ids than the step has sample rows.
    #[error("sampled_ids: expected {expected} ids, one a sample row, got {got}")]
    SampleCount {
        /// Sample rows of the step.
        expected: usize,
        /// Ids given.
        got: usize,
    },
    /// A sampled id is negative.
    #[error("sampled_ids: expected ids of at least 0, got {0}")]
    SampledId(i32),
    /// The scheduler's own state is broken.
    #[error("invariant broken: {0}")]
    Invariant(String),
}
