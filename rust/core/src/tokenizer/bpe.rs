//! Byte pair encoding of one piece: join the neighbours of lowest rank, leftmost first, until no pair has a rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::tokenizer::error::{Result, invalid};
use crate::tokenizer::vocabulary::Vocabulary;

/// Longer pieces use a heap; up to here looking through all ranks is quicker.
const SHORT: usize = 64;
const NO_RANK: u32 = u32::MAX;
const END: u32 = u32::MAX;

/// A pair's rank and what it becomes.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

/// The merges of a vocabulary.
pub struct Bpe {
    merges: FxHashMap<(u32, u32), Merge>,
    byte_ids: [u32; 256],
    /// By id: whether a piece of this token's bytes is this token, so that no merge is needed.
    whole: Vec<bool>,
}

/// Working memory of [`Bpe::encode`]: the symbols of a piece as a doubly linked list.
#[derive(Default)]
pub struct Scratch {
    ids: Vec<u32>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
}

impl Bpe {
    /// From a file's merges, in order of rank. With `ignore_merges` a piece that is a token is that token in any case.
    pub fn from_merges<'m>(
        vocabulary: &Vocabulary,
        merges: impl Iterator<Item = (&'m str, &'m str)>,
        ignore_merges: bool,
        place: &str,
    ) -> Result<Self> {
        let mut table = FxHashMap::default();
        table.reserve(merges.size_hint().0);
        let mut joined = String::new();
        for (rank, (left, right)) in merges.enumerate() {
            let known = |token: &str| {
                vocabulary.id_of_string(token).filter(|_| !token.is_empty()).ok_or_else(|| {
                    let place = format!("{place}[{rank}]");
                    invalid(place, "two tokens of the vocabulary that join to a third", format!("{token:?}"))
                })
            };
            joined.clear();
            joined.extend([left, right]);
            let merge = Merge { rank: rank as u32, id: known(&joined)? };
            table.insert((known(left)?, known(right)?), merge);
        }
        Ok(Self::new(vocabulary, table, ignore_merges))
    }

    /// From token ranks: any two neighbours whose bytes together are a token may be joined, at that token's rank.
    pub fn from_ranks(vocabulary: &Vocabulary) -> Self {
        let mut table = FxHashMap::default();
        for id in vocabulary.ids() {
            let bytes = vocabulary.bytes(id);
            for cut in 1..bytes.len() {
                let (left, right) = bytes.split_at(cut);
                if let (Some(left), Some(right)) =
                    (vocabulary.id_of_bytes(left), vocabulary.id_of_bytes(right))
                {
                    table.insert((left, right), Merge { rank: id, id });
                }
            }
        }
        Self::new(vocabulary, table, true)
    }

    fn new(vocabulary: &Vocabulary, merges: FxHashMap<(u32, u32), Merge>, all_whole: bool) -> Self {
        let byte_ids = std::array::from_fn(|byte| {
            vocabulary.id_of_bytes(&[byte as u8]).expect("the vocabulary has every byte")
        });
        let mut bpe = Self { merges, byte_ids, whole: Vec::new() };
        let is_whole = |scratch: &mut Scratch, id: u32| {
            let bytes = vocabulary.bytes(id);
            if vocabulary.id_of_bytes(bytes) != Some(id) {
                return false;
            }
            all_whole || {
                let mut ids = Vec::new();
                bpe.merge(bytes, scratch, &mut ids);
                ids == [id]
            }
        };
        let ids = 0..vocabulary.len() as u32;
        bpe.whole = ids.into_par_iter().map_init(Scratch::default, is_whole).collect();
        bpe
    }

    /// Appends the ids of one piece.
    #[inline]
    pub fn encode(&self, vocabulary: &Vocabulary, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        match vocabulary.id_of_bytes(piece) {
            // Added tokens lie behind the model's: a piece of plain text never becomes one.
            Some(id) if self.whole.get(id as usize).is_some_and(|&whole| whole) => out.push(id),
            _ => self.merge(piece, scratch, out),
        }
    }

    fn merge(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        debug_assert!(piece.len() < END as usize, "links are u32; Tokenizer::encode refuses longer texts");
        let Scratch { ids, ranks, .. } = scratch;
        ids.clear();
        ids.extend(piece.iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        ranks.clear();
        ranks.extend(ids.windows(2).map(|pair| self.rank(pair[0], pair[1])));
        if piece.len() <= SHORT {
            self.merge_short(scratch)
        } else {
            self.merge_long(scratch)
        }
        out.extend_from_slice(&scratch.ids);
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.merges.get(&(left, right)).map_or(NO_RANK, |merge| merge.rank)
    }

    /// `ranks[i]` is that of symbols i and i + 1.
    fn merge_short(&self, scratch: &mut Scratch) {
        let Scratch { ids, ranks, .. } = scratch;
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, &rank)| rank) {
            if rank == NO_RANK {
                break;
            }
            ids[at] = self.merges[&(ids[at], ids[at + 1])].id;
            ids.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
            if at < ranks.len() {
                ranks[at] = self.rank(ids[at], ids[at + 1]);
            }
        }
    }

    /// The same in O(n log n). A heap entry whose rank is no longer its symbol's is stale.
    fn merge_long(&self, scratch: &mut Scratch) {
        let Scratch { ids, ranks, next, previous, heap } = scratch;
        let len = ids.len() as u32;
        ranks.push(NO_RANK);
        next.clear();
        next.extend((1..len).chain([END]));
        previous.clear();
        previous.extend([END].into_iter().chain(0..len - 1));
        heap.clear();
        let entries = ranks.iter().zip(0u32..).filter(|&(&rank, _)| rank != NO_RANK);
        heap.extend(entries.map(|(&rank, at)| Reverse((rank, at))));
        while let Some(Reverse((rank, at))) = heap.pop() {
            let left = at as usize;
            if ranks[left] != rank {
                continue;
            }
            let right = next[left] as usize;
            ids[left] = self.merges[&(ids[left], ids[right])].id;
            next[left] = next[right];
            ranks[right] = NO_RANK;
            if next[left] != END {
                previous[next[left] as usize] = at;
            }
            for pair in [previous[left], at] {
                if pair == END {
                    continue;
                }
                let (first, second) = (pair as usize, next[pair as usize]);
                ranks[first] =
                    if second == END { NO_RANK } else { self.rank(ids[first], ids[second as usize]) };
                if ranks[first] != NO_RANK {
                    heap.push(Reverse((ranks[first], pair)));
                }
            }
        }
        let (mut kept, mut at) = (0, 0);
        while at != END {
            ids[kept] = ids[at as usize];
            kept += 1;
            at = next[at as usize];
        }
        ids.truncate(kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes, and merges of a few of them in an order that makes pieces of every length.
    fn small() -> (Vocabulary, Bpe) {
        let merges =
            [("a", "b"), ("b", "c"), ("a", "a"), ("ab", "ab"), ("aa", "b"), ("bc", "a"), ("abab", "abab")];
        let bytes = (0..=255u8).map(|byte| crate::tokenizer::byte_level::string_of(&[byte]));
        let tokens: Vec<String> =
            bytes.chain(merges.iter().map(|(left, right)| format!("{left}{right}"))).collect();
        let strings = tokens.iter().zip(0..).map(|(token, id)| (token.as_str(), id));
        let vocabulary = Vocabulary::from_strings(strings, "vocab").unwrap();
        let bpe = Bpe::from_merges(&vocabulary, merges.into_iter(), false, "merges").unwrap();
        (vocabulary, bpe)
    }

    /// The definition: look for the lowest rank again and again.
    fn by_definition(bpe: &Bpe, piece: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = piece.iter().map(|&byte| bpe.byte_ids[usize::from(byte)]).collect();
        loop {
            let pairs = ids.windows(2).enumerate();
            let ranked =
                pairs.filter_map(|(at, pair)| bpe.merges.get(&(pair[0], pair[1])).map(|merge| (at, *merge)));
            let Some((at, merge)) = ranked.min_by_key(|&(at, merge)| (merge.rank, at)) else { return ids };
            ids.splice(at..at + 2, [merge.id]);
        }
    }

    proptest! {
        /// On both sides of the length where the heap takes over.
        #[test]
        fn merging_is_by_definition(piece in prop::collection::vec(prop::sample::select(&b"aaabbc "[..]), 0..200)) {
            let (vocabulary, bpe) = small();
            let mut ids = vec![7];
            bpe.encode(&vocabulary, &piece, &mut Scratch::default(), &mut ids);
            prop_assert_eq!(&ids[1..], by_definition(&bpe, &piece));
        }
    }

    #[test]
    fn a_token_that_merges_do_not_make_is_never_taken_whole() {
        let (vocabulary, bpe) = small();
        // "aab": a a b merges as a (ab), for ab ranks before aa.
        let whole = vocabulary.id_of_bytes(b"aab").unwrap();
        let mut ids = Vec::new();
        bpe.encode(&vocabulary, b"aab", &mut Scratch::default(), &mut ids);
        assert_ne!(ids, [whole]);
        assert_eq!(ids, by_definition(&bpe, b"aab"));
    }

    #[test]
    fn ranks_join_any_two_tokens_that_are_one() {
        let mut tokens: Vec<(Vec<u8>, u32)> = (0..=255u8).map(|byte| (vec![byte], u32::from(byte))).collect();
        tokens.extend([
            (b"bc".to_vec(), 256),
            (b"ab".to_vec(), 257),
            (b"abc".to_vec(), 258),
            (b"zz".to_vec(), 259),
        ]);
        let vocabulary = Vocabulary::from_bytes(tokens, "ranks").unwrap();
        let bpe = Bpe::from_ranks(&vocabulary);
        for (piece, expected) in
            [(&b"abc"[..], vec![258]), (b"abcd", vec![258, 100]), (b"zzz", vec![259, 122])]
        {
            let mut ids = Vec::new();
            bpe.encode(&vocabulary, piece, &mut Scratch::default(), &mut ids);
            assert_eq!(ids, expected, "{piece:?}");
        }
    }
}
