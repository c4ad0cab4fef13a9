//! Where in the text each id comes from, by the reference's rules.
//!
//! An id has the characters that its bytes touch: ids inside one character share its place. What normalization made has the
//! place of what it was made from, a space that was put before a piece that of the piece's first character. A post-processor
//! may leave out the spaces at a token's ends, and its own ids have the place 0..0.

use std::ops::Range;

use crate::tokenizer::encode::Encoder;
use crate::tokenizer::error::Result;
use crate::tokenizer::key::window;
use crate::tokenizer::normalizer::Origin;
use crate::tokenizer::scratch::Scratch;
use crate::tokenizer::settings::Settings;
use crate::tokenizer::tokenizer::{EncodeOptions, Part, Place, Tokenizer};

/// What offsets count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Unicode characters.
    Char,
    /// Bytes of UTF-8.
    Byte,
}

/// Ids and their places.
pub type Located = (Vec<u32>, Vec<[u32; 2]>);

/// So many ids ahead, what tells a token's length is asked for.
const AHEAD: usize = 32;

impl Tokenizer {
    /// The ids of `text` and, for each, where it begins and ends.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, options: EncodeOptions<'_>, unit: Unit) -> Result<Located> {
        let (mut ids, mut offsets) = self.encode_untrimmed(text, options, unit)?;
        if options.add_special_tokens {
            let Settings { before, behind, .. } = self.settings();
            ids.splice(0..0, before.iter().copied());
            offsets.splice(0..0, before.iter().map(|_| [0, 0]));
            ids.extend_from_slice(behind);
            offsets.resize(ids.len(), [0, 0]);
        }
        if self.settings().trim.spaces {
            self.trim(&ids, &mut offsets);
        }
        Ok((ids, offsets))
    }

    /// The same without what a post-processor does.
    pub(super) fn encode_untrimmed(
        &self,
        text: &str,
        options: EncodeOptions<'_>,
        unit: Unit,
    ) -> Result<Located> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        let mut offsets = Vec::with_capacity(text.len() / 3 + 8);
        let mut counter = Counter::new(text, unit);
        self.pool().with(|scratch| {
            self.for_each_part(text, options.allowed_special, |part| match part {
                Part::Token(id, place) => {
                    ids.push(id);
                    offsets.push(counter.offsets(place.origin(text, self)));
                }
                Part::Text(normalized, place) if place.is_original && self.pieces_cover() => {
                    let before = ids.len();
                    self.encode_plain(normalized, scratch, &mut ids);
                    let start = place.section.start + place.range.start;
                    self.locate(&ids[before..], start, &mut counter, &mut offsets);
                }
                Part::Text(normalized, place) => {
                    let origins = place.origins(text, self);
                    self.locate_pieces(normalized, &origins, scratch, &mut counter, &mut ids, &mut offsets);
                }
            })
        })?;
        Ok((ids, offsets))
    }

    /// Places of ids that follow each other from byte `at` of the text on.
    fn locate(&self, ids: &[u32], mut at: usize, counter: &mut Counter<'_>, offsets: &mut Vec<[u32; 2]>) {
        let vocabulary = &self.bpe().vocabulary;
        let mut offset = counter.offset(at);
        offsets.extend(ids.iter().enumerate().map(|(index, &id)| {
            if let Some(&later) = ids.get(index + AHEAD) {
                vocabulary.ask_bytes(later);
            }
            let len = vocabulary.bytes(id).len();
            if len <= 16 && is_ascii(window(counter.bytes, at), len) {
                let start = offset;
                at += len;
                offset += len as u32;
                return [start, offset];
            }
            let (mut start, mut end) = (at, at + len);
            at = end;
            while counter.is_inside(start) {
                start -= 1;
            }
            while counter.is_inside(end) {
                end += 1;
            }
            let place = counter.offsets(start..end);
            offset = place[1]; // of what follows, unless that begins inside the same character and so is not ASCII
            place
        }));
    }

    /// The same where pieces do not make up the text, or normalization changed it: piece by piece.
    fn locate_pieces(
        &self,
        normalized: &str,
        origins: &Origins<'_>,
        scratch: &mut Scratch,
        counter: &mut Counter<'_>,
        ids: &mut Vec<u32>,
        offsets: &mut Vec<[u32; 2]>,
    ) {
        let Scratch { pieces, bpe: memory, patterns, .. } = scratch;
        let mut encoder = Encoder { bpe: *self.bpe(), pieces: pieces.tables(), memory };
        let patterns = patterns.get_or_insert_with(|| self.pre_tokenizer().caches());
        self.pre_tokenizer().split(patterns, normalized, &mut |piece, from| {
            let before = ids.len();
            encoder.piece(piece.as_bytes(), ids);
            // A space that was put there counts as a byte before the piece, with the origin of its first character.
            let byte = |at: usize| {
                let at = origins.place.range.start + from.at + at.saturating_sub(usize::from(from.prefixed));
                origins.of_byte(at)
            };
            let mut at = 0;
            for &id in &ids[before..] {
                let len = self.token_bytes(id).len();
                let (first, last) = (byte(at), byte(at + len - 1));
                offsets.push(counter.offsets(first.start..last.end));
                at += len;
            }
        });
    }

    /// Leaves out the spaces at the ends of tokens.
    fn trim(&self, ids: &[u32], offsets: &mut [[u32; 2]]) {
        let vocabulary = &self.bpe().vocabulary;
        for (index, (&id, [start, end])) in ids.iter().zip(offsets).enumerate() {
            let (leading, trailing) = vocabulary.spaces(id);
            if leading > 0 {
                let keeps = self.settings().trim.keeps_first && (index == 0 || *start == 0);
                *start = (*start + leading - u32::from(keeps)).min(*end);
            }
            if trailing > 0 && *end >= trailing {
                *end = (*end - trailing).max(*start);
            }
        }
    }

    fn pieces_cover(&self) -> bool {
        self.scanner().is_some() || self.pre_tokenizer().covers()
    }
}

impl Place {
    /// Origins of the bytes of the section's normalized form.
    fn origins(&self, text: &str, tokenizer: &Tokenizer) -> Origins<'_> {
        let section = self.section.clone();
        Origins {
            start: section.start,
            characters: tokenizer.settings().normalizer.origins(&text[section]),
            place: self,
        }
    }

    /// The stretch of the text that the part comes from.
    fn origin(&self, text: &str, tokenizer: &Tokenizer) -> Range<usize> {
        if self.is_original {
            return self.section.start + self.range.start..self.section.start + self.range.end;
        }
        let origins = self.origins(text, tokenizer);
        origins.of_byte(self.range.start).start..origins.of_byte(self.range.end - 1).end
    }
}

/// Where the characters of a normalized text come from.
struct Origins<'p> {
    start: usize,
    characters: Vec<Origin>,
    place: &'p Place,
}

impl Origins<'_> {
    /// The stretch of the whole text that byte `at` of the normalized section comes from.
    fn of_byte(&self, at: usize) -> Range<usize> {
        let index = self.characters.partition_point(|character| character.at <= at);
        let found = index.checked_sub(1).and_then(|index| self.characters.get(index));
        let origin = found.map_or(self.place.section.clone(), |character| character.from.clone());
        self.start + origin.start..self.start + origin.end
    }
}

/// From bytes to what offsets count. Places rise, but for tokens that share a character.
struct Counter<'t> {
    bytes: &'t [u8],
    /// Whether characters are counted, and are not all bytes.
    counts: bool,
    at: usize,
    characters: u32,
}

impl<'t> Counter<'t> {
    fn new(text: &'t str, unit: Unit) -> Self {
        let counts = unit == Unit::Char && !text.is_ascii();
        Self { bytes: text.as_bytes(), counts, at: 0, characters: 0 }
    }

    /// The offset of a place between characters.
    #[inline]
    fn offset(&mut self, byte: usize) -> u32 {
        if !self.counts {
            return byte as u32;
        }
        if byte < self.at {
            self.characters -= characters(self.bytes, byte, self.at);
        } else {
            self.characters += characters(self.bytes, self.at, byte);
        }
        self.at = byte;
        self.characters
    }

    fn offsets(&mut self, range: Range<usize>) -> [u32; 2] {
        [self.offset(range.start), self.offset(range.end)]
    }

    /// Whether a byte is inside a character.
    #[inline]
    fn is_inside(&self, byte: usize) -> bool {
        self.bytes.get(byte).is_some_and(|&byte| byte & 0xC0 == 0x80)
    }
}

/// Whether the first `len` bytes of a window, at least one, are ASCII.
#[inline]
fn is_ascii(window: u128, len: usize) -> bool {
    window << (128 - 8 * len) & u128::from_le_bytes([0x80; 16]) == 0
}

/// Characters that begin in `from..to`, counted 16 bytes at a time.
#[inline]
fn characters(bytes: &[u8], mut from: usize, to: usize) -> u32 {
    const ONES: u128 = u128::from_le_bytes([1; 16]);
    let mut count = 0;
    while from < to {
        let len = (to - from).min(16);
        let window = window(bytes, from);
        let inside = (window >> 7) & !(window >> 6) & ONES & (u128::MAX >> (128 - 8 * len));
        // The sum of all bytes comes to lie in the highest one.
        count += len as u32 - (inside.wrapping_mul(ONES) >> 120) as u32;
        from += len;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn characters_are_counted_where_they_begin(text in "[aé中😀]{0,30}", cuts in any::<[prop::sample::Index; 2]>()) {
            let bytes = text.as_bytes();
            let mut cuts = cuts.map(|cut| cut.index(bytes.len() + 1));
            cuts.sort_unstable();
            let expected = text.char_indices().filter(|(at, _)| (cuts[0]..cuts[1]).contains(at)).count();
            prop_assert_eq!(characters(bytes, cuts[0], cuts[1]), expected as u32);
        }
    }
}
