//! The selection against its definition: the head of the sorted row.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

/// Sorts the whole row: the definition.
fn reference(scores: &[f32], k: usize) -> Vec<i32> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|&s| scores[s] != f32::NEG_INFINITY).collect();
    let rank = |s: usize| (!scores[s].is_nan(), if scores[s].is_nan() { 0.0 } else { scores[s] });
    order.sort_by(|&a, &b| rank(b).partial_cmp(&rank(a)).unwrap().then(a.cmp(&b)));
    let mut out: Vec<i32> = order.into_iter().map(|s| s as i32).take(k).collect();
    out.resize(k, PADDING);
    out
}

/// The same set in rising order.
fn rising(mut chosen: Vec<i32>) -> Vec<i32> {
    let found = chosen.iter().filter(|&&s| s != PADDING).count();
    chosen[..found].sort_unstable();
    chosen
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|l| l.available())
}

/// What every level selects of one row.
fn check(scores: &[f32], k: usize) {
    let want = reference(scores, k);
    let row = |columns| Row { scores: Elements::F32(scores), start: 0, columns };
    for level in levels() {
        let mut selector = Selector::default();
        let mut out = vec![7; k];
        selector.select(level, row(scores.len()), true, &mut out);
        assert!(out == want, "{level:?}, k = {k}, {} scores", scores.len());
        // A selector carries nothing from one row to the next.
        let half = scores.len() / 2;
        selector.select(level, row(half), true, &mut out);
        assert!(out == reference(&scores[..half], k), "{level:?}, half");
        selector.select(level, row(scores.len()), false, &mut out);
        assert!(out == rising(want.clone()), "{level:?}, rising order");
    }
}

/// What selectors of parts of a row find together.
fn check_parts(scores: &[f32], k: usize, parts: usize, piece: usize) {
    for level in levels() {
        let size = scores.len().div_ceil(parts).max(1);
        let mut selectors: Vec<Selector> = Vec::new();
        for (p, part) in scores.chunks(size).enumerate() {
            let mut selector = Selector::default();
            selector.begin(k, scores.len());
            for (i, scores) in part.chunks(piece).enumerate() {
                selector.push(level, scores, p * size + i * piece);
            }
            selectors.push(selector);
        }
        if selectors.is_empty() {
            continue;
        }
        let (first, later) = selectors.split_at_mut(1);
        later.iter_mut().for_each(|later| first[0].absorb(level, later));
        let mut out = vec![7; k];
        first[0].finish(level, true, &mut out);
        assert!(out == reference(scores, k), "{level:?}, {parts} parts");
    }
}

fn score() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-3i32..3).prop_map(|x| x as f32),
        2 => any::<f32>(),
        1 => prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MIN]),
    ]
}

/// A long row from a seed: `values` different scores, `special` of a thousand of them NaN or infinite.
fn long_row(columns: usize, values: u64, special: u64, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..columns)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = state >> 33;
            if draw % 1000 < special {
                return [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0][draw as usize % 4];
            }
            ((draw / 1000) % values) as f32 - values as f32 / 2.0
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn selection_is_the_head_of_the_sorted_row(scores in prop::collection::vec(score(), 0..3000), k in 1usize..300) {
        check(&scores, k);
    }

    #[test]
    fn parts_of_a_row_find_what_the_row_has(
        scores in prop::collection::vec(score(), 0..3000), k in 1usize..300, parts in 1usize..5, piece in 1usize..200,
    ) {
        check_parts(&scores, k, parts, piece);
    }

    #[test]
    fn the_kth_highest_key_and_the_keys_above_it(
        keys in prop::collection::vec(prop_oneof![0u32..4, any::<u32>(), 0x8000_0000u32..0x8000_0100], 1..400),
        k in 1usize..400, coarse in prop::sample::select(vec![0u32, 0, 14, 31]),
    ) {
        let k = k.min(keys.len());
        let mut sorted: Vec<u32> = keys.iter().map(|key| key >> coarse << coarse).collect();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let want = (sorted[k - 1], sorted.iter().filter(|&&key| key > sorted[k - 1]).count());
        for level in levels() {
            prop_assert_eq!(candidates::kth_highest(level, &keys, k, coarse, &mut Default::default()), want);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn long_rows_are_selected_through_a_guess(
        columns in 16_000usize..70_000, values in prop::sample::select(vec![1u64, 2, 50, 5000, 1 << 20]),
        special in prop::sample::select(vec![0u64, 3, 950, 1000]), k in prop::sample::select(vec![1usize, 100, 2048, 9000]),
        seed in any::<u64>(),
    ) {
        check(&long_row(columns, values, special, seed), k);
    }
}

#[test]
fn rows_made_to_mislead() {
    const COLUMNS: usize = 40_000;
    type Row = Box<dyn Fn(usize) -> f32>;
    let rows: [(&str, Row); 8] = [
        ("rising", Box::new(|i| (i / 3) as f32)),
        ("falling", Box::new(|i| -((i / 3) as f32))),
        ("alike", Box::new(|_| 1.0)),
        ("zeros of both signs", Box::new(|i| if i % 3 == 0 { 0.0 } else { -0.0 })),
        ("nothing", Box::new(|_| f32::NEG_INFINITY)),
        ("NaN", Box::new(|_| f32::NAN)),
        // What the sample sees, and what it does not.
        ("high in the sample alone", Box::new(|i| if i % (COLUMNS / 128) < 16 { 2.0 } else { 1.0 })),
        ("low in the sample alone", Box::new(|i| if i % (COLUMNS / 128) < 16 { f32::NAN } else { i as f32 })),
    ];
    for (name, row) in rows {
        println!("{name}");
        let scores: Vec<f32> = (0..COLUMNS).map(row).collect();
        for k in [1, 100, 2048, 39_999, 40_000, 50_000] {
            check(&scores, k);
        }
    }
}

#[test]
fn order_keys_are_in_the_order_of_numbers_and_back() {
    let numbers = [
        f32::MIN,
        -2.5,
        -f32::MIN_POSITIVE,
        -1e-45,
        0.0,
        1e-45,
        f32::MIN_POSITIVE,
        3.0,
        f32::MAX,
        f32::INFINITY,
    ];
    for pair in numbers.windows(2) {
        assert!(candidates::order_key(pair[0]) < candidates::order_key(pair[1]));
        assert_eq!(candidates::score_of(candidates::order_key(pair[1])), pair[1]);
    }
    assert_eq!(candidates::order_key(-0.0), candidates::order_key(0.0));
    assert!(candidates::order_key(f32::MIN) > candidates::order_key(f32::NEG_INFINITY));
}

#[test]
fn narrow_rows_and_lengths() {
    let wide = long_row(3 * 20_000, 90, 5, 3);
    let half: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let ieee: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x)).collect();
    let lengths = [20_000, 0, 17_001];
    let mut want = Vec::new();
    for (t, &length) in lengths.iter().enumerate() {
        want.extend(reference(&wide[t * 20_000..][..length as usize], 300));
    }
    for values in [Elements::F32(&wide), Elements::Bf16(&half), Elements::F16(&ieee)] {
        let scores = Scores { values, rows: 3, columns: 20_000, lengths: Some(&lengths) };
        let mut out = vec![7; 900];
        top_k(Level::best(), scores, 300, true, &mut out, &Arena::new()).unwrap();
        assert_eq!(out, want);
    }
}

#[test]
fn bad_arguments_name_themselves() {
    let numbers = [1.0, 2.0];
    let attempt = |rows, lengths, k, out: &mut [i32]| {
        let scores = Scores { values: Elements::F32(&numbers), rows, columns: 2, lengths };
        top_k(Level::best(), scores, k, true, out, &Arena::new()).unwrap_err().to_string()
    };
    assert_eq!(attempt(1, None, 0, &mut []), "k: expected at least 1, got 0");
    assert_eq!(attempt(1, Some(&[3]), 2, &mut [0; 2]), "lengths: expected values from 0 to 2, got 3");
    assert!(attempt(2, None, 1, &mut [0; 2]).starts_with("scores: "));
}
