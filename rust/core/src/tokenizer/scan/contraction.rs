//! English contractions behind an apostrophe: 's 't 're 've 'm 'll 'd.

/// How many bytes at `at` are the letters of a contraction of small letters; 0 if there is none.
pub(super) fn exact(text: &[u8], at: usize) -> usize {
    match text.get(at..).unwrap_or_default() {
        [b's' | b't' | b'm' | b'd', ..] => 1,
        [b'r', b'e', ..] | [b'v', b'e', ..] | [b'l', b'l', ..] => 2,
        _ => 0,
    }
}

/// The same for either case, and for U+017F, which is an s as well when case is ignored.
pub(super) fn folded(text: &[u8], at: usize) -> usize {
    match text.get(at..).unwrap_or_default() {
        [b's' | b't' | b'm' | b'd' | b'S' | b'T' | b'M' | b'D', ..] => 1,
        [b'r' | b'R' | b'v' | b'V', b'e' | b'E', ..] | [b'l' | b'L', b'l' | b'L', ..] => 2,
        [0xC5, 0xBF, ..] => 2,
        _ => 0,
    }
}
