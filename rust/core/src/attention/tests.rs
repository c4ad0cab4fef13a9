//! Properties of the operators: equal to the formulas in f64, the same bits on any number of threads, from pages or from
//! contiguous rows, alone or in a batch, and (sparse over everything) as dense attention.

use half::bf16;
use proptest::prelude::*;

use super::attend::{Attention, AttentionQueries, KeyValueRows, Selection};
use super::batch::PagedBatch;
use super::index::{IndexQueries, Indexer};
use crate::cache::layout::{LatentLayout, PAGE_TOKENS};
use crate::cache::pages::{Cache, Layout, Pages};
use crate::elements::{Elements, ElementsMut};
use crate::simd::Level;
use crate::topk;

/// Numbers in [-1, 1) from a seed.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn with_threads<R: Send>(count: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap().install(work)
}

fn best() -> Level {
    Level::ALL.into_iter().rev().find(|l| l.available()).unwrap()
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
    q: Vec<f32>,
    kv: Vec<f32>,
    sink: Option<Vec<f32>>,
}

fn cases() -> impl Strategy<Value = Case> {
    let shapes = (0usize..12, 0usize..700, 1usize..4, 1usize..6, 1usize..50, any::<u64>(), any::<bool>());
    shapes.prop_flat_map(|(queries, keys, kv_heads, group, dim, seed, sink)| {
        (1..=dim).prop_map(move |value_dim| {
            let heads = kv_heads * group;
            Case {
                queries,
                keys,
                heads,
                kv_heads,
                dim,
                value_dim,
                q: numbers(queries * heads * dim, seed),
                kv: numbers(keys * kv_heads * dim, seed + 1),
                sink: sink.then(|| numbers(heads, seed + 2)),
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
            values: Elements::F32(&self.q),
            count: self.queries,
            heads: self.heads,
            dim: self.dim,
            scale: self.scale(),
            sink: self.sink.as_deref(),
        };
        let rows = KeyValueRows {
            keys: Elements::F32(&self.kv),
            values: None,
            count: self.keys,
            heads: self.kv_heads,
            value_dim: self.value_dim,
        };
        Attention::contiguous(level, queries, rows, None).unwrap()
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
                let row = |s: usize| &self.kv[(s * self.kv_heads + group) * self.dim..][..self.dim];
                let q = &self.q[(t * self.heads + h) * self.dim..][..self.dim];
                let dot =
                    |s: usize| row(s).iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let p: Vec<f64> = chosen.iter().map(|&s| (dot(s) * f64::from(self.scale())).exp()).collect();
                let sum: f64 = p.iter().sum();
                let sink = self.sink.as_ref().map_or(0.0, |x| f64::from(x[h]).exp());
                for d in 0..self.value_dim {
                    let value: f64 = chosen.iter().zip(&p).map(|(&s, p)| p * f64::from(row(s)[d])).sum();
                    out.push(if chosen.is_empty() { 0.0 } else { value / (sum + sink) });
                }
                lse.push(sum.ln());
            }
        }
        (out, lse)
    }
}

/// Values below 1 averaged over some hundred keys: the error is some 10 roundings of 6e-8 in the logits (which reach 3
/// sqrt(dim) / 3) and as many in the sums.
fn close(got: &[f32], want: &[f64]) -> bool {
    got.iter()
        .zip(want)
        .all(|(&g, &w)| f64::from(g) == w || (f64::from(g) - w).abs() <= 2e-5 * (1.0 + w.abs()))
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
            let (out, lse) = case.sparse(level, &indices, width);
            let (want_out, want_lse) = case.formula(&indices, width);
            prop_assert!(close(&out, &want_out) && close(&lse, &want_lse), "sparse, {:?}", level);
            let (out, lse) = case.dense(level);
            let (want_out, want_lse) = case.formula(&every, case.keys);
            prop_assert!(close(&out, &want_out) && close(&lse, &want_lse), "dense, {:?}", level);
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
        let last = Case { queries: 1, q: case.q[(case.queries - 1) * case.heads * case.dim..].to_vec(), ..case.clone() };
        let (alone, alone_lse) = last.dense(best());
        prop_assert_eq!(&alone[..], &out[out.len() - row..]);
        prop_assert_eq!(&alone_lse[..], &lse[lse.len() - case.heads..]);
    }

    #[test]
    fn pages_give_the_bits_of_contiguous_rows(
        lens in prop::collection::vec((0usize..5, 0usize..300), 0..5), heads in 1usize..5, dim in 2usize..40, seed in any::<u64>(),
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
        let (q, weights) = (numbers(count * heads * dim, seed + 1), numbers(count * heads, seed + 2));
        let width = dim / 2;
        let storage = Pages::Rows(Elements::Bf16(&pages));
        let latents = Cache::new(storage, Layout::Latent(LatentLayout::new(dim, width).unwrap()), blocks).unwrap();
        let queries = |q, count| AttentionQueries { values: Elements::F32(q), count, heads, dim, scale: 0.5, sink: None };
        let index = |q, weights, count| IndexQueries { values: Elements::F32(q), weights, count, heads, dim };

        let paged = Attention::paged(best(), queries(&q, count), latents, batch).unwrap();
        let (mut out, mut lse) = (vec![0.0; count * heads * width], vec![0.0; count * heads]);
        paged.dense(ElementsMut::F32(&mut out), &mut lse).unwrap();
        let keys = Cache::new(storage, Layout::Index(dim), blocks).unwrap();
        let indexer = Indexer::paged(best(), index(&q, &weights, count), keys, batch).unwrap();
        let mut chosen = vec![0; count * 70];
        indexer.top_k(70, &mut chosen).unwrap();
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
            let q = &q[first * heads * dim..][..n * heads * dim];
            let weights = &weights[first * heads..][..n * heads];
            let rows = KeyValueRows { keys: Elements::Bf16(&rows), values: None, count: len, heads: 1, value_dim: width };
            let contiguous = Attention::contiguous(best(), queries(q, n), rows, None).unwrap();
            let (mut o, mut l) = (vec![0.0; n * heads * width], vec![0.0; n * heads]);
            contiguous.dense(ElementsMut::F32(&mut o), &mut l).unwrap();
            prop_assert_eq!(&o[..], &out[first * heads * width..][..o.len()]);
            prop_assert_eq!(&l[..], &lse[first * heads..][..l.len()]);
            let indexer = Indexer::contiguous(best(), index(q, weights, n), rows.keys, len, None, None).unwrap();
            let mut c = vec![0; n * 70];
            indexer.top_k(70, &mut c).unwrap();
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
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            let scale = scaled.then_some(&scales[..]);
            let indexer = Indexer::contiguous(level, index, Elements::F32(&kv), keys, scale, None).unwrap();
            let mut got = vec![f32::NAN; queries * keys];
            with_threads(threads, || indexer.scores(keys, &mut got)).unwrap();
            prop_assert_eq!(&got, &want);
            let (mut direct, mut two_steps) = (vec![0; queries * k], vec![0; queries * k]);
            with_threads(threads, || indexer.top_k(k, &mut direct)).unwrap();
            topk::top_k(Elements::F32(&want), queries, keys, None, k, &mut two_steps).unwrap();
            prop_assert_eq!(direct, two_steps);
        }
    }
}
