//! Requests that wait, and which of them goes first.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::request::{Rank, Requests};
use super::tenants::Tenants;
use super::{Policy, SchedulerConfig};
use crate::cache::{BlockPool, Found};

/// Waiting requests among which the longest cached prefix is looked for.
const WINDOW: usize = 64;

/// The queue: by tenant under the policy "fair", then by rank.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    queue: BTreeMap<(u32, Rank), u32>,
    /// Their tokens.
    tokens: usize,
    /// Under "deadline": whether the last that was admitted was so for its age.
    aged_last: bool,
}

impl Waiting {
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Tokens of all that wait.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn insert(&mut self, config: &SchedulerConfig, requests: &Requests, key: usize) {
        self.queue.insert(place(config, requests, key), key as u32);
        self.tokens += requests.len[key] as usize;
    }

    pub fn remove(&mut self, config: &SchedulerConfig, requests: &Requests, key: usize) {
        if self.queue.remove(&place(config, requests, key)).is_some() {
            self.tokens -= requests.len[key] as usize;
        }
    }

    pub fn contains(&self, config: &SchedulerConfig, requests: &Requests, key: usize) -> bool {
        self.queue.get(&place(config, requests, key)) == Some(&(key as u32))
    }

    /// Their keys; by tenant under "fair", then by rank.
    pub fn keys(&self) -> impl Iterator<Item = usize> {
        self.queue.values().map(|&key| key as usize)
    }

    /// The request that goes first. It stays in the queue.
    pub fn first(
        &self,
        config: &SchedulerConfig,
        requests: &mut Requests,
        tenants: &Tenants,
        pool: &BlockPool,
        found: &mut Found,
    ) -> Option<usize> {
        match config.policy {
            Policy::Fcfs | Policy::Priority => self.keys().next(),
            Policy::Deadline => {
                let mut without =
                    self.queue.range((0, Rank::WITHOUT_DEADLINE)..).map(|(_, &key)| key as usize);
                let oldest =
                    without.next().filter(|&key| !self.aged_last && is_aged(config, requests, pool, key));
                oldest.or_else(|| self.keys().next())
            }
            Policy::Fair => self.first_of_the_poorest(tenants),
            Policy::LongestPrefix => {
                let oldest = self.keys().next()?;
                if is_aged(config, requests, pool, oldest) {
                    return Some(oldest);
                }
                let mut best = (oldest, matched(requests, pool, found, oldest));
                for key in self.keys().take(WINDOW).skip(1) {
                    let tokens = matched(requests, pool, found, key);
                    if tokens > best.1 {
                        best = (key, tokens);
                    }
                }
                Some(best.0)
            }
        }
    }

    /// Takes out a request that begins to run. Under "deadline", one without a deadline that has waited for long goes before all
    /// others from now on; at most every second is admitted so.
    pub fn admit(&mut self, config: &SchedulerConfig, requests: &mut Requests, pool: &BlockPool, key: usize) {
        self.remove(config, requests, key);
        if config.policy == Policy::Deadline {
            self.aged_last = requests.terms(key).deadline.is_none() && is_aged(config, requests, pool, key);
            if self.aged_last {
                requests.rank[key].key = i128::MIN;
            }
        }
    }

    fn first_of_the_poorest(&self, tenants: &Tenants) -> Option<usize> {
        let mut best: Option<(f64, Rank, usize)> = None;
        let mut behind = Bound::Unbounded;
        while let Some((&(tenant, rank), &key)) = self.queue.range((behind, Bound::Unbounded)).next() {
            let counter = tenants.counter(tenant);
            if best.is_none_or(|(least, first, _)| (counter, rank) < (least, first)) {
                best = Some((counter, rank, key as usize));
            }
            let Some(next) = tenant.checked_add(1) else { break };
            behind = Bound::Included((next, Rank::FIRST));
        }
        best.map(|(_, _, key)| key)
    }
}

fn is_aged(config: &SchedulerConfig, requests: &Requests, pool: &BlockPool, key: usize) -> bool {
    pool.clock >= requests.terms(key).since + config.ageing_steps as u64
}

/// Tokens of a waiting request that are cached.
fn matched(requests: &mut Requests, pool: &BlockPool, found: &mut Found, key: usize) -> u32 {
    let Some(index) = pool.index() else { return 0 };
    let epoch = index.epoch();
    if let Some((then, tokens)) = requests.terms(key).matched
        && then == epoch
    {
        return tokens;
    }
    pool.find(requests.terms(key).namespace, reusable(requests, key), found);
    let tokens = found.full.len() * index.block_size() + found.part.map_or(0, |(_, tokens)| tokens);
    requests.terms_mut(key).matched = Some((epoch, tokens as u32));
    tokens as u32
}

/// The tokens of a request whose rows may come from the cache: the last one is computed for its logits.
pub(super) fn reusable(requests: &Requests, key: usize) -> &[u32] {
    let len = if requests.terms(key).skip_cache { 0 } else { requests.len[key] as usize - 1 };
    &requests.tokens[key][..len]
}

fn place(config: &SchedulerConfig, requests: &Requests, key: usize) -> (u32, Rank) {
    let lane = if config.policy == Policy::Fair { requests.terms(key).tenant } else { 0 };
    (lane, requests.rank[key])
}
