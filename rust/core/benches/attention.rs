//! Sparse attention of V3.2's sizes (128 heads, 576 + 512) over 2,048 of 131,072 rows, and dense attention.
//!
//! `cargo bench -p heedful-core --bench attention`; `RAYON_NUM_THREADS` sets the number of threads.

#![allow(clippy::unwrap_used)] // a benchmark may panic

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use heedful_core::attention::attend::{Attention, AttentionQueries, KeyValueRows, Selection};
use heedful_core::attention::batch::PagedBatch;
use heedful_core::cache::layout::{LatentLayout, PAGE_TOKENS};
use heedful_core::cache::pages::{Cache, Layout, Pages, PagesMut, write};
use heedful_core::elements::{Elements, ElementsMut};
use heedful_core::simd::Level;

const HEADS: usize = 128;
const DIM: usize = 576;
const VALUE_DIM: usize = 512;
const KEYS: usize = 131_072;
const CHOSEN: usize = 2048;
const BLOCKS: usize = KEYS / PAGE_TOKENS;
/// Multiply-adds count twice.
const FLOP_A_KEY: usize = 2 * HEADS * (DIM + VALUE_DIM);

fn numbers(count: usize, seed: u64) -> impl Iterator<Item = f32> {
    (0..count as u64).map(move |i| {
        let bits = (i + 1 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / 8_388_608.0 - 1.0
    })
}

fn chosen(queries: usize) -> Vec<i32> {
    numbers(queries * CHOSEN, 7).map(|x| ((x + 1.0) / 2.0 * KEYS as f32) as i32).collect()
}

fn attention(c: &mut Criterion) {
    let level = Level::current().unwrap();
    let half: Vec<bf16> = numbers(KEYS * DIM, 1).map(bf16::from_f32).collect();
    let layout = Layout::Latent(LatentLayout::new(DIM, VALUE_DIM).unwrap());
    let mut fp8 = vec![0u8; KEYS * 656];
    let slots: Vec<i64> = (0..KEYS as i64).collect();
    write("latent", Elements::Bf16(&half), &slots, PagesMut::Fp8(&mut fp8), layout, BLOCKS).unwrap();
    let single: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
    let table: Vec<i32> = (0..BLOCKS as i32).collect();
    let q: Vec<bf16> = numbers(8 * HEADS * DIM, 3).map(bf16::from_f32).collect();
    let q_single: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();

    let mut group = c.benchmark_group("sparse");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for queries in [1, 8] {
        let indices = chosen(queries);
        let (mut out, mut lse) = (vec![bf16::ZERO; queries * HEADS * VALUE_DIM], vec![0.0; queries * HEADS]);
        let mut out_single = vec![0.0; out.len()];
        let (lens, starts) = ([KEYS as i32], [0, queries as i32]);
        let batch = PagedBatch { block_tables: &table, seq_lens: &lens, query_start_loc: &starts };
        let selection = Selection { indices: &indices, width: CHOSEN };
        let of = |values| AttentionQueries {
            values,
            count: queries,
            heads: HEADS,
            dim: DIM,
            scale: 0.1,
            sink: None,
        };
        let rows = |keys| KeyValueRows { keys, values: None, count: KEYS, heads: 1, value_dim: VALUE_DIM };
        let halves = of(Elements::Bf16(&q[..queries * HEADS * DIM]));
        let singles = of(Elements::F32(&q_single[..queries * HEADS * DIM]));
        group.throughput(Throughput::Elements((queries * CHOSEN * FLOP_A_KEY) as u64));
        group.bench_function(BenchmarkId::new("bf16", queries), |b| {
            b.iter(|| {
                let a = Attention::contiguous(level, halves, rows(Elements::Bf16(&half)), None).unwrap();
                a.sparse(selection, ElementsMut::Bf16(black_box(&mut out)), &mut lse).unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("fp8", queries), |b| {
            b.iter(|| {
                let cache = Cache::new(Pages::Fp8(&fp8), layout, BLOCKS).unwrap();
                let a = Attention::paged(level, halves, cache, batch).unwrap();
                a.sparse(selection, ElementsMut::Bf16(black_box(&mut out)), &mut lse).unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("f32", queries), |b| {
            b.iter(|| {
                let a = Attention::contiguous(level, singles, rows(Elements::F32(&single)), None).unwrap();
                a.sparse(selection, ElementsMut::F32(black_box(&mut out_single)), &mut lse).unwrap();
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("dense");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let keys = 8192;
    let (mut out, mut lse) = (vec![bf16::ZERO; HEADS * VALUE_DIM], vec![0.0; HEADS]);
    let values = Elements::Bf16(&q[..HEADS * DIM]);
    let queries = AttentionQueries { values, count: 1, heads: HEADS, dim: DIM, scale: 0.1, sink: None };
    let rows = KeyValueRows {
        keys: Elements::Bf16(&half[..keys * DIM]),
        values: None,
        count: keys,
        heads: 1,
        value_dim: VALUE_DIM,
    };
    group.throughput(Throughput::Elements((keys * FLOP_A_KEY) as u64));
    group.bench_function(BenchmarkId::new("bf16", keys), |b| {
        b.iter(|| {
            let a = Attention::contiguous(level, queries, rows, None).unwrap();
            a.dense(ElementsMut::Bf16(black_box(&mut out)), &mut lse).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);
