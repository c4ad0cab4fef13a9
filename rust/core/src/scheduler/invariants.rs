//! What must hold of a scheduler between any two calls. Tests ask after every call; a service may ask whenever it is idle.

use super::{Policy, Scheduler, SchedulerError};

impl Scheduler {
    /// Checks everything that must hold between any two calls.
    pub fn check_invariants(&self) -> Result<(), SchedulerError> {
        self.find_broken().map_err(SchedulerError::Invariant)
    }

    fn find_broken(&self) -> Result<(), String> {
        let live =
            || self.requests.iter().enumerate().filter_map(|(key, slot)| slot.as_ref().map(|r| (key, r)));
        self.pool.check(live().map(|(_, request)| &request.table))?;
        for (key, request) in live() {
            let ensure = |holds: bool, what: &str| {
                if holds { Ok(()) } else { Err(format!("{what}: {:?}", request.id)) }
            };
            let runs = self.running.get(&request.rank) == Some(&key);
            let waits = self.waiting.get(&request.rank) == Some(&key);
            let held = request.computed + request.planned;
            ensure(held <= request.tokens.len(), "more is computed than there is")?;
            ensure(request.table.len() == self.config.blocks_for(held), "a table has another length")?;
            if request.aborted {
                ensure(request.planned > 0 && !runs && !waits, "an aborted request lives on")?;
                continue;
            }
            ensure(runs != waits, "a request is in both queues or in none")?;
            ensure(self.keys.get(&request.id) == Some(&key), "a request's name is lost")?;
            ensure(request.computed < request.tokens.len(), "a request has nothing to compute")?;
            ensure(request.tokens.len() <= request.max_len.max(request.prompt_len), "a request is too long")?;
            ensure(waits == (held == 0), "a waiting request has computed tokens, or a running one has none")?;
        }
        let ensure = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
        let count = live().filter(|(_, request)| !request.aborted).count();
        ensure(count == self.keys.len(), "names and requests differ in number")?;
        ensure(count == self.running.len() + self.waiting.len(), "queues and requests differ in number")?;
        ensure(self.running.len() <= self.config.max_num_seqs, "more requests run than max_num_seqs")?;
        if let (Policy::Fcfs, Some(last), Some(first)) =
            (self.config.policy, self.running.last_key_value(), self.waiting.first_key_value())
        {
            ensure(last < first, "a request runs although one before it waits")?;
        }
        let mut free_keys = self.free_keys.clone();
        free_keys.sort_unstable();
        let empty = self.requests.iter().enumerate().filter(|(_, slot)| slot.is_none()).map(|(key, _)| key);
        ensure(empty.eq(free_keys), "free keys and empty slots differ")?;
        let mut planned: Vec<usize> = self.in_flight.iter().flatten().copied().collect();
        planned.sort_unstable();
        ensure(
            live().filter(|(_, request)| request.planned > 0).map(|(key, _)| key).eq(planned),
            "the step in flight and its requests differ",
        )?;
        let tokens: usize = live().map(|(_, request)| request.planned).sum();
        ensure(
            tokens <= self.config.max_batched_tokens,
            "the step in flight is larger than max_batched_tokens",
        )
    }
}
