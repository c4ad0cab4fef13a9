//! What must hold of a scheduler between any two calls. Tests ask after every call; a service may ask whenever it is idle.

use super::request::Phase;
use super::{Policy, Scheduler, SchedulerError};

impl Scheduler {
    /// Checks everything that must hold between any two calls.
    pub fn check_invariants(&self) -> Result<(), SchedulerError> {
        self.find_broken().map_err(SchedulerError::Invariant)
    }

    fn find_broken(&self) -> Result<(), String> {
        let requests = &self.requests;
        let tables = requests.keys().map(|key| &requests.tables[key]).chain([&self.flight.held]);
        self.pool.check(tables)?;
        if let Some(tier) = &self.tier {
            let kept = || tier.swap.records().flat_map(|(_, record)| &record.blocks);
            tier.residencies.check(kept().map(|kept| kept.latent_place))?;
            tier.swap.check()?;
            for (key, record) in tier.swap.records() {
                let waits = requests.phase[key] == Phase::Waiting;
                let goes_on = self.flight.is_in() && self.flight.swapped_in.contains(&(key as u32));
                if !(waits || goes_on) || record.blocks.len() != self.config.blocks_for(record.rows as usize)
                {
                    return Err("rows are kept for a request that does not wait for them".into());
                }
            }
        }
        for key in requests.keys() {
            self.find_broken_request(key)?;
        }
        let ensure = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
        let live = || requests.keys().filter(|&key| requests.phase[key] != Phase::Doomed);
        let names: usize = live().map(|key| 1 + requests.terms(key).forks.len()).sum();
        ensure(names == self.names.len(), "names and requests differ in number")?;
        let count = live().count();
        ensure(count == self.running.len() + self.waiting.len(), "queues and requests differ in number")?;
        let kept: usize = self.running.iter().map(|&key| requests.terms(key as usize).forks.len()).sum();
        ensure(kept == self.kept_seats, "seats for forks are counted wrongly")?;
        ensure(self.running.len() + kept <= self.config.max_num_seqs, "more requests run than max_num_seqs")?;
        ensure(
            self.running.is_sorted_by_key(|&key| requests.rank[key as usize]),
            "those that run are not in the order of service",
        )?;
        let tokens: usize = self.waiting.keys().map(|key| requests.len[key] as usize).sum();
        ensure(tokens == self.waiting.tokens(), "tokens that wait are counted wrongly")?;
        if let (Policy::Fcfs, Some(&last), Some(first)) =
            (self.config.policy, self.running.last(), self.waiting.keys().next())
        {
            // Forks of one origin arrived together.
            let arrival = |key: usize| (requests.rank[key].key, requests.rank[key].arrival);
            let holds = arrival(last as usize) <= arrival(first);
            ensure(holds, "a request runs although one before it waits")?;
        }
        let mut free_keys = requests.free_keys.clone();
        free_keys.sort_unstable();
        let gone =
            (0..requests.phase.len() as u32).filter(|&key| requests.phase[key as usize] == Phase::Gone);
        ensure(gone.eq(free_keys), "free keys and empty slots differ")?;
        let mut flying: Vec<usize> = Vec::new();
        if self.flight.is_in() {
            flying.extend(self.flight.keys.iter().map(|&key| key as usize));
            flying.sort_unstable();
        } else {
            ensure(self.flight.held.is_empty(), "blocks are held without a step")?;
        }
        let planned = requests.keys().filter(|&key| requests.planned[key] > 0);
        ensure(planned.eq(flying), "the step in flight and its requests differ")?;
        let tokens: usize = requests.planned.iter().map(|&planned| planned as usize).sum();
        ensure(
            tokens <= self.config.max_batched_tokens,
            "the step in flight is larger than max_batched_tokens",
        )
    }

    fn find_broken_request(&self, key: usize) -> Result<(), String> {
        let requests = &self.requests;
        let terms = requests.terms(key);
        let ensure = |holds: bool, what: &str| {
            if holds { Ok(()) } else { Err(format!("{what}: {:?}", terms.id)) }
        };
        let (phase, known) = (requests.phase[key], requests.len[key]);
        let held = requests.computed[key] + requests.planned[key];
        let all = requests.tokens[key].len();
        ensure(held as usize <= all, "more is computed than there is")?;
        ensure(known as usize <= all, "a request has fewer tokens than it knows")?;
        ensure(all - known as usize <= self.config.num_speculative_tokens, "a request has too many drafts")?;
        let blocks = self.config.blocks_for(held as usize);
        ensure(requests.tables[key].len() == blocks, "a table has another length")?;
        let offered = requests.offered[key] as usize;
        ensure(
            offered <= requests.computed[key] as usize / self.config.block_size,
            "a block was offered to the cache before it was full",
        )?;
        if phase == Phase::Doomed {
            return ensure(
                requests.planned[key] > 0 && !self.running.contains(&(key as u32)),
                "an aborted request lives on",
            );
        }
        let runs = self.running.contains(&(key as u32));
        let waits = self.waiting.contains(&self.config, requests, key);
        ensure(runs != waits, "a request is in both queues or in none")?;
        ensure(runs == (phase == Phase::Running), "a request is in the wrong queue")?;
        let named = |id| self.names.get(id) == Some(&(key as u32));
        ensure(named(&terms.id) && terms.forks.iter().all(|(_, id)| named(id)), "a request's name is lost")?;
        ensure(requests.computed[key] < known, "a request has nothing to compute")?;
        ensure(known <= requests.max_len[key], "a request is too long")?;
        ensure(runs || held == 0, "a waiting request has computed tokens")
    }
}
