//! What each tenant got, for the policy "fair".
//!
//! Each tenant has a counter of the cost of its tokens over its weight; who waits is admitted from the tenant with the lowest one.
//! A prompt is charged whole when it is admitted, less what is reused, and each generated token when it is computed; a token that a
//! preemption has computed again is not charged again. A tenant that comes back does not bring saved time: its counter is lifted to
//! the lowest of those that are there. Between two tenants that both wait, counters never differ by more than one prompt and the
//! answers of what one of them can have running at once, over its weight: none of that was admitted while its counter was above the
//! other's.

use std::collections::HashMap;
use std::sync::Arc;

/// Tenants beyond this number that want nothing are forgotten.
const MOST_IDLE: usize = 1024;

#[derive(Debug)]
struct Tenant {
    name: Arc<str>,
    weight: f64,
    /// Cost of its tokens so far over its weight at the time.
    counter: f64,
    /// Its requests that are there.
    requests: usize,
}

/// All tenants, by number.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    tenants: Vec<Option<Tenant>>,
    numbers: HashMap<Arc<str>, u32>,
    free: Vec<u32>,
    idle: usize,
}

impl Tenants {
    /// A request of this tenant comes: the tenant's number.
    pub fn enter(&mut self, name: &Arc<str>, weight: f64) -> u32 {
        let lowest = self.lowest();
        let number = match self.numbers.get(name) {
            Some(&number) => number,
            None => {
                let tenant = Tenant { name: name.clone(), weight, counter: f64::NEG_INFINITY, requests: 0 };
                self.idle += 1;
                let number = match self.free.pop() {
                    Some(number) => {
                        self.tenants[number as usize] = Some(tenant);
                        number
                    }
                    None => {
                        self.tenants.push(Some(tenant));
                        self.tenants.len() as u32 - 1
                    }
                };
                self.numbers.insert(name.clone(), number);
                number
            }
        };
        let tenant = self.get(number);
        tenant.weight = weight;
        if tenant.requests == 0 {
            tenant.counter = tenant.counter.max(lowest);
            self.idle -= 1;
        }
        self.get(number).requests += 1;
        number
    }

    /// One more request of a tenant that has one.
    pub fn enter_fork(&mut self, number: u32) {
        self.get(number).requests += 1;
    }

    /// A request of this tenant is gone.
    pub fn leave(&mut self, number: u32) {
        let tenant = self.get(number);
        tenant.requests -= 1;
        if tenant.requests > 0 {
            return;
        }
        self.idle += 1;
        if self.idle > MOST_IDLE {
            let lowest = self.lowest();
            for number in 0..self.tenants.len() {
                // One that got more than those that are there keeps its counter.
                let forget = |tenant: &mut Tenant| tenant.requests == 0 && tenant.counter <= lowest;
                if let Some(tenant) = self.tenants[number].take_if(forget) {
                    self.numbers.remove(&tenant.name);
                    self.free.push(number as u32);
                    self.idle -= 1;
                }
            }
        }
    }

    /// Tokens of this cost are computed for a tenant.
    pub fn charge(&mut self, number: u32, cost: f64) {
        let tenant = self.get(number);
        tenant.counter += cost / tenant.weight;
    }

    /// Cost of a tenant's tokens over its weight.
    pub fn counter(&self, number: u32) -> f64 {
        self.tenants[number as usize].as_ref().expect("tenants of requests are there").counter
    }

    /// A tenant's name.
    pub fn name(&self, number: u32) -> &Arc<str> {
        &self.tenants[number as usize].as_ref().expect("tenants of requests are there").name
    }

    /// The lowest counter of the tenants that have requests.
    fn lowest(&self) -> f64 {
        let present = self.tenants.iter().flatten().filter(|tenant| tenant.requests > 0);
        let lowest = present.map(|tenant| tenant.counter).fold(f64::INFINITY, f64::min);
        if lowest.is_finite() {
            return lowest;
        }
        // Nobody is there: whoever comes goes on where the last one stopped.
        self.tenants.iter().flatten().map(|tenant| tenant.counter).fold(0.0, f64::max)
    }

    fn get(&mut self, number: u32) -> &mut Tenant {
        self.tenants[number as usize].as_mut().expect("tenants of requests are there")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(tenants: &mut Tenants, name: &str, weight: f64) -> u32 {
        tenants.enter(&name.into(), weight)
    }

    #[test]
    fn cost_counts_over_the_weight() {
        let mut tenants = Tenants::default();
        let (a, b) = (enter(&mut tenants, "a", 1.0), enter(&mut tenants, "b", 4.0));
        tenants.charge(a, 8.0);
        tenants.charge(b, 8.0);
        assert_eq!((tenants.counter(a), tenants.counter(b)), (8.0, 2.0));
        // A new weight counts from now on.
        assert_eq!(enter(&mut tenants, "b", 1.0), b);
        tenants.charge(b, 8.0);
        assert_eq!((tenants.counter(b), &**tenants.name(b)), (10.0, "b"));
    }

    #[test]
    fn who_was_away_brings_no_saved_time() {
        let mut tenants = Tenants::default();
        let (a, b) = (enter(&mut tenants, "a", 1.0), enter(&mut tenants, "b", 1.0));
        tenants.charge(a, 3.0);
        tenants.leave(a);
        tenants.charge(b, 50.0);
        assert_eq!(enter(&mut tenants, "a", 1.0), a);
        assert_eq!(tenants.counter(a), 50.0);
        // Nor does it lose what it owes.
        tenants.charge(a, 100.0);
        tenants.leave(a);
        enter(&mut tenants, "a", 1.0);
        assert_eq!(tenants.counter(a), 150.0);
        let newcomer = enter(&mut tenants, "c", 1.0);
        assert_eq!(tenants.counter(newcomer), 50.0);
    }

    #[test]
    fn when_nobody_was_there_the_next_goes_on_where_the_last_stopped() {
        let mut tenants = Tenants::default();
        let a = enter(&mut tenants, "a", 1.0);
        tenants.charge(a, 9.0);
        tenants.leave(a);
        let b = enter(&mut tenants, "b", 1.0);
        assert_eq!(tenants.counter(b), 9.0);
    }

    #[test]
    fn a_fork_is_a_request_of_its_tenant() {
        let mut tenants = Tenants::default();
        let a = enter(&mut tenants, "a", 1.0);
        tenants.enter_fork(a);
        tenants.leave(a);
        let b = enter(&mut tenants, "b", 1.0);
        tenants.charge(b, 5.0);
        // It is there still, so its counter is the lowest.
        let c = enter(&mut tenants, "c", 1.0);
        assert_eq!(tenants.counter(c), tenants.counter(a));
    }

    #[test]
    fn tenants_that_want_nothing_are_forgotten_when_they_are_many() {
        let mut tenants = Tenants::default();
        let debtor = enter(&mut tenants, "debtor", 1.0);
        let stays = enter(&mut tenants, "stays", 1.0);
        tenants.charge(debtor, 1e6);
        tenants.leave(debtor);
        for number in 0..5 * MOST_IDLE {
            let guest = enter(&mut tenants, &format!("guest {number}"), 1.0);
            tenants.leave(guest);
        }
        assert!(tenants.tenants.len() <= MOST_IDLE + 3, "{}", tenants.tenants.len());
        assert_eq!(tenants.names_of(debtor), Some("debtor"), "it got more than those that are there");
        assert_eq!(tenants.counter(stays), 0.0);
        assert_eq!(tenants.numbers.len(), tenants.tenants.iter().flatten().count());
    }

    impl Tenants {
        fn names_of(&self, number: u32) -> Option<&str> {
            self.tenants[number as usize].as_ref().map(|tenant| &*tenant.name)
        }
    }
}
