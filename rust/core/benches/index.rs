//! Index scores and their selection at V3.2's sizes (64 heads of 128), beside the rates of the products themselves.
//!
//! The rate of products is that of a loop that does nothing else, on registers: what no kernel can pass on this core.

#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use heedful_core::attention::batch::PagedBatch;
use heedful_core::attention::index::{IndexArena, IndexQueries, Indexer};
use heedful_core::cache::layout::{PAGE_TOKENS, index_page_bytes};
use heedful_core::cache::pages::{Cache, Layout, Pages, PagesMut, write};
use heedful_core::elements::Elements;
use heedful_core::simd::Level;

const HEADS: usize = 64;
const DIM: usize = 128;
const K: usize = 2048;

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Numbers in each format.
struct Values {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    int8: Vec<i8>,
}

impl Values {
    fn new(count: usize, seed: u64) -> Self {
        let f32 = numbers(count, seed);
        Self {
            bf16: f32.iter().map(|&x| bf16::from_f32(x)).collect(),
            int8: f32.iter().map(|&x| (x * 127.0) as i8).collect(),
            f32,
        }
    }

    fn of(&self, format: &str) -> Elements<'_> {
        match format {
            "f32" => Elements::F32(&self.f32),
            "int8" => Elements::I8(&self.int8),
            _ => Elements::Bf16(&self.bf16),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;

    pub const STEPS: usize = 4096;
    const SUMS: usize = 16;
    pub const BF16_OPERATIONS: u64 = (STEPS * SUMS * 64) as u64;
    pub const INT8_OPERATIONS: u64 = (STEPS * SUMS * 128) as u64;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(seed: i32) -> f32 {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        // SAFETY: both are 64 bytes.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(seed)) };
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, x, x));
        }
        sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8(seed: i32) -> i32 {
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let x = _mm512_set1_epi32(seed);
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, x, x));
        }
        sums.iter().fold(0, |all, &sum| all ^ _mm512_reduce_add_epi32(sum))
    }
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("products alone");
    #[cfg(target_arch = "x86_64")]
    if Level::Avx512Bf16.available() {
        group.throughput(Throughput::Elements(peak::BF16_OPERATIONS));
        // SAFETY: the machine has the features.
        group.bench_function("bf16", |b| b.iter(|| unsafe { peak::bf16(black_box(0x3f80_3f80)) }));
        group.throughput(Throughput::Elements(peak::INT8_OPERATIONS));
        // SAFETY: as above.
        group.bench_function("int8", |b| b.iter(|| unsafe { peak::int8(black_box(0x0101_0101)) }));
    }
    group.finish();
}

fn index(c: &mut Criterion) {
    let arena = IndexArena::new();
    for (queries, keys) in [(1, 131_072), (16, 32_768), (128, 8192)] {
        let (q, k) = (Values::new(queries * HEADS * DIM, 1), Values::new(keys * DIM, 2));
        let (weights, scales) = (numbers(queries * HEADS, 3), vec![0.01; keys]);
        let mut scores = vec![0.0; queries * keys];
        let mut chosen = vec![0; queries * K];
        let mut group = c.benchmark_group(format!("{queries} queries, {keys} keys"));
        // Every query sees every key, so that operations over time is comparable with the rate of products.
        let positions = vec![keys as i64; queries];
        group.throughput(Throughput::Elements((2 * queries * HEADS * DIM * keys) as u64));
        let index = |format| IndexQueries {
            values: q.of(format),
            weights: &weights,
            count: queries,
            heads: HEADS,
            dim: DIM,
        };
        for format in ["f32", "bf16", "int8"] {
            let scale = (format == "int8").then_some(&scales[..]);
            let indexer = Indexer::contiguous(
                Level::best(),
                index(format),
                k.of(format),
                keys,
                scale,
                Some(&positions),
            )
            .expect("sound");
            group.bench_function(format!("scores, {format}"), |b| {
                b.iter(|| indexer.scores(keys, &mut scores, &arena).expect("sound"));
            });
            group.bench_function(format!("top {K}, {format}"), |b| {
                b.iter(|| indexer.top_k(K, false, &mut chosen, &arena).expect("sound"));
            });
        }
        // Pages in falling order.
        let blocks = keys / PAGE_TOKENS;
        let (mut fp8, mut int8) =
            (vec![0; blocks * index_page_bytes(DIM)], vec![0; blocks * index_page_bytes(DIM)]);
        let (slots, layout): (Vec<i64>, _) = ((0..keys as i64).collect(), Layout::Index(DIM));
        write("keys", Elements::F32(&k.f32), &slots, PagesMut::Fp8(&mut fp8), layout, blocks).expect("sound");
        write("keys", Elements::F32(&k.f32), &slots, PagesMut::Int8(&mut int8), layout, blocks)
            .expect("sound");
        let table: Vec<i32> = (0..blocks as i32).rev().collect();
        let batch = PagedBatch {
            block_tables: &table,
            seq_lens: &[keys as i32],
            query_start_loc: &[0, queries as i32],
        };
        let caches = [
            ("bf16", Pages::Rows(Elements::Bf16(&k.bf16))),
            ("fp8", Pages::Fp8(&fp8)),
            ("int8", Pages::Int8(&int8)),
        ];
        for (format, pages) in caches {
            let cache = Cache::new(pages, layout, blocks).expect("sound");
            let indexer = Indexer::paged(Level::best(), index(format), cache, batch).expect("sound");
            group.bench_function(format!("top {K}, pages of {format}"), |b| {
                b.iter(|| indexer.top_k(K, false, &mut chosen, &arena).expect("sound"));
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(std::time::Duration::from_millis(100))
        .measurement_time(std::time::Duration::from_millis(500));
    targets = products, index
}
criterion_main!(benches);
