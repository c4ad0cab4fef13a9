//! Properties of the operators: equal to the formulas in f64, the same bits on any number of threads, from pages or from
//! contiguous rows, alone or in a batch, and (sparse over everything) as dense attention.

use half::bf16;
use proptest::prelude::*;

use super::attend::{Attention, AttentionQueries, KeyValueRows, Selection};
use super::batch::PagedBatch;
use super::index::{IndexArena, IndexQueries, Indexer};
use crate::cache::layout::{LatentLayout, PAGE_TOKENS};
use crate::cache::pages::{Cache, Layout, Pages, PagesMut, write};
use crate::elements::{Elements, ElementsMut};
use crate::simd::Level;
use crate::threads::Arena;
use crate::topk::{self, Scores};

/// Numbers in [-1, 1) from a seed.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

pub fn with_threads<R: Send>(count: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap().install(work)
}

fn best() -> Level {
    Level::best()
}

/// The same numbers in two dtypes.
#[derive(Debug, Clone)]
struct Numbers {
    single: Vec<f32>,
    half: Vec<bf16>,
}

impl Numbers {
    /// `half` makes the f32 numbers those of the bfloat16 ones.
    fn new(single: Vec<f32>, half: bool) -> Self {
        let rounded: Vec<bf16> = single.iter().map(|&x| bf16::from_f32(x)).collect();
        let single = if half { rounded.iter().map(|x| x.to_f32()).collect() } else { single };
        Self { single, half: rounded }
    }

    fn elements(&self, half: bool) -> Elements<'_> {
        if half { Elements::Bf16(&self.half) } else { Elements::F32(&self.single) }
    }

    fn row(&self, i: usize, width: usize) -> &[f32] {
        &self.single[i * width..][..width]
    }
}

/// One sequence of attention inputs.
#[derive(Debug, Clone)]
struct Case {
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    value_dim: usize,
    /// Inputs are bfloat16.
    half: bool,
    q: Numbers,
    kv: Numbers,
    /// Values apart from the keys.
    v: Option<Numbers>,
    sink: Option<Vec<f32>>,
}

fn cases() -> impl Strategy<Value = Case> {
    let shapes = (0usize..12, 0usize..700, 1usize..4, 1usize..20, 1usize..50, any::<u64>());
    let forms = (any::<bool>(), any::<bool>(), any::<bool>());
    (shapes, forms).prop_flat_map(|((queries, keys, kv_heads, group, dim, seed), (half, apart, sink))| {
        (1..=if apart { 40 } else { dim }).prop_map(move |value_dim| {
            let heads = kv_heads * group;
            let numbers = |count, i| Numbers::new(numbers(count, seed + i), half);
            Case {
                queries,
                keys,
                heads,
                kv_heads,
                dim,
                value_dim,
                half,
                q: numbers(queries * heads * dim, 0),
                kv: numbers(keys * kv_heads * dim, 1),
                v: apart.then(|| numbers(keys * kv_heads * value_dim, 3)),
                sink: sink.then(|| numbers(heads, 2).single),
            }
        })
    })
}

impl Case {
    fn scale(&self) -> f32 {
        (self.dim as f32).sqrt().recip() * 3.0
    }

    fn attention(&self, level: Level) -> Attention<'_> {
        let queries = AttentionQueries {
            values: self.q.elements(self.half),
            count: self.queries,
            heads: self.heads,
            dim: self.dim,
            scale: self.scale(),
            sink: self.sink.as_deref(),
        };
        let rows = KeyValueRows {
            keys: self.kv.elements(self.half),
            values: self.v.as_ref().map(|v| v.elements(self.half)),
            count: self.keys,
            heads: self.kv_heads,
            value_dim: self.value_dim,
        };
        Attention::contiguous(level, queries, rows, None).unwrap()
    }

    /// The last query alone.
    fn last(&self) -> Self {
        let mut last = Self { queries: 1, ..self.clone() };
        let first = (self.queries - 1) * self.heads * self.dim;
        last.q.single.drain(..first);
        last.q.half.drain(..first);
        last
    }

    fn dense(&self, level: Level) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; self.queries * self.heads * self.value_dim];
        let mut lse = vec![f32::NAN; self.queries * self.heads];
        self.attention(level).dense(ElementsMut::F32(&mut out), &mut lse).unwrap();
        (out, lse)
    }

    fn sparse(&self, level: Level, indices: &[i32], width: usize) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; self.queries * self.heads * self.value_dim];
        let mut lse = vec![f32::NAN; self.queries * self.heads];
        let selection = Selection { indices, width };
        self.attention(level).sparse(selection, ElementsMut::F32(&mut out), &mut lse).unwrap();
        (out, lse)
    }

    /// Every visible key in order, -1 beyond.
    fn every_key(&self) -> Vec<i32> {
        let visible = |t: usize| (self.keys + t + 1).saturating_sub(self.queries);
        (0..self.queries)
            .flat_map(|t| (0..self.keys).map(move |s| if s < visible(t) { s as i32 } else { -1 }))
            .collect()
    }

    /// The formula, in f64.
    fn formula(&self, indices: &[i32], width: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for t in 0..self.queries {
            let chosen: Vec<usize> = indices[t * width..][..width]
                .iter()
                .filter_map(|&s| usize::try_from(s).ok().filter(|&s| s < self.keys))
                .collect();
            for h in 0..self.heads {
                let group = h / (self.heads / self.kv_heads);
                let key = |s: usize| self.kv.row(s * self.kv_heads + group, self.dim);
                let value = |s: usize| match &self.v {
                    Some(v) => v.row(s * self.kv_heads + group, self.value_dim),
                    None => key(s),
                };
                let q = self.q.row(t * self.heads + h, self.dim);
                let dot =
                    |s: usize| key(s).iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let p: Vec<f64> = chosen.iter().map(|&s| (dot(s) * f64::from(self.scale())).exp()).collect();
                let sum: f64 = p.iter().sum();
                let sink = self.sink.as_ref().map_or(0.0, |x| f64::from(x[h]).exp());
                for d in 0..self.value_dim {
                    let total: f64 = chosen.iter().zip(&p).map(|(&s, p)| p * f64::from(value(s)[d])).sum();
                    out.push(if chosen.is_empty() { 0.0 } else { total / (sum + sink) });
                }
                lse.push(sum.ln());
            }
        }
        (out, lse)
    }
}

/// Values below 1 averaged over some hundred keys: the error is some 10 roundings of 6e-8 in the logits (which reach 3
/// sqrt(dim) / 3) and as many in the sums. bfloat16 products round each probability by at most 2^-9 of itself, and so their
/// average by at most 2^-9.
fn close(got: &[f32], want: &[f64], rounding: f64) -> bool {
    got.iter()
        .zip(want)
        .all(|(&g, &w)| f64::from(g) == w || (f64::from(g) - w).abs() <= rounding + 2e-5 * (1.0 + w.abs()))
}

fn bits(x: &(Vec<f32>, Vec<f32>)) -> Vec<u32> {
    x.0.iter().chain(&x.1).map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_is_the_formula_at_every_level(case in cases(), width in 0usize..400, seed in any::<u64>()) {
        let span = case.keys as f32 + 20.0;
        let indices: Vec<i32> =
            numbers(case.queries * width, seed).iter().map(|x| ((x + 1.0) / 2.0 * span) as i32 - 10).collect();
        let every = case.every_key();
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            let rounding = if case.half && level == Level::Avx512Bf16 { 2f64.powi(-9) } else { 0.0 };
            let (out, lse) = case.sparse(level, &indices, width);
            let (want_out, want_lse) = case.formula(&indices, width);
            prop_assert!(close(&out, &want_out, rounding) && close(&lse, &want_lse, 0.0), "sparse, {:?}", level);
            let (out, lse) = case.dense(level);
            let (want_out, want_lse) = case.formula(&every, case.keys);
            prop_assert!(close(&out, &want_out, rounding) && close(&lse, &want_lse, 0.0), "dense, {:?}", level);
        }
    }

    #[test]
    fn sparse_over_every_key_is_dense_bit_for_bit_on_any_threads(case in cases(), threads in 1usize..5) {
        let dense = with_threads(1, || case.dense(best()));
        let sparse = with_threads(threads, || case.sparse(best(), &case.every_key(), case.keys));
        prop_assert_eq!(bits(&dense), bits(&sparse));
        prop_assert_eq!(bits(&dense), bits(&with_threads(threads, || case.dense(best()))));
    }

    #[test]
    fn a_query_gives_the_same_bits_alone(case in cases()) {
        prop_assume!(case.queries > 0);
        let (out, lse) = case.dense(best());
        let row = case.heads * case.value_dim;
        let (alone, alone_lse) = case.last().dense(best());
        prop_assert_eq!(&alone[..], &out[out.len() - row..]);
        prop_assert_eq!(&alone_lse[..], &lse[lse.len() - case.heads..]);
    }

    #[test]
    fn what_no_query_chose_leaves_no_trace(case in cases(), seed in any::<u64>()) {
        // Every second key is chosen; the others, and what follows a query's position, become NaN.
        prop_assume!(case.keys > 1);
        let even: Vec<i32> = (0..case.queries).flat_map(|_| (0..case.keys as i32).step_by(2)).collect();
        let width = case.keys.div_ceil(2);
        let mut spoilt = case.clone();
        let spoil = |numbers: &mut Numbers, row: usize, from: usize, step: usize| {
            for s in (from..case.keys).step_by(step) {
                numbers.single[s * row..][..row].fill(f32::NAN);
                numbers.half[s * row..][..row].fill(bf16::NAN);
            }
        };
        spoil(&mut spoilt.kv, case.kv_heads * case.dim, 1, 2);
        spoilt.v.iter_mut().for_each(|v| spoil(v, case.kv_heads * case.value_dim, 1, 2));
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            prop_assert_eq!(bits(&case.sparse(level, &even, width)), bits(&spoilt.sparse(level, &even, width)));
        }
        let seen = (seed % case.keys as u64) as usize;
        let mut spoilt = case.clone();
        spoil(&mut spoilt.kv, case.kv_heads * case.dim, seen, 1);
        spoilt.v.iter_mut().for_each(|v| spoil(v, case.kv_heads * case.value_dim, seen, 1));
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            let ((out, lse), (clean, clean_lse)) = (spoilt.dense(level), case.dense(level));
            let whole = (0..case.queries).filter(|t| (case.keys + t + 1).saturating_sub(case.queries) <= seen).count();
            let (out_items, lse_items) = (whole * case.heads * case.value_dim, whole * case.heads);
            prop_assert_eq!(&out[..out_items], &clean[..out_items]);
            prop_assert_eq!(&lse[..lse_items], &clean_lse[..lse_items]);
        }
    }

    #[test]
    fn fp8_rows_count_as_their_bfloat16_values(
        queries in 1usize..3, keys in 1usize..300, heads in 1usize..20, c in 1usize..300, r in 0usize..20, seed in any::<u64>(),
    ) {
        let dim = c + r;
        let layout = Layout::Latent(LatentLayout::new(dim, c).unwrap());
        let blocks = keys.div_ceil(PAGE_TOKENS);
        let slots: Vec<i64> = (0..(blocks * PAGE_TOKENS) as i64).collect();
        let mut pages = vec![0u8; slots.len() * LatentLayout::new(dim, c).unwrap().fp8_row_bytes()];
        let rows = numbers(slots.len() * dim, seed);
        write("latent", Elements::F32(&rows), &slots, PagesMut::Fp8(&mut pages), layout, blocks).unwrap();
        let cache = Cache::new(Pages::Fp8(&pages), layout, blocks).unwrap();
        let mut wide = vec![0.0; rows.len()];
        cache.gather(&slots, &mut wide).unwrap();
        let wide: Vec<bf16> = wide[..keys * dim].iter().map(|&x| bf16::from_f32(x)).collect();
        let q: Vec<bf16> = numbers(queries * heads * dim, seed + 1).into_iter().map(bf16::from_f32).collect();
        let q = AttentionQueries { values: Elements::Bf16(&q), count: queries, heads, dim, scale: 0.3, sink: None };
        prop_assume!(queries <= keys);
        let table: Vec<i32> = (0..blocks as i32).collect();
        let batch = PagedBatch { block_tables: &table, seq_lens: &[keys as i32], query_start_loc: &[0, queries as i32] };
        let run = |attention: Attention<'_>| {
            let (mut out, mut lse) = (vec![f32::NAN; queries * heads * c], vec![f32::NAN; queries * heads]);
            attention.dense(ElementsMut::F32(&mut out), &mut lse).unwrap();
            (out, lse)
        };
        let fp8 = run(Attention::paged(Level::best(), q, cache, batch).unwrap());
        let rows = KeyValueRows { keys: Elements::Bf16(&wide), values: None, count: keys, heads: 1, value_dim: c };
        let half = run(Attention::contiguous(Level::best(), q, rows, None).unwrap());
        if Level::best() == Level::Avx512Bf16 {
            prop_assert_eq!(bits(&fp8), bits(&half));
        } else {
            // Codes times scales are not rounded in f32: keys of up to 1 differ by up to 2^-9.
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            prop_assert!(close(&fp8.0, &wide(&half.0), 2f64.powi(-9) * (1.0 + 0.6 * dim as f64)));
        }
    }

    #[test]
    fn pages_give_the_bits_of_contiguous_rows(
        lens in prop::collection::vec((0usize..5, 0usize..300), 0..5), heads in 1usize..5, dim in 2usize..40, seed in any::<u64>(),
        half: bool,
    ) {
        let lens: Vec<(usize, usize)> = lens.into_iter().map(|(queries, before)| (queries, queries + before)).collect();
        let columns = lens.iter().map(|(_, len)| len.div_ceil(PAGE_TOKENS)).max().unwrap_or(0) + 1;
        let blocks = lens.len() * columns + 1;
        let pages: Vec<bf16> = numbers(blocks * PAGE_TOKENS * dim, seed).into_iter().map(bf16::from_f32).collect();
        // Blocks in falling order, -1 where the sequence does not reach.
        let tables: Vec<i32> = (0..lens.len() * columns)
            .map(|i| if i % columns < lens[i / columns].1.div_ceil(PAGE_TOKENS) { (blocks - 1 - i) as i32 } else { -1 })
            .collect();
        let count: usize = lens.iter().map(|l| l.0).sum();
        let seq_lens: Vec<i32> = lens.iter().map(|l| l.1 as i32).collect();
        let starts: Vec<i32> = std::iter::once(0)
            .chain(lens.iter().scan(0, |n, l| { *n += l.0 as i32; Some(*n) }))
            .collect();
        let batch = PagedBatch { block_tables: &tables, seq_lens: &seq_lens, query_start_loc: &starts };
        let q_numbers = Numbers::new(numbers(count * heads * dim, seed + 1), half);
        let weights = numbers(count * heads, seed + 2);
        let width = dim / 2;
        let storage = Pages::Rows(Elements::Bf16(&pages));
        let latents = Cache::new(storage, Layout::Latent(LatentLayout::new(dim, width).unwrap()), blocks).unwrap();
        let queries = |q: std::ops::Range<usize>| {
            let count = q.len();
            let q = q.start * heads * dim..q.end * heads * dim;
            let values =
                if half { Elements::Bf16(&q_numbers.half[q]) } else { Elements::F32(&q_numbers.single[q]) };
            AttentionQueries { values, count, heads, dim, scale: 0.5, sink: None }
        };
        let index = |q, weights, count| IndexQueries { values: Elements::F32(q), weights, count, heads, dim };

        let paged = Attention::paged(best(), queries(0..count), latents, batch).unwrap();
        let (mut out, mut lse) = (vec![0.0; count * heads * width], vec![0.0; count * heads]);
        paged.dense(ElementsMut::F32(&mut out), &mut lse).unwrap();
        let keys = Cache::new(storage, Layout::Index(dim), blocks).unwrap();
        let indexer = Indexer::paged(best(), index(&q_numbers.single, &weights, count), keys, batch).unwrap();
        let (arena, mut chosen) = (IndexArena::new(), vec![0; count * 70]);
        indexer.top_k(70, true, &mut chosen, &arena).unwrap();
        let mut sparse_out = vec![0.0; count * heads * width];
        let mut sparse_lse = vec![0.0; count * heads];
        let selection = Selection { indices: &chosen, width: 70 };
        paged.sparse(selection, ElementsMut::F32(&mut sparse_out), &mut sparse_lse).unwrap();

        let mut first = 0;
        for (b, &(n, len)) in lens.iter().enumerate() {
            let rows: Vec<bf16> = (0..len)
                .flat_map(|s| {
                    let block = tables[b * columns + s / PAGE_TOKENS] as usize;
                    pages[(block * PAGE_TOKENS + s % PAGE_TOKENS) * dim..][..dim].to_vec()
                })
                .collect();
            let q = &q_numbers.single[first * heads * dim..][..n * heads * dim];
            let weights = &weights[first * heads..][..n * heads];
            let rows = KeyValueRows { keys: Elements::Bf16(&rows), values: None, count: len, heads: 1, value_dim: width };
            let contiguous = Attention::contiguous(best(), queries(first..first + n), rows, None).unwrap();
            let (mut o, mut l) = (vec![0.0; n * heads * width], vec![0.0; n * heads]);
            contiguous.dense(ElementsMut::F32(&mut o), &mut l).unwrap();
            prop_assert_eq!(&o[..], &out[first * heads * width..][..o.len()]);
            prop_assert_eq!(&l[..], &lse[first * heads..][..l.len()]);
            let indexer = Indexer::contiguous(best(), index(q, weights, n), rows.keys, len, None, None).unwrap();
            let mut c = vec![0; n * 70];
            indexer.top_k(70, true, &mut c, &arena).unwrap();
            prop_assert_eq!(&c[..], &chosen[first * 70..][..c.len()]);
            contiguous.sparse(Selection { indices: &c, width: 70 }, ElementsMut::F32(&mut o), &mut l).unwrap();
            prop_assert_eq!(&o[..], &sparse_out[first * heads * width..][..o.len()]);
            first += n;
        }
    }

    #[test]
    fn index_scores_are_the_formula_and_selection_needs_no_matrix(
        queries in 0usize..40, keys in 0usize..300, heads in 1usize..40, dim in 1usize..50, k in 1usize..80,
        scaled in any::<bool>(), threads in 1usize..4, seed in any::<u64>(),
    ) {
        // Small whole numbers: every product and sum is exact, so every level must give the same bits as f64, ties included.
        let whole = |count, seed| numbers(count, seed).into_iter().map(|x| (x * 4.0).round()).collect::<Vec<f32>>();
        let (q, kv) = (whole(queries * heads * dim, seed), whole(keys * dim, seed + 1));
        let (weights, scales) = (whole(queries * heads, seed + 2), whole(keys, seed + 3));
        let index = IndexQueries { values: Elements::F32(&q), weights: &weights, count: queries, heads, dim };
        let mut want = vec![f32::NEG_INFINITY; queries * keys];
        for t in 0..queries {
            for s in 0..(keys + t + 1).saturating_sub(queries).min(keys) {
                let score: f64 = (0..heads)
                    .map(|j| {
                        let q = &q[(t * heads + j) * dim..][..dim];
                        let dot: f64 = q.iter().zip(&kv[s * dim..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        f64::from(weights[t * heads + j]) * dot.max(0.0)
                    })
                    .sum();
                want[t * keys + s] = (score * if scaled { f64::from(scales[s]) } else { 1.0 }) as f32;
            }
        }
        let arena = IndexArena::new();
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            let scale = scaled.then_some(&scales[..]);
            let indexer = Indexer::contiguous(level, index, Elements::F32(&kv), keys, scale, None).unwrap();
            let mut got = vec![f32::NAN; queries * keys];
            with_threads(threads, || indexer.scores(keys, &mut got, &arena)).unwrap();
            prop_assert_eq!(&got, &want);
            let (mut direct, mut two_steps) = (vec![0; queries * k], vec![0; queries * k]);
            with_threads(threads, || indexer.top_k(k, true, &mut direct, &arena)).unwrap();
            let scores = Scores { values: Elements::F32(&want), rows: queries, columns: keys, lengths: None };
            topk::top_k(level, scores, k, true, &mut two_steps, &Arena::new()).unwrap();
            prop_assert_eq!(direct, two_steps);
        }
    }
}
