//! What pieces became: small tables of fixed size, one pair of them for each thread at work.
//!
//! A piece of up to 15 bytes with up to 3 ids takes half a cache line, others of up to 32 bytes and 6 ids a whole one.
//! The newest piece of a set takes the place of the older; nothing grows, nothing is allocated after the first use.

use bytemuck::{Zeroable, allocation::zeroed_vec};

use crate::tokenizer::key::{Key, place, window};

/// Sets of two short entries, 64 bytes each.
const SHORT_SETS: usize = 32768;
/// Long entries, 64 bytes each.
const LONG_ENTRIES: usize = 16384;

/// The longest piece that is kept.
pub const LONGEST: usize = 32;

/// Bytes that the tables take.
pub const BYTES: usize = SHORT_SETS * size_of::<[Short; 2]>() + LONG_ENTRIES * size_of::<Long>();

/// Ids of a piece of up to 15 bytes. A count of 0 with a key of 0 is an empty entry.
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(32))]
pub struct Short {
    key: Key,
    /// The ids, and zeros behind them.
    pub ids: [u32; 3],
    /// How many.
    pub count: u32,
}

#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(64))]
struct Long {
    bytes: [u128; 2],
    ids: [u32; 6],
    len: u32,
    count: u32,
}

/// The tables.
pub struct PieceCache {
    short: Vec<[Short; 2]>,
    long: Vec<Long>,
}

impl PieceCache {
    /// Empty tables; their memory is touched when pieces come.
    pub fn new() -> Self {
        Self { short: zeroed_vec(SHORT_SETS), long: zeroed_vec(LONG_ENTRIES) }
    }

    /// The entry of a key that is not empty.
    #[inline]
    pub fn short(&self, key: Key, hash: u64) -> Option<&Short> {
        // Which of the two it is cannot be foretold, so no branch asks.
        let set = &self.short[place(hash, SHORT_SETS)];
        let entry = &set[usize::from(set[0].key != key)];
        if entry.key == key { Some(entry) } else { None }
    }

    /// Keeps what a key became; false if it does not fit.
    #[inline]
    pub fn keep_short(&mut self, key: Key, hash: u64, ids: &[u32]) -> bool {
        let mut entry = Short { key, ids: [0; 3], count: ids.len() as u32 };
        let Some(kept) = entry.ids.get_mut(..ids.len()) else { return false };
        kept.copy_from_slice(ids);
        let set = &mut self.short[place(hash, SHORT_SETS)];
        set[1] = set[0];
        set[0] = entry;
        true
    }

    /// The ids of a piece of up to [`LONGEST`] bytes.
    #[inline]
    pub fn long(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let entry = &self.long[place(hash, LONG_ENTRIES)];
        let is_it = entry.len as usize == piece.len() && entry.bytes == [window(piece, 0), window(piece, 16)];
        if is_it { entry.ids.get(..entry.count as usize) } else { None }
    }

    /// Keeps what such a piece became, if it fits.
    #[inline]
    pub fn keep_long(&mut self, piece: &[u8], hash: u64, ids: &[u32]) {
        let bytes = [window(piece, 0), window(piece, 16)];
        let mut entry = Long { bytes, ids: [0; 6], len: piece.len() as u32, count: ids.len() as u32 };
        if let Some(kept) = entry.ids.get_mut(..ids.len()) {
            kept.copy_from_slice(ids);
            self.long[place(hash, LONG_ENTRIES)] = entry;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::key::Hasher;

    #[test]
    fn what_is_kept_comes_back_and_the_oldest_goes() {
        let mut cache = PieceCache::new();
        let key = |byte: u8| Key::new(window(&[byte, 1], 0), 2);
        let hash = 12345 << 40;
        for byte in 1..=3 {
            cache.keep_short(key(byte), hash, &[u32::from(byte), 9]);
        }
        assert!(cache.short(key(1), hash).is_none());
        for byte in 2..=3 {
            let entry = cache.short(key(byte), hash).unwrap();
            assert_eq!((entry.ids, entry.count), ([u32::from(byte), 9, 0], 2));
        }
        assert!(!cache.keep_short(key(4), hash, &[1, 2, 3, 4]));
        assert!(cache.short(key(4), hash).is_none());
    }

    #[test]
    fn long_pieces_are_told_apart_by_length() {
        let mut cache = PieceCache::new();
        let hasher = Hasher::new(0);
        let (piece, shorter) = ([b'a'; 32], [b'a'; 31]);
        cache.keep_long(&piece, hasher.bytes(&piece), &[1, 2, 3, 4, 5, 6]);
        assert_eq!(cache.long(&piece, hasher.bytes(&piece)), Some(&[1, 2, 3, 4, 5, 6][..]));
        assert_eq!(cache.long(&shorter, hasher.bytes(&piece)), None);
        cache.keep_long(&shorter, 0, &[0; 7]);
        assert_eq!(cache.long(&shorter, 0), None);
    }

    #[test]
    fn the_tables_are_as_large_as_stated() {
        assert_eq!(BYTES, 3072 << 10);
    }
}
