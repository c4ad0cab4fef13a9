//! Where in the text each id comes from, by the reference's rules.
//!
//! An id has the characters that its bytes touch: ids inside one character share its place. What normalization made has the
//! place of what it was made from, a space that was put before a piece that of the piece's first character. A post-processor
//! may leave out the spaces at a token's ends, and its own ids have the place 0..0.

use std::ops::Range;

use crate::tokenizer::encode::Encoder;
use crate::tokenizer::error::Result;
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
        let mut ids = Vec::with_capacity(text.len() / 4 + 8);
        let mut offsets = Vec::with_capacity(text.len() / 4 + 8);
        self.pool().with(|scratch| {
            self.for_each_part(text, options.allowed_special, |part| match part {
                Part::Token(id, place) => {
                    ids.push(id);
                    let Range { start, end } = place.origin(text, self);
                    offsets.push([start as u32, end as u32]);
                }
                Part::Text(normalized, place) if place.is_original && self.pieces_cover() => {
                    let before = ids.len();
                    self.encode_plain(normalized, scratch, &mut ids);
                    let start = place.section.start + place.range.start;
                    self.locate(&ids[before..], text, start, &mut offsets);
                }
                Part::Text(normalized, place) => {
                    self.locate_pieces(text, normalized, &place, scratch, &mut ids, &mut offsets);
                }
            })
        })?;
        if unit == Unit::Char {
            to_chars(text, &mut offsets);
        }
        Ok((ids, offsets))
    }

    /// Places of ids that follow each other from byte `start` of the text on.
    fn locate(&self, ids: &[u32], text: &str, start: usize, offsets: &mut Vec<[u32; 2]>) {
        let vocabulary = &self.bpe().vocabulary;
        let mut at = start as u32;
        let first = offsets.len();
        offsets.extend(ids.iter().map(|&id| {
            let start = at;
            at += vocabulary.bytes(id).len() as u32;
            [start, at]
        }));
        let bytes = text.as_bytes();
        if bytes[start..at as usize].is_ascii() {
            return;
        }
        let is_inside = |at: u32| bytes.get(at as usize).is_some_and(|&byte| byte & 0xC0 == 0x80);
        for [start, end] in &mut offsets[first..] {
            while is_inside(*start) {
                *start -= 1;
            }
            while is_inside(*end) {
                *end += 1;
            }
        }
    }

    /// The same where pieces do not make up the text, or normalization changed it: piece by piece.
    fn locate_pieces(
        &self,
        text: &str,
        normalized: &str,
        place: &Place,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
        offsets: &mut Vec<[u32; 2]>,
    ) {
        let origins = place.origins(text, self);
        let Scratch { pieces, bpe: memory, patterns, .. } = scratch;
        let mut encoder = Encoder { bpe: *self.bpe(), pieces, memory };
        let patterns = patterns.get_or_insert_with(|| self.pre_tokenizer().caches());
        self.pre_tokenizer().split(patterns, normalized, &mut |piece, from| {
            let before = ids.len();
            encoder.piece(piece.as_bytes(), ids);
            // A space that was put there counts as a byte before the piece, with the origin of its first character.
            let byte = |at: usize| {
                let at = place.range.start + from.at + at.saturating_sub(usize::from(from.prefixed));
                origins.of_byte(at)
            };
            let mut at = 0;
            for &id in &ids[before..] {
                let len = self.token_bytes(id).len();
                let (first, last) = (byte(at), byte(at + len - 1));
                offsets.push([first.start as u32, last.end as u32]);
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

/// From bytes to characters. Places rise, so one pass is enough; where one goes back, counting begins anew.
fn to_chars(text: &str, offsets: &mut [[u32; 2]]) {
    if text.is_ascii() {
        return;
    }
    let bytes = text.as_bytes();
    let count = |range: Range<usize>| bytes[range].iter().filter(|&&byte| byte & 0xC0 != 0x80).count() as u32;
    let (mut at, mut chars) = (0, 0);
    for [start, end] in offsets {
        let (from, to) = (*start as usize, *end as usize);
        if from < at {
            chars -= count(from..at);
        } else {
            chars += count(at..from);
        }
        *start = chars;
        chars += count(from..to);
        *end = chars;
        at = to;
    }
}
