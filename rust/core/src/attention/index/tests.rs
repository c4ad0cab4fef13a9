//! Every pair of formats at every level: the formula, and the same bits from pages, alone, in a batch, on any threads.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::attention::tests::{numbers, with_threads};
use crate::cache::layout::{PAGE_TOKENS, index_page_bytes};
use crate::cache::pages::{Pages, PagesMut, write};
use crate::cache::{fp8, int8};
use crate::topk::{self, Scores};

const FORMATS: [&str; 5] = ["f32", "bf16", "f16", "e4m3", "int8"];

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|l| l.available())
}

/// Whole numbers from -4 to 4, which every format holds and whose products and sums are exact.
fn whole(count: usize, seed: u64) -> Vec<f32> {
    numbers(count, seed).into_iter().map(|x| (x * 4.0).round()).collect()
}

/// Numbers in a format.
enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    E4m3(Vec<u8>),
    I8(Vec<i8>),
}

impl Stored {
    fn new(format: &str, values: &[f32]) -> Self {
        match format {
            "f32" => Self::F32(values.to_vec()),
            "bf16" => Self::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            "f16" => Self::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            "e4m3" => Self::E4m3(values.iter().map(|&x| fp8::encode_one(x)).collect()),
            _ => Self::I8(values.iter().map(|&x| x as i8).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(x) => Elements::F32(x),
            Self::Bf16(x) => Elements::Bf16(x),
            Self::F16(x) => Elements::F16(x),
            Self::E4m3(x) => Elements::E4m3(x),
            Self::I8(x) => Elements::I8(x),
        }
    }
}

/// The formula in f64, without a mask: [T, S].
fn formula(index: &IndexQueries<'_>, q: &[f32], k: &[f32], scales: &[f32]) -> Vec<f64> {
    let IndexQueries { count, heads, dim, weights, .. } = *index;
    let mut out = Vec::new();
    for t in 0..count {
        for (key, &scale) in k.chunks(dim).zip(scales) {
            let score: f64 = (0..heads)
                .map(|j| {
                    let q = &q[(t * heads + j) * dim..][..dim];
                    let dot: f64 = q.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    f64::from(weights[t * heads + j]) * dot.max(0.0)
                })
                .sum();
            out.push(score * f64::from(scale));
        }
    }
    out
}

fn top_k_of(scores: &[f32], rows: usize, columns: usize, k: usize) -> Vec<i32> {
    let mut out = vec![0; rows * k];
    let scores = Scores { values: Elements::F32(scores), rows, columns, lengths: None };
    topk::top_k(Level::Portable, scores, k, true, &mut out, &Arena::new()).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn formats_at_every_level_select_what_the_formula_does(
        queries in 0usize..40, keys in 0usize..700, heads in prop::sample::select(vec![1usize, 5, 16, 32, 33, 64, 70, 130]),
        dim in prop::sample::select(vec![1usize, 2, 6, 8, 36, 64, 128]), k in 1usize..400,
        formats in (prop::sample::select(&FORMATS[..]), prop::sample::select(&FORMATS[..])), threads in 1usize..4,
        seed in any::<u64>(),
    ) {
        let (q, kv) = (whole(queries * heads * dim, seed), whole(keys * dim, seed + 1));
        let (weights, scales) = (whole(queries * heads, seed + 2), whole(keys, seed + 3));
        let (stored_q, stored_k) = (Stored::new(formats.0, &q), Stored::new(formats.1, &kv));
        let index = IndexQueries { values: stored_q.elements(), weights: &weights, count: queries, heads, dim };
        let mut want: Vec<f32> = formula(&index, &q, &kv, &scales).into_iter().map(|x| x as f32).collect();
        let positions: Vec<i64> =
            (0..queries as i64).map(|t| (t * 7919 + seed as i64 % 1000) % (keys as i64 + 20) - 10).collect();
        for (row, &position) in want.chunks_mut(keys.max(1)).zip(&positions) {
            row.iter_mut().skip((position + 1).max(0) as usize).for_each(|x| *x = f32::NEG_INFINITY);
        }
        let arena = IndexArena::new();
        for level in levels() {
            let indexer =
                Indexer::contiguous(level, index, stored_k.elements(), keys, Some(&scales), Some(&positions)).unwrap();
            let mut got = vec![f32::NAN; queries * keys];
            with_threads(threads, || indexer.scores(keys, &mut got, &arena)).unwrap();
            prop_assert_eq!(&got, &want, "{:?}", level);
            let mut chosen = vec![0; queries * k];
            with_threads(threads, || indexer.top_k(k, true, &mut chosen, &arena)).unwrap();
            prop_assert_eq!(&chosen, &top_k_of(&want, queries, keys, k), "{:?}", level);
        }
    }

    #[test]
    fn pages_of_codes_score_as_their_codes_and_scales_do(
        lens in prop::collection::vec((0usize..5, 0usize..300), 1..4), heads in 1usize..70,
        dim in prop::sample::select(vec![4usize, 36, 128]), int8_keys: bool,
        q_format in prop::sample::select(&FORMATS[..]), seed in any::<u64>(),
    ) {
        let lens: Vec<(usize, usize)> = lens.into_iter().map(|(n, before)| (n, n + before)).collect();
        let columns = lens.iter().map(|(_, len)| len.div_ceil(PAGE_TOKENS)).max().unwrap();
        let blocks = lens.len() * columns + 1;
        let (rows, layout) = (numbers(blocks * PAGE_TOKENS * dim, seed), Layout::Index(dim));
        let slots: Vec<i64> = (0..(blocks * PAGE_TOKENS) as i64).collect();
        let (mut bytes, mut signed) = (vec![0; blocks * index_page_bytes(dim)], vec![0; blocks * index_page_bytes(dim)]);
        write("k", Elements::F32(&rows), &slots, PagesMut::Fp8(&mut bytes), layout, blocks).unwrap();
        write("k", Elements::F32(&rows), &slots, PagesMut::Int8(&mut signed), layout, blocks).unwrap();
        let cache = Cache::new(if int8_keys { Pages::Int8(&signed) } else { Pages::Fp8(&bytes) }, layout, blocks).unwrap();
        let tables: Vec<i32> = (0..(lens.len() * columns) as i32).map(|i| blocks as i32 - 1 - i).collect();
        let count: usize = lens.iter().map(|l| l.0).sum();
        let seq_lens: Vec<i32> = lens.iter().map(|l| l.1 as i32).collect();
        let mut starts = vec![0];
        lens.iter().for_each(|l| starts.push(starts[starts.len() - 1] + l.0 as i32));
        let batch = PagedBatch { block_tables: &tables, seq_lens: &seq_lens, query_start_loc: &starts };
        let (q, weights) = (whole(count * heads * dim, seed + 1), numbers(count * heads, seed + 2));
        let stored_q = Stored::new(q_format, &q);
        let index = IndexQueries { values: stored_q.elements(), weights: &weights, count, heads, dim };
        let (longest, arena) = (lens.iter().map(|l| l.1).max().unwrap(), IndexArena::new());
        for level in levels() {
            let paged = Indexer::paged(level, index, cache, batch).unwrap();
            let mut scores = vec![f32::NAN; count * longest];
            with_threads(1, || paged.scores(longest, &mut scores, &arena)).unwrap();
            let mut again = vec![f32::NAN; count * longest];
            with_threads(3, || paged.scores(longest, &mut again, &arena)).unwrap();
            prop_assert_eq!(&scores, &again);
            let mut chosen = vec![0; count * 50];
            with_threads(3, || paged.top_k(50, true, &mut chosen, &arena)).unwrap();
            prop_assert_eq!(&chosen, &top_k_of(&scores, count, longest, 50), "{:?}", level);

            let mut first = 0;
            for (b, &(n, len)) in lens.iter().enumerate() {
                let (mut codes, mut signed, mut scales) = (vec![0; len * dim], vec![0; len * dim], vec![0.0; len]);
                for s in 0..len {
                    let slot = tables[b * columns + s / PAGE_TOKENS] as usize * PAGE_TOKENS + s % PAGE_TOKENS;
                    let row = &rows[slot * dim..][..dim];
                    scales[s] = if int8_keys {
                        int8::quantize_row(row, &mut signed[s * dim..][..dim])
                    } else {
                        fp8::quantize_group(row, &mut codes[s * dim..][..dim])
                    };
                }
                let k = if int8_keys { Elements::I8(&signed) } else { Elements::E4m3(&codes) };
                let index = IndexQueries {
                    values: index.values.slice(first * heads * dim, n * heads * dim),
                    weights: &weights[first * heads..][..n * heads],
                    count: n,
                    ..index
                };
                let alone = Indexer::contiguous(level, index, k, len, Some(&scales), None).unwrap();
                let mut got = vec![f32::NAN; n * len];
                with_threads(2, || alone.scores(len, &mut got, &arena)).unwrap();
                let mut wide = vec![0.0; len * dim];
                k.widen(0, &mut wide);
                let want = formula(&index, &q[first * heads * dim..], &wide, &scales);
                for i in 0..n * len {
                    let (t, s) = (i / len, i % len);
                    prop_assert_eq!(scores[(first + t) * longest + s].to_bits(), got[i].to_bits());
                    // 128 products of whole numbers and codes are summed without an error worth naming; then 70 heads.
                    let bound = 1e-4 * (1.0 + want[i].abs());
                    prop_assert!(got[i] == f32::NEG_INFINITY || (f64::from(got[i]) - want[i]).abs() <= bound);
                }
                first += n;
            }
        }
    }
}

#[test]
fn codes_become_the_bf16_of_their_value() {
    let codes: Vec<u8> = (0..=255).chain(3..40).collect();
    let bytes: Vec<i8> = (-128..=127).chain(3..40).collect();
    for level in levels().filter(|&l| l >= Level::Avx512) {
        let mut out = vec![0; codes.len()];
        kernel::to_bf16(level, Elements::E4m3(&codes), &mut out);
        for (&code, &bits) in codes.iter().zip(&out) {
            let (got, want) = (bf16::from_bits(bits).to_f32(), fp8::decode_one(code));
            assert!(got == want || (got.is_nan() && want.is_nan()), "{code:#x}");
        }
        kernel::to_bf16(level, Elements::I8(&bytes), &mut out);
        assert!(
            bytes.iter().zip(&out).all(|(&byte, &bits)| bf16::from_bits(bits).to_f32() == f32::from(byte))
        );
    }
}

#[test]
fn extreme_bytes_are_multiplied_exactly() {
    let (q, k) = (vec![-128i8; 64 * 128], [vec![-128i8; 128], vec![127; 128]].concat());
    let index = IndexQueries { values: Elements::I8(&q), weights: &[1.0; 64], count: 1, heads: 64, dim: 128 };
    for level in levels() {
        let indexer = Indexer::contiguous(level, index, Elements::I8(&k), 2, None, Some(&[1])).unwrap();
        let mut got = [0.0; 2];
        indexer.scores(2, &mut got, &IndexArena::new()).unwrap();
        assert_eq!(got, [64.0 * 128.0 * 16384.0, 0.0]);
    }
}

#[test]
fn a_key_that_is_not_finite_disturbs_only_its_own_score() {
    for format in ["f32", "bf16", "e4m3"] {
        let mut k = numbers(200 * 64, 5);
        let q = Stored::new(format, &numbers(3 * 20 * 64, 6));
        let weights = numbers(60, 7);
        let index = IndexQueries { values: q.elements(), weights: &weights, count: 3, heads: 20, dim: 64 };
        let score = |level, k: &[f32]| {
            let k = Stored::new(format, k);
            let mut got = vec![0.0; 600];
            let indexer =
                Indexer::contiguous(level, index, k.elements(), 200, None, Some(&[199; 3])).unwrap();
            indexer.scores(200, &mut got, &IndexArena::new()).unwrap();
            got
        };
        for level in levels() {
            let clean = score(level, &k);
            k[150 * 64 + 3] = f32::NAN;
            let got = score(level, &k);
            for (i, (clean, got)) in clean.iter().zip(&got).enumerate() {
                assert!(if i % 200 == 150 { got.is_nan() } else { clean == got }, "{format}, {level:?}, {i}");
            }
            k[150 * 64 + 3] = 0.5;
        }
    }
}

#[test]
fn a_bad_shape_names_its_argument() {
    let (q, k) = (vec![0.0; 8], vec![0.0; 12]);
    let index = IndexQueries { values: Elements::F32(&q), weights: &[1.0; 2], count: 1, heads: 2, dim: 4 };
    let error = |keys, scales, positions| {
        let r = Indexer::contiguous(Level::best(), index, Elements::F32(&k), keys, scales, positions);
        r.err().unwrap().to_string()
    };
    assert!(error(4, None, None).starts_with("k: expected 16 values"));
    assert_eq!(error(3, Some(&[1.0][..]), None), "k_scale: expected [3], got [1]");
    assert_eq!(
        error(3, Some(&[1.0, 1.0, f32::NAN][..]), None),
        "k_scale: expected finite scales, got NaN at 2"
    );
    assert_eq!(error(3, None, Some(&[1, 2][..])), "q_positions: expected [1], got [2]");
    let indexer = Indexer::contiguous(Level::best(), index, Elements::F32(&k), 3, None, None).unwrap();
    let e = indexer.scores(2, &mut [0.0; 2], &IndexArena::new()).unwrap_err().to_string();
    assert_eq!(e, "out: expected at least 3 columns, got 2");
    assert_eq!(
        indexer.top_k(0, true, &mut [], &IndexArena::new()).unwrap_err().to_string(),
        "top_k: expected at least 1, got 0"
    );
}
