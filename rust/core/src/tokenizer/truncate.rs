//! The part of a text that fits a number of tokens.

use crate::tokenizer::added_tokens::AllowedSpecial;
use crate::tokenizer::error::Result;
use crate::tokenizer::offsets::Unit;
use crate::tokenizer::tokenizer::{EncodeOptions, Tokenizer};

/// Where a text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// At its end: the beginning stays.
    Right,
    /// At its beginning: the end stays.
    Left,
}

impl Tokenizer {
    /// The longest part of `text` that ends, or begins, between two of its tokens and between two characters, and that has
    /// at most `max_tokens` tokens when it is encoded by itself.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn truncate_to<'t>(
        &self,
        text: &'t str,
        max_tokens: usize,
        side: Side,
        allowed_special: AllowedSpecial<'_>,
    ) -> Result<&'t str> {
        let options = EncodeOptions { add_special_tokens: false, allowed_special };
        let (ids, offsets) = self.encode_untrimmed(text, options, Unit::Byte)?;
        if ids.len() <= max_tokens {
            return Ok(text);
        }
        // A part by itself may be cut into other pieces at its edge, and then have more tokens than it had.
        for kept in (1..=max_tokens).rev() {
            let part = match side {
                Side::Right => &text[..offsets[kept][0] as usize],
                Side::Left => &text[offsets[ids.len() - kept - 1][1] as usize..],
            };
            if self.encode(part, options)?.len() <= max_tokens {
                return Ok(part);
            }
        }
        Ok("")
    }
}
