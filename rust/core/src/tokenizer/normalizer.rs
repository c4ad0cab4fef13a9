//! What is done to a text before it is cut.

use std::borrow::Cow;

use unicode_normalization_alignments::UnicodeNormalization;

/// A file's `normalizer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalizer {
    /// Nothing.
    Identity,
    /// Canonical composition, by the reference engine's tables.
    Nfc,
}

impl Normalizer {
    /// The normalized text.
    pub fn apply<'t>(self, text: &'t str) -> Cow<'t, str> {
        match self {
            // Below U+0300 there is nothing to compose or to reorder.
            Self::Nfc if text.chars().any(|c| c >= '\u{300}') => {
                Cow::Owned(text.nfc().map(|(c, _)| c).collect())
            }
            _ => Cow::Borrowed(text),
        }
    }
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
