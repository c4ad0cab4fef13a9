use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const MOST_WRITTEN: usize = 3;
const PAGES: u32 = 8;

/// Rows by block, page and place: a number that each write changes. What a failed step leaves anywhere is 0.
#[derive(Default)]
struct World {
    pages: BTreeMap<u32, u64>,
    host: BTreeMap<u32, u64>,
    truth: BTreeMap<u32, u64>,
    /// Places that are kept, and their rows.
    kept: Vec<(u32, u64)>,
    writes: u64,
}

impl World {
    fn read(&self, residencies: &Residencies, block: u32) -> u64 {
        match residencies.of(block) {
            Residency::Dirty(page) | Residency::Clean(page) => self.pages[&page],
            Residency::Host => self.host[&residencies.host_place(block).expect("it is on the host")],
            Residency::Absent => panic!("block {block} holds nothing"),
        }
    }

    fn check(&self, residencies: &Residencies) {
        residencies.check(self.kept.iter().map(|&(place, _)| place)).unwrap();
        for (&block, &row) in &self.truth {
            assert_eq!(self.read(residencies, block), row, "block {block}");
            if let Residency::Clean(_) = residencies.of(block) {
                assert_eq!(self.host[&residencies.host_place(block).unwrap()], row, "clean block {block}");
            }
        }
        for &(place, row) in &self.kept {
            assert_eq!(self.host[&place], row, "place {place}");
        }
    }
}

#[derive(Clone, Debug)]
enum Call {
    Free(u32),
    LetGo(usize),
    Step { keep: Vec<u32>, adopt: Vec<(u32, usize)>, write: Vec<u32>, fails: bool },
}

fn calls() -> impl Strategy<Value = Call> {
    let block = || 0u32..20;
    let step = (
        prop::collection::vec(block(), 0..3),
        prop::collection::vec((block(), 0usize..8), 0..2),
        prop::collection::vec(block(), 0..MOST_WRITTEN + 1),
        prop::bool::weighted(0.15),
    );
    prop_oneof![
        1 => block().prop_map(Call::Free),
        1 => (0usize..8).prop_map(Call::LetGo),
        6 => step.prop_map(|(keep, adopt, write, fails)| Call::Step { keep, adopt, write, fails }),
    ]
}

proptest! {
    /// Whatever is written, kept, adopted, freed and failed: each block's rows are where they are said to be, and kept ones stay.
    #[test]
    fn rows_are_where_they_are_said_to_be(calls in prop::collection::vec(calls(), 1..80)) {
        let mut residencies = Residencies::new(PAGES, MOST_WRITTEN);
        let mut world = World::default();
        let mut moves = Moves::default();
        for (step, call) in (1..).zip(calls) {
            match call {
                Call::Free(block) => {
                    residencies.forget(block);
                    world.truth.remove(&block);
                }
                Call::LetGo(place) => {
                    if place < world.kept.len() {
                        residencies.let_go(world.kept.swap_remove(place).0);
                    }
                }
                Call::Step { keep, adopt, write, fails } => {
                    residencies.begin(step, &mut moves);
                    let mut kept_now = Vec::new();
                    for block in keep {
                        if let Some(&row) = world.truth.get(&block) {
                            kept_now.push((residencies.keep(block, &mut moves), row));
                        }
                    }
                    // A kept block may be given away in the same step.
                    if step % 3 == 0 && let Some(&block) = world.truth.keys().next() {
                        residencies.forget(block);
                        world.truth.remove(&block);
                    }
                    for (block, place) in adopt {
                        if residencies.of(block) == Residency::Absent && let Some(&(place, row)) = world.kept.get(place) {
                            residencies.adopt(block, place);
                            world.truth.insert(block, row);
                        }
                    }
                    let mut written: Vec<u32> = write;
                    written.sort_unstable();
                    written.dedup();
                    for &block in &written {
                        residencies.write(block, true, &mut moves);
                    }
                    residencies.finish(&mut moves);
                    let garbage = |row: u64| if fails { 0 } else { row };
                    for &[page, place] in &moves.stores {
                        let row = garbage(world.pages[&(page as u32)]);
                        world.host.insert(place as u32, row);
                    }
                    for &[place, page] in &moves.loads {
                        let row = garbage(world.host[&(place as u32)]);
                        world.pages.insert(page as u32, row);
                    }
                    for &block in &written {
                        let page = residencies.page(block).expect("it is written");
                        if fails {
                            continue; // rows that count already stay as they are
                        }
                        if let Some(&row) = world.truth.get(&block) {
                            prop_assert_eq!(world.pages[&page], row, "block {} has its rows before it is written", block);
                        }
                        world.writes += 1;
                        world.pages.insert(page, world.writes);
                        world.truth.insert(block, world.writes);
                    }
                    if fails {
                        residencies.abandon();
                        // Blocks that would have got their first rows are given back.
                        for &block in written.iter().filter(|&block| !world.truth.contains_key(block)) {
                            residencies.forget(block);
                        }
                        kept_now.drain(..).for_each(|(place, _)| residencies.let_go(place));
                    } else {
                        residencies.land();
                        world.kept.append(&mut kept_now);
                    }
                }
            }
            world.check(&residencies);
        }
    }
}

#[test]
fn nothing_moves_while_pages_are_left() {
    let mut residencies = Residencies::new(100, 2);
    let mut moves = Moves::default();
    for block in 0..90 {
        residencies.begin(u64::from(block) + 1, &mut moves);
        residencies.write(block, false, &mut moves);
        residencies.finish(&mut moves);
        assert_eq!(moves, Moves::default());
        residencies.land();
    }
}

#[test]
fn pages_for_the_next_step_are_stored_before_they_are_needed() {
    let mut residencies = Residencies::new(PAGES, 2);
    let mut moves = Moves::default();
    for block in 0..40 {
        residencies.begin(u64::from(block) + 1, &mut moves);
        residencies.write(block, false, &mut moves);
        residencies.finish(&mut moves);
        assert!(moves.stores.len() <= 2);
        residencies.land();
        assert!(residencies.free() + residencies.clean() >= 1);
    }
    assert_eq!(
        (0..40).filter(|&block| residencies.of(block) == Residency::Host).count(),
        40 - PAGES as usize
    );
}

#[test]
fn kept_rows_stay_when_their_block_is_written_anew() {
    let mut residencies = Residencies::new(PAGES, 2);
    let mut moves = Moves::default();
    residencies.begin(1, &mut moves);
    residencies.write(0, false, &mut moves);
    residencies.finish(&mut moves);
    residencies.land();
    residencies.begin(2, &mut moves);
    let place = residencies.keep(0, &mut moves);
    assert_eq!(residencies.keep(0, &mut moves), place, "it is stored once");
    residencies.write(0, true, &mut moves);
    residencies.finish(&mut moves);
    assert_eq!(moves.stores, [[0, place as i32]]);
    residencies.land();
    assert_eq!((residencies.of(0), residencies.host_place(0)), (Residency::Dirty(0), None));
    residencies.begin(3, &mut moves);
    assert_ne!(residencies.keep(0, &mut moves), place);
}
