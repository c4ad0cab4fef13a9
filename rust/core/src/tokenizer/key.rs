//! A piece of up to 15 bytes as one number of 128 bits, and the one hash of all the tokenizer's tables.
//!
//! The length stands in the last byte, so that two keys are equal exactly when the bytes are.

/// The longest piece that fits a key.
pub const SHORT: usize = 15;

/// By length: the bytes of a window that belong to the key.
const MASKS: [u128; SHORT + 1] = {
    let mut masks = [0; SHORT + 1];
    let mut len = 1;
    while len <= SHORT {
        masks[len] = (1 << (8 * len)) - 1;
        len += 1;
    }
    masks
};

/// Up to 15 bytes and their number.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Key {
    low: u64,
    high: u64,
}

impl PartialEq for Key {
    /// Without a branch between the halves: which key it is cannot be foretold.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        (self.low ^ other.low) | (self.high ^ other.high) == 0
    }
}

impl Eq for Key {}

impl Key {
    /// The first `len` bytes of a [`window`]; `len` is at most [`SHORT`].
    #[inline]
    pub fn new(window: u128, len: usize) -> Self {
        let bytes = (window & MASKS[len]) | (len as u128) << 120;
        Self { low: bytes as u64, high: (bytes >> 64) as u64 }
    }

    /// The key of bytes with this hash; of more than fit, it is their hash and length, which two may share.
    #[inline]
    pub fn of(bytes: &[u8], hash: u64) -> Self {
        match bytes.len() {
            len @ ..=SHORT => Self::new(window(bytes, 0), len),
            len => Self { low: hash, high: 0xFF << 56 | len as u64 },
        }
    }
}

/// 16 bytes of `text` from `at` on, zeros behind its end.
#[inline]
pub fn window(text: &[u8], at: usize) -> u128 {
    match text.get(at..at + 16).and_then(|bytes| bytes.first_chunk()) {
        Some(bytes) => u128::from_le_bytes(*bytes),
        None => short_window(text.get(at..).unwrap_or_default()),
    }
}

#[cold]
fn short_window(rest: &[u8]) -> u128 {
    let mut bytes = [0; 16];
    bytes[..rest.len()].copy_from_slice(rest);
    u128::from_le_bytes(bytes)
}

/// A hash function, one of a family: a file made to defeat one seed meets another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hasher {
    first: u64,
    second: u64,
}

impl Hasher {
    /// The function of this seed.
    pub fn new(seed: u64) -> Self {
        let odd = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self { first: 0xA076_1D64_78BD_642F ^ odd, second: 0xE703_7ED1_A0B4_28DB ^ odd.rotate_left(29) }
    }

    /// The hash of a key.
    #[inline]
    pub fn key(self, key: Key) -> u64 {
        folded_product(key.low ^ self.first, key.high ^ self.second)
    }

    /// The hash of a pair of ids.
    #[inline]
    pub fn pair(self, left: u32, right: u32) -> u64 {
        folded_product((u64::from(left) << 32 | u64::from(right)) ^ self.first, self.second)
    }

    /// The key of bytes of any length, and its hash.
    #[inline]
    pub fn key_and_hash(self, bytes: &[u8]) -> (Key, u64) {
        let hash = self.bytes(bytes);
        (Key::of(bytes, hash), hash)
    }

    /// The hash of bytes of any length; of those that fit a key, the key's.
    #[inline]
    pub fn bytes(self, bytes: &[u8]) -> u64 {
        if bytes.len() <= SHORT {
            return self.key(Key::new(window(bytes, 0), bytes.len()));
        }
        let mut hash = bytes.len() as u64;
        let mut at = 0;
        while at < bytes.len() {
            let part = window(bytes, at);
            hash = folded_product(part as u64 ^ self.first ^ hash, (part >> 64) as u64 ^ self.second);
            at += 16;
        }
        hash
    }
}

/// All 128 bits of a product, folded to 64.
#[inline]
fn folded_product(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// A hash's place in a table of `len` slots: its upper bits decide.
#[inline]
pub fn place(hash: u64, len: usize) -> usize {
    ((u128::from(hash) * len as u128) >> 64) as usize
}

/// A set that may say yes wrongly and never says no wrongly: a bit for each hash, small enough to stay near the processor.
#[derive(Clone, Copy)]
pub struct Filter<'i>(pub &'i [u64]);

impl Filter<'_> {
    /// Whether these can be a filter's words.
    pub fn fits(self) -> bool {
        self.0.len().is_power_of_two()
    }

    /// Whether something of this hash may be there.
    #[inline]
    pub fn has(self, hash: u64) -> bool {
        let (word, bit) = filter_bit(hash, self.0.len());
        self.0[word] & bit != 0
    }

    /// The words of a filter of these hashes: 8 to 16 bits for each of `count`.
    pub fn build(hashes: impl Iterator<Item = u64>, count: usize) -> Vec<u64> {
        let mut words = vec![0; (count / 8).next_power_of_two()];
        let len = words.len();
        for hash in hashes {
            let (word, bit) = filter_bit(hash, len);
            words[word] |= bit;
        }
        words
    }
}

/// The lower bits, which `place` does not use; `words` is a power of two.
#[inline]
fn filter_bit(hash: u64, words: usize) -> (usize, u64) {
    ((hash >> 6) as usize & (words - 1), 1 << (hash & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_as_their_bytes_do() {
        let key = |bytes: &[u8]| Key::new(window(bytes, 0), bytes.len());
        assert_eq!(key(b"abc"), Key::new(window(b"xabcdefghijklmnopqrst", 1), 3));
        assert_ne!(key(b"abc"), key(b"abc\0"));
        assert_ne!(key(b""), key(b"\0"));
        assert_ne!(key(b"abcdefghijklmno"), key(b"abcdefghijklmnp"));
    }

    #[test]
    fn a_window_ends_in_zeros() {
        assert_eq!(window(b"ab", 1).to_le_bytes()[..2], *b"b\0");
        assert_eq!(window(b"ab", 2), 0);
        assert_eq!(window(b"ab", 7), 0);
    }

    #[test]
    fn hashes_depend_on_every_byte_and_on_the_seed() {
        let hasher = Hasher::new(0);
        let text: Vec<u8> = (0..70).collect();
        let hash = hasher.bytes(&text);
        for at in 0..text.len() {
            let mut other = text.clone();
            other[at] ^= 1;
            assert_ne!(hasher.bytes(&other), hash, "{at}");
        }
        assert_ne!(hasher.bytes(&text[..69]), hash);
        assert_ne!(Hasher::new(1).bytes(&text), hash);
        assert_ne!(hasher.pair(1, 2), hasher.pair(2, 1));
    }

    #[test]
    fn a_filter_knows_what_it_holds() {
        let hasher = Hasher::new(0);
        let words = Filter::build((0..1000).map(|id| hasher.pair(id, 7)), 1000);
        let filter = Filter(&words);
        assert!((0..1000).all(|id| filter.has(hasher.pair(id, 7))));
        let wrong = (0..1000).filter(|&id| filter.has(hasher.pair(id, 8))).count();
        assert!(wrong < 250, "{wrong}");
    }
}
