use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

/// A prefix cache over an evictor and a pool: what a request does to its blocks, and the plain account of it.
struct Cache {
    evictor: Evictor,
    capacity: usize,
    /// Content to block, and block to (content, parent, holders, time given up).
    blocks: HashMap<u64, u32>,
    held: BTreeMap<u32, (u64, Option<u32>, usize, u64)>,
    free: Vec<u32>,
    time: u64,
}

impl Cache {
    fn new(policy: EvictionPolicy, capacity: usize) -> Self {
        Self {
            evictor: Evictor::new(policy, capacity as u32),
            capacity,
            blocks: HashMap::new(),
            held: BTreeMap::new(),
            free: (0..capacity as u32).rev().collect(),
            time: 0,
        }
    }

    /// The unpinned blocks that no cached block continues.
    fn leaves(&self) -> Vec<u32> {
        let continued: Vec<_> = self.held.values().filter_map(|&(_, parent, ..)| parent).collect();
        let free = self
            .held
            .iter()
            .filter(|&(block, &(_, _, holders, _))| holders == 0 && !continued.contains(block));
        free.map(|(&block, _)| block).collect()
    }

    /// Evicts a block, if one can go; `checked` against the plain account, which takes its time.
    fn evict(&mut self, checked: bool) -> bool {
        if !checked {
            let Some(victim) = self.evictor.evict() else { return false };
            self.forget(victim);
            return true;
        }
        let leaves = self.leaves();
        let worth: Vec<f32> = leaves.iter().map(|&leaf| self.worth(leaf)).collect();
        let Some(victim) = self.evictor.evict() else {
            assert!(leaves.is_empty());
            return false;
        };
        assert!(leaves.contains(&victim), "block {victim} is held, continued or not cached");
        match self.evictor.policy() {
            EvictionPolicy::Lru => {
                let oldest = leaves.iter().min_by_key(|leaf| self.held[leaf].3);
                assert_eq!(oldest, Some(&victim));
            }
            EvictionPolicy::Reuse => {
                let place =
                    leaves.iter().position(|&leaf| leaf == victim).expect("the victim is one of the leaves");
                assert!(
                    worth.iter().all(|&other| worth[place] <= other),
                    "{victim} of {leaves:?}: {worth:?}"
                );
            }
        }
        self.forget(victim);
        true
    }

    fn forget(&mut self, victim: u32) {
        let (content, ..) = self.held.remove(&victim).expect("the victim is cached");
        self.blocks.remove(&content);
        self.free.push(victim);
    }

    fn worth(&self, block: u32) -> f32 {
        let list = self.evictor.list_of(block);
        self.evictor.reuse.as_ref().map_or(0.0, |reuse| reuse.worth_of(list))
    }

    /// A request takes its prompt, as far as there is room; how many blocks it found, and what it holds.
    fn begin(&mut self, prompt: &[u64], checked: bool) -> (usize, Vec<u32>) {
        let mut mine: Vec<u32> = Vec::new();
        for content in prompt {
            let Some(&block) = self.blocks.get(content) else { break };
            self.evictor.use_again(block);
            self.held.get_mut(&block).expect("known blocks are cached").2 += 1;
            mine.push(block);
        }
        let found = mine.len();
        for &content in &prompt[found..] {
            if self.free.is_empty() && !self.evict(checked) {
                break;
            }
            let block = self.free.pop().expect("a block was evicted");
            self.evictor.insert(block, content, mine.last().copied());
            self.held.insert(block, (content, mine.last().copied(), 1, 0));
            self.blocks.insert(content, block);
            mine.push(block);
        }
        (found, mine)
    }

    fn end(&mut self, mine: &[u32], output_tokens: usize) {
        for &block in mine.iter().rev() {
            let (_, _, holders, given_up) = self.held.get_mut(&block).expect("a held block is cached");
            *holders -= 1;
            if *holders == 0 {
                *given_up = self.time;
                self.time += 1;
                self.evictor.unpin(block, output_tokens);
            }
        }
    }

    fn run(&mut self, prompt: &[u64], output_tokens: usize) -> usize {
        let (found, mine) = self.begin(prompt, false);
        self.end(&mine, output_tokens);
        found
    }

    fn check(&self) {
        let pinned = self.held.values().filter(|&&(_, _, holders, _)| holders > 0).count();
        assert_eq!(self.evictor.cached(), self.held.len());
        assert_eq!(self.evictor.evictable(), self.held.len() - pinned);
        assert_eq!(self.free.len() + self.held.len(), self.capacity);
        self.evictor.check_invariants().expect("the lists and tables are right");
    }
}

fn policies() -> impl Strategy<Value = EvictionPolicy> {
    prop_oneof![Just(EvictionPolicy::Lru), Just(EvictionPolicy::Reuse)]
}

/// Content of the n-th block of a conversation; conversations of the same group share their first blocks.
fn content(conversation: u64, depth: u64) -> u64 {
    let group = if depth < 2 { conversation % 3 } else { conversation };
    (group << 32 | depth).wrapping_mul(0x2545_f491_4f6c_dd1d)
}

fn prompt(conversation: u64, blocks: u64) -> Vec<u64> {
    (0..blocks).map(|depth| content(conversation, depth)).collect()
}

/// Share of blocks found, in percent.
fn hit_share(
    policy: EvictionPolicy,
    capacity: usize,
    prompts: impl Iterator<Item = (Vec<u64>, usize)>,
) -> f64 {
    let mut cache = Cache::new(policy, capacity);
    let (mut found, mut all) = (0, 0);
    for (prompt, output) in prompts {
        found += cache.run(&prompt, output);
        all += prompt.len();
    }
    cache.check();
    100.0 * found as f64 / all as f64
}

proptest! {
    /// Against the plain account: who may go, who goes under LRU, that nothing goes which is worth more than another, that all
    /// that nobody holds can go.
    #[test]
    fn victims_are_unheld_leaves_in_the_order_of_the_policy(
        policy in policies(),
        capacity in 1usize..40,
        operations in prop::collection::vec((0u64..12, 1u64..14, 0usize..600, 0usize..6), 1..120),
    ) {
        let mut cache = Cache::new(policy, capacity);
        let mut running: Vec<(Vec<u32>, usize)> = Vec::new();
        for (conversation, blocks, output, ending) in operations {
            let (_, mine) = cache.begin(&prompt(conversation, blocks), true);
            running.push((mine, output));
            if ending < running.len() {
                let (mine, output) = running.swap_remove(ending);
                cache.end(&mine, output);
            }
            cache.check();
        }
        for (mine, output) in running {
            cache.end(&mine, output);
        }
        while cache.evict(true) {
            cache.check();
        }
        prop_assert_eq!(cache.evictor.cached(), 0);
    }

    /// In any order of giving up, and with blocks that leave for other reasons.
    #[test]
    fn all_blocks_go_in_whatever_order_they_were_given_up(
        policy in policies(),
        order in Just((0u32..24).collect::<Vec<_>>()).prop_shuffle(),
        parents in prop::collection::vec(any::<prop::sample::Index>(), 24),
        removals in 0usize..8,
    ) {
        let mut evictor = Evictor::new(policy, 24);
        let mut children = [0; 24];
        let parent = |block: u32| (block > 0).then(|| parents[block as usize].index(block as usize) as u32);
        for block in 0..24 {
            evictor.insert(block, u64::from(block), parent(block));
            parent(block).inspect(|&parent| children[parent as usize] += 1);
        }
        prop_assert_eq!(evictor.evict(), None);
        for &block in &order {
            evictor.unpin(block, 5);
        }
        let mut left: Vec<u32> = (0..24).collect();
        for turn in 0.. {
            let leaf = left.iter().copied().find(|&block| children[block as usize] == 0);
            let Some(leaf) = leaf else { break };
            let gone = if turn < removals {
                evictor.remove(leaf);
                leaf
            } else {
                evictor.evict().expect("something is left")
            };
            prop_assert_eq!(children[gone as usize], 0);
            parent(gone).inspect(|&parent| children[parent as usize] -= 1);
            left.retain(|&block| block != gone);
            prop_assert_eq!(evictor.check_invariants(), Ok(()));
        }
        prop_assert_eq!(evictor.cached(), 0);
    }
}

#[test]
fn names_are_read_as_they_are_written() {
    for policy in [EvictionPolicy::Lru, EvictionPolicy::Reuse] {
        assert_eq!(policy.name().parse(), Ok(policy));
    }
    let error = "mru".parse::<EvictionPolicy>().unwrap_err();
    assert_eq!(error, "eviction: expected \"lru\" or \"reuse\", got \"mru\"");
}

#[test]
fn a_cache_that_has_learned_nothing_is_least_recently_used() {
    for policy in [EvictionPolicy::Lru, EvictionPolicy::Reuse] {
        let mut cache = Cache::new(policy, 4096);
        for conversation in 0..64 {
            let unshared: Vec<u64> = (0..16).map(|depth| conversation << 32 | depth).collect();
            cache.run(&unshared, 100);
        }
        let first = cache.blocks[&15];
        assert_eq!(cache.evictor.evict(), Some(first), "{policy:?}");
    }
}

#[test]
fn a_loop_longer_than_the_cache_keeps_a_part_of_itself() {
    let turns = || (0..4000).map(|turn| (prompt(3 * (turn % 40), 16), 100));
    assert!(hit_share(EvictionPolicy::Lru, 320, turns()) < 15.0);
    assert!(hit_share(EvictionPolicy::Reuse, 320, turns()) > 35.0);
}

#[test]
fn a_scan_does_not_drive_out_what_is_used_again() {
    // Twenty conversations that go on, each time after sixty prompts that never come again.
    let turns =
        || (0..6000).map(|turn| (prompt(if turn % 4 == 0 { turn / 4 % 20 } else { 1000 + turn }, 12), 100));
    let (lru, reuse) =
        (hit_share(EvictionPolicy::Lru, 300, turns()), hit_share(EvictionPolicy::Reuse, 300, turns()));
    assert!(reuse > lru + 10.0, "{reuse} against {lru}");
}

#[test]
fn popular_prompts_under_zipf_are_found_no_less_often_than_under_lru() {
    // Ranks drawn with probability about 1 / rank: the exponential of a uniform number.
    let turns = || {
        let mut state = 1u64;
        (0..8000).map(move |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = (state >> 40) as f64 / (1u64 << 24) as f64;
            (prompt(3 * 2000f64.powf(uniform) as u64, 8), 100)
        })
    };
    for capacity in [64, 512, 4096] {
        let (lru, reuse) = (
            hit_share(EvictionPolicy::Lru, capacity, turns()),
            hit_share(EvictionPolicy::Reuse, capacity, turns()),
        );
        assert!(reuse > lru - 1.0, "{reuse} against {lru} with {capacity} blocks");
    }
}
