//! Hit shares of the eviction policies on request traces and on drawn traffic, and what an operation costs.
//!
//!     cargo run --release -p heedful-core --example eviction -- TRACE.jsonl...
//!
//! Requests come one after the other; a hit is a block of the run of leading blocks that are cached. Traces are Mooncake's JSON lines,
//! with 512-token blocks, cut into 64-token blocks with `--split`; each is also reported for its second half alone, behind the first.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::time::Instant;

use heedful_core::cache::eviction::{EvictionPolicy, Evictor};
use serde::Deserialize;

/// Blocks of 512 tokens: from 0.13 M to 33.6 M tokens.
const CAPACITIES: [usize; 9] = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

#[derive(Deserialize)]
struct Line {
    hash_ids: Vec<u64>,
    output_length: usize,
}

/// The blocks of a prompt, and how many tokens were generated.
type Request = (Vec<u64>, usize);

fn read(path: &str, split: u64) -> Result<Vec<Request>, Box<dyn Error>> {
    let mut requests = Vec::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let line: Line = serde_json::from_str(line)?;
        let parts = |id: u64| (0..split).map(move |part| id * split + part);
        requests.push((line.hash_ids.into_iter().flat_map(parts).collect(), line.output_length));
    }
    Ok(requests)
}

/// Found and all blocks of the requests from `from` on, in percent, and nanoseconds of an operation.
fn replay(requests: &[Request], policy: EvictionPolicy, capacity: usize, from: usize) -> (f64, f64) {
    let mut evictor = Evictor::new(policy, capacity as u32);
    let (mut blocks, mut keys) = (HashMap::new(), vec![0; capacity]);
    let mut free: Vec<u32> = (0..capacity as u32).rev().collect();
    let (mut found, mut all, mut operations, mut spent) = (0, 0, 0, 0.0);
    for (place, (prompt, output)) in requests.iter().enumerate() {
        let prompt = &prompt[..prompt.len().min(capacity)];
        let mut mine: Vec<u32> = prompt.iter().map_while(|key| blocks.get(key).copied()).collect();
        let (hits, missing) = (mine.len(), prompt.len() - mine.len());
        if place >= from {
            found += hits;
            all += prompt.len();
        }
        let begin = Instant::now();
        mine.iter().for_each(|&block| evictor.use_again(block));
        let mut victims = Vec::new();
        while free.len() + victims.len() < missing {
            victims.push(evictor.evict().expect("no block of another request is held"));
        }
        operations += hits + victims.len() + prompt.len() + missing;
        spent += begin.elapsed().as_secs_f64();
        for block in victims {
            blocks.remove(&keys[block as usize]);
            free.push(block);
        }
        let begin = Instant::now();
        for &key in &prompt[hits..] {
            let block = free.pop().expect("as many were evicted as are missing");
            evictor.insert(block, key, mine.last().copied());
            keys[block as usize] = key;
            mine.push(block);
        }
        mine.iter().rev().for_each(|&block| evictor.unpin(block, *output));
        spent += begin.elapsed().as_secs_f64();
        blocks.extend(prompt[hits..].iter().copied().zip(mine[hits..].iter().copied()));
    }
    (100.0 * found as f64 / all as f64, 1e9 * spent / operations as f64)
}

/// What a policy finds that knows the future: of the leaves, the one whose next use is farthest goes. A prompt's blocks are taken
/// in as far as they are of use before what they would drive out. In percent.
fn foresee(requests: &[Request], capacity: usize, from: usize) -> f64 {
    const NEVER: usize = usize::MAX;
    // When a block is used next, by request and place: found from the end on.
    let mut later: HashMap<u64, usize> = HashMap::new();
    let mut next_uses: Vec<Vec<usize>> = Vec::with_capacity(requests.len());
    for (place, (prompt, _)) in requests.iter().enumerate().rev() {
        next_uses.push(prompt.iter().map(|&key| later.insert(key, place).unwrap_or(NEVER)).collect());
    }
    next_uses.reverse();
    // Cached blocks: next use, depth. A block is used whenever one behind it is, so among equals the deepest is a leaf.
    let mut cached: HashMap<u64, (usize, usize)> = HashMap::new();
    let mut order: BTreeSet<(usize, usize, u64)> = BTreeSet::new();
    let (mut found, mut all) = (0, 0);
    for (place, ((prompt, _), next_uses)) in requests.iter().zip(&next_uses).enumerate() {
        let hits = prompt.iter().take_while(|key| cached.contains_key(key)).count();
        if place >= from {
            found += hits;
            all += prompt.len().min(capacity);
        }
        for (depth, (&key, &next)) in prompt.iter().zip(next_uses).enumerate() {
            if let Some((before, depth)) = cached.remove(&key) {
                order.remove(&(before, depth, key));
            }
            if next != NEVER {
                cached.insert(key, (next, depth));
                order.insert((next, depth, key));
            }
        }
        while cached.len() > capacity {
            let (_, _, key) = order.pop_last().expect("each cached block is in the order");
            cached.remove(&key);
        }
    }
    100.0 * found as f64 / all as f64
}

fn print(title: &str, requests: &[Request], capacities: &[usize], from: usize) {
    println!("{title}: {} requests", requests.len() - from);
    print!("  {:<8}", "blocks");
    capacities.iter().for_each(|capacity| print!("{capacity:>8}"));
    println!("  ns/operation");
    for policy in [EvictionPolicy::Lru, EvictionPolicy::Reuse] {
        let results: Vec<_> =
            capacities.iter().map(|&capacity| replay(requests, policy, capacity, from)).collect();
        print!("  {:<8}", policy.name());
        results.iter().for_each(|(share, _)| print!("{share:>7.2}%"));
        println!("{:>8.0}", results.iter().map(|(_, cost)| cost).sum::<f64>() / results.len() as f64);
    }
    print!("  {:<8}", "future");
    capacities.iter().for_each(|&capacity| print!("{:>7.2}%", foresee(requests, capacity, from)));
    println!();
}

/// A generator of 32-bit numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed >> 32) * bound) >> 32
    }
}

/// Prompts that begin alike within a family and go on apart.
fn prompt(family: u64, length: u64) -> Vec<u64> {
    (0..length).map(|depth| family << 16 | depth).collect()
}

/// Zipf: prompt r of 4,000 is drawn about as often as 1 / r says.
fn zipf(random: &mut Random) -> Vec<Request> {
    let mut draw = || 4000f64.powf(random.below(1 << 24) as f64 / f64::from(1 << 24)) as u64;
    (0..20_000).map(|_| (prompt(draw(), 12), 100)).collect()
}

/// Prompts that never come again.
fn scan(count: u64) -> Vec<Request> {
    (0..count).map(|place| (prompt(1_000_000 + place, 24), 100)).collect()
}

/// Two hundred prompts in turn.
fn cycle(count: u64) -> Vec<Request> {
    (0..count).map(|place| (prompt(500_000 + place % 200, 24), 100)).collect()
}

/// One request of each in turn, and then, for a change of traffic, one after the other.
fn mix(parts: [Vec<Request>; 3]) -> Vec<Request> {
    let turns = (0..5000).flat_map(|place| parts.iter().map(move |part| part[place].clone()));
    let blocks = parts.iter().flat_map(|part| part[5000..9000].iter().cloned());
    turns.chain(blocks).collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let split =
        arguments.iter().position(|argument| argument == "--split").map(|place| arguments.remove(place));
    let split = if split.is_some() { 8 } else { 1 };
    for path in &arguments {
        let requests = read(path, split)?;
        let name = path.rsplit('/').next().unwrap_or(path);
        let capacities = CAPACITIES.map(|capacity| capacity * split as usize);
        print(name, &requests, &capacities, 0);
        print(&format!("{name}, second half"), &requests, &capacities, requests.len() / 2);
    }
    let drawn = [256, 1024, 4096, 16384];
    print("Zipf", &zipf(&mut Random(1)), &drawn, 0);
    print("scan", &scan(9000), &drawn, 0);
    print("loop", &cycle(9000), &drawn, 0);
    print("mix of the three", &mix([zipf(&mut Random(2)), scan(9000), cycle(9000)]), &drawn, 0);
    Ok(())
}
