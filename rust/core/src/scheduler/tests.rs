//! The scheduler's behaviour in statements; `traffic` then tests it at random against the reference in `simulation`.

#[allow(non_snake_case)] // dimension letters
mod simulation;
mod traffic;

use std::sync::Arc;

use super::*;

/// Limits without a prefix cache, whose blocks are free when they are not in use.
fn config(num_blocks: usize, block_size: usize) -> SchedulerConfig {
    SchedulerConfig {
        block_size,
        watermark: 0.0,
        enable_prefix_caching: false,
        ..SchedulerConfig::new(num_blocks)
    }
}

fn scheduler(config: SchedulerConfig) -> Scheduler {
    Scheduler::new(config).unwrap()
}

/// A request for tokens 0, 1, ... `len` - 1.
fn request(id: &str, len: usize, max_tokens: usize) -> NewRequest {
    NewRequest::new(id, (0..len as u32).collect(), max_tokens)
}

fn names(ids: &[Arc<str>]) -> Vec<&str> {
    ids.iter().map(|id| &**id).collect()
}

type Ran = Vec<(String, usize)>;
type Ended = Vec<(String, FinishReason)>;

/// Schedules a step and updates it with token 7 everywhere: who ran, how many tokens of each, and who ended.
fn run(scheduler: &mut Scheduler) -> (Ran, Ended) {
    let step = scheduler.schedule().unwrap().unwrap();
    let counts = step.query_start_loc.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
    let ran = step.request_ids.iter().map(|id| id.to_string()).zip(counts).collect();
    let ended = scheduler.update(&vec![7; step.sample_rows.len()], None).unwrap();
    scheduler.check_invariants().unwrap();
    (ran, ended.into_iter().map(|(id, reason)| (id.to_string(), reason)).collect())
}

fn ran(scheduler: &mut Scheduler) -> Ran {
    run(scheduler).0
}

fn counts(expected: &[(&str, usize)]) -> Ran {
    expected.iter().map(|&(id, count)| (id.to_string(), count)).collect()
}

#[test]
fn a_prompt_is_computed_whole_then_token_by_token() {
    let mut s = scheduler(config(4, 4));
    s.add(request("a", 5, 2)).unwrap();
    let step = s.schedule().unwrap().unwrap();
    assert_eq!(names(&step.request_ids), ["a"]);
    assert_eq!(step.token_ids, [0, 1, 2, 3, 4]);
    assert_eq!(step.positions, [0, 1, 2, 3, 4]);
    assert_eq!(step.slot_mapping, [0, 1, 2, 3, 4]);
    assert_eq!((&step.query_start_loc[..], &step.seq_lens[..]), (&[0, 5][..], &[5][..]));
    assert_eq!((&step.block_tables[..], step.table_width), (&[0, 1][..], 2));
    assert_eq!((&step.sample_rows[..], &step.sample_request[..]), (&[4][..], &[0][..]));
    assert_eq!(s.update(&[9], None), Ok(vec![]));
    let step = s.schedule().unwrap().unwrap();
    assert_eq!(
        (&step.token_ids[..], &step.positions[..], &step.slot_mapping[..]),
        (&[9][..], &[5][..], &[5][..])
    );
    assert_eq!((&step.sample_rows[..], &step.seq_lens[..]), (&[0][..], &[6][..]));
    assert_eq!(s.output_token_ids("a"), Ok(&[9][..]));
    assert_eq!(s.update(&[8], None), Ok(vec![("a".into(), FinishReason::Length)]));
    assert_eq!(s.schedule(), Ok(None));
}

#[test]
fn a_block_is_taken_when_its_first_token_comes() {
    for (len, blocks, after_one_more) in
        [(63, 1, 1), (64, 1, 2), (65, 2, 2), (127, 2, 2), (128, 2, 3), (129, 3, 3)]
    {
        let mut s = scheduler(config(4, 64));
        s.add(request("a", len, 9)).unwrap();
        run(&mut s);
        assert_eq!(s.stats().used_blocks, blocks, "{len} tokens");
        run(&mut s);
        assert_eq!(s.stats().used_blocks, after_one_more, "{len} tokens and one");
    }
}

#[test]
fn a_long_prompt_is_computed_in_chunks_and_sampled_once() {
    let mut s = scheduler(SchedulerConfig { max_batched_tokens: 16, ..config(4, 16) });
    s.add(request("a", 40, 1)).unwrap();
    for (positions, samples) in [(0..16, 0), (16..32, 0), (32..40, 1)] {
        let step = s.schedule().unwrap().unwrap();
        assert_eq!(step.positions, positions.collect::<Vec<i64>>());
        assert_eq!(step.sample_rows.len(), samples);
        s.update(&vec![7; samples], None).unwrap();
    }
    assert!(!s.has_unfinished());
}

#[test]
fn a_long_prompt_does_not_hold_up_those_that_generate() {
    let mut s = scheduler(SchedulerConfig { max_batched_tokens: 16, ..config(8, 16) });
    s.add(request("a", 2, 9)).unwrap();
    run(&mut s);
    s.add(request("long", 40, 1)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 1), ("long", 15)]));
    assert_eq!(ran(&mut s), counts(&[("a", 1), ("long", 15)]));
    s.add(request("next", 3, 1)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 1), ("long", 10), ("next", 3)]));
}

#[test]
fn no_more_than_max_num_seqs_run() {
    let mut s = scheduler(SchedulerConfig { max_num_seqs: 2, ..config(8, 4) });
    for id in ["a", "b", "c"] {
        s.add(request(id, 2, 2)).unwrap();
    }
    assert_eq!(ran(&mut s), counts(&[("a", 2), ("b", 2)]));
    assert_eq!(ran(&mut s), counts(&[("a", 1), ("b", 1)]));
    assert_eq!(ran(&mut s), counts(&[("c", 2)]));
}

#[test]
fn the_first_that_waits_is_not_passed_by_a_smaller_one() {
    let mut s = scheduler(config(4, 4));
    s.add(request("a", 8, 3)).unwrap();
    run(&mut s);
    s.add(request("large", 12, 1)).unwrap();
    s.add(request("small", 1, 1)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 1)]));
    assert_eq!(ran(&mut s), counts(&[("a", 1)]));
    assert_eq!(ran(&mut s), counts(&[("large", 12), ("small", 1)]));
}

#[test]
fn blocks_that_a_chunked_prompt_still_needs_are_not_given_to_a_newcomer() {
    let mut s = scheduler(SchedulerConfig { max_batched_tokens: 6, ..config(4, 4) });
    s.add(request("a", 11, 1)).unwrap();
    s.add(request("b", 8, 1)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 6)]));
    assert_eq!(ran(&mut s), counts(&[("a", 5)])); // one token of budget and one block are left, but b needs two
    assert_eq!(ran(&mut s), counts(&[("b", 6)]));
    assert_eq!(s.stats().preemptions, 0);
}

#[test]
fn the_watermark_keeps_blocks_free_beside_others_and_never_for_one_alone() {
    for watermark in [0.25, 0.01] {
        let mut s = scheduler(SchedulerConfig { watermark, ..config(4, 4) });
        s.add(request("a", 16, 1)).unwrap();
        assert_eq!(ran(&mut s), counts(&[("a", 16)]));
        s.add(request("b", 4, 9)).unwrap();
        s.add(request("c", 12, 1)).unwrap();
        assert_eq!(ran(&mut s), counts(&[("b", 4)])); // 3 blocks are free and one of them must stay so
        s.abort("c");
        s.add(request("d", 4, 1)).unwrap();
        assert_eq!(ran(&mut s), counts(&[("b", 1), ("d", 4)]));
    }
}

#[test]
fn the_last_in_the_order_gives_way_and_is_computed_anew() {
    let mut s = scheduler(config(4, 4));
    s.add(request("a", 7, 4)).unwrap();
    s.add(request("b", 7, 3)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 7), ("b", 7)]));
    assert_eq!(ran(&mut s), counts(&[("a", 1), ("b", 1)]));
    // Each has filled its two blocks, and a needs a third.
    let step = s.schedule().unwrap().unwrap();
    assert_eq!((names(&step.request_ids), names(&step.preempted)), (vec!["a"], vec!["b"]));
    assert_eq!((s.stats().running, s.stats().waiting, s.stats().preemptions), (1, 1, 1));
    s.update(&[7], None).unwrap();
    // b has 9 tokens and finds one free block, so it waits for a to end, then runs from its start, its output included.
    assert_eq!(run(&mut s), (counts(&[("a", 1)]), vec![("a".into(), FinishReason::Length)]));
    let step = s.schedule().unwrap().unwrap();
    assert_eq!((&step.token_ids[5..], &step.sample_rows[..]), (&[5, 6, 7, 7][..], &[8][..]));
    assert_eq!(s.update(&[7], None), Ok(vec![("b".into(), FinishReason::Length)]));
}

#[test]
fn a_request_that_is_last_itself_gives_way_itself() {
    let mut s = scheduler(config(3, 4));
    s.add(request("a", 5, 9)).unwrap();
    s.add(request("b", 4, 3)).unwrap();
    run(&mut s);
    let step = s.schedule().unwrap().unwrap();
    assert_eq!((names(&step.request_ids), names(&step.preempted)), (vec!["a"], vec!["b"]));
}

#[test]
fn a_preempted_request_goes_before_later_ones() {
    let mut s = scheduler(config(4, 4));
    s.add(request("a", 8, 2)).unwrap();
    s.add(request("b", 8, 2)).unwrap();
    run(&mut s);
    s.add(request("c", 1, 1)).unwrap();
    let (first, ended) = run(&mut s); // a needs a block; b gives way, and nothing is admitted in such a step
    assert_eq!((first, ended.len()), (counts(&[("a", 1)]), 1));
    assert_eq!(ran(&mut s), counts(&[("b", 9), ("c", 1)]));
}

#[test]
fn by_priority_the_lower_number_goes_first_and_the_highest_gives_way() {
    let mut s = scheduler(SchedulerConfig { policy: Policy::Priority, ..config(6, 4) });
    for (id, priority) in [("low", 5), ("high", -1), ("same", 5)] {
        s.add(NewRequest { priority, ..request(id, 8, 3) }).unwrap();
    }
    assert_eq!(ran(&mut s), counts(&[("high", 8), ("low", 8), ("same", 8)]));
    let step = s.schedule().unwrap().unwrap();
    assert_eq!((names(&step.request_ids), names(&step.preempted)), (vec!["high", "low"], vec!["same"]));
}

#[test]
fn who_waits_does_not_push_out_who_runs() {
    let mut s = scheduler(SchedulerConfig { policy: Policy::Priority, max_num_seqs: 1, ..config(4, 4) });
    s.add(NewRequest { priority: 9, ..request("low", 4, 2) }).unwrap();
    run(&mut s);
    s.add(NewRequest { priority: 0, ..request("high", 4, 2) }).unwrap();
    assert_eq!(ran(&mut s), counts(&[("low", 1)]));
    assert_eq!(ran(&mut s), counts(&[("high", 4)]));
}

#[test]
fn fcfs_knows_no_priority() {
    let mut s = scheduler(config(4, 4));
    s.add(NewRequest { priority: 5, ..request("a", 2, 1) }).unwrap();
    s.add(NewRequest { priority: -5, ..request("b", 2, 1) }).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 2), ("b", 2)]));
}

#[test]
fn a_request_that_outgrows_the_pool_or_the_model_ends_by_length() {
    let whole_pool = config(2, 4);
    let small_model = SchedulerConfig { max_model_len: Some(6), ..config(9, 4) };
    // A sampled token needs no slot before it is computed, so a prompt that fills the pool still gets one.
    for (config, prompt, generated) in [(whole_pool.clone(), 5, 3), (whole_pool, 8, 1), (small_model, 4, 2)] {
        let mut s = scheduler(config);
        s.add(request("a", prompt, usize::MAX)).unwrap();
        for _ in 1..generated {
            assert_eq!(run(&mut s).1, []);
        }
        assert_eq!(run(&mut s).1, [("a".into(), FinishReason::Length)]);
        assert_eq!(s.stats().used_blocks, 0);
    }
}

#[test]
fn a_stop_token_ends_a_request_and_is_the_better_reason() {
    let mut s = scheduler(config(4, 4));
    for (id, stop_token_ids) in [("a", vec![7]), ("b", vec![8])] {
        s.add(NewRequest { stop_token_ids, ..request(id, 2, 1) }).unwrap();
    }
    assert_eq!(run(&mut s).1, [("a".into(), FinishReason::Stop), ("b".into(), FinishReason::Length)]);
    assert_eq!(s.stats().finished, 2);
}

#[test]
fn an_aborted_request_is_gone_at_once_and_its_blocks_when_no_step_writes_them() {
    let mut s = scheduler(SchedulerConfig { max_num_seqs: 1, ..config(4, 4) });
    s.add(request("a", 4, 9)).unwrap();
    s.add(request("waits", 4, 9)).unwrap();
    run(&mut s);
    assert!(s.abort("waits") && !s.abort("waits") && !s.abort("never seen"));
    let step = s.schedule().unwrap().unwrap();
    assert!(s.abort("a") && !s.has_unfinished());
    assert_eq!((s.stats().running, s.stats().used_blocks), (0, 2));
    s.check_invariants().unwrap();
    // The name is free, for a request that the step in flight does not know.
    s.add(request("a", 1, 1)).unwrap();
    assert_eq!(s.update(&vec![7; step.sample_rows.len()], None), Ok(vec![]));
    assert_eq!((s.stats().used_blocks, s.stats().aborted), (0, 2));
    assert_eq!(s.output_token_ids("a"), Ok(&[][..]));
    assert_eq!(run(&mut s).1, [("a".into(), FinishReason::Length)]);
    s.add(request("b", 4, 9)).unwrap();
    run(&mut s);
    assert!(s.abort("b"));
    assert_eq!(s.stats().used_blocks, 0);
}

#[test]
fn a_refused_request_leaves_no_trace() {
    let mut s = scheduler(SchedulerConfig { max_waiting: Some(1), max_model_len: Some(12), ..config(2, 4) });
    s.add(request("a", 1, 1)).unwrap();
    let (before, negative) = (s.stats(), 1 << 31);
    for (new, message) in [
        (request("b", 0, 1), "token_ids: expected at least one token, got an empty prompt"),
        (request("b", 1, 0), "max_tokens: expected at least 1, got 0"),
        (request("b", 12, 1), "token_ids: expected fewer than 12 tokens (max_model_len), got 12"),
        (request("b", 9, 1), "token_ids: expected at most 8 tokens (num_blocks * block_size), got 9"),
        (request("a", 1, 1), "request_id: \"a\" is in use"),
        (request("b", 1, 1), "the waiting queue is full: 1 requests wait (max_waiting)"),
        (
            NewRequest { token_ids: vec![1, negative], ..request("b", 1, 1) },
            "token_ids: expected ids from 0 to 2147483647, got 2147483648",
        ),
        (
            NewRequest { stop_token_ids: vec![negative], ..request("b", 1, 1) },
            "stop_token_ids: expected ids from 0 to 2147483647, got 2147483648",
        ),
    ] {
        assert_eq!(s.add(new).unwrap_err().to_string(), message);
        let stats = Stats { refused_full: 0, refused_invalid: 0, ..s.stats() };
        assert_eq!((stats, s.check_invariants()), (before, Ok(())));
    }
    assert_eq!((s.stats().refused_full, s.stats().refused_invalid), (1, 7));
    assert_eq!(run(&mut s).1.len(), 1);
}

#[test]
fn calls_out_of_turn_are_refused_and_the_step_stays() {
    let mut s = scheduler(config(4, 4));
    assert_eq!(s.update(&[], None), Err(SchedulerError::NoStep));
    assert_eq!(s.token_ids("a"), Err(SchedulerError::UnknownId("a".into())));
    s.add(request("a", 3, 1)).unwrap();
    s.schedule().unwrap().unwrap();
    assert_eq!(s.schedule(), Err(SchedulerError::StepInFlight));
    assert_eq!(s.update(&[], None), Err(SchedulerError::SampleCount { expected: 1, got: 0 }));
    assert_eq!(s.update(&[1, 2], None), Err(SchedulerError::SampleCount { expected: 1, got: 2 }));
    assert_eq!(s.update(&[-3], None), Err(SchedulerError::SampledId(-3)));
    assert_eq!(s.update(&[3], None).unwrap().len(), 1);
}

#[test]
fn every_limit_has_a_range() {
    let good = config(4, 4);
    let huge = 1 << 31;
    let refused = [
        (
            SchedulerConfig { num_blocks: 0, ..good.clone() },
            "num_blocks: expected an integer from 1 to 2147483647, got 0",
        ),
        (SchedulerConfig { num_blocks: huge, ..good.clone() }, "num_blocks: "),
        (SchedulerConfig { block_size: 0, ..good.clone() }, "block_size: "),
        (SchedulerConfig { max_batched_tokens: 0, ..good.clone() }, "max_batched_tokens: "),
        (SchedulerConfig { max_num_seqs: 0, ..good.clone() }, "max_num_seqs: "),
        (SchedulerConfig { max_waiting: Some(0), ..good.clone() }, "max_waiting: "),
        (SchedulerConfig { max_model_len: Some(0), ..good.clone() }, "max_model_len: "),
        (
            SchedulerConfig { watermark: 1.0, ..good.clone() },
            "watermark: expected a number from 0 to below 1, got 1",
        ),
        (SchedulerConfig { watermark: -0.1, ..good.clone() }, "watermark: "),
        (SchedulerConfig { watermark: f64::NAN, ..good.clone() }, "watermark: "),
    ];
    for (config, message) in refused {
        let error = Scheduler::new(config).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    // The largest limits cost nothing and do not overflow.
    let largest = SchedulerConfig { num_blocks: huge - 1, block_size: huge - 1, ..good };
    assert_eq!(largest.capacity(), huge - 1);
    let mut s = scheduler(largest);
    s.add(request("a", 3, usize::MAX)).unwrap();
    assert_eq!(ran(&mut s), counts(&[("a", 3)]));
}

/// Breaks a sound state in one place; what the check must say of it.
type Damage = (&'static str, fn(&mut Scheduler));

#[test]
fn check_invariants_finds_every_kind_of_damage() {
    // In each state "a" runs (key 0), "b" runs (key 1), "c" waits (key 2), and key 3 is free.
    let state = |in_flight: bool| {
        let mut s = scheduler(SchedulerConfig { max_batched_tokens: 10, max_num_seqs: 2, ..config(9, 4) });
        for id in ["a", "b", "c", "d"] {
            s.add(request(id, 5, 9)).unwrap();
        }
        s.abort("d");
        run(&mut s);
        if in_flight {
            s.schedule().unwrap().unwrap();
        }
        s.check_invariants().unwrap();
        s
    };
    let damages: [Damage; 20] = [
        ("block 0 is lost", |s| s.requests.tables[0] = Default::default()),
        ("a table has another length: \"a\"", |s| {
            assert!(s.pool.grow(&mut s.requests.tables[0], 1));
        }),
        ("a table has another length: \"b\"", |s| s.pool.release(&mut s.requests.tables[1])),
        ("a block was offered to the cache before it was full: \"a\"", |s| s.requests.offered[0] = 2),
        ("a table has another length: \"a\"", |s| s.requests.computed[0] -= 1),
        ("more is computed than there is: \"a\"", |s| s.requests.computed[0] += 2),
        ("a request has fewer tokens than it knows: \"c\"", |s| s.requests.len[2] += 1),
        ("a request has too many drafts: \"a\"", |s| s.requests.tokens[0].push(1)),
        ("a request is in both queues or in none: \"a\"", |s| {
            s.running.remove(0);
        }),
        ("a request is in both queues or in none: \"c\"", |s| s.running.push(2)),
        ("a request is in the wrong queue: \"c\"", |s| s.requests.phase[2] = request::Phase::Running),
        ("those that run are not in the order of service", |s| s.running.reverse()),
        ("seats for forks are counted wrongly", |s| s.kept_seats = 1),
        ("a request's name is lost: \"b\"", |s| {
            s.names.insert("b".into(), 0);
        }),
        ("names and requests differ in number", |s| {
            s.names.insert("e".into(), 0);
        }),
        ("a request is too long: \"c\"", |s| {
            s.requests.tokens[2] = vec![1; 15];
            s.requests.len[2] = 15;
        }),
        ("a waiting request has computed tokens: \"b\"", |s| {
            s.running.remove(1);
            s.requests.phase[1] = request::Phase::Waiting;
            s.waiting.insert(&s.config, &s.requests, 1);
        }),
        ("more requests run than max_num_seqs", |s| s.config.max_num_seqs = 1),
        ("free keys and empty slots differ", |s| s.requests.free_keys.push(0)),
        ("free keys and empty slots differ", |s| s.requests.free_keys.clear()),
    ];
    let damages_in_flight: [Damage; 4] = [
        ("the step in flight and its requests differ", |s| s.flight.land()),
        ("the step in flight and its requests differ", |s| s.flight.keys.push(0)),
        ("more is computed than there is: \"a\"", |s| s.requests.planned[0] += 1),
        ("the step in flight is larger than max_batched_tokens", |s| s.config.max_batched_tokens = 1),
    ];
    let cases = damages.map(|damage| (false, damage)).into_iter().chain(damages_in_flight.map(|d| (true, d)));
    for (in_flight, (message, damage)) in cases {
        let mut s = state(in_flight);
        damage(&mut s);
        assert_eq!(s.check_invariants(), Err(SchedulerError::Invariant(message.into())));
    }
}

#[test]
fn under_fcfs_nobody_runs_before_one_that_waits() {
    let mut s = scheduler(SchedulerConfig { policy: Policy::Priority, ..config(4, 4) });
    s.add(NewRequest { priority: 1, ..request("late", 4, 9) }).unwrap();
    run(&mut s);
    s.add(NewRequest { priority: 0, ..request("early", 16, 9) }).unwrap();
    s.check_invariants().unwrap();
    s.config.policy = Policy::Fcfs;
    let message = "a request runs although one before it waits".to_string();
    assert_eq!(s.check_invariants(), Err(SchedulerError::Invariant(message)));
}
