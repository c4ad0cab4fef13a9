//! Requests: what a caller asks for, and the state of all that are there, one array a field.

use std::sync::Arc;

use super::SchedulerConfig;
use crate::cache::{BlockTable, Namespace};

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
    /// Names of further completions of the prompt, which share its blocks.
    pub fork_ids: Vec<Arc<str>>,
    /// Whose rows may be reused: requests with the same salt share, or, without one, with all of these.
    pub cache_salt: Option<Arc<str>>,
    /// Tokens at the start that are shared whatever the salt.
    pub shared_prefix_len: usize,
    /// Whether all of it is computed, whatever is cached.
    pub skip_cache: bool,
    /// Who asks, under [`Policy::Fair`](super::Policy::Fair).
    pub tenant: Arc<str>,
    /// The tenant's share beside the others' from now on.
    pub weight: f64,
    /// When [`Scheduler::expire`](super::Scheduler::expire) ends it.
    pub deadline: Option<f64>,
}

impl NewRequest {
    /// A request without anything special.
    pub fn new(id: &str, token_ids: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            id: id.into(),
            token_ids,
            max_tokens,
            priority: 0,
            stop_token_ids: Vec::new(),
            fork_ids: Vec::new(),
            cache_salt: None,
            shared_prefix_len: 0,
            skip_cache: false,
            tenant: "".into(),
            weight: 1.0,
            deadline: None,
        }
    }
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

/// Memory for this many tokens of output is set aside at most.
const MOST_RESERVED: u32 = 4096;

/// Place of a request in the order of service: what the policy says, then arrival; forks are right behind their origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub key: i128,
    pub arrival: u64,
    pub fork: u64,
}

impl Rank {
    pub const FIRST: Self = Self { key: i128::MIN, arrival: 0, fork: 0 };
    /// Under "deadline", before all that have none.
    pub const WITHOUT_DEADLINE: Self = Self { key: i128::MAX, ..Self::FIRST };
}

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The key is free.
    Gone,
    /// It holds no block.
    Waiting,
    /// It has a seat, and the blocks of its computed tokens.
    Running,
    /// Aborted while a step that writes its blocks was in flight.
    Doomed,
}

/// What of a request is not needed in every step.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub id: Arc<str>,
    pub prompt_len: u32,
    pub stop_token_ids: Arc<[u32]>,
    pub namespace: Namespace,
    pub skip_cache: bool,
    pub tenant: u32,
    pub deadline: Option<f64>,
    /// Which completion of its prompt it is.
    pub branch: u32,
    /// Completions that begin when the prompt is computed.
    pub forks: Vec<(u32, Arc<str>)>,
    /// Step of its arrival.
    pub since: u64,
    pub preemptions: u32,
    /// How many of these its rows were kept over.
    pub swaps: u32,
    /// Tokens whose rows it found in the cache when it last began to run.
    pub reused: u32,
    /// Tokens behind those whose rows had been kept for it then.
    pub restored: u32,
    /// Tokens that its longest cached prefix had, and the prefix index' epoch then.
    pub matched: Option<(u64, u32)>,
}

/// State of all requests that are there: arrays by key. Keys are used again.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub phase: Vec<Phase>,
    pub rank: Vec<Rank>,
    /// Prompt and output so far; drafts stand behind them.
    pub tokens: Vec<Vec<u32>>,
    /// Tokens without drafts.
    pub len: Vec<u32>,
    /// Tokens whose rows are computed.
    pub computed: Vec<u32>,
    /// Tokens that the step in flight computes, drafts included; 0 when it is not part of one.
    pub planned: Vec<u32>,
    /// Length at which it ends.
    pub max_len: Vec<u32>,
    pub tables: Vec<BlockTable>,
    /// Blocks at the start of the table that were offered to the prefix index.
    pub offered: Vec<u32>,
    /// Tokens that its tenant was charged for: those before this place.
    pub charged: Vec<u32>,
    /// Latent rows fetched from the host tier for it.
    pub fetched: Vec<u64>,
    pub terms: Vec<Option<Terms>>,
    pub free_keys: Vec<u32>,
}

impl Requests {
    /// A key for a request that waits.
    pub fn insert(&mut self, rank: Rank, mut tokens: Vec<u32>, max_len: u32, terms: Terms) -> usize {
        let len = tokens.len() as u32;
        // So that a step in which many requests outgrow their memory is rare.
        tokens.reserve((max_len - len.min(max_len)).min(MOST_RESERVED) as usize);
        let Some(key) = self.free_keys.pop() else {
            self.phase.push(Phase::Waiting);
            self.rank.push(rank);
            self.tokens.push(tokens);
            self.len.push(len);
            self.computed.push(0);
            self.planned.push(0);
            self.max_len.push(max_len);
            self.tables.push(BlockTable::default());
            self.offered.push(0);
            self.fetched.push(0);
            self.charged.push(0);
            self.terms.push(Some(terms));
            return self.phase.len() - 1;
        };
        let key = key as usize;
        debug_assert!(self.phase[key] == Phase::Gone && self.tables[key].is_empty());
        self.phase[key] = Phase::Waiting;
        self.rank[key] = rank;
        self.tokens[key] = tokens;
        self.len[key] = len;
        self.max_len[key] = max_len;
        (self.fetched[key], self.charged[key]) = (0, 0);
        self.terms[key] = Some(terms);
        key
    }

    /// Takes memory for the blocks that a request will have, so that no later step does.
    pub fn reserve_table(&mut self, key: usize, config: &SchedulerConfig) {
        let most = self.max_len[key].min(self.len[key].saturating_add(MOST_RESERVED));
        self.tables[key].reserve(config.blocks_for(most as usize));
    }

    /// Frees a key whose table is empty.
    pub fn remove(&mut self, key: usize) -> Terms {
        debug_assert!(self.tables[key].is_empty(), "blocks go back first");
        self.phase[key] = Phase::Gone;
        self.tokens[key] = Vec::new();
        (self.len[key], self.computed[key], self.planned[key], self.offered[key]) = (0, 0, 0, 0);
        self.free_keys.push(key as u32);
        self.terms[key].take().expect("a key is freed once")
    }

    /// Keys in use.
    pub fn keys(&self) -> impl Iterator<Item = usize> {
        (0..self.phase.len()).filter(|&key| self.phase[key] != Phase::Gone)
    }

    pub fn terms(&self, key: usize) -> &Terms {
        self.terms[key].as_ref().expect("keys in queues and steps are live")
    }

    pub fn terms_mut(&mut self, key: usize) -> &mut Terms {
        self.terms[key].as_mut().expect("keys in queues and steps are live")
    }

    /// Prompt and output so far.
    pub fn known(&self, key: usize) -> &[u32] {
        &self.tokens[key][..self.len[key] as usize]
    }

    /// Tokens that are there and not computed, drafts included.
    pub fn wanted(&self, key: usize) -> usize {
        self.tokens[key].len() - self.computed[key] as usize
    }

    /// Forgets its drafts.
    pub fn drop_drafts(&mut self, key: usize) {
        self.tokens[key].truncate(self.len[key] as usize);
    }

    /// Takes a token behind those that are known; says why the request ends, if it does.
    pub fn append(&mut self, key: usize, token: u32) -> Option<FinishReason> {
        debug_assert_eq!(self.tokens[key].len(), self.len[key] as usize, "drafts are dropped first");
        self.tokens[key].push(token);
        self.len[key] += 1;
        if self.terms(key).stop_token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.len[key] >= self.max_len[key] {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Drafts that a request may have: with all of them accepted and one token more it is not too long.
    pub fn most_drafts(&self, key: usize, config: &SchedulerConfig) -> usize {
        config.num_speculative_tokens.min((self.max_len[key] - self.len[key]).saturating_sub(1) as usize)
    }
}
