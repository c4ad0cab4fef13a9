//! Where keys and values lie: contiguous rows, or latent rows of pages; read one row at a time, as f32 or as bfloat16.

use half::bf16;

use super::batch::PagedKeys;
use crate::elements::Elements;
use crate::simd::Level;

/// Contiguous keys and values of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KeyValueRows<'a> {
    /// [S, Hkv, Dk].
    pub keys: Elements<'a>,
    /// [S, Hkv, Dv]; without it, the first Dv numbers of a key are its value.
    pub values: Option<Elements<'a>>,
    /// S.
    pub count: usize,
    /// Hkv; head h reads key head h / (H / Hkv).
    pub heads: usize,
    /// Dv.
    pub value_dim: usize,
}

/// Keys and values of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeyValues<'a> {
    Rows { rows: KeyValueRows<'a>, dim: usize },
    Pages(PagedKeys<'a>),
}

impl KeyValues<'_> {
    /// Widens the key of `head` at `position`; `dst` has its width.
    #[inline]
    pub fn read_key(&self, position: usize, head: usize, dst: &mut [f32]) {
        match self {
            Self::Rows { rows, dim } => rows.keys.widen((position * rows.heads + head) * dim, dst),
            Self::Pages(pages) => {
                pages.read(position, dst);
            }
        }
    }

    /// Widens a value that lies apart from its key.
    #[inline]
    pub fn read_value(&self, position: usize, head: usize, dst: &mut [f32]) {
        if let Some((values, at)) = self.value_at(position, head) {
            values.widen(at, dst);
        }
    }

    /// True when values lie apart from keys.
    pub fn has_values(&self) -> bool {
        matches!(self, Self::Rows { rows: KeyValueRows { values: Some(_), .. }, .. })
    }

    /// True when every number is a bfloat16, or an FP8 code that comes with a scale.
    pub fn is_half(&self) -> bool {
        let half = |x: Elements<'_>| matches!(x, Elements::Bf16(_));
        match self {
            Self::Rows { rows, .. } => half(rows.keys) && rows.values.is_none_or(half),
            Self::Pages(pages) => pages.cache.is_half(),
        }
    }

    /// As `read_key`, in bfloat16: exact, but for FP8 rows, whose products with their scales are rounded to nearest even.
    #[inline]
    pub fn read_half_key(&self, level: Level, position: usize, head: usize, dst: &mut [bf16]) {
        match self {
            Self::Rows { rows: KeyValueRows { keys: Elements::Bf16(keys), heads, .. }, dim } => {
                dst.copy_from_slice(&keys[(position * heads + head) * dim..][..dst.len()]);
            }
            Self::Rows { .. } => unreachable!("is_half has been asked"),
            Self::Pages(pages) => pages.read_half(level, position, dst),
        }
    }

    /// As `read_value`, in bfloat16.
    #[inline]
    pub fn read_half_value(&self, position: usize, head: usize, dst: &mut [bf16]) {
        if let Some((Elements::Bf16(values), at)) = self.value_at(position, head) {
            dst.copy_from_slice(&values[at..][..dst.len()]);
        }
    }

    /// Address and bytes of the key at `position`, to be fetched ahead.
    pub fn span(&self, position: usize, head: usize) -> (usize, usize) {
        match self {
            Self::Rows { rows, dim } => {
                let (base, width) = rows.keys.base();
                (base + (position * rows.heads + head) * dim * width, dim * width)
            }
            Self::Pages(pages) => pages.span(position),
        }
    }

    fn value_at(&self, position: usize, head: usize) -> Option<(Elements<'_>, usize)> {
        match self {
            Self::Rows { rows, .. } => Some((rows.values?, (position * rows.heads + head) * rows.value_dim)),
            Self::Pages(_) => None,
        }
    }
}
