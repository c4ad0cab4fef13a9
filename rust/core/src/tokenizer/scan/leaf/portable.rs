//! Without vector instructions: a table gives each byte its kinds as bits, a multiplication gathers one bit of eight bytes.

use super::{Ascii, Block, Leaf, Wide, places};

/// A target's own integers.
pub(super) struct Portable;

/// The masks of the bits 0 to 7 of what `table` holds for each byte.
#[inline(always)]
fn planes(block: &Block, table: &[u8; 256]) -> [u64; 8] {
    let mut planes = [0; 8];
    for (at, eight) in block.as_chunks::<8>().0.iter().enumerate() {
        let kinds = u64::from_le_bytes(eight.map(|byte| table[usize::from(byte)]));
        for (bit, plane) in planes.iter_mut().enumerate() {
            // Each byte's bit comes to a place of its own in the highest byte of the product.
            let gathered = ((kinds >> bit) & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            *plane |= gathered << (8 * at);
        }
    }
    planes
}

static ASCII: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'A'..=b'Z' | b'a'..=b'z' => 1,
            b'0'..=b'9' => 2,
            b' ' => 4,
            b'\n' | b'\r' => 16,
            b'\t'..=b'\r' => 8,
            b'\'' => 64,
            b'!'..=b'~' => 32,
            0x80.. => 128,
            _ => 0,
        };
        byte += 1;
    }
    table
};

static WIDE: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0x80;
    while byte < 256 {
        table[byte] = match byte as u8 {
            0x80..=0xB7 => 1 | 32,
            0xB8..=0xBD => 1 | 16 | 32,
            0xBE..=0xBF => 1 | 16,
            0xE5..=0xE8 => 2,
            0xE4 => 4,
            0xE9 => 8,
            _ => 0,
        };
        byte += 1;
    }
    table
};

impl Leaf for Portable {
    #[inline(always)]
    unsafe fn ascii(block: &Block) -> Ascii {
        let [letter, digit, space, blank, newline, punctuation, apostrophe, wide] = planes(block, &ASCII);
        Ascii { letter, digit, space, blank, newline, punctuation, apostrophe, wide }
    }

    #[inline(always)]
    unsafe fn wide(block: &Block) -> Wide {
        let [tail, lead_e5_e8, lead_e4, lead_e9, from_b8, to_bd, ..] = planes(block, &WIDE);
        Wide { tail, lead_e5_e8, lead_e4, lead_e9, from_b8, to_bd }
    }

    #[inline(always)]
    unsafe fn places(mask: u64, base: u32, out: &mut [u32; 64]) {
        places(mask, base, out);
    }
}
