//! One request: its tokens, how many of them are computed, and the blocks that hold them.

use std::sync::Arc;

use crate::cache::BlockTable;

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// A name not in use.
    pub id: Arc<str>,
    /// The prompt, at least one token.
    pub token_ids: Vec<u32>,
    /// Tokens to generate at most, at least one.
    pub max_tokens: usize,
    /// Lower goes earlier under [`Policy::Priority`](super::Policy::Priority).
    pub priority: i64,
    /// Ids that end the request; they are part of its output.
    pub stop_token_ids: Vec<u32>,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was sampled.
    Stop,
    /// It reached `max_tokens` or the longest sequence.
    Length,
}

impl FinishReason {
    /// "stop" or "length".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Place of a request in the order of service: priority (0 under first come, first served), then arrival.
pub(super) type Rank = (i64, u64);

#[derive(Debug)]
pub(super) struct Request {
    pub id: Arc<str>,
    pub rank: Rank,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Length at which it ends.
    pub max_len: usize,
    pub stop_token_ids: Vec<u32>,
    /// Tokens whose cache rows are computed.
    pub computed: usize,
    /// Tokens that the step in flight computes; 0 when it is not part of one.
    pub planned: usize,
    pub table: BlockTable,
    /// Aborted while a step that writes its blocks was in flight.
    pub aborted: bool,
}

impl Request {
    /// Tokens that are there and not computed.
    pub fn wanted(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the step in flight computes its last token, whose logits give the next one.
    pub fn is_sampled(&self) -> bool {
        self.planned > 0 && self.planned == self.wanted()
    }

    /// Takes a sampled token; says why the request ends, if it does.
    pub fn append(&mut self, token: u32) -> Option<FinishReason> {
        self.tokens.push(token);
        if self.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.max_len {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
