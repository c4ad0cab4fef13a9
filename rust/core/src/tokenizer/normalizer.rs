//! What is done to a text before it is cut.

use std::borrow::Cow;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// A file's `normalizer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Normalizer {
    /// Nothing.
    Identity,
    /// Canonical composition, by the reference engine's tables.
    Nfc,
}

impl Normalizer {
    /// The normalized text; borrowed if nothing changes, as far as that is quick to see.
    pub fn apply<'t>(self, text: &'t str) -> Cow<'t, str> {
        match self {
            Self::Nfc if !is_quickly_nfc(text) => Cow::Owned(text.nfc().map(|(c, _)| c).collect()),
            _ => Cow::Borrowed(text),
        }
    }

    /// Where each character of the normalized text comes from.
    pub fn origins(self, text: &str) -> Vec<Origin> {
        let characters: Vec<(char, isize)> = match self {
            Self::Identity => text.chars().map(|c| (c, 0)).collect(),
            Self::Nfc => text.nfc().collect(),
        };
        let (mut at, mut begins) = (0, 0); // in the normalized and in the original text
        let mut origins: Vec<Origin> = Vec::with_capacity(characters.len());
        for (c, change) in characters {
            let mut rest = text[begins..].chars();
            // The reference gives a character that was added the place of the one before.
            let from = match change {
                1.. => text[..begins].char_indices().next_back().map_or(0..0, |(start, _)| start..begins),
                _ => begins..begins + rest.next().map_or(0, char::len_utf8),
            };
            let removed: usize = rest.take(usize::try_from(-change).unwrap_or(0)).map(char::len_utf8).sum();
            begins = begins.max(from.end) + removed;
            origins.push(Origin { at, from });
            at += c.len_utf8();
        }
        origins
    }
}

/// Where a character of a normalized text begins, and the bytes of the original that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// In the normalized text.
    pub at: usize,
    /// In the original.
    pub from: Range<usize>,
}

fn is_quickly_nfc(text: &str) -> bool {
    // Below U+0300, whose first byte is 0xCC, there is nothing to compose or to reorder.
    text.bytes().all(|byte| byte < 0xCC) || is_nfc_quick(text.chars()) == IsNormalized::Yes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composes() {
        assert_eq!(Normalizer::Nfc.apply("e\u{301}"), "é");
        assert_eq!(Normalizer::Identity.apply("e\u{301}"), "e\u{301}");
        assert!(matches!(Normalizer::Nfc.apply("é"), Cow::Borrowed(_)));
    }
}
