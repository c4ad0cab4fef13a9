//! Selection of 2048 of a row of scores, beside the rate at which this machine reads the row from its second-level cache.

#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use heedful_core::elements::Elements;
use heedful_core::simd::Level;
use heedful_core::threads::Arena;
use heedful_core::topk::{Scores, Selector, top_k};

const K: usize = 2048;

/// Sums of uniform draws: scores in no particular order, about normal.
fn scores(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| (0..4).map(|_| draw()).sum()).collect()
}

/// The greatest of the row's integers: a load and an operation a vector, and nothing else.
fn read(row: &[f32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn read_avx512(row: &[f32]) -> u32 {
        use std::arch::x86_64::*;
        let mut most = [_mm512_setzero_si512(); 8];
        for lines in row.chunks_exact(16 * most.len()) {
            for (i, most) in most.iter_mut().enumerate() {
                // SAFETY: the load lies in its chunk.
                *most =
                    _mm512_or_si512(*most, unsafe { _mm512_loadu_si512(lines.as_ptr().add(16 * i).cast()) });
            }
        }
        _mm512_reduce_or_epi32(most.into_iter().reduce(|a, b| _mm512_or_si512(a, b)).expect("eight")) as u32
    }
    #[cfg(target_arch = "x86_64")]
    if Level::Avx512.available() {
        // SAFETY: the machine has AVX-512 F.
        return unsafe { read_avx512(row) };
    }
    row.iter().fold(0, |any, x| any | x.to_bits())
}

fn select(c: &mut Criterion) {
    let arena: Arena<Selector> = Arena::new();
    let mut out = vec![0; K];
    for columns in [4096, 16_384, 131_072, 1 << 20] {
        let row = scores(columns);
        let half: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
        let rising: Vec<f32> = (0..columns).map(|i| i as f32).collect();
        let mut group = c.benchmark_group(format!("top {K} of {columns}"));
        group.throughput(Throughput::Bytes(4 * columns as u64));
        group.bench_function("read alone", |b| b.iter(|| read(black_box(&row))));
        let cells = [
            ("f32, rising order", Elements::F32(&row), false, Level::best()),
            ("f32, sorted", Elements::F32(&row), true, Level::best()),
            ("bf16, rising order", Elements::Bf16(&half), false, Level::best()),
            ("f32, worst order", Elements::F32(&rising), false, Level::best()),
            ("f32, one value", Elements::F32(&vec![1.0; columns]), false, Level::best()),
            ("f32, portable", Elements::F32(&row), false, Level::Portable),
        ];
        for (name, values, sorted, level) in cells {
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                let scores = Scores { values, rows: 1, columns, lengths: None };
                b.iter(|| top_k(level, black_box(scores), K, sorted, &mut out, &arena).expect("sound"));
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(100))
        .measurement_time(std::time::Duration::from_millis(400));
    targets = select
}
criterion_main!(benches);
