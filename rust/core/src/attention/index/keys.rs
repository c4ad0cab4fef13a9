//! Index keys of a sequence, and the tile of them that the kernels read: in place where the storage already is what the
//! products take, converted once a tile otherwise.

use super::kernel;
use super::query::Products;
use crate::attention::batch::PagedKeys;
use crate::cache::layout::PAGE_TOKENS;
use crate::elements::Elements;
use crate::prefetch;
use crate::simd::{AlignedBuffer, Level};

/// Keys of a tile: whole pages, few enough that what is converted stays in the second-level cache.
pub(super) const KEY_TILE: usize = 4 * PAGE_TOKENS;

/// Index keys of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) enum IndexKeys<'a> {
    /// k [S, Di] and its scales [S].
    Rows { values: Elements<'a>, scales: Option<&'a [f32]>, dim: usize },
    /// Pages of a cache.
    Pages(PagedKeys<'a>),
}

impl<'a> IndexKeys<'a> {
    /// Whether there is memory of a key at `position`.
    fn holds(&self, position: usize) -> bool {
        match self {
            Self::Rows { values, dim, .. } => (position + 1) * dim <= values.len(),
            Self::Pages(keys) => keys.holds(position),
        }
    }

    /// Keys from `position` on that lie one after another, at most `count`: values [keys, dim] and where their scales are.
    fn run(&self, position: usize, count: usize, dim: usize) -> Run<'a> {
        match self {
            Self::Rows { values, scales, .. } => Run {
                values: values.slice(position * dim, count * dim),
                scales: scales.map_or(Scales::None, |s| Scales::Numbers(&s[position..][..count])),
                count,
            },
            Self::Pages(keys) => {
                let offset = position % PAGE_TOKENS;
                let count = count.min(PAGE_TOKENS - offset);
                let (values, scales) = keys.index_page(position);
                Run {
                    values: values.slice(offset * dim, count * dim),
                    scales: scales.map_or(Scales::None, |s| Scales::Bytes(&s[4 * offset..][..4 * count])),
                    count,
                }
            }
        }
    }
}

/// Where the keys of the next tile lie, which are fetched while this one is scored: pages are not neighbours, and hardware
/// prefetchers do not look beyond 4 KiB.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    /// Address of every 64th key, 0 where there is none.
    pages: [usize; KEY_TILE / PAGE_TOKENS],
    row_bytes: usize,
}

impl Ahead {
    /// Fetches the counterparts of `count` keys from the `first`-th of this tile.
    #[inline(always)]
    pub fn fetch(&self, first: usize, count: usize) {
        let page = self.pages[first / PAGE_TOKENS % self.pages.len()];
        if page != 0 {
            let start = page + first % PAGE_TOKENS * self.row_bytes;
            prefetch::lines(start, count * self.row_bytes).for_each(prefetch::fetch);
        }
    }
}

struct Run<'a> {
    values: Elements<'a>,
    scales: Scales<'a>,
    count: usize,
}

enum Scales<'a> {
    None,
    Numbers(&'a [f32]),
    /// Little-endian f32 of a page, at any alignment.
    Bytes(&'a [u8]),
}

/// A tile of keys as `products` take them.
#[derive(Default)]
pub(super) struct KeyTile {
    converted: AlignedBuffer<u32>,
    factors: AlignedBuffer<f32>,
    in_place: bool,
    first: usize,
    count: usize,
}

impl KeyTile {
    /// Makes this the tile of the `count` keys from `first` on, at most [`KEY_TILE`].
    pub fn load(
        &mut self,
        level: Level,
        products: Products,
        keys: &IndexKeys<'_>,
        first: usize,
        count: usize,
        dim: usize,
    ) {
        let words = dim / products.per_word();
        self.factors.reserve(KEY_TILE);
        (self.first, self.count) = (first, count);
        let mut done = 0;
        while done < count {
            let run = keys.run(first + done, count - done, dim);
            self.in_place = matches!(
                (products, run.values),
                (Products::F32, Elements::F32(_))
                    | (Products::Bf16, Elements::Bf16(_))
                    | (Products::I8, Elements::I8(_))
            );
            if !self.in_place {
                self.converted.reserve(KEY_TILE * words);
                let out = &mut self.converted[done * words..][..run.count * words];
                match products {
                    Products::F32 => run.values.widen(0, bytemuck::cast_slice_mut(out)),
                    _ => kernel::to_bf16(level, run.values, bytemuck::cast_slice_mut(out)),
                }
            }
            let factors = &mut self.factors[done..][..run.count];
            match run.scales {
                Scales::None => factors.fill(1.0),
                Scales::Numbers(scales) => factors.copy_from_slice(scales),
                Scales::Bytes(bytes) => {
                    for (factor, raw) in factors.iter_mut().zip(bytes.chunks_exact(4)) {
                        *factor = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                    }
                }
            }
            done += run.count;
        }
    }

    /// Where the keys that follow the tile lie.
    pub fn ahead(&self, keys: &IndexKeys<'_>, dim: usize) -> Ahead {
        let mut ahead = Ahead::default();
        for (i, page) in ahead.pages.iter_mut().enumerate() {
            let position = self.first + KEY_TILE + i * PAGE_TOKENS;
            if keys.holds(position) {
                let bytes = keys.run(position, 1, dim).values.bytes();
                (*page, ahead.row_bytes) = (bytes.as_ptr().addr(), bytes.len());
            }
        }
        ahead
    }

    /// The first `live` keys of the tile, in runs that lie one after another: the place of each in the tile, its rows, its
    /// factors. `keys` are those it was loaded from.
    pub fn for_each_run(
        &self,
        keys: &IndexKeys<'_>,
        live: usize,
        dim: usize,
        mut work: impl FnMut(usize, &[u8], &[f32]),
    ) {
        let live = live.min(self.count);
        if !self.in_place {
            return work(0, bytemuck::cast_slice(&self.converted), &self.factors[..live]);
        }
        let mut done = 0;
        while done < live {
            let run = keys.run(self.first + done, live - done, dim);
            work(done, run.values.bytes(), &self.factors[done..][..run.count]);
            done += run.count;
        }
    }
}
