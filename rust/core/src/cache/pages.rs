//! Reading and writing rows of paged caches, whatever their format. Layouts: `layout.rs`.

use half::bf16;
use rayon::prelude::*;

use super::layout::{LatentLayout, PAGE_TOKENS, index_page_bytes, index_scale_offset, load_f32, store_f32};
use super::{fp8, fp8_half, int8};
use crate::argument::{ArgumentError, Result, ensure, ensure_volume, volume};
use crate::elements::{Elements, take_front};
use crate::simd::Level;

/// Storage of a cache: rows of numbers, or pages of codes and scales.
#[derive(Clone, Copy, Debug)]
pub enum Pages<'a> {
    /// f32 or bf16 rows.
    Rows(Elements<'a>),
    /// FP8 pages.
    Fp8(&'a [u8]),
    /// Pages of int8 index keys.
    Int8(&'a [i8]),
}

/// Writable storage of a cache.
#[derive(Debug)]
pub enum PagesMut<'a> {
    /// f32 rows.
    F32(&'a mut [f32]),
    /// bf16 rows.
    Bf16(&'a mut [bf16]),
    /// FP8 pages.
    Fp8(&'a mut [u8]),
    /// Pages of int8 index keys.
    Int8(&'a mut [i8]),
}

/// Which cache, with the widths that fix its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Latent rows.
    Latent(LatentLayout),
    /// Index keys of Di values, at most 128 (one scale a key).
    Index(usize),
}

impl Layout {
    /// Numbers of a row.
    pub fn dim(&self) -> usize {
        match self {
            Self::Latent(l) => l.dim(),
            Self::Index(dim) => *dim,
        }
    }

    fn page_bytes(&self) -> usize {
        match self {
            Self::Latent(l) => PAGE_TOKENS * l.fp8_row_bytes(),
            Self::Index(dim) => index_page_bytes(*dim),
        }
    }

    /// Items of one page of storage.
    fn page_items(&self, format: Format) -> usize {
        if format == Format::Numbers { PAGE_TOKENS * self.dim() } else { self.page_bytes() }
    }

    fn check(&self, blocks: usize, items: usize, format: Format) -> Result<()> {
        ensure(self.dim() > 0, "cache", || "rows of at least 1 value".into(), || "0".into())?;
        match self {
            Self::Index(dim) => {
                let fits = format != Format::Fp8 || *dim <= fp8::GROUP;
                let expected = || format!("FP8 index keys of at most {} values", fp8::GROUP);
                ensure(fits, "cache", expected, || dim.to_string())?;
            }
            Self::Latent(_) => {
                let expected = || "latent rows of numbers or FP8 (int8 is a format of index keys)".into();
                ensure(format != Format::Int8, "cache", expected, || "int8".into())?;
            }
        }
        ensure_volume("cache", &[blocks, self.page_items(format)], items)
    }

    fn read_int8(&self, pages: &[i8], slot: usize, dst: &mut [f32]) -> f32 {
        let (page, offset) = (slot / PAGE_TOKENS, slot % PAGE_TOKENS);
        let page = &pages[page * self.page_bytes()..][..self.page_bytes()];
        for (d, &code) in dst.iter_mut().zip(&page[offset * self.dim()..][..self.dim()]) {
            *d = f32::from(code);
        }
        load_f32(bytemuck::cast_slice(page), index_scale_offset(self.dim(), offset))
    }

    fn write_int8(&self, page: &mut [i8], offset: usize, row: &[f32]) {
        let dim = self.dim();
        let scale = int8::quantize_row(row, &mut page[offset * dim..][..dim]);
        store_f32(bytemuck::cast_slice_mut(page), index_scale_offset(dim, offset), scale);
    }

    fn read_fp8(&self, pages: &[u8], slot: usize, dst: &mut [f32]) -> f32 {
        let (page, offset) = (slot / PAGE_TOKENS, slot % PAGE_TOKENS);
        let page = &pages[page * self.page_bytes()..][..self.page_bytes()];
        match self {
            Self::Latent(l) => {
                let row = &page[offset * l.fp8_row_bytes()..][..l.fp8_row_bytes()];
                let (values, rope) = dst.split_at_mut(l.value_dim);
                let groups = values.chunks_mut(fp8::GROUP).zip(row[..l.value_dim].chunks(fp8::GROUP));
                for (g, (dst, codes)) in groups.enumerate() {
                    fp8::dequantize_group(codes, load_f32(row, l.scale_offset(g)), dst);
                }
                for (d, raw) in rope.iter_mut().zip(row[l.rope_offset()..].chunks_exact(2)) {
                    *d = bf16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
                1.0
            }
            Self::Index(dim) => {
                fp8::decode(&page[offset * dim..][..*dim], dst);
                load_f32(page, index_scale_offset(*dim, offset))
            }
        }
    }

    fn write_fp8(&self, page: &mut [u8], offset: usize, row: &[f32]) {
        match self {
            Self::Latent(l) => {
                let bytes = l.fp8_row_bytes();
                let page = &mut page[offset * bytes..][..bytes];
                let (codes, tail) = page.split_at_mut(l.value_dim);
                fp8::quantize_row(&row[..l.value_dim], codes, |g, scale| {
                    store_f32(tail, l.scale_offset(g) - l.value_dim, scale);
                });
                for (raw, &x) in page[l.rope_offset()..].chunks_exact_mut(2).zip(&row[l.value_dim..]) {
                    raw.copy_from_slice(&bf16::from_f32(x).to_le_bytes());
                }
            }
            Self::Index(dim) => {
                let scale = fp8::quantize_group(row, &mut page[offset * dim..][..*dim]);
                store_f32(page, index_scale_offset(*dim, offset), scale);
            }
        }
    }
}

/// What an item of storage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Numbers,
    Fp8,
    Int8,
}

/// A cache whose size has been checked against its layout.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    pages: Pages<'a>,
    layout: Layout,
    blocks: usize,
}

impl<'a> Cache<'a> {
    /// A view of `blocks` pages.
    ///
    /// # Errors
    /// The storage does not hold exactly `blocks` pages of `layout`.
    pub fn new(pages: Pages<'a>, layout: Layout, blocks: usize) -> Result<Self> {
        match pages {
            Pages::Rows(values) => layout.check(blocks, values.len(), Format::Numbers)?,
            Pages::Fp8(bytes) => layout.check(blocks, bytes.len(), Format::Fp8)?,
            Pages::Int8(bytes) => layout.check(blocks, bytes.len(), Format::Int8)?,
        }
        Ok(Self { pages, layout, blocks })
    }

    /// Pages of the cache.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Widths of a row.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Reads the row in `slot` and returns the factor its numbers (index keys) or 1 (latents, already scaled) stand for.
    #[inline]
    pub(crate) fn read(&self, slot: usize, dst: &mut [f32]) -> f32 {
        match self.pages {
            Pages::Rows(values) => {
                values.widen(slot * self.layout.dim(), dst);
                1.0
            }
            Pages::Fp8(bytes) => self.layout.read_fp8(bytes, slot, dst),
            Pages::Int8(bytes) => self.layout.read_int8(bytes, slot, dst),
        }
    }

    /// True when rows are bfloat16 or FP8.
    pub(crate) fn is_half(&self) -> bool {
        matches!(self.pages, Pages::Fp8(_) | Pages::Rows(Elements::Bf16(_)))
    }

    /// Reads the latent row in `slot` as bfloat16, FP8 codes times their scale rounded to nearest even. `is_half` must hold.
    #[inline]
    pub(crate) fn read_half(&self, level: Level, slot: usize, dst: &mut [bf16]) {
        match (self.pages, self.layout) {
            (Pages::Rows(Elements::Bf16(rows)), _) => {
                dst.copy_from_slice(&rows[slot * dst.len()..][..dst.len()]);
            }
            (Pages::Fp8(bytes), Layout::Latent(l)) => {
                let row = &bytes[slot * l.fp8_row_bytes()..][..l.fp8_row_bytes()];
                let (values, rope) = dst.split_at_mut(l.value_dim);
                let groups = values.chunks_mut(fp8::GROUP).zip(row[..l.value_dim].chunks(fp8::GROUP));
                for (g, (dst, codes)) in groups.enumerate() {
                    fp8_half::dequantize_group(level, codes, load_f32(row, l.scale_offset(g)), dst);
                }
                for (d, raw) in rope.iter_mut().zip(row[l.rope_offset()..].chunks_exact(2)) {
                    *d = bf16::from_le_bytes([raw[0], raw[1]]);
                }
            }
            _ => unreachable!("is_half has been asked of a latent cache"),
        }
    }

    /// Address and bytes of the row in `slot`, of numbers or of an FP8 latent cache.
    pub(crate) fn span(&self, slot: usize) -> (usize, usize) {
        match (self.pages, self.layout) {
            (Pages::Rows(rows), layout) => {
                let (base, width) = rows.base();
                (base + slot * layout.dim() * width, layout.dim() * width)
            }
            (Pages::Fp8(bytes), Layout::Latent(l)) => {
                (bytes.as_ptr().addr() + slot * l.fp8_row_bytes(), l.fp8_row_bytes())
            }
            _ => unreachable!("spans are those of rows; index keys are read a page at a time"),
        }
    }

    /// All of the storage, as the numbers that an index cache holds (its scales among them).
    pub(crate) fn values(&self) -> Elements<'a> {
        match self.pages {
            Pages::Rows(values) => values,
            Pages::Fp8(bytes) => Elements::E4m3(bytes),
            Pages::Int8(bytes) => Elements::I8(bytes),
        }
    }

    /// Page `block` of an index cache: its 64 keys and, where the format has them, their scales, f32 in little-endian bytes.
    #[inline]
    pub(crate) fn index_page(&self, block: usize) -> (Elements<'a>, Option<&'a [u8]>) {
        let keys = PAGE_TOKENS * self.layout.dim();
        let bytes = self.layout.page_bytes();
        let scales = match self.pages {
            Pages::Rows(values) => return (values.slice(block * keys, keys), None),
            Pages::Fp8(pages) => &pages[block * bytes + keys..][..bytes - keys],
            Pages::Int8(pages) => bytemuck::cast_slice(&pages[block * bytes + keys..][..bytes - keys]),
        };
        (self.values().slice(block * bytes, keys), Some(scales))
    }

    /// Reads the rows in `slots` as f32 [N, dim], scales applied.
    ///
    /// # Errors
    /// A slot outside the cache, an output of the wrong size.
    pub fn gather(&self, slots: &[i64], out: &mut [f32]) -> Result<()> {
        let dim = self.layout.dim();
        ensure_volume("out", &[slots.len(), dim], out.len())?;
        for &slot in slots {
            let fits = usize::try_from(slot).is_ok_and(|s| s < self.blocks * PAGE_TOKENS);
            ensure(
                fits,
                "slots",
                || format!("slots from 0 to {} - 1", self.blocks * PAGE_TOKENS),
                || slot.to_string(),
            )?;
        }
        out.par_chunks_mut(dim).zip(slots).for_each(|(row, &slot)| {
            let factor = self.read(slot as usize, row);
            if factor != 1.0 {
                row.iter_mut().for_each(|x| *x *= factor);
            }
        });
        Ok(())
    }
}

/// Writes `rows` [N, dim] to the slots of `cache` in its format; slot -1 skips its row.
///
/// # Errors
/// Sizes that do not fit, a slot outside the cache, a slot named twice (which row would win?). Nothing is written then.
pub fn write(
    name: &'static str,
    rows: Elements<'_>,
    slots: &[i64],
    cache: PagesMut<'_>,
    layout: Layout,
    blocks: usize,
) -> Result<()> {
    ensure_volume(name, &[slots.len(), layout.dim()], rows.len())?;
    let (items, format) = match &cache {
        PagesMut::F32(x) => (x.len(), Format::Numbers),
        PagesMut::Bf16(x) => (x.len(), Format::Numbers),
        PagesMut::Fp8(x) => (x.len(), Format::Fp8),
        PagesMut::Int8(x) => (x.len(), Format::Int8),
    };
    layout.check(blocks, items, format)?;
    let page_items = layout.page_items(format);
    let targets = Target::sorted(slots, volume("cache", &[blocks, PAGE_TOKENS])?)?;
    let dim = layout.dim();
    let read = |t: &Target, dst: &mut [f32]| rows.widen(t.row * dim, dst);
    match cache {
        PagesMut::F32(x) => each_page(x, page_items, &targets, |page, targets| {
            targets.iter().for_each(|t| read(t, &mut page[t.offset() * dim..][..dim]));
        }),
        PagesMut::Bf16(x) => each_page(x, page_items, &targets, |page, targets| {
            let mut wide = vec![0.0; dim];
            for t in targets {
                let row = &mut page[t.offset() * dim..][..dim];
                match rows {
                    Elements::Bf16(x) => row.copy_from_slice(&x[t.row * dim..][..dim]),
                    _ => {
                        read(t, &mut wide);
                        row.iter_mut().zip(&wide).for_each(|(d, &s)| *d = bf16::from_f32(s));
                    }
                }
            }
        }),
        PagesMut::Fp8(x) => each_page(x, page_items, &targets, |page, targets| {
            let mut wide = vec![0.0; dim];
            for t in targets {
                read(t, &mut wide);
                layout.write_fp8(page, t.offset(), &wide);
            }
        }),
        PagesMut::Int8(x) => each_page(x, page_items, &targets, |page, targets| {
            let mut wide = vec![0.0; dim];
            for t in targets {
                read(t, &mut wide);
                layout.write_int8(page, t.offset(), &wide);
            }
        }),
    }
    Ok(())
}

/// A row to write.
struct Target {
    slot: usize,
    row: usize,
}

impl Target {
    fn offset(&self) -> usize {
        self.slot % PAGE_TOKENS
    }

    /// The rows to write in the order of their slots.
    fn sorted(slots: &[i64], capacity: usize) -> Result<Vec<Self>> {
        let mut targets = Vec::with_capacity(slots.len());
        for (row, &slot) in slots.iter().enumerate() {
            match usize::try_from(slot) {
                Ok(slot) if slot < capacity => targets.push(Self { slot, row }),
                _ if slot == -1 => {}
                _ => {
                    return Err(ArgumentError::Mismatch {
                        name: "slot_mapping",
                        expected: format!("-1 or a slot below {capacity}"),
                        got: slot.to_string(),
                    });
                }
            }
        }
        targets.sort_unstable_by_key(|t| t.slot);
        match targets.windows(2).find(|w| w[0].slot == w[1].slot) {
            Some(w) => Err(ArgumentError::Mismatch {
                name: "slot_mapping",
                expected: "each slot once".into(),
                got: format!(
                    "slot {} for rows {} and {}",
                    w[0].slot,
                    w[0].row.min(w[1].row),
                    w[0].row.max(w[1].row)
                ),
            }),
            None => Ok(targets),
        }
    }
}

/// Calls `work` once for each page that `targets` touch, pages in parallel.
fn each_page<T: Send>(
    mut storage: &mut [T],
    page_items: usize,
    targets: &[Target],
    work: impl Fn(&mut [T], &[Target]) + Sync,
) {
    let mut passed = 0;
    let touched: Vec<_> = targets
        .chunk_by(|a, b| a.slot / PAGE_TOKENS == b.slot / PAGE_TOKENS)
        .map(|targets| {
            let page = targets[0].slot / PAGE_TOKENS;
            take_front(&mut storage, (page - passed) * page_items);
            passed = page + 1;
            (take_front(&mut storage, page_items), targets)
        })
        .collect();
    touched.into_par_iter().for_each(|(page, targets)| work(page, targets));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn published_sizes() {
        let latent = LatentLayout::new(576, 512).unwrap();
        assert_eq!(latent.fp8_row_bytes(), 656);
        assert_eq!(index_page_bytes(128), 64 * 132);
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        prop_oneof![
            (1usize..300, 0usize..70)
                .prop_map(|(c, r)| Layout::Latent(LatentLayout { value_dim: c, rope_dim: r })),
            (1usize..=128).prop_map(Layout::Index),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn written_rows_come_back_and_other_slots_are_untouched(
            layout in layouts(),
            slots in prop::collection::hash_set(-1i64..256, 0..40),
            seed in -1e3f32..1e3,
        ) {
            let slots: Vec<i64> = slots.into_iter().collect();
            let dim = layout.dim();
            let rows: Vec<f32> = (0..slots.len() * dim).map(|i| seed * (i % 97) as f32 / 97.0 - i as f32).collect();
            let write_to = |cache| write("rows", Elements::F32(&rows), &slots, cache, layout, 4).unwrap();
            let all: Vec<i64> = (0..256).collect();
            let read = |pages| {
                let mut out = vec![0.0; 256 * dim];
                Cache::new(pages, layout, 4).unwrap().gather(&all, &mut out).unwrap();
                out
            };
            let mut plain = vec![0.0; 256 * dim];
            write_to(PagesMut::F32(&mut plain));
            let mut half = vec![bf16::ZERO; 256 * dim];
            write_to(PagesMut::Bf16(&mut half));
            let mut bytes = vec![0u8; layout.page_bytes() * 4];
            write_to(PagesMut::Fp8(&mut bytes));
            let (plain, half, bytes) = (
                read(Pages::Rows(Elements::F32(&plain))),
                read(Pages::Rows(Elements::Bf16(&half))),
                read(Pages::Fp8(&bytes)),
            );
            let mut want = vec![0.0; 256 * dim];
            for (i, &slot) in slots.iter().enumerate().filter(|(_, s)| **s >= 0) {
                want[slot as usize * dim..][..dim].copy_from_slice(&rows[i * dim..][..dim]);
            }
            prop_assert_eq!(&plain, &want);
            for ((w, h), b) in want.chunks(dim).zip(half.chunks(dim)).zip(bytes.chunks(dim)) {
                let amax = w.iter().fold(0f32, |m, x| m.max(x.abs()));
                for ((w, h), b) in w.iter().zip(h).zip(b) {
                    prop_assert_eq!(*h, bf16::from_f32(*w).to_f32());
                    // Half a step of 3 mantissa bits, or of the smallest subnormal at the group's scale.
                    prop_assert!((w - b).abs() <= (w.abs() / 16.0).max(amax / 448.0 / 1024.0) * 1.001);
                }
            }
        }
    }

    #[test]
    fn bad_slots_are_refused_before_anything_is_written() {
        let mut cache = vec![0.0; 128];
        let rows = [1.0, 2.0];
        let mut attempt = |slots: &[i64]| {
            let r =
                write("keys", Elements::F32(&rows), slots, PagesMut::F32(&mut cache), Layout::Index(1), 2);
            r.map_err(|e| e.to_string())
        };
        assert_eq!(attempt(&[0, 128]).unwrap_err(), "slot_mapping: expected -1 or a slot below 128, got 128");
        assert_eq!(attempt(&[0, -2]).unwrap_err(), "slot_mapping: expected -1 or a slot below 128, got -2");
        assert_eq!(
            attempt(&[5, 5]).unwrap_err(),
            "slot_mapping: expected each slot once, got slot 5 for rows 0 and 1"
        );
        assert!(attempt(&[5]).unwrap_err().starts_with("keys: "));
        assert!(cache.iter().all(|&x| x == 0.0));
    }
}
