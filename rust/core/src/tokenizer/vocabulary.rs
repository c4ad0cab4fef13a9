//! The tokens: their bytes, by id; their ids, by bytes.
//!
//! All bytes lie in one buffer, so a vocabulary of 150,000 tokens is three allocations and not 300,000.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

use crate::tokenizer::byte_level;
use crate::tokenizer::error::{Result, invalid};

/// Ids from here on are refused: tables are as long as the highest id.
pub const MAX_ID: u32 = 1 << 24;

const ABSENT: u8 = 0;
/// The token's string is written in the byte-level alphabet, so merges can make it.
const BYTES: u8 = 1;
/// The token's string stands for itself.
const TEXT: u8 = 2;

/// Tokens of a model, and the added tokens beside them.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// Where token `i` lies: `starts[i]..starts[i + 1]`.
    starts: Vec<usize>,
    kinds: Vec<u8>,
    by_bytes: HashTable<u32>,
    by_text: HashTable<u32>,
}

impl Vocabulary {
    /// From token strings in the byte-level alphabet; one that is not written in it stands for itself.
    pub fn from_strings<'t>(
        tokens: impl Iterator<Item = (&'t str, u32)> + Clone,
        place: &str,
    ) -> Result<Self> {
        let entries = tokens.map(|(token, id)| match byte_level::bytes_of(token) {
            Some(bytes) => (bytes, id, BYTES),
            None => (token.as_bytes().to_vec(), id, TEXT),
        });
        Self::build(entries.collect(), place)
    }

    /// From token bytes.
    pub fn from_bytes(tokens: Vec<(Vec<u8>, u32)>, place: &str) -> Result<Self> {
        Self::build(tokens.into_iter().map(|(bytes, id)| (bytes, id, BYTES)).collect(), place)
    }

    fn build(mut tokens: Vec<(Vec<u8>, u32, u8)>, place: &str) -> Result<Self> {
        tokens.sort_unstable_by_key(|&(_, id, _)| id);
        let mut vocabulary = Self {
            bytes: Vec::with_capacity(tokens.iter().map(|(bytes, ..)| bytes.len()).sum()),
            starts: vec![0],
            kinds: Vec::new(),
            by_bytes: HashTable::new(),
            by_text: HashTable::new(),
        };
        for (bytes, id, kind) in tokens {
            vocabulary.push(&bytes, id, kind, place)?;
        }
        if let Some(byte) = (0..=255u8).find(|&byte| vocabulary.id_of_bytes(&[byte]).is_none()) {
            return Err(invalid(
                place,
                "a token for each of the 256 bytes",
                format!("none for 0x{byte:02X}"),
            ));
        }
        Ok(vocabulary)
    }

    /// Adds an added token behind the others; one that is there already is left as it is.
    pub fn add(&mut self, content: &str, id: u32, place: &str) -> Result<()> {
        if self.id_of_string(content) == Some(id) {
            return Ok(());
        }
        match byte_level::bytes_of(content) {
            Some(bytes) => self.push(&bytes, id, BYTES, place),
            None => self.push(content.as_bytes(), id, TEXT, place),
        }
    }

    /// Ids come in rising order.
    fn push(&mut self, bytes: &[u8], id: u32, kind: u8, place: &str) -> Result<()> {
        if id >= MAX_ID {
            return Err(invalid(place, format!("ids below {MAX_ID}"), id.to_string()));
        }
        let index = id as usize;
        if index < self.kinds.len() {
            return Err(invalid(place, "an id of its own for each token", format!("{id} twice")));
        }
        self.kinds.resize(index, ABSENT);
        self.starts.resize(index + 1, self.bytes.len());
        self.bytes.extend_from_slice(bytes);
        self.kinds.push(kind);
        self.starts.push(self.bytes.len());
        if self.find(bytes, kind).is_some() {
            return Err(invalid(
                place,
                "each token once",
                format!("{:?} twice", String::from_utf8_lossy(bytes)),
            ));
        }
        let (bytes, starts) = (&self.bytes, &self.starts);
        let hash = |&id: &u32| hash(token(bytes, starts, id));
        let table = if kind == BYTES { &mut self.by_bytes } else { &mut self.by_text };
        table.insert_unique(hash(&id), id, hash);
        Ok(())
    }

    fn find(&self, bytes: &[u8], kind: u8) -> Option<u32> {
        let table = if kind == BYTES { &self.by_bytes } else { &self.by_text };
        table.find(hash(bytes), |&id| token(&self.bytes, &self.starts, id) == bytes).copied()
    }

    /// One more than the highest id.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The ids that have a token.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        (0..self.kinds.len() as u32).filter(|&id| self.kinds[id as usize] != ABSENT)
    }

    /// What token `id` decodes to; nothing for an id without a token.
    #[inline]
    pub fn bytes(&self, id: u32) -> &[u8] {
        if (id as usize) < self.kinds.len() { token(&self.bytes, &self.starts, id) } else { &[] }
    }

    /// The token of these bytes that merges can make.
    #[inline]
    pub fn id_of_bytes(&self, bytes: &[u8]) -> Option<u32> {
        self.find(bytes, BYTES)
    }

    /// The token's string, as tokenizer.json writes it.
    pub fn string(&self, id: u32) -> Option<String> {
        match *self.kinds.get(id as usize)? {
            BYTES => Some(byte_level::string_of(self.bytes(id))),
            TEXT => Some(String::from_utf8_lossy(self.bytes(id)).into_owned()),
            _ => None,
        }
    }

    /// The id of a token's string, as tokenizer.json writes it.
    pub fn id_of_string(&self, string: &str) -> Option<u32> {
        match byte_level::bytes_of(string) {
            Some(bytes) => self.find(&bytes, BYTES),
            None => self.find(string.as_bytes(), TEXT),
        }
    }
}

#[inline]
fn hash(bytes: &[u8]) -> u64 {
    FxBuildHasher.hash_one(bytes)
}

#[inline]
fn token<'v>(bytes: &'v [u8], starts: &[usize], id: u32) -> &'v [u8] {
    &bytes[starts[id as usize]..starts[id as usize + 1]]
}
