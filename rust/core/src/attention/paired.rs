//! The products of attention on bfloat16 pairs: bfloat16 queries over bfloat16 or FP8 keys.
//!
//! Logits and sums are f32; what is rounded to bfloat16, to nearest even, are the probabilities (relative to the running
//! maximum) and FP8 codes times their scale. Each output number is an average, so it moves by at most 2^-9 of the largest
//! value of the average for either rounding.

use half::bf16;
use half::slice::HalfBitsSliceExt;

use super::attend::AttentionQueries;
use super::pairs::{LEVEL, Packing, PairGemm};
use super::softmax::{Heads, LogitRows, Running};
use super::wave::{KEY_TILE, KeyTile, Products, Scratch, Shape, front};
use crate::elements::{Elements, round_bf16};
use crate::simd::{Kernel, PAD, Simd, dispatch, padded};

/// bfloat16 products, at the one level that has them.
pub(super) struct Paired {
    pub shape: Shape,
}

impl Paired {
    /// Pairs of a key.
    fn pairs(&self) -> usize {
        self.shape.dim.div_ceil(2)
    }

    /// bfloat16 numbers from staged key to staged key; whole cache lines.
    fn stride(&self) -> usize {
        2 * padded(self.pairs())
    }

    fn query_packing(&self) -> Packing {
        Packing { vectors: self.shape.lanes() / PAD, group: self.pairs() }
    }

    fn value_packing(&self) -> Packing {
        Packing { vectors: self.shape.width() / PAD, group: KEY_TILE / 2 }
    }
}

impl Products for Paired {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn absorb(&self, running: &mut Running, rows: LogitRows<'_>, scale: f32, out: &mut [Heads]) -> Heads {
        running.absorb(LEVEL, rows, scale, out)
    }

    fn query_items(&self) -> usize {
        self.query_packing().group_items()
    }

    fn value_items(&self) -> usize {
        self.value_packing().group_items()
    }

    /// Pairs of dimensions, heads in the lanes.
    fn pack(&self, queries: &AttentionQueries<'_>, first: usize, packed: &mut [f32], _: &mut Scratch) {
        let Elements::Bf16(q) = queries.values else { unreachable!("the caller has asked") };
        let Shape { dim, heads, .. } = self.shape;
        let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
        for panel in self.query_packing().panels() {
            let packed = &mut packed[panel.at..][..self.pairs() * panel.stride()];
            for lane in 0..panel.stride() {
                let h = panel.first * PAD + lane;
                let row = if h < heads { &q[(first + h) * dim..][..dim] } else { &[] };
                let pairs = row.chunks(2).map(|two| {
                    u32::from(two[0].to_bits()) | u32::from(two.get(1).map_or(0, |x| x.to_bits())) << 16
                });
                let pairs = pairs.chain(std::iter::repeat(0));
                packed[lane..].iter_mut().step_by(panel.stride()).zip(pairs).for_each(|(out, x)| *out = x);
            }
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
        let Scratch { rows, values: apart, lines, .. } = scratch;
        let (stride, lanes, width) = (self.stride(), self.shape.lanes(), self.shape.width());
        let rows = front(rows, KEY_TILE * stride / 2);
        let apart = front(apart, if self.shape.apart { KEY_TILE * width / 2 } else { 0 });
        dispatch(
            LEVEL,
            Load {
                products: self,
                tile,
                rows: bytemuck::cast_slice_mut::<_, u16>(rows).reinterpret_cast_mut(),
                apart: bytemuck::cast_slice_mut::<_, u16>(apart).reinterpret_cast_mut(),
                values: bytemuck::cast_slice_mut(values),
            },
        );
        tile.next_lines(lines);
        let mut ahead = lines.iter();
        let queries = packed.chunks_exact(self.query_items()).zip(logits.chunks_exact_mut(KEY_TILE * lanes));
        for ((packed, logits), live) in queries.zip(tile.live()) {
            PairGemm {
                a: bytemuck::cast_slice(rows),
                a_row: stride / 2,
                a_col: 1,
                b: bytemuck::cast_slice(packed),
                packing: self.query_packing(),
                c: logits,
                c_row: lanes,
                m: live,
                k: self.shape.dim,
                accumulate: false,
                ahead: std::mem::take(&mut ahead),
            }
            .run();
        }
    }

    fn weigh(&self, count: usize, values: &[f32], sums: &mut [f32], heads: usize, scratch: &mut Scratch) {
        let Scratch { probabilities, pairs, .. } = scratch;
        let pairs = front(pairs, count.div_ceil(2) * PAD);
        let pairs: &mut [u32] = bytemuck::cast_slice_mut(pairs);
        dispatch(LEVEL, Pair { probabilities: &probabilities[..count], pairs });
        PairGemm {
            a: pairs,
            a_row: 1,
            a_col: PAD,
            b: bytemuck::cast_slice(values),
            packing: self.value_packing(),
            c: sums,
            c_row: self.shape.width(),
            m: heads,
            k: count,
            accumulate: true,
            ahead: [].iter(),
        }
        .run();
    }
}

/// Stages keys (and values apart) of a tile as bfloat16, and interleaves neighbouring values.
struct Load<'a> {
    products: &'a Paired,
    tile: &'a KeyTile<'a>,
    rows: &'a mut [bf16],
    apart: &'a mut [bf16],
    values: &'a mut [u32],
}

impl Kernel for Load<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Shape { dim, value_dim, apart, .. } = self.products.shape;
        let (stride, width) = (self.products.stride(), self.products.shape.width());
        for i in 0..self.tile.count {
            let (keys, head, position) = self.tile.source(i);
            let row = &mut self.rows[i * stride..][..stride];
            keys.read_half_key(LEVEL, position, head, &mut row[..dim]);
            if dim % 2 == 1 {
                row[dim] = bf16::ZERO; // the query's pair ends in 0 as well, but 0 times what was here may be NaN
            }
            if apart {
                keys.read_half_value(position, head, &mut self.apart[i * width..][..value_dim]);
            }
        }
        let (source, stride): (&[bf16], _) = if apart { (self.apart, width) } else { (self.rows, stride) };
        // The second row of the last pair of an odd count is what was there before: products leave it out.
        for panel in self.products.value_packing().panels() {
            let out = self.values[panel.at..].chunks_exact_mut(panel.stride());
            for (out, rows) in out.zip(source.chunks_exact(2 * stride)).take(self.tile.count.div_ceil(2)) {
                let (low, high) = rows.split_at(stride);
                let columns = panel.first * PAD..panel.first * PAD + out.len();
                let pairs = low[columns.clone()].iter().zip(&high[columns]);
                for (out, (low, high)) in out.iter_mut().zip(pairs) {
                    *out = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
                }
            }
        }
    }
}

/// Rounds probabilities to bfloat16 and joins those of neighbouring keys.
struct Pair<'a> {
    probabilities: &'a [Heads],
    pairs: &'a mut [u32],
}

impl Kernel for Pair<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (out, keys) in self.pairs.chunks_exact_mut(PAD).zip(self.probabilities.chunks(2)) {
            let high = keys.get(1).unwrap_or(&[0.0; PAD]);
            for ((out, &low), &high) in out.iter_mut().zip(&keys[0]).zip(high) {
                *out = u32::from(round_bf16(low).to_bits()) | u32::from(round_bf16(high).to_bits()) << 16;
            }
        }
    }
}
