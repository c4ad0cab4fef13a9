//! What pieces became: small tables of fixed size, a set of them for each thread at work.
//!
//! A piece of up to 15 bytes with up to 3 ids takes half a cache line, one of up to 32 bytes and 6 ids a whole one, one of up
//! to 96 bytes and 22 ids three. Each table has sets of two: the newest piece of a set takes the place of the older, which
//! goes on to the neighbouring set. So four have to meet before one is lost, and most lookups still read one line.
//! Nothing grows, nothing is allocated after the first use.

use std::alloc::{Layout, handle_alloc_error};

use bytemuck::{Pod, Zeroable, cast_slice_mut};
use memmap2::{MmapMut, MmapOptions};

use crate::prefetch::fetch_value;
use crate::tokenizer::key::{Key, SHORT, place, window};

/// Sets for the pieces of some tens of megabytes of text.
const SHORT_SETS: usize = 1 << 17;
const LONG_SETS: usize = 1 << 15;
const LONGEST_SETS: usize = 1 << 12;

const SHORT_BYTES: usize = SHORT_SETS * size_of::<[Short; 2]>();
const LONG_BYTES: usize = LONG_SETS * size_of::<[Long; 2]>();
const LONGEST_BYTES: usize = LONGEST_SETS * size_of::<[Longest; 2]>();

/// The most ids that are kept of a piece.
pub const MOST_IDS: usize = Longest::MOST_IDS;

/// Bytes that the tables take.
pub const BYTES: usize = SHORT_BYTES + LONG_BYTES + LONGEST_BYTES;

/// What a table holds; all zeros is an empty entry.
trait Slot: Pod {
    fn is_empty(&self) -> bool;
}

/// Ids of a piece of up to 15 bytes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Short {
    key: Key,
    /// Up to three ids, zeros behind them, and how many they are.
    pub ids: [u32; 4],
}

impl Short {
    /// How many ids.
    #[inline]
    pub fn count(&self) -> usize {
        self.ids[3] as usize
    }
}

impl Slot for Short {
    #[inline]
    fn is_empty(&self) -> bool {
        self.count() == 0
    }
}

/// A longer piece in so many words: half of them its bytes, with zeros behind, then its ids, its length, and their number.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
struct Entry<const WORDS: usize>([u32; WORDS]);

type Long = Entry<16>;
type Longest = Entry<48>;

impl<const WORDS: usize> Slot for Entry<WORDS> {
    #[inline]
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<const WORDS: usize> Entry<WORDS> {
    const LONGEST: usize = WORDS / 2 * 4;
    const MOST_IDS: usize = WORDS / 2 - 2;

    #[inline]
    fn new(piece: &[u8], ids: &[u32]) -> Option<Self> {
        if piece.len() > Self::LONGEST || ids.len() > Self::MOST_IDS {
            return None;
        }
        let mut entry = Self::zeroed();
        bytemuck::bytes_of_mut(&mut entry)[..piece.len()].copy_from_slice(piece);
        entry.0[WORDS / 2..][..ids.len()].copy_from_slice(ids);
        entry.0[WORDS - 2] = piece.len() as u32;
        entry.0[WORDS - 1] = ids.len() as u32;
        Some(entry)
    }

    #[inline]
    fn len(&self) -> usize {
        self.0[WORDS - 2] as usize
    }

    #[inline]
    fn is(&self, piece: &[u8]) -> bool {
        let bytes = &bytemuck::bytes_of(self)[..Self::LONGEST];
        self.len() == piece.len()
            && bytes
                .chunks_exact(16)
                .enumerate()
                .all(|(at, own)| *own == window(piece, at * 16).to_le_bytes())
    }

    #[inline]
    fn ids(&self) -> &[u32] {
        &self.0[WORDS / 2..][..(self.0[WORDS - 1] as usize).min(Self::MOST_IDS)]
    }
}

/// The memory of the tables, of which the system gives all pages at once. One by one, each would come twice: first it would be
/// read, as the page of zeros that all share, and then written, which makes the processors of all threads wait.
pub struct PieceCache(MmapMut);

impl PieceCache {
    /// Empty tables.
    pub fn new() -> Self {
        let memory = MmapOptions::new().len(BYTES).populate().map_anon();
        Self(memory.unwrap_or_else(|_| handle_alloc_error(Layout::new::<[u8; BYTES]>())))
    }

    /// The tables in it.
    pub fn tables(&mut self) -> Tables<'_> {
        let (short, longer) = self.0.split_at_mut(SHORT_BYTES);
        let (long, longest) = longer.split_at_mut(LONG_BYTES);
        Tables { short: cast_slice_mut(short), long: cast_slice_mut(long), longest: cast_slice_mut(longest) }
    }
}

/// The tables.
pub struct Tables<'c> {
    short: &'c mut [[Short; 2]],
    long: &'c mut [[Long; 2]],
    longest: &'c mut [[Longest; 2]],
}

impl Tables<'_> {
    /// Asks for the memory where a piece of this length would be.
    #[inline]
    pub fn ask(&self, len: usize, hash: u64) {
        if len <= SHORT {
            fetch_value(&self.short[place(hash, SHORT_SETS)]);
        } else {
            self.long[place(hash, LONG_SETS)].iter().for_each(fetch_value);
        }
    }

    /// Asks for where else it may be, which [`Self::other`] reads.
    #[inline]
    pub fn ask_other(&self, len: usize, hash: u64) {
        let set = place(hash, LONG_SETS);
        if len <= SHORT {
            fetch_value(&self.short[place(hash, SHORT_SETS) ^ 1]);
            self.long[set].iter().for_each(fetch_value);
        }
        self.long[set ^ 1].iter().for_each(fetch_value);
    }

    /// The entry of a key that is not empty, if it is in its own set.
    #[inline]
    pub fn short(&self, key: Key, hash: u64) -> Option<&Short> {
        // Which of the two it is cannot be foretold, so no branch asks.
        let set = &self.short[place(hash, SHORT_SETS)];
        let entry = &set[usize::from(set[0].key != key)];
        if entry.key == key { Some(entry) } else { None }
    }

    /// The ids of a piece longer than [`SHORT`], if it is in its own set.
    #[inline]
    pub fn long(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let entry = self.long[place(hash, LONG_SETS)].iter().find(|entry| entry.is(piece));
        if let Some(entry) = entry {
            return Some(entry.ids());
        }
        self.longest[place(hash, LONGEST_SETS)].iter().find(|entry| entry.is(piece)).map(Entry::ids)
    }

    /// The ids of a short piece from the neighbour of its set, to which others of the set displaced it.
    #[inline]
    pub fn other_short(&mut self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let key = Key::new(window(piece, 0), piece.len());
        let entry = find(self.short, place(hash, SHORT_SETS), |entry| entry.key == key)?;
        entry.ids.get(..entry.count())
    }

    /// The ids of a piece that is longer or has more of them, from wherever it may be.
    pub fn other_long(&mut self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        if let Some(entry) = find(self.long, place(hash, LONG_SETS), |entry| entry.is(piece)) {
            return Some(entry.ids());
        }
        find(self.longest, place(hash, LONGEST_SETS), |entry| entry.is(piece)).map(|entry| entry.ids())
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
            let mut entry = Short { key, ids: [0, 0, 0, ids.len() as u32] };
            entry.ids[..ids.len()].copy_from_slice(ids);
            push(self.short, place(hash, SHORT_SETS), entry);
        } else if let Some(entry) = Entry::new(piece, ids) {
            push(self.long, place(hash, LONG_SETS), entry);
        } else if let Some(entry) = Entry::new(piece, ids) {
            push(self.longest, place(hash, LONGEST_SETS), entry);
        }
    }
}

/// Whether a piece begins with kana or a Han character. Text without spaces is cut into phrases, of which hardly one comes
/// again; words of the other scripts do.
#[inline]
fn is_phrase(piece: &[u8]) -> bool {
    matches!(piece.first(), Some(0xE3..=0xE9))
}

/// The neighbour of a set.
#[inline]
fn near(set: usize) -> usize {
    set ^ 1
}

/// Puts an entry in its set. The set's older one goes to the neighbour, in the place of that one's older.
#[inline]
fn push<E: Slot>(sets: &mut [[E; 2]], set: usize, newest: E) {
    let [newer, older] = sets[set];
    sets[set] = [newest, newer];
    if !older.is_empty() {
        let near = &mut sets[near(set)];
        near[usize::from(!near[0].is_empty())] = older;
    }
}

/// The entry of a set or of its neighbour. One that is found at the neighbour comes home.
#[inline]
fn find<E: Slot>(sets: &mut [[E; 2]], set: usize, is_it: impl Fn(&E) -> bool) -> Option<&E> {
    if let Some(at) = sets[set].iter().position(&is_it) {
        return Some(&sets[set][at]);
    }
    let at = sets[near(set)].iter().position(is_it)?;
    let [newer, older] = sets[set];
    sets[set] = [std::mem::replace(&mut sets[near(set)][at], older), newer];
    Some(&sets[set][0])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::key::Hasher;

    /// From wherever it may be, as the encoder asks.
    fn found(tables: &mut Tables<'_>, piece: &[u8], hash: u64) -> Option<Vec<u32>> {
        if piece.len() <= SHORT
            && let Some(ids) = tables.other_short(piece, hash)
        {
            return Some(ids.to_vec());
        }
        tables.other_long(piece, hash).map(<[u32]>::to_vec)
    }

    #[test]
    fn four_of_two_neighbouring_sets_are_kept_and_the_oldest_goes() {
        for (len, count) in [(2, 2), (2, 4), (20, 1), (20, 7)] {
            let mut cache = PieceCache::new();
            let mut tables = cache.tables();
            let hash = 12345 << 40;
            let piece = |byte: u8| vec![byte; len];
            let ids = |byte: u8| vec![u32::from(byte); count];
            for byte in 1..=5 {
                tables.keep(&piece(byte), hash, &ids(byte));
            }
            let kept: Vec<u8> =
                (1..=5).filter(|&byte| found(&mut tables, &piece(byte), hash) == Some(ids(byte))).collect();
            assert_eq!(kept.len(), 4, "{len} bytes, {count} ids: {kept:?}");
            assert!(kept.contains(&5));
        }
    }

    #[test]
    fn what_is_found_at_the_neighbour_comes_home() {
        let mut cache = PieceCache::new();
        let mut tables = cache.tables();
        let key = |byte: u8| Key::new(window(&[byte], 0), 1);
        (1..=3).for_each(|byte| tables.keep(&[byte], 0, &[u32::from(byte)]));
        assert!(tables.short(key(1), 0).is_none());
        assert_eq!(tables.other_short(&[1], 0), Some(&[1][..]));
        assert_eq!(tables.short(key(1), 0).map(|entry| entry.ids), Some([1, 0, 0, 1]));
        assert_eq!(tables.other_short(&[2], 0), Some(&[2][..]));
        assert_eq!(tables.other_short(&[3], 0), Some(&[3][..]));
    }

    #[test]
    fn pieces_of_every_length_are_told_apart() {
        let hasher = Hasher::new(0);
        let bytes = [b'a'; 97];
        let mut cache = PieceCache::new();
        for len in 1..=96 {
            let (piece, longer) = (&bytes[..len], &bytes[..len + 1]);
            let hash = hasher.bytes(piece);
            for count in [1, 3, 4, 6, 7, MOST_IDS] {
                let mut tables = cache.tables();
                let ids: Vec<u32> = (0..count as u32).collect();
                tables.keep(piece, hash, &ids);
                assert_eq!(found(&mut tables, piece, hash), Some(ids), "{len} bytes, {count} ids");
                assert_eq!(found(&mut tables, longer, hash), None);
                cache = PieceCache::new();
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_was_kept(
            pieces in prop::collection::vec((0u64..4, 1usize..100, 1usize..MOST_IDS), 1..200),
        ) {
            let mut cache = PieceCache::new();
            let mut tables = cache.tables();
            let mut kept = HashMap::new();
            for (id, (set, len, count)) in pieces.into_iter().enumerate() {
                let piece = vec![1 + 8 * set as u8 + (id % 7) as u8; len];
                let hash = set << 47 | len as u64;
                // A piece is kept when it is not found, and its ids never change.
                let ids = &*kept.entry(piece.clone()).or_insert_with(|| vec![id as u32; count]);
                match found(&mut tables, &piece, hash) {
                    Some(there) => prop_assert_eq!(&there, ids),
                    None => tables.keep(&piece, hash, ids),
                }
                let there = found(&mut tables, &piece, hash);
                prop_assert_eq!(there.as_ref(), (len <= 96).then_some(ids));
            }
        }
    }

    #[test]
    fn phrases_of_many_ids_are_not_kept() {
        let mut cache = PieceCache::new();
        let mut tables = cache.tables();
        let phrase = "注意力只在要紧处".as_bytes();
        tables.keep(phrase, 0, &[1, 2]);
        assert_eq!(tables.long(phrase, 0), None);
        tables.keep(phrase, 0, &[1]);
        assert_eq!(tables.long(phrase, 0), Some(&[1][..]));
    }

    #[test]
    fn what_does_not_fit_is_not_kept() {
        let mut cache = PieceCache::new();
        let mut tables = cache.tables();
        tables.keep(&[b'a'; 97], 0, &[1]);
        tables.keep(&[b'a'; 96], 0, &[0; MOST_IDS + 1]);
        assert_eq!(found(&mut tables, &[b'a'; 97], 0), None);
        assert_eq!(found(&mut tables, &[b'a'; 96], 0), None);
    }

    #[test]
    fn the_tables_are_as_large_as_stated() {
        assert_eq!(BYTES, (13 << 20) + (512 << 10));
    }
}
