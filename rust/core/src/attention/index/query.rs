//! Index queries, and the form in which the kernels read one: heads in the lanes, its arithmetic chosen with the keys'.

use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::Elements;
use crate::simd::{AlignedBuffer, Level, padded};

/// Index queries of a step.
#[derive(Clone, Copy, Debug)]
pub struct IndexQueries<'a> {
    /// q [T, Hi, Di].
    pub values: Elements<'a>,
    /// w [T, Hi].
    pub weights: &'a [f32],
    /// T.
    pub count: usize,
    /// Hi.
    pub heads: usize,
    /// Di.
    pub dim: usize,
}

impl IndexQueries<'_> {
    pub(super) fn check(&self) -> Result<()> {
        let shape = || "[T, Hi, Di] with Hi and Di of at least 1".to_string();
        ensure(self.heads > 0 && self.dim > 0, "q", shape, || {
            format!("[{}, {}, {}]", self.count, self.heads, self.dim)
        })?;
        ensure_volume("q", &[self.count, self.heads, self.dim], self.values.len())?;
        ensure_volume("weights", &[self.count, self.heads], self.weights.len())
    }
}

/// How the products of queries and keys are computed. Each is as exact as f32: what is narrower is used only for numbers that it
/// holds exactly, so which one runs changes the rounding of sums alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Products {
    /// Multiply and add in f32.
    F32,
    /// Pairs of bf16 products, added in f32.
    Bf16,
    /// Four byte products, added as integers.
    I8,
}

impl Products {
    /// The fastest of `level` for `q` and `k`, Di = `dim`.
    pub fn of(level: Level, q: Elements<'_>, k: Elements<'_>, dim: usize) -> Self {
        // bf16 has 8 significant bits and f32's exponents: it holds every byte and every e4m3 number.
        let fits_bf16 = |x| matches!(x, Elements::Bf16(_) | Elements::E4m3(_) | Elements::I8(_));
        let bytes = matches!((q, k), (Elements::I8(_), Elements::I8(_)));
        // 2^15 products of 255 and 128 at most stay within i32.
        if bytes && dim.is_multiple_of(4) && dim <= 1 << 15 && level.runs(Level::Avx512Vnni) {
            Self::I8
        } else if fits_bf16(q) && fits_bf16(k) && dim.is_multiple_of(2) && level.runs(Level::Avx512Bf16) {
            Self::Bf16
        } else {
            Self::F32
        }
    }

    /// Values of a key that share a 32-bit word.
    pub fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::I8 => 4,
        }
    }
}

/// One query, heads in the lanes (Hp of them, Hi rounded up).
#[derive(Default)]
pub(super) struct PackedQuery {
    /// q [words of a key, Hp]: an f32, two bf16 or four bytes of a head, in the order of the key's.
    words: AlignedBuffer<u32>,
    /// [Hp], what integer sums start from: they are computed with 128 added to each value of the key.
    start: AlignedBuffer<i32>,
    /// w [Hp], 0 beyond Hi.
    weights: AlignedBuffer<f32>,
    /// [Hp], all bits set for the Hi real heads. A padded head has q = 0 and w = 0, but 0 times an infinite key is NaN.
    mask: AlignedBuffer<f32>,
    row: Vec<f32>,
    steps: usize,
    lanes: usize,
}

impl PackedQuery {
    /// Packs query `t`.
    pub fn pack(&mut self, products: Products, queries: &IndexQueries<'_>, t: usize) {
        let IndexQueries { heads, dim, .. } = *queries;
        let per_word = products.per_word();
        (self.lanes, self.steps) = (padded(heads), dim / per_word);
        let (lanes, steps) = (self.lanes, self.steps);
        self.words.reserve(steps * lanes);
        self.start.reserve(lanes);
        self.weights.reserve(lanes);
        self.mask.reserve(lanes);
        self.row.resize(dim, 0.0);
        for head in 0..heads {
            queries.values.widen((t * heads + head) * dim, &mut self.row);
            let words = self.words[head..].iter_mut().step_by(lanes).zip(self.row.chunks_exact(per_word));
            match products {
                Products::F32 => words.for_each(|(word, x)| *word = x[0].to_bits()),
                // The upper half of an f32 is all there is to it: the number came from something that fits bf16.
                Products::Bf16 => {
                    words.for_each(|(word, x)| *word = x[0].to_bits() >> 16 | (x[1].to_bits() & 0xffff_0000));
                }
                Products::I8 => {
                    words.for_each(|(word, x)| {
                        *word = u32::from_le_bytes(std::array::from_fn(|i| x[i] as i8 as u8));
                    });
                    self.start[head] = -128 * self.row.iter().sum::<f32>() as i32;
                }
            }
        }
        for row in self.words[..steps * lanes].chunks_exact_mut(lanes) {
            row[heads..].fill(0);
        }
        self.start[heads..lanes].fill(0);
        self.weights[..heads].copy_from_slice(&queries.weights[t * heads..][..heads]);
        self.weights[heads..lanes].fill(0.0);
        self.mask[..heads].fill(f32::from_bits(u32::MAX));
        self.mask[heads..lanes].fill(0.0);
    }

    /// Words of a key.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Hp.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// q [words of a key, Hp].
    pub fn words(&self) -> &[u32] {
        &self.words[..self.steps * self.lanes]
    }

    /// [Hp].
    #[cfg(target_arch = "x86_64")]
    pub fn start(&self) -> &[i32] {
        &self.start[..self.lanes]
    }

    /// w [Hp].
    pub fn weights(&self) -> &[f32] {
        &self.weights[..self.lanes]
    }

    /// [Hp].
    pub fn mask(&self) -> &[f32] {
        &self.mask[..self.lanes]
    }
}
