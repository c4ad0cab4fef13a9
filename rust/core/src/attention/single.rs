//! The products of attention in f32: any dtype, widened; any machine.

use super::attend::AttentionQueries;
use super::gemm::Gemm;
use super::softmax::{Heads, LogitRows, Running};
use super::wave::{KEY_TILE, KeyTile, Products, Scratch, Shape, front};
use crate::simd::{Level, PAD, padded};

/// Rows that are fetched before they are read.
const AHEAD: usize = 4;

/// f32 products at an instruction set.
pub(super) struct Single {
    pub shape: Shape,
    pub level: Level,
}

impl Single {
    /// Numbers from value to value: those of a key that is its own value, or of a value apart.
    fn value_stride(&self) -> usize {
        if self.shape.apart { self.shape.width() } else { padded(self.shape.dim) }
    }
}

impl Products for Single {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn absorb(&self, running: &mut Running, rows: LogitRows<'_>, scale: f32, out: &mut [Heads]) -> Heads {
        running.absorb(self.level, rows, scale, out)
    }

    fn query_items(&self) -> usize {
        self.shape.dim * self.shape.lanes()
    }

    fn value_items(&self) -> usize {
        KEY_TILE * self.value_stride()
    }

    /// [Dk, lanes].
    fn pack(&self, queries: &AttentionQueries<'_>, first: usize, packed: &mut [f32], scratch: &mut Scratch) {
        let (dim, lanes) = (self.shape.dim, self.shape.lanes());
        let row = front(&mut scratch.rows, dim);
        for h in 0..lanes {
            if h < self.shape.heads {
                queries.values.widen((first + h) * dim, row);
            } else {
                row.fill(0.0);
            }
            row.iter().enumerate().for_each(|(d, &x)| packed[d * lanes + h] = x);
        }
    }

    fn tile(
        &self,
        tile: &KeyTile<'_>,
        packed: &[f32],
        logits: &mut [f32],
        values: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let Shape { dim, value_dim, apart, .. } = self.shape;
        let (stride, lanes) = (padded(dim), self.shape.lanes());
        let staged = front(&mut scratch.rows, KEY_TILE * stride);
        (0..AHEAD).for_each(|i| tile.fetch(i));
        for i in 0..tile.count {
            tile.fetch(i + AHEAD);
            let (keys, head, position) = tile.source(i);
            if apart {
                keys.read_key(position, head, &mut staged[i * stride..][..dim]);
                keys.read_value(position, head, &mut values[i * self.value_stride()..][..value_dim]);
            } else {
                keys.read_key(position, head, &mut values[i * stride..][..dim]);
            }
        }
        let rows: &[f32] = if apart { staged } else { values };
        let queries = packed.chunks_exact(self.query_items()).zip(logits.chunks_exact_mut(KEY_TILE * lanes));
        for ((packed, logits), live) in queries.zip(tile.live()) {
            Gemm {
                a: rows,
                a_row: stride,
                a_col: 1,
                b: packed,
                b_row: lanes,
                c: logits,
                c_row: lanes,
                m: live,
                n: lanes,
                k: dim,
                accumulate: false,
            }
            .run_at(self.level);
        }
    }

    fn weigh(&self, count: usize, values: &[f32], sums: &mut [f32], heads: usize, scratch: &mut Scratch) {
        let stride = self.value_stride();
        let probabilities = scratch.probabilities[..count].as_flattened();
        for (values, probabilities) in
            values.chunks(self.value_items()).zip(probabilities.chunks(KEY_TILE * PAD))
        {
            Gemm {
                a: probabilities,
                a_row: 1,
                a_col: PAD,
                b: values,
                b_row: stride,
                c: sums,
                c_row: self.shape.width(),
                m: heads,
                n: self.shape.width(),
                k: probabilities.len() / PAD,
                accumulate: true,
            }
            .run_at(self.level);
        }
    }
}
