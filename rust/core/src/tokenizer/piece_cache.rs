//! What pieces became: small tables of fixed size, a set of them for each thread at work.
//!
//! A piece of up to 15 bytes with up to 3 ids takes half a cache line, one of up to 32 bytes and 6 ids a whole one, one of up
//! to 96 bytes and 22 ids three. Each table has sets of two: the newest piece of a set takes the place of the older.
//! Nothing grows, nothing is allocated after the first use.

use bytemuck::{Zeroable, allocation::zeroed_vec};

use crate::prefetch::fetch_value;
use crate::tokenizer::key::{Key, SHORT, place, window};

/// Sets for the pieces of some megabytes of text.
const SHORT_SETS: usize = 1 << 17;
const LONG_SETS: usize = 1 << 14;
const LONGEST_SETS: usize = 1 << 11;

/// The most ids that are kept of a piece.
pub const MOST_IDS: usize = 22;

/// Bytes that the tables take.
pub const BYTES: usize = SHORT_SETS * size_of::<[Short; 2]>()
    + LONG_SETS * size_of::<[Entry<2, 6>; 2]>()
    + LONGEST_SETS * size_of::<[Entry<6, MOST_IDS>; 2]>();

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

/// Ids of a longer piece. A length of 0 is an empty entry.
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(64))]
struct Entry<const WINDOWS: usize, const IDS: usize> {
    bytes: [u128; WINDOWS],
    ids: [u32; IDS],
    len: u32,
    count: u32,
}

impl<const WINDOWS: usize, const IDS: usize> Entry<WINDOWS, IDS> {
    /// The longest piece that fits.
    const LONGEST: usize = WINDOWS * 16;

    #[inline]
    fn new(piece: &[u8], ids: &[u32]) -> Option<Self> {
        let bytes = std::array::from_fn(|at| window(piece, at * 16));
        let mut entry = Self { bytes, ids: [0; IDS], len: piece.len() as u32, count: ids.len() as u32 };
        entry.ids.get_mut(..ids.len())?.copy_from_slice(ids);
        (piece.len() <= Self::LONGEST).then_some(entry)
    }

    /// The ids of a piece in a set.
    #[inline]
    fn find<'s>(set: &'s [Self; 2], piece: &[u8]) -> Option<&'s [u32]> {
        let is_it = |entry: &&Self| {
            let same = |(at, bytes): (usize, &u128)| *bytes == window(piece, at * 16);
            entry.len as usize == piece.len() && entry.bytes.iter().enumerate().all(same)
        };
        let entry = set.iter().find(is_it)?;
        entry.ids.get(..entry.count as usize)
    }
}

/// The tables.
pub struct PieceCache {
    short: Vec<[Short; 2]>,
    long: Vec<[Entry<2, 6>; 2]>,
    longest: Vec<[Entry<6, MOST_IDS>; 2]>,
}

impl PieceCache {
    /// Empty tables; their memory is touched when pieces come.
    pub fn new() -> Self {
        Self { short: zeroed_vec(SHORT_SETS), long: zeroed_vec(LONG_SETS), longest: zeroed_vec(LONGEST_SETS) }
    }

    /// Asks for the memory where a piece of this length would be.
    #[inline]
    pub fn ask(&self, len: usize, hash: u64) {
        if len <= SHORT {
            fetch_value(&self.short[place(hash, SHORT_SETS)]);
        } else {
            self.ask_long(hash);
        }
    }

    /// The same for a short piece of many ids.
    #[inline]
    pub fn ask_long(&self, hash: u64) {
        fetch_value(&self.long[place(hash, LONG_SETS)]);
    }

    /// The entry of a key that is not empty.
    #[inline]
    pub fn short(&self, key: Key, hash: u64) -> Option<&Short> {
        // Which of the two it is cannot be foretold, so no branch asks.
        let set = &self.short[place(hash, SHORT_SETS)];
        let entry = &set[usize::from(set[0].key != key)];
        if entry.key == key { Some(entry) } else { None }
    }

    /// The ids of a piece that is longer or has more of them.
    #[inline]
    pub fn long(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let found = Entry::find(&self.long[place(hash, LONG_SETS)], piece);
        found.or_else(|| Entry::find(&self.longest[place(hash, LONGEST_SETS)], piece))
    }

    /// Keeps what a piece became, if it fits.
    #[inline]
    pub fn keep(&mut self, piece: &[u8], hash: u64, ids: &[u32]) {
        let is_short = piece.len() <= SHORT && ids.len() <= 3;
        if is_phrase(piece) && !is_short && ids.len() > 1 {
            return;
        }
        if is_short {
            let key = Key::new(window(piece, 0), piece.len());
            let mut entry = Short { key, ids: [0; 3], count: ids.len() as u32 };
            entry.ids[..ids.len()].copy_from_slice(ids);
            push(&mut self.short[place(hash, SHORT_SETS)], entry);
        } else if let Some(entry) = Entry::new(piece, ids) {
            push(&mut self.long[place(hash, LONG_SETS)], entry);
        } else if let Some(entry) = Entry::new(piece, ids) {
            push(&mut self.longest[place(hash, LONGEST_SETS)], entry);
        }
    }
}

/// Whether a piece begins with kana or a Han character. Text without spaces is cut into phrases, of which hardly one comes
/// again; words of the other scripts do.
#[inline]
fn is_phrase(piece: &[u8]) -> bool {
    matches!(piece.first(), Some(0xE3..=0xE9))
}

/// In the place of the older of two.
#[inline]
fn push<E: Copy>(set: &mut [E; 2], newest: E) {
    *set = [newest, set[0]];
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
            cache.keep(&[byte, 1], hash, &[u32::from(byte), 9]);
        }
        assert!(cache.short(key(1), hash).is_none());
        for byte in 2..=3 {
            let entry = cache.short(key(byte), hash).unwrap();
            assert_eq!((entry.ids, entry.count), ([u32::from(byte), 9, 0], 2));
        }
        cache.keep(&[4, 1], hash, &[1, 2, 3, 4]);
        assert!(cache.short(key(4), hash).is_none());
        assert_eq!(cache.long(&[4, 1], hash), Some(&[1, 2, 3, 4][..]));
    }

    #[test]
    fn pieces_of_every_length_are_told_apart() {
        let hasher = Hasher::new(0);
        let bytes = [b'a'; 97];
        for len in 1..=96 {
            let (piece, longer) = (&bytes[..len], &bytes[..len + 1]);
            let hash = hasher.bytes(piece);
            for count in [1, 3, 4, 6, 7, MOST_IDS] {
                let mut cache = PieceCache::new();
                let ids: Vec<u32> = (0..count as u32).collect();
                cache.keep(piece, hash, &ids);
                if len <= SHORT && count <= 3 {
                    let entry = cache.short(Key::new(window(piece, 0), len), hash).unwrap();
                    assert_eq!(entry.ids[..entry.count as usize], ids);
                } else {
                    assert_eq!(cache.long(piece, hash), Some(&ids[..]), "{len} bytes, {count} ids");
                }
                assert_eq!(cache.long(longer, hash), None);
            }
        }
    }

    #[test]
    fn phrases_of_many_ids_are_not_kept() {
        let mut cache = PieceCache::new();
        let phrase = "注意力只在要紧处".as_bytes();
        cache.keep(phrase, 0, &[1, 2]);
        assert_eq!(cache.long(phrase, 0), None);
        cache.keep(phrase, 0, &[1]);
        assert_eq!(cache.long(phrase, 0), Some(&[1][..]));
    }

    #[test]
    fn what_does_not_fit_is_not_kept() {
        let mut cache = PieceCache::new();
        cache.keep(&[b'a'; 97], 0, &[1]);
        cache.keep(&[b'a'; 96], 0, &[0; MOST_IDS + 1]);
        assert_eq!(cache.long(&[b'a'; 97], 0), None);
        assert_eq!(cache.long(&[b'a'; 96], 0), None);
    }

    #[test]
    fn the_tables_are_as_large_as_stated() {
        assert_eq!(BYTES, (10 << 20) + (768 << 10));
    }
}
