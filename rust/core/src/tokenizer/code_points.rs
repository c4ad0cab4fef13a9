//! Code points to UTF-8, for callers whose strings are stored by code point.

use crate::simd::{self, Kernel, Level, Simd};

/// So many are looked at together.
const BLOCK: usize = 32;
/// The most bytes of one.
const MOST: usize = 4;

/// Appends code points as UTF-8; None, with something appended, if one is not a character.
pub fn encode(points: &[u32], out: &mut Vec<u8>) -> Option<()> {
    // A level that cannot be had is an operator's error: it is answered with the least.
    simd::dispatch(Level::current().unwrap_or(Level::Portable), Encode { points, out })
}

/// Vectors are left to the compiler, which sees the level's instructions.
struct Encode<'a> {
    points: &'a [u32],
    out: &'a mut Vec<u8>,
}

impl Kernel for Encode<'_> {
    type Output = Option<()>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Option<()> {
        let Self { points, out } = self;
        let mut valid = true;
        let mut len = out.len();
        out.resize(len + MOST * points.len(), 0);
        for block in points.chunks(BLOCK) {
            if let Some(block) = block.first_chunk::<BLOCK>()
                && is_ascii(block)
            {
                out[len..len + BLOCK].copy_from_slice(&block.map(|point| point as u8));
                len += BLOCK;
                continue;
            }
            for &point in block {
                valid &= char::from_u32(point).is_some();
                // Each byte has six bits of it but the first, which says by its upper bits how many there are.
                let last = |bits: u32, at: u32| (0x80 | bits & 0x3F) << (8 * at);
                let (word, count) = match point {
                    ..0x80 => (point, 1),
                    0x80..0x800 => (0xC0 | point >> 6 | last(point, 1), 2),
                    0x800..0x1_0000 => (0xE0 | point >> 12 | last(point >> 6, 1) | last(point, 2), 3),
                    _ => (
                        0xF0 | point >> 18 | last(point >> 12, 1) | last(point >> 6, 2) | last(point, 3),
                        MOST,
                    ),
                };
                out[len..len + MOST].copy_from_slice(&word.to_le_bytes());
                len += count;
            }
        }
        out.truncate(len);
        valid.then_some(())
    }
}

/// Whether each is below 0x80, written so that compilers see vectors in it.
#[inline(always)]
fn is_ascii(block: &[u32; BLOCK]) -> bool {
    let mut all = [0; 16];
    for lanes in block.chunks_exact(16) {
        all.iter_mut().zip(lanes).for_each(|(all, lane)| *all |= lane);
    }
    all.into_iter().fold(0, |all, lane| all | lane) < 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_is_encoded_as_the_standard_library_does() {
        let characters: Vec<char> = (0..=0x10FFFF).filter_map(char::from_u32).collect();
        for size in [1000, 1017] {
            let mut bytes = vec![];
            for part in characters.chunks(size) {
                let points: Vec<u32> = part.iter().copied().map(u32::from).collect();
                encode(&points, &mut bytes).unwrap();
            }
            assert_eq!(std::str::from_utf8(&bytes), Ok(&*characters.iter().collect::<String>()));
        }
    }

    #[test]
    fn what_is_no_character_is_refused() {
        for point in [0xD800, 0xDFFF, 0x11_0000, u32::MAX] {
            assert_eq!(encode(&[65, point, 66], &mut vec![]), None);
        }
    }
}
