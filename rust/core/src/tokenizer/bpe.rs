//! Byte pair encoding of one piece.
//!
//! The definition: join the neighbours of lowest rank, leftmost first, until no pair has a rank. A short piece is encoded
//! just so, from its characters where these are tokens.
//!
//! A long one is not, where merges are ordered: then a sequence of tokens is the piece's encoding exactly when each two
//! neighbours are compatible (see `merges`), so it can be put together of parts. Windows that overlap are tried first, then,
//! for pieces like a thousand spaces whose tokens are longer than a window, a walk: take the longest token that is compatible
//! with the one before, go back where nothing fits. A position from which the end cannot be reached is never tried twice, and
//! steps are counted, so both are linear. What neither finds, and unordered merges, a heap does in O(n log n).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::tokenizer::join::{FEW, Join};
use crate::tokenizer::merges::Merges;
use crate::tokenizer::vocabulary::Vocabulary;

/// So many pieces are joined side by side.
pub const WAYS: usize = 8;
/// Bytes that are looked at together in a long piece, and those at their end whose tokens may be others in the piece.
const WINDOW: usize = 48;
const UNSURE: usize = 12;
/// Of tokens so long a walk is quicker.
const LONG_TOKEN: usize = 8;
/// Bytes a window that a piece must get on by; real text gets on by nearly a window's.
const MIN_PROGRESS: usize = 12;
const NO_RANK: u32 = u32::MAX;
const END: u32 = u32::MAX;

/// Steps a byte that the walk may take; real text needs less than one.
const MAX_STEPS: usize = 8;

/// Working memory: a few symbols, or those of a long piece as a doubly linked list, and the dead ends of a walk.
#[derive(Default)]
pub struct Scratch {
    few: Box<Join>,
    /// Of pieces that are joined side by side.
    pub joins: Box<[Join; WAYS]>,
    ids: Vec<u32>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
    dead: Vec<u64>,
}

impl Scratch {
    /// Gives back what an unusually long piece took.
    pub fn shrink(&mut self, symbols: usize) {
        if self.ids.capacity().max(self.dead.capacity()) > symbols {
            *self = Self::default();
        }
    }
}

/// The model: tokens and merges.
#[derive(Clone, Copy)]
pub struct Bpe<'i> {
    /// The tokens.
    pub vocabulary: Vocabulary<'i>,
    /// What neighbours become.
    pub merges: Merges<'i>,
}

impl Bpe<'_> {
    /// Appends the ids that merges make of a piece.
    pub fn merge(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let before = out.len();
        if let Some(count) = self.symbols(piece, &mut scratch.few.ids) {
            return scratch.few.run(&self.merges, count, out);
        }
        if self.merges.are_ordered() {
            if self.glide(piece, &mut scratch.few, out) {
                return;
            }
            out.truncate(before);
            if self.walk(piece, &mut scratch.dead, out) {
                return;
            }
            out.truncate(before);
        }
        self.join_many(piece, scratch, out);
    }

    /// Window by window: the tokens of each, but for those its end may have cut short, are kept where they are compatible
    /// with those before. False, with something appended, where a walk does better.
    fn glide(&self, piece: &[u8], few: &mut Join, out: &mut Vec<u32>) -> bool {
        let before = out.len();
        let len = |id: u32| self.vocabulary.bytes(id).len();
        let mut at = 0;
        for step in 0.. {
            if step * MIN_PROGRESS > at + 8 * MIN_PROGRESS {
                break;
            }
            let end = (at + WINDOW).min(piece.len());
            let Some(count) = self.symbols(&piece[at..end], &mut few.ids) else { return false };
            let first = out.len();
            few.run(&self.merges, count, out);
            if first > before && !self.merges.compatible(out[first - 1], out[first], NO_RANK) {
                out.truncate(first);
                let Some(id) = out.pop() else { return false };
                at -= len(id);
            } else if end == piece.len() {
                return true;
            } else if (out.len() - first) * LONG_TOKEN <= end - at {
                break;
            } else {
                at = end;
                while at + UNSURE > end && out.len() > first + 1 {
                    let Some(id) = out.pop() else { return false };
                    at -= len(id);
                }
            }
        }
        false
    }

    /// What merging can begin with: the piece's characters where each becomes one token before anything happens at its
    /// borders, and bytes elsewhere. None if that is more than `symbols` can hold.
    #[inline]
    pub fn symbols(&self, piece: &[u8], symbols: &mut [u32; FEW]) -> Option<usize> {
        if !self.merges.are_ordered() || piece.is_ascii() {
            return self.byte_symbols(piece, symbols);
        }
        let (mut count, mut at) = (0, 0);
        let mut crossed = false; // at the border before this character
        while at < piece.len() {
            let len = match piece[at] {
                0xC2..0xE0 => 2,
                0xE0..0xF0 => 3,
                0xF0.. => 4,
                _ => 1,
            };
            let end = (at + len).min(piece.len());
            let crosses = piece.get(end).is_some_and(|&next| self.merges.cross(piece[end - 1], next));
            let whole = if len == 1 || at + len > piece.len() || crossed || crosses {
                None
            } else {
                self.vocabulary.character(&piece[at..end])
            };
            match whole {
                Some(id) => {
                    *symbols.get_mut(count)? = id;
                    count += 1;
                }
                None => count += self.byte_symbols(&piece[at..end], symbols.get_mut(count..)?)?,
            }
            (at, crossed) = (end, crosses);
        }
        Some(count)
    }

    #[inline]
    fn byte_symbols(&self, piece: &[u8], symbols: &mut [u32]) -> Option<usize> {
        for (symbol, &byte) in symbols.get_mut(..piece.len())?.iter_mut().zip(piece) {
            *symbol = self.merges.byte_id(byte);
        }
        Some(piece.len())
    }

    /// From left to right; false, with something appended, if that took too many steps.
    fn walk(&self, piece: &[u8], dead: &mut Vec<u64>, out: &mut Vec<u32>) -> bool {
        let before = out.len();
        let is_dead =
            |dead: &[u64], at: usize| dead.get(at / 64).is_some_and(|word| word >> (at % 64) & 1 == 1);
        dead.clear();
        let mut steps = piece.len() * MAX_STEPS + 64;
        let mut at = 0;
        let mut limit = usize::MAX;
        while at < piece.len() {
            if steps == 0 {
                return false;
            }
            steps -= 1;
            if let Some((id, len)) = self.vocabulary.longest(piece, at, limit) {
                let fits = out.len() == before || self.merges.compatible(out[out.len() - 1], id, NO_RANK);
                if fits && !is_dead(dead, at + len) {
                    out.push(id);
                    at += len;
                    limit = usize::MAX;
                } else {
                    limit = len - 1;
                }
                continue;
            }
            // No token fits here: what led here was wrong, whatever comes behind.
            if dead.is_empty() {
                dead.resize(piece.len() / 64 + 1, 0);
            }
            dead[at / 64] |= 1 << (at % 64);
            if out.len() == before {
                return false; // each piece has an encoding, so this is a damaged table
            }
            let Some(id) = out.pop() else { return false };
            let len = self.vocabulary.bytes(id).len();
            at -= len;
            limit = len - 1;
        }
        true
    }

    /// By the definition in O(n log n). A heap entry whose rank is no longer its symbol's is stale.
    fn join_many(&self, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        debug_assert!(piece.len() < END as usize, "links are u32; Tokenizer::encode refuses longer texts");
        let Scratch { ids, ranks, next, previous, heap, .. } = scratch;
        let rank_of = |left: u32, right: u32| self.merges.find(left, right).map_or(NO_RANK, |pair| pair.rank);
        ids.clear();
        ids.extend(piece.iter().map(|&byte| self.merges.byte_id(byte)));
        let len = ids.len() as u32;
        ranks.clear();
        ranks.extend(ids.windows(2).map(|pair| rank_of(pair[0], pair[1])));
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
            let Some(pair) = self.merges.find(ids[left], ids[right]) else { continue };
            ids[left] = pair.id;
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
                    if second == END { NO_RANK } else { rank_of(ids[first], ids[second as usize]) };
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
        out.extend_from_slice(&ids[..kept]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::build;
    use crate::tokenizer::merges::MergesTables;
    use crate::tokenizer::vocabulary::{TokenList, VocabularyTables};
    use proptest::prelude::*;

    struct Tables(VocabularyTables, MergesTables);

    impl Tables {
        /// The bytes, what merges make of them, and a token that nothing makes.
        fn new(merges: &[(&str, &str)]) -> Self {
            let mut tokens = TokenList::new("vocab");
            let mut id = 0;
            let mut push = |bytes: &[u8]| {
                tokens.push_bytes(bytes, id).unwrap();
                id += 1;
            };
            (0..=255u8).for_each(|byte| push(&[byte]));
            for (index, (left, right)) in merges.iter().enumerate() {
                let joined = [left.as_bytes(), right.as_bytes()].concat();
                let earlier = &merges[..index];
                if !earlier.iter().any(|(left, right)| [left.as_bytes(), right.as_bytes()].concat() == joined)
                {
                    push(&joined);
                }
            }
            push(b"never");
            let mut vocabulary = VocabularyTables::new(tokens, 0).unwrap();
            let id = |bytes: &str| vocabulary.view().id_of_bytes(bytes.as_bytes()).unwrap();
            let merges: Vec<_> = merges
                .iter()
                .map(|(left, right)| (id(left), id(right), id(&format!("{left}{right}"))))
                .collect();
            let merges = MergesTables::new(&vocabulary.view(), &merges, "merges").unwrap();
            build::set_uses(&mut vocabulary, &merges, false).unwrap();
            Self(vocabulary, merges)
        }

        fn from_ranks(tokens: &[&str]) -> Self {
            let mut list = TokenList::new("ranks");
            (0..=255u8).for_each(|byte| list.push_bytes(&[byte], byte.into()).unwrap());
            tokens.iter().zip(256..).for_each(|(token, id)| list.push_bytes(token.as_bytes(), id).unwrap());
            let mut vocabulary = VocabularyTables::new(list, 0).unwrap();
            let merges = build::merges_of_ranks(&vocabulary.view()).unwrap();
            build::set_uses(&mut vocabulary, &merges, true).unwrap();
            Self(vocabulary, merges)
        }

        fn bpe(&self) -> Bpe<'_> {
            Bpe { vocabulary: self.0.view(), merges: self.1.view() }
        }

        fn encode(&self, piece: &[u8]) -> Vec<u32> {
            let bpe = self.bpe();
            if let Some(id) = bpe.vocabulary.piece(piece, bpe.vocabulary.hasher.bytes(piece)) {
                return vec![id];
            }
            let mut ids = vec![7];
            bpe.merge(piece, &mut Scratch::default(), &mut ids);
            ids.split_off(1)
        }

        /// The definition: look for the lowest rank again and again.
        fn by_definition(&self, piece: &[u8]) -> Vec<u32> {
            let bpe = self.bpe();
            let mut ids: Vec<u32> = piece.iter().map(|&byte| bpe.merges.byte_id(byte)).collect();
            loop {
                let pairs = ids.windows(2).enumerate();
                let ranked = pairs.filter_map(|(at, pair)| Some((at, bpe.merges.find(pair[0], pair[1])?)));
                let Some((at, merge)) = ranked.min_by_key(|&(at, merge)| (merge.rank, at)) else {
                    return ids;
                };
                ids.splice(at..at + 2, [merge.id]);
            }
        }
    }

    /// In an order that makes pieces of every length, long ones of "a" too.
    const ORDERED: [(&str, &str); 13] = [
        ("a", "b"),
        ("b", "c"),
        ("a", "a"),
        ("ab", "ab"),
        ("aa", "b"),
        ("bc", "a"),
        ("aa", "aa"),
        ("abab", "abab"),
        ("aaaa", "aaaa"),
        ("c", " "),
        ("aaaaaaaa", "aaaaaaaa"),
        ("bca", "bca"),
        ("aaaaaaaaaaaaaaaa", "ab"),
    ];

    proptest! {
        /// On both sides of the lengths where a window ends and where the heap takes over.
        #[test]
        fn merging_is_by_definition(piece in prop::collection::vec(prop::sample::select(&b"aaaabbc "[..]), 1..200)) {
            let tables = Tables::new(&ORDERED);
            prop_assert!(tables.bpe().merges.are_ordered());
            let expected = tables.by_definition(&piece);
            prop_assert_eq!(tables.encode(&piece), &expected[..]);
            let mut ids = Vec::new();
            tables.bpe().join_many(&piece, &mut Scratch::default(), &mut ids);
            prop_assert_eq!(ids, expected);
        }

        /// Any merges at all: made twice, out of order, never made.
        #[test]
        fn merging_is_by_definition_whatever_the_merges(
            picks in prop::collection::vec((0usize..40, 0usize..40), 1..25),
            piece in prop::collection::vec(prop::sample::select(&b"aabc"[..]), 1..80),
            shuffle in any::<prop::sample::Index>(),
        ) {
            let mut made = vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
            let mut merges = Vec::new();
            for (left, right) in picks {
                let (left, right) = (made[left % made.len()].clone(), made[right % made.len()].clone());
                if left.len() + right.len() < 40 {
                    made.push(format!("{left}{right}"));
                    merges.push((left, right));
                }
            }
            let swap = shuffle.index(merges.len() * 3);
            if swap < merges.len() {
                merges.swap(0, swap);
            }
            let merges: Vec<_> = merges.iter().map(|(left, right)| (&left[..], &right[..])).collect();
            let tables = Tables::new(&merges);
            prop_assert_eq!(tables.encode(&piece), tables.by_definition(&piece));
        }

        /// tiktoken's definition: join the neighbours that are the token of lowest rank.
        #[test]
        fn ranks_join_any_two_neighbours_that_are_a_token(
            tokens in prop::collection::hash_set("[abc]{2,6}", 1..25),
            piece in "[abc]{1,40}",
        ) {
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let tables = Tables::from_ranks(&tokens);
            let id = |bytes: &str| match bytes.len() {
                1 => Some(u32::from(bytes.as_bytes()[0])),
                _ => tokens.iter().zip(256..).find(|(token, _)| **token == bytes).map(|(_, id)| id),
            };
            let mut parts: Vec<String> = piece.chars().map(String::from).collect();
            while let Some((_, at)) = (1..parts.len())
                .filter_map(|at| Some((id(&[&parts[at - 1][..], &parts[at]].concat())?, at)))
                .min()
            {
                let right = parts.remove(at);
                parts[at - 1].push_str(&right);
            }
            let expected = match id(&piece) {
                Some(whole) => vec![whole],
                None => parts.iter().map(|part| id(part).unwrap()).collect(),
            };
            prop_assert_eq!(tables.encode(piece.as_bytes()), expected);
        }
    }

    #[test]
    fn a_token_that_merges_do_not_make_is_never_taken_whole() {
        let tables = Tables::new(&ORDERED);
        // "aab": a a b merges as a (ab), for ab ranks before aa.
        let whole = tables.0.view().id_of_bytes(b"aab").unwrap();
        assert_ne!(tables.encode(b"aab"), [whole]);
        assert_eq!(tables.encode(b"never"), tables.by_definition(b"never"));
        assert_eq!(tables.encode(b"never").len(), 5);
    }

    #[test]
    fn a_dead_end_is_left_by_the_way_it_came() {
        // The longest token at the beginning, "aaaa", is not how five of them begin when "ab" ranks first.
        let tables = Tables::new(&[("a", "b"), ("a", "a"), ("aa", "aa")]);
        for len in 1..40 {
            let piece = [vec![b'a'; len], vec![b'b']].concat();
            assert_eq!(tables.encode(&piece), tables.by_definition(&piece), "{len}");
        }
    }

    #[test]
    fn a_walk_gives_up_in_time() {
        let tables = Tables::new(&ORDERED);
        let piece = b"abcaab".repeat(20_000);
        let mut ids = Vec::new();
        tables.bpe().join_many(&piece, &mut Scratch::default(), &mut ids);
        assert_eq!(tables.encode(&piece), ids);
    }

    #[test]
    fn ranks_out_of_order_are_still_served() {
        // "abc" ranks before "ab" and "bc", so it is made of parts that rank behind it.
        let tables = Tables::from_ranks(&["abc", "ab", "bc"]);
        assert!(!tables.bpe().merges.are_ordered());
        assert_eq!(tables.encode(b"abcd"), [256, u32::from(b'd')]);
    }
}
