//! Decoding token by token.

use crate::tokenizer::Tokenizer;

/// Turns bytes that come in parts into text: the concatenation equals `String::from_utf8_lossy` of all bytes.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Appends to `text` what `bytes` completes.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty() {
            self.pending = decode(bytes, text).to_vec();
        } else {
            self.pending.extend_from_slice(bytes);
            self.pending = decode(&self.pending, text).to_vec();
        }
    }

    /// Appends U+FFFD for a character that was begun and will not be completed.
    pub fn flush(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends the characters of `bytes`, U+FFFD for what is none; what is left may be the beginning of one.
fn decode<'b>(mut bytes: &'b [u8], text: &mut String) -> &'b [u8] {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        text.push_str(std::str::from_utf8(valid).expect("just checked"));
        match error.error_len() {
            None => return rest,
            Some(bad) => {
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[bad..];
            }
        }
    }
}

/// The state of one decoded sequence. Between calls it holds back at most one unfinished character.
#[derive(Clone, Debug, Default)]
pub struct TokenStream {
    utf8: Utf8Stream,
    skip_special_tokens: bool,
}

impl TokenStream {
    /// A stream at its beginning.
    pub fn new(skip_special_tokens: bool) -> Self {
        Self { utf8: Utf8Stream::default(), skip_special_tokens }
    }

    /// The text that token `id` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let mut text = String::new();
        if !(self.skip_special_tokens && tokenizer.is_special(id)) {
            self.utf8.push(tokenizer.token_bytes(id), &mut text);
        }
        text
    }

    /// What is still held back; the stream is at its beginning again.
    pub fn flush(&mut self) -> String {
        let mut text = String::new();
        self.utf8.flush(&mut text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Bytes near the edges of UTF-8, cut anywhere.
        #[test]
        fn parts_decode_as_the_whole(
            bytes in prop::collection::vec(prop_oneof![
                Just(b'a'), Just(0xE4), Just(0xB8), Just(0xF0), Just(0x9F), Just(0x80), Just(0xC0), Just(0xED), any::<u8>()
            ], 0..60),
            cuts in prop::collection::vec(0usize..8, 0..60),
        ) {
            let mut stream = Utf8Stream::default();
            let (mut text, mut rest) = (String::new(), &bytes[..]);
            for cut in cuts {
                let (part, behind) = rest.split_at(cut.min(rest.len()));
                stream.push(part, &mut text);
                prop_assert!(stream.pending.len() <= 3);
                rest = behind;
            }
            stream.push(rest, &mut text);
            stream.flush(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
