//! The leaf of the scanners: which of 64 bytes are what, as one u64 a question, by vector instructions.
//!
//! Bit i stands for byte i. Everything but two comparisons is written once; each instruction set brings those two.

mod dispatch;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(super) use dispatch::Instructions;
pub(in crate::tokenizer) use dispatch::Work;

/// A block of text.
pub(in crate::tokenizer) type Block = [u8; 64];

/// The ASCII bytes of a block by kind; no byte is in two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tokenizer) struct Ascii {
    /// A-Z a-z
    pub letter: u64,
    /// 0-9
    pub digit: u64,
    /// U+0020
    pub space: u64,
    /// U+0009, 000B, 000C
    pub blank: u64,
    /// U+000A, 000D
    pub newline: u64,
    /// The 32 of P and S, but for the apostrophe
    pub punctuation: u64,
    /// U+0027
    pub apostrophe: u64,
    /// Bytes from 0x80 on
    pub wide: u64,
}

/// What a block's bytes from 0x80 on are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::tokenizer) struct Wide {
    /// 80-BF: not the first byte of a character
    pub tail: u64,
    /// E5-E8
    pub lead_e5_e8: u64,
    /// E4
    pub lead_e4: u64,
    /// E9
    pub lead_e9: u64,
    /// B8-BF
    pub from_b8: u64,
    /// 80-BD
    pub to_bd: u64,
}

/// An instruction set. The methods are unsafe because they may use instructions that only [`Instructions::run`] has
/// proven to exist.
#[allow(clippy::missing_safety_doc)]
pub(in crate::tokenizer) trait Leaf {
    unsafe fn ascii(block: &Block) -> Ascii;
    unsafe fn wide(block: &Block) -> Wide;
    /// Writes `base` plus the place of each bit, in order; what lies behind them in `out` becomes anything.
    unsafe fn places(mask: u64, base: u32, out: &mut [u32; 64]);
}

/// 64 bytes in registers. Unsafe as [`Leaf`] is.
#[allow(clippy::missing_safety_doc)]
trait Bytes: Copy {
    unsafe fn load(block: &Block) -> Self;
    /// Each byte with the bit 0x20, which makes ASCII letters small.
    unsafe fn small(self) -> Self;
    /// The bytes equal to this one.
    unsafe fn equal(self, byte: u8) -> u64;
    /// The bytes from the first to the last of these.
    unsafe fn within(self, first: u8, last: u8) -> u64;
    /// As [`Leaf::places`].
    #[inline(always)]
    unsafe fn places(mask: u64, base: u32, out: &mut [u32; 64]) {
        places(mask, base, out);
    }
}

/// [`Leaf::places`] without vectors.
#[inline(always)]
fn places(mut mask: u64, base: u32, out: &mut [u32; 64]) {
    // Eight at a time without a question.
    for eight in out.as_chunks_mut::<8>().0 {
        if mask == 0 {
            break;
        }
        for place in eight {
            *place = base.wrapping_add(mask.trailing_zeros());
            mask &= mask.wrapping_sub(1);
        }
    }
}

impl<B: Bytes> Leaf for B {
    #[inline(always)]
    unsafe fn ascii(block: &Block) -> Ascii {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = B::load(block);
            let letter = bytes.small().within(b'a', b'z');
            let digit = bytes.within(b'0', b'9');
            let newline = bytes.equal(b'\n') | bytes.equal(b'\r');
            let apostrophe = bytes.equal(b'\'');
            Ascii {
                letter,
                digit,
                space: bytes.equal(b' '),
                blank: bytes.within(b'\t', b'\r') & !newline,
                newline,
                punctuation: bytes.within(b'!', b'~') & !(letter | digit | apostrophe),
                apostrophe,
                wide: bytes.within(0x80, 0xFF),
            }
        }
    }

    #[inline(always)]
    unsafe fn wide(block: &Block) -> Wide {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = B::load(block);
            let tail = bytes.within(0x80, 0xBF);
            Wide {
                tail,
                lead_e5_e8: bytes.within(0xE5, 0xE8),
                lead_e4: bytes.equal(0xE4),
                lead_e9: bytes.equal(0xE9),
                from_b8: bytes.within(0xB8, 0xBF),
                to_bd: tail & !bytes.within(0xBE, 0xBF),
            }
        }
    }

    #[inline(always)]
    unsafe fn places(mask: u64, base: u32, out: &mut [u32; 64]) {
        // SAFETY: the caller's promise.
        unsafe { <B as Bytes>::places(mask, base, out) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definitions, bit by bit.
    fn plain(block: &Block) -> (Ascii, Wide) {
        let mask = |holds: &dyn Fn(u8) -> bool| {
            block.iter().enumerate().fold(0, |mask, (i, &byte)| mask | u64::from(holds(byte)) << i)
        };
        let ascii = Ascii {
            letter: mask(&|b| b.is_ascii_alphabetic()),
            digit: mask(&|b| b.is_ascii_digit()),
            space: mask(&|b| b == b' '),
            blank: mask(&|b| matches!(b, 9 | 11 | 12)),
            newline: mask(&|b| matches!(b, 10 | 13)),
            punctuation: mask(&|b| b.is_ascii_punctuation() && b != b'\''),
            apostrophe: mask(&|b| b == b'\''),
            wide: mask(&|b| b >= 0x80),
        };
        let wide = Wide {
            tail: mask(&|b| matches!(b, 0x80..=0xBF)),
            lead_e5_e8: mask(&|b| matches!(b, 0xE5..=0xE8)),
            lead_e4: mask(&|b| b == 0xE4),
            lead_e9: mask(&|b| b == 0xE9),
            from_b8: mask(&|b| matches!(b, 0xB8..=0xBF)),
            to_bd: mask(&|b| matches!(b, 0x80..=0xBD)),
        };
        (ascii, wide)
    }

    struct Both<'b>(&'b Block);

    impl Work for Both<'_> {
        type Output = (Ascii, Wide);
        #[inline(always)]
        unsafe fn run<L: Leaf>(self) -> Self::Output {
            // SAFETY: the caller's promise.
            unsafe { (L::ascii(self.0), L::wide(self.0)) }
        }
    }

    fn check(block: &Block) {
        for instructions in Instructions::available() {
            assert_eq!(instructions.run(Both(block)), plain(block), "{instructions:?}");
        }
    }

    #[test]
    fn every_byte_at_every_place_is_known() {
        for byte in 0..=255 {
            check(&[byte; 64]);
            for place in 0..64 {
                let mut block = [b'a'; 64];
                block[place] = byte;
                check(&block);
            }
        }
    }

    struct Places(u64, u32);

    impl Work for Places {
        type Output = Vec<u32>;
        #[inline(always)]
        unsafe fn run<L: Leaf>(self) -> Self::Output {
            let mut out = [0; 64];
            // SAFETY: the caller's promise.
            unsafe { L::places(self.0, self.1, &mut out) };
            out[..self.0.count_ones() as usize].to_vec()
        }
    }

    proptest! {
        #[test]
        fn places_are_those_of_the_bits(mask: u64, other: u64, base: u32) {
            for mask in [0, u64::MAX, mask, mask & other, mask | other, mask & !(u64::MAX << (other % 64))] {
                let expected: Vec<u32> =
                    (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| base.wrapping_add(bit)).collect();
                for instructions in Instructions::available() {
                    prop_assert_eq!(instructions.run(Places(mask, base)), &expected[..], "{:?}", instructions);
                }
            }
        }

        #[test]
        fn random_blocks_are_known(block in prop::array::uniform32(any::<[u8; 2]>())) {
            check(block.as_flattened().try_into().unwrap());
        }
    }
}
