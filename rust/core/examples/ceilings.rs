//! What one core of this machine can do at most: rates of its multiply-add instructions, and of reading each cache.
//!
//! Prints one JSON object, `null` for what the machine lacks: products in G operations (a multiply and an add are two) a
//! second, reads in GB a second. It has no dependencies, so that `rustc -O` alone builds it for benches/bench_cpu_ops.py.

use std::hint::black_box;
use std::time::Instant;

/// Independent sums, enough to hide an instruction's latency.
const SUMS: usize = 16;
const ROUNDS: usize = 2_000_000;

/// Median seconds of a few runs.
fn seconds(mut work: impl FnMut()) -> f64 {
    let mut runs: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

/// GB a second when a buffer of this size is read over and over.
fn read_rate(bytes: usize) -> f64 {
    let buffer = vec![1u64; bytes / 8];
    let passes = ((1usize << 28) / bytes).max(2);
    let time = seconds(|| {
        for _ in 0..passes {
            black_box(sum(black_box(&buffer)));
        }
    });
    (passes * bytes) as f64 / time / 1e9
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::{ROUNDS, SUMS, black_box, seconds};
    use std::arch::x86_64::*;

    macro_rules! rate {
        ($name:ident, $features:literal, $vector:ty, $zero:ident, $set:expr, $step:expr) => {
            #[target_feature(enable = $features)]
            fn $name() {
                let x = black_box($set);
                let mut sums: [$vector; SUMS] = [$zero(); SUMS];
                for _ in 0..ROUNDS {
                    for sum in &mut sums {
                        *sum = $step(*sum, x);
                    }
                }
                black_box(sums);
            }
        };
    }

    rate!(bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps, _mm512_set1_epi32(0x3f80_3f80), |s, x| {
        // SAFETY: both types are 64 bytes of numbers, and any bits will do.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
        _mm512_dpbf16_ps(s, x, x)
    });
    rate!(int8, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, _mm512_set1_epi8(1), |s, x| {
        _mm512_dpbusd_epi32(s, x, x)
    });
    rate!(f32x16, "avx512f", __m512, _mm512_setzero_ps, _mm512_set1_ps(0.5), |s, x| _mm512_fmadd_ps(x, x, s));
    rate!(f32x8, "avx2,fma", __m256, _mm256_setzero_ps, _mm256_set1_ps(0.5), |s, x| _mm256_fmadd_ps(x, x, s));

    fn giga(operations: usize, work: impl FnMut()) -> f64 {
        (operations * SUMS * ROUNDS) as f64 / seconds(work) / 1e9
    }

    /// bf16, int8, f32.
    pub fn products() -> [Option<f64>; 3] {
        let wide = is_x86_feature_detected!("avx512f");
        let pairs = wide && is_x86_feature_detected!("avx512bf16");
        let bytes = wide && is_x86_feature_detected!("avx512vnni");
        let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        // SAFETY: `pairs` says that the features were detected.
        let of_pairs = pairs.then(|| giga(64, || unsafe { bf16() }));
        // SAFETY: so does `bytes`.
        let of_bytes = bytes.then(|| giga(128, || unsafe { int8() }));
        let of_floats = if wide {
            // SAFETY: so does `wide`.
            Some(giga(32, || unsafe { f32x16() }))
        } else {
            // SAFETY: so does `narrow`.
            narrow.then(|| giga(16, || unsafe { f32x8() }))
        };
        [of_pairs, of_bytes, of_floats]
    }

    #[target_feature(enable = "avx512f")]
    fn sum_wide(buffer: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        for lines in buffer.chunks_exact(64) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight loads of eight numbers from a chunk of 64.
                *sum =
                    _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(lines.as_ptr().add(8 * i).cast()) });
            }
        }
        sums.map(|s| _mm512_reduce_add_epi64(s)).iter().sum::<i64>() as u64
    }

    /// Reads a buffer with the widest loads there are.
    pub fn sum(buffer: &[u64]) -> u64 {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            unsafe { sum_wide(buffer) }
        } else {
            buffer.iter().fold(0, |sum, x| sum ^ x)
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod machine {
    pub fn products() -> [Option<f64>; 3] {
        [None; 3]
    }

    pub fn sum(buffer: &[u64]) -> u64 {
        buffer.iter().fold(0, |sum, x| sum ^ x)
    }
}

use machine::{products, sum};

fn main() {
    let [bf16, int8, f32] = products();
    let rates = [
        ("bf16", bf16),
        ("int8", int8),
        ("f32", f32),
        ("l2_read", Some(read_rate(512 << 10))),
        ("memory_read", Some(read_rate(256 << 20))),
    ];
    let fields = rates.map(|(name, rate)| {
        format!("\"{name}\": {}", rate.map_or("null".into(), |rate| format!("{rate:.1}")))
    });
    println!("{{{}}}", fields.join(", "));
}
