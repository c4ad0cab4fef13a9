//! Random traffic against the simulation: requests of all lengths in few blocks, calls in any order.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::config;
use super::simulation::{Simulation, VOCAB};
use crate::scheduler::{NewRequest, Policy, SchedulerConfig};

/// What happens next in random traffic.
#[derive(Clone, Debug)]
enum Event {
    Add(NewRequest),
    /// Of the n-th name, live or not.
    Abort(u8),
    Schedule,
    Update,
    WrongUpdate,
    Step,
}

/// Few names, so that they are used again; few tokens, so that stop tokens come; lengths around the edges of blocks.
fn new_request(block_size: usize, num_blocks: usize) -> impl Strategy<Value = NewRequest> {
    let len = prop_oneof![
        2 => (1..=num_blocks, 0usize..3).prop_map(move |(blocks, beside)| blocks * block_size + beside - 1),
        2 => (1..=num_blocks.min(2), 0usize..3).prop_map(move |(blocks, beside)| blocks * block_size + beside - 1),
        2 => 1..=2 * block_size,
    ];
    let ids = len.prop_flat_map(|len| prop::collection::vec(0..VOCAB, len.max(1)));
    let stops = prop::collection::vec(0..VOCAB, 0..2);
    (0u8..12, ids, 1usize..40, -2i64..3, stops).prop_map(
        |(name, token_ids, max_tokens, priority, stop_token_ids)| NewRequest {
            priority,
            stop_token_ids,
            ..NewRequest::new(&name.to_string(), token_ids, max_tokens)
        },
    )
}

fn traffic() -> impl Strategy<Value = (SchedulerConfig, Vec<Event>)> {
    let sizes = prop_oneof![(Just(64), 1..6usize), (Just(16), 1..10usize), (1..4usize, 1..20usize)];
    let limits = (
        prop_oneof![Just(1), Just(16), 2..70usize, Just(8192)],
        prop_oneof![1..4usize, 4..20usize],
        prop_oneof![Just(Policy::Fcfs), Just(Policy::Priority)],
        prop::option::weighted(0.3, 1..4usize),
        prop_oneof![3 => Just(0.0), 2 => Just(0.01), 1 => 0.0..1.0f64],
    );
    (sizes, limits).prop_flat_map(|((block_size, num_blocks), limits)| {
        let (max_batched_tokens, max_num_seqs, policy, max_waiting, watermark) = limits;
        let max_model_len = prop::option::weighted(0.3, 2..=block_size * num_blocks + 2);
        let config = max_model_len.prop_map(move |max_model_len| SchedulerConfig {
            max_batched_tokens,
            max_num_seqs,
            policy,
            max_waiting,
            watermark,
            max_model_len,
            ..config(num_blocks, block_size)
        });
        let event = prop_oneof![
            6 => new_request(block_size, num_blocks).prop_map(Event::Add),
            2 => (0u8..12).prop_map(Event::Abort),
            3 => Just(Event::Schedule),
            2 => Just(Event::Update),
            1 => Just(Event::WrongUpdate),
            8 => Just(Event::Step),
        ];
        (config, prop::collection::vec(event, 1..80))
    })
}

#[test]
fn random_traffic_gives_every_request_what_it_gets_alone() {
    let (preemptions, finished, aborted_in_flight) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let runner_config = Config { cases: 3000, source_file: Some(file!()), ..Config::default() };
    let outcome = TestRunner::new(runner_config).run(&traffic(), |(config, events)| {
        let mut simulation = Simulation::new(config);
        for event in events {
            match event {
                Event::Add(new) => simulation.add(new),
                Event::Abort(name) => {
                    let stats = simulation.scheduler.stats();
                    simulation.abort(&name.to_string());
                    let after = simulation.scheduler.stats();
                    let held = after.running < stats.running && after.used_blocks == stats.used_blocks;
                    aborted_in_flight.set(aborted_in_flight.get() + u64::from(held));
                }
                Event::Schedule => drop(simulation.schedule()),
                Event::Update => simulation.update(),
                Event::WrongUpdate => simulation.update_wrongly(),
                Event::Step => {
                    simulation.schedule();
                    simulation.update();
                }
            }
        }
        simulation.drain();
        let stats = simulation.scheduler.stats();
        preemptions.set(preemptions.get() + stats.preemptions);
        finished.set(finished.get() + stats.finished);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    // The traffic is worth its name.
    assert!(preemptions.get() > 500, "{} preemptions", preemptions.get());
    assert!(finished.get() > 5000, "{} requests ended", finished.get());
    assert!(aborted_in_flight.get() > 50, "{} requests aborted in flight", aborted_in_flight.get());
}
