//! Byte layouts of a page of 64 tokens: the latent cache (c and k_pe) and the index-key cache.
//!
//! Plain caches hold rows of numbers. The FP8 latent row ("fp8_ds_mla") holds C e4m3 codes, one f32 scale for each 128 of
//! them, then R bf16 values: 656 bytes for C = 512, R = 64. The FP8 index page holds 64 rows of Di codes and then 64 f32
//! scales, which lets a kernel read the codes as one matrix: 132 bytes a key for Di = 128. Numbers are little-endian.

use crate::argument::{Result, ensure};
use crate::cache::fp8;

/// Tokens of a page (a block of the block pool).
pub const PAGE_TOKENS: usize = 64;

const SCALE_BYTES: usize = size_of::<f32>();
const ROPE_BYTES: usize = size_of::<half::bf16>();

/// Widths of a latent row: C values (the attention values) and R rotary ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentLayout {
    /// C.
    pub value_dim: usize,
    /// R.
    pub rope_dim: usize,
}

impl LatentLayout {
    /// A row of `dim` = C + R numbers of which the first `value_dim` are values.
    ///
    /// # Errors
    /// `value_dim` of 0 or above `dim`.
    pub fn new(dim: usize, value_dim: usize) -> Result<Self> {
        ensure(
            (1..=dim).contains(&value_dim),
            "value_dim",
            || format!("1 to {dim}"),
            || value_dim.to_string(),
        )?;
        Ok(Self { value_dim, rope_dim: dim - value_dim })
    }

    /// C + R.
    pub fn dim(&self) -> usize {
        self.value_dim + self.rope_dim
    }

    /// Scales of an FP8 row.
    pub fn scales(&self) -> usize {
        self.value_dim.div_ceil(fp8::GROUP)
    }

    /// Bytes of an FP8 row.
    pub fn fp8_row_bytes(&self) -> usize {
        self.rope_offset() + ROPE_BYTES * self.rope_dim
    }

    /// Byte of an FP8 row at which scale `group` lies.
    pub fn scale_offset(&self, group: usize) -> usize {
        self.value_dim + SCALE_BYTES * group
    }

    /// Byte of an FP8 row at which the rotary values begin.
    pub fn rope_offset(&self) -> usize {
        self.scale_offset(self.scales())
    }
}

/// Bytes of an FP8 index page whose keys have `dim` values.
pub fn index_page_bytes(dim: usize) -> usize {
    PAGE_TOKENS * (dim + SCALE_BYTES)
}

/// Byte of an FP8 index page at which the scale of the key at `offset` lies.
pub fn index_scale_offset(dim: usize, offset: usize) -> usize {
    PAGE_TOKENS * dim + SCALE_BYTES * offset
}

/// The f32 at byte `at`.
#[inline]
pub(crate) fn load_f32(bytes: &[u8], at: usize) -> f32 {
    let mut raw = [0; SCALE_BYTES];
    raw.copy_from_slice(&bytes[at..at + SCALE_BYTES]);
    f32::from_le_bytes(raw)
}

/// Writes an f32 at byte `at`.
#[inline]
pub(crate) fn store_f32(bytes: &mut [u8], at: usize, value: f32) {
    bytes[at..at + SCALE_BYTES].copy_from_slice(&value.to_le_bytes());
}
