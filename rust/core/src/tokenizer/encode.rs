//! From a text without added tokens to ids: pieces from the scanner or the patterns, ids from the cache or from BPE.

use std::ops::Range;

use rayon::prelude::*;

use crate::tokenizer::bpe::{self, Bpe, WAYS};
use crate::tokenizer::key::{Key, SHORT, window};
use crate::tokenizer::piece_cache::{MOST_IDS, Tables};
use crate::tokenizer::scan::{Leaf, Scanner, Work};
use crate::tokenizer::scratch::Scratch;
use crate::tokenizer::tokenizer::Tokenizer;

/// A shorter text is not worth a second thread.
pub(super) const PARALLEL_BYTES: usize = 1 << 18;
/// What a thread takes at a time.
const PART_BYTES: usize = 1 << 16;
/// How far from there a safe place to cut is looked for.
const CUT_BYTES: usize = 1 << 14;

impl Tokenizer {
    /// Appends the ids of a normalized text in which no added token is to be found. In a thread pool, a long text is shared
    /// between its threads.
    pub(super) fn encode_plain(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Some(scanner) = self.scanner() else {
            let Scratch { pieces, bpe: memory, patterns, .. } = scratch;
            let mut encoder = Encoder { bpe: *self.bpe(), pieces: pieces.tables(), memory };
            let patterns = patterns.get_or_insert_with(|| self.pre_tokenizer().caches());
            self.pre_tokenizer().split(patterns, text, &mut |piece, _| encoder.piece(piece.as_bytes(), out));
            return;
        };
        if text.len() < PARALLEL_BYTES || !in_pool() {
            return encode_scanned(*self.bpe(), scanner, text, scratch, out);
        }
        let encoded: Vec<Vec<u32>> = parts(scanner, text)
            .into_par_iter()
            .map(|part| {
                let mut ids = Vec::new();
                self.pool().with(|scratch| {
                    encode_scanned(*self.bpe(), scanner, &text[part], scratch, &mut ids);
                });
                ids
            })
            .collect();
        out.reserve(encoded.iter().map(Vec::len).sum());
        encoded.iter().for_each(|ids| out.extend_from_slice(ids));
    }
}

/// Whether this is a thread of a pool, which others can help.
pub(super) fn in_pool() -> bool {
    rayon::current_thread_index().is_some()
}

/// Parts of a text that can be encoded apart from each other.
fn parts(scanner: Scanner, text: &str) -> Vec<Range<usize>> {
    let mut parts = Vec::with_capacity(text.len() / PART_BYTES + 1);
    let mut start = 0;
    let mut look = PART_BYTES;
    while look < text.len() {
        match scanner.safe_cut(text, look, CUT_BYTES) {
            Some(cut) => {
                parts.push(start..cut);
                start = cut;
                look = cut + PART_BYTES;
            }
            None => look += CUT_BYTES,
        }
    }
    parts.push(start..text.len());
    parts
}

/// Pieces that are looked at together; what they ask for fits the nearest cache.
const TOGETHER: usize = 256;

/// The ids of the pieces that a scanner finds.
///
/// The tables are larger than the nearest caches, so pieces are taken many at a time: first all ask for where the cache may
/// have them, then those that are there are copied, then the others are encoded side by side.
fn encode_scanned(bpe: Bpe<'_>, scanner: Scanner, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
    scanner.run(EncodeScanned { bpe, scanner, text, scratch, out });
}

struct EncodeScanned<'a> {
    bpe: Bpe<'a>,
    scanner: Scanner,
    text: &'a str,
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u32>,
}

impl Work for EncodeScanned<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Leaf>(self) {
        let Self { bpe, scanner, text, scratch, out } = self;
        let Scratch { pieces, bpe: memory, ends, ids, misses, .. } = scratch;
        let mut encoder = Encoder { bpe, pieces: pieces.tables(), memory };
        let bytes = text.as_bytes();
        let mut cursor = scanner.cursor(text);
        let mut start = 0;
        let mut hashes = [0; TOGETHER];
        let mut keys = [Key::default(); TOGETHER];
        // Each piece writes a whole entry and counts what of it is its own.
        ids.resize(TOGETHER * MOST_IDS, 0);
        loop {
            let found = cursor.fill(ends);
            if found == 0 {
                return;
            }
            for ends in ends[..found].chunks(TOGETHER) {
                let mut at = start;
                for ((&end, hash), key) in ends.iter().zip(&mut hashes).zip(&mut keys) {
                    let len = end as usize - at;
                    *hash = if len <= SHORT {
                        *key = Key::new(window(bytes, at), len);
                        bpe.vocabulary.hasher.key(*key)
                    } else {
                        bpe.vocabulary.hasher.bytes(&bytes[at..end as usize])
                    };
                    encoder.pieces.ask(len, *hash);
                    at = end as usize;
                }
                let mut staged = 0;
                for ((&end, &hash), &key) in ends.iter().zip(&hashes).zip(&keys) {
                    let end = end as usize;
                    let len = end - start;
                    if len <= SHORT
                        && let Some(entry) = encoder.pieces.short(key, hash)
                        && let Some(room) = ids.get_mut(staged..staged + entry.ids.len())
                    {
                        room.copy_from_slice(&entry.ids);
                        staged += entry.count();
                    } else if len > SHORT
                        && let Some(entry) = encoder.pieces.long(&bytes[start..end], hash)
                        && let Some(room) = ids.get_mut(staged..staged + entry.len())
                    {
                        room.copy_from_slice(entry);
                        staged += entry.len();
                    } else {
                        misses.list.push(Miss {
                            piece: start as u32..end as u32,
                            hash,
                            before: staged as u32,
                            ids: 0..0,
                        });
                    }
                    start = end;
                }
                if misses.list.is_empty() {
                    out.extend_from_slice(&ids[..staged]);
                    continue;
                }
                encoder.misses(bytes, misses);
                let mut copied = 0;
                for miss in misses.list.drain(..) {
                    out.extend_from_slice(&ids[copied..miss.before as usize]);
                    copied = miss.before as usize;
                    out.extend_from_slice(&misses.ids[miss.ids.start as usize..miss.ids.end as usize]);
                }
                misses.ids.clear();
                out.extend_from_slice(&ids[copied..staged]);
            }
        }
    }
}

/// A piece that the cache does not have.
struct Miss {
    /// Where it lies in the text.
    piece: Range<u32>,
    hash: u64,
    /// The ids from the cache that come before it.
    before: u32,
    /// Where its ids lie in [`Misses::ids`].
    ids: Range<u32>,
}

/// Pieces that the cache does not have, and their ids.
#[derive(Default)]
pub struct Misses {
    list: Vec<Miss>,
    ids: Vec<u32>,
}

impl Misses {
    /// Gives back what an unusually long piece took.
    pub fn shrink(&mut self, ids: usize) {
        if self.ids.capacity() > ids {
            self.ids = Vec::new();
        }
    }
}

/// Turns pieces into ids.
pub(super) struct Encoder<'a> {
    pub bpe: Bpe<'a>,
    pub pieces: Tables<'a>,
    pub memory: &'a mut bpe::Scratch,
}

impl Encoder<'_> {
    /// Appends the ids of a piece that is not empty.
    #[inline]
    pub fn piece(&mut self, piece: &[u8], out: &mut Vec<u32>) {
        let hash = self.bpe.vocabulary.hasher.bytes(piece);
        let before = out.len();
        if piece.len() <= SHORT
            && let Some(entry) = self.pieces.short(Key::new(window(piece, 0), piece.len()), hash)
        {
            out.extend_from_slice(&entry.ids[..entry.count()]);
        } else if !self.known(piece, hash, out) {
            self.bpe.merge(piece, self.memory, out);
            self.pieces.keep(piece, hash, &out[before..]);
        }
    }

    /// Appends the ids of a piece that is a token or that the cache has elsewhere; false if neither.
    #[inline]
    fn known(&mut self, piece: &[u8], hash: u64, out: &mut Vec<u32>) -> bool {
        if piece.len() <= SHORT
            && let Some(ids) = self.pieces.other_short(piece, hash)
        {
            out.extend_from_slice(ids);
        } else if let Some(id) = self.bpe.vocabulary.piece(piece, hash) {
            out.push(id);
            self.pieces.keep(piece, hash, &[id]);
        } else if let Some(ids) = self.pieces.other_long(piece, hash) {
            out.extend_from_slice(ids);
        } else {
            return false;
        }
        true
    }

    /// Finds the ids of all misses, several pieces at a time.
    #[inline(always)]
    fn misses(&mut self, text: &[u8], misses: &mut Misses) {
        let Misses { list, ids } = misses;
        for miss in &*list {
            self.bpe.vocabulary.ask(miss.hash);
            self.pieces.ask_other(miss.piece.len(), miss.hash);
        }
        let mut rest = list.iter_mut();
        let mut working = [const { None::<&mut Miss> }; WAYS];
        loop {
            let mut idle = true;
            for (way, slot) in working.iter_mut().enumerate() {
                if slot.is_none() {
                    *slot = self.start(text, &mut rest, way, ids);
                }
                let Some(miss) = slot else { continue };
                idle = false;
                let join = &mut self.memory.joins[way];
                if !join.step(&self.bpe.merges) {
                    let before = ids.len();
                    join.finish(ids);
                    miss.ids = before as u32..ids.len() as u32;
                    let piece = &text[miss.piece.start as usize..miss.piece.end as usize];
                    self.pieces.keep(piece, miss.hash, &ids[before..]);
                    *slot = None;
                }
            }
            if idle {
                return;
            }
        }
    }

    /// Begins to join the next miss that asks for it, and appends the ids of those before it.
    #[inline(always)]
    fn start<'m>(
        &mut self,
        text: &[u8],
        rest: &mut std::slice::IterMut<'m, Miss>,
        way: usize,
        ids: &mut Vec<u32>,
    ) -> Option<&'m mut Miss> {
        for miss in rest {
            let piece = &text[miss.piece.start as usize..miss.piece.end as usize];
            let before = ids.len();
            if !self.known(piece, miss.hash, ids) {
                let join = &mut self.memory.joins[way];
                if let Some(count) = self.bpe.symbols(piece, &mut join.ids) {
                    join.begin(&self.bpe.merges, count);
                    return Some(miss);
                }
                self.bpe.merge(piece, self.memory, ids);
                self.pieces.keep(piece, miss.hash, &ids[before..]);
            }
            miss.ids = before as u32..ids.len() as u32;
        }
        None
    }
}
