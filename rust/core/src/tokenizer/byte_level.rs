//! The byte-level alphabet: one printable character for each byte.
//!
//! Printable bytes of Latin-1 stand for themselves; the other 68, in order, for the characters from U+0100 on (GPT-2).

use std::sync::LazyLock;

/// What stands for a space.
pub const SPACE: char = '\u{120}';

const LAST: usize = 0x143; // 0x100 + 68 - 1

const fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = (0x100u32..).map_while(char::from_u32);
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if stands_for_itself(byte) {
            char::from(byte)
        } else {
            next.next().expect("68 of them from U+0100 on")
        }
    })
});

static BYTES: LazyLock<[Option<u8>; LAST + 1]> = LazyLock::new(|| {
    let mut bytes = [None; LAST + 1];
    for (byte, &c) in CHARS.iter().enumerate() {
        bytes[c as usize] = Some(byte as u8);
    }
    bytes
});

/// The bytes a token's string stands for, or None if it has a character outside the alphabet.
pub fn bytes_of(token: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(token.len());
    append_bytes_of(token, &mut bytes).then_some(bytes)
}

/// Appends them; false, with some of them appended, if there is such a character.
pub fn append_bytes_of(token: &str, bytes: &mut Vec<u8>) -> bool {
    let table = &*BYTES;
    token.chars().all(|c| match table.get(c as usize).copied().flatten() {
        Some(byte) => {
            bytes.push(byte);
            true
        }
        None => false,
    })
}

/// The string that stands for `bytes`.
pub fn string_of(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| CHARS[usize::from(byte)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let all: Vec<u8> = (0..=255).collect();
        let text = string_of(&all);
        assert_eq!(text.chars().count(), 256);
        assert_eq!(bytes_of(&text).as_deref(), Some(&all[..]));
        assert_eq!(string_of(b" the\n"), "\u{120}the\u{10A}");
        assert_eq!(string_of(&[0x7F, 0xA0, 0xAD]), "\u{121}\u{142}\u{143}");
    }

    #[test]
    fn other_characters_stand_for_nothing() {
        assert_eq!(bytes_of("a b"), None);
        assert_eq!(bytes_of("<｜end｜>"), None);
        assert_eq!(bytes_of("\u{144}"), None);
    }
}
