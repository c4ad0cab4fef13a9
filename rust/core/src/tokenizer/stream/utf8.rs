//! UTF-8 in parts.

/// Turns bytes that come in parts into text: the concatenation equals `String::from_utf8_lossy` of all bytes.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most 3 bytes between calls.
    pending: [u8; 4],
    len: usize,
}

impl Utf8Stream {
    /// Whether no character is begun.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends to `text` what `bytes` completes.
    pub fn push(&mut self, mut bytes: &[u8], text: &mut String) {
        while self.len > 0 {
            let Some((&byte, behind)) = bytes.split_first() else { return };
            self.pending[self.len] = byte;
            match std::str::from_utf8(&self.pending[..=self.len]) {
                Ok(character) => {
                    text.push_str(character);
                    self.len = 0;
                }
                // Still the beginning of a character.
                Err(error) if error.error_len().is_none() => self.len += 1,
                // What was begun ends before this byte, which is looked at anew.
                Err(_) => {
                    self.flush(text);
                    break;
                }
            }
            bytes = behind;
        }
        if let Ok(valid) = std::str::from_utf8(bytes) {
            text.push_str(valid);
            return;
        }
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let bad = chunk.invalid();
            let incomplete = std::str::from_utf8(bad).is_err_and(|error| error.error_len().is_none());
            if incomplete && chunks.peek().is_none() {
                self.pending[..bad.len()].copy_from_slice(bad);
                self.len = bad.len();
            } else if !bad.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Appends U+FFFD for a character that was begun and will not be completed.
    pub fn flush(&mut self, text: &mut String) {
        if self.len > 0 {
            self.len = 0;
            text.push(char::REPLACEMENT_CHARACTER);
        }
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
                prop_assert!(stream.len <= 3);
                rest = behind;
            }
            stream.push(rest, &mut text);
            stream.flush(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    /// Every row of three bytes, each by itself: all the ways in which a character can break off.
    #[test]
    fn single_bytes_decode_as_the_whole() {
        // The ends of every range of the UTF-8 table.
        let bytes = [
            0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED,
            0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF,
        ];
        let mut text = String::new();
        for row in 0..bytes.len().pow(4) {
            let whole = [0, 1, 2, 3].map(|place| bytes[row / bytes.len().pow(place) % bytes.len()]);
            text.clear();
            let mut stream = Utf8Stream::default();
            for byte in whole {
                stream.push(&[byte], &mut text);
            }
            stream.flush(&mut text);
            assert_eq!(text, String::from_utf8_lossy(&whole), "{whole:02X?}");
        }
    }
}
