//! From a text without added tokens to ids: pieces from the scanner or the patterns, ids from the cache or from BPE.

use std::ops::Range;

use rayon::prelude::*;

use crate::tokenizer::bpe::{self, Bpe};
use crate::tokenizer::key::{Key, SHORT, window};
use crate::tokenizer::piece_cache::{LONGEST, PieceCache};
use crate::tokenizer::scan::{BATCH, Scanner};
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
            let mut encoder = Encoder { bpe: *self.bpe(), pieces, memory };
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

/// The ids of the pieces that a scanner finds.
fn encode_scanned(bpe: Bpe<'_>, scanner: Scanner, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
    let Scratch { pieces, bpe: memory, ends, ids, .. } = scratch;
    let mut encoder = Encoder { bpe, pieces, memory };
    let bytes = text.as_bytes();
    let mut cursor = scanner.cursor(text);
    let mut start = 0;
    // Room for all short pieces of a batch; each writes a whole entry and counts what of it is its own.
    ids.resize(BATCH * 3, 0);
    loop {
        let found = cursor.fill(ends);
        if found == 0 {
            return;
        }
        let mut staged = 0;
        for &end in &ends[..found] {
            let end = end as usize;
            let len = end - start;
            if len <= SHORT {
                let key = Key::new(window(bytes, start), len);
                let hash = bpe.vocabulary.hasher.key(key);
                if let Some(entry) = encoder.pieces.short(key, hash)
                    && let Some(room) = ids.get_mut(staged..staged + 3)
                {
                    room.copy_from_slice(&entry.ids);
                    staged += entry.count as usize;
                    start = end;
                    continue;
                }
                out.extend_from_slice(&ids[..staged]);
                staged = 0;
                encoder.new_short(&bytes[start..end], key, hash, out);
            } else {
                out.extend_from_slice(&ids[..staged]);
                staged = 0;
                encoder.long(&bytes[start..end], out);
            }
            start = end;
        }
        out.extend_from_slice(&ids[..staged]);
    }
}

/// Turns pieces into ids.
pub(super) struct Encoder<'a> {
    pub bpe: Bpe<'a>,
    pub pieces: &'a mut PieceCache,
    pub memory: &'a mut bpe::Scratch,
}

impl Encoder<'_> {
    /// Appends the ids of a piece that is not empty.
    #[inline]
    pub fn piece(&mut self, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() > SHORT {
            return self.long(piece, out);
        }
        let key = Key::new(window(piece, 0), piece.len());
        let hash = self.bpe.vocabulary.hasher.key(key);
        match self.pieces.short(key, hash) {
            Some(entry) => out.extend_from_slice(&entry.ids[..entry.count as usize]),
            None => self.new_short(piece, key, hash, out),
        }
    }

    /// A piece of up to 15 bytes that the cache does not have.
    fn new_short(&mut self, piece: &[u8], key: Key, hash: u64, out: &mut Vec<u32>) {
        let before = out.len();
        if let Some(id) = self.bpe.vocabulary.piece_of_key(key, hash) {
            out.push(id);
        } else if let Some(ids) = self.pieces.long(piece, hash) {
            return out.extend_from_slice(ids);
        } else {
            self.bpe.merge(piece, self.memory, out);
        }
        if !self.pieces.keep_short(key, hash, &out[before..]) {
            self.pieces.keep_long(piece, hash, &out[before..]);
        }
    }

    fn long(&mut self, piece: &[u8], out: &mut Vec<u32>) {
        if piece.len() > LONGEST {
            return self.bpe.encode(piece, self.memory, out);
        }
        let hash = self.bpe.vocabulary.hasher.bytes(piece);
        if let Some(ids) = self.pieces.long(piece, hash) {
            return out.extend_from_slice(ids);
        }
        let before = out.len();
        self.bpe.encode(piece, self.memory, out);
        self.pieces.keep_long(piece, hash, &out[before..]);
    }
}
