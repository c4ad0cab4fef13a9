//! The tokens: their bytes, by id; their ids, by bytes; and the longest token at a place of a text.
//!
//! Everything lies in flat tables, which are built once ([`VocabularyTables`]) and then read where they lie, in memory or in
//! a mapped file ([`Vocabulary`]). Indices are checked on every access: a damaged file can give wrong ids, never worse.

use std::collections::HashMap;

use bytemuck::Zeroable;

use crate::prefetch::fetch_value;
use crate::tokenizer::byte_level;
use crate::tokenizer::error::{Result, TokenizerError, invalid};
use crate::tokenizer::key::{Filter, Hasher, Key, SHORT, place, window};

/// Ids from here on are refused.
pub const MAX_ID: u32 = 1 << 24;

/// Tables are as long as the highest id: this many ids may have no token.
const MAX_GAPS: usize = 1 << 20;

/// Bytes of a token; real ones have up to some hundreds.
const MAX_TOKEN_BYTES: usize = 1 << 16;

/// So many slots are looked at for one key, or another seed is taken: a file can be made so that all its tokens collide.
const MAX_PROBES: usize = 256;
const SEEDS: u64 = 4;

/// A token has this id.
const PRESENT: u8 = 1;
/// It is written in the byte-level alphabet, so merges can make it; others stand for themselves.
const BYTES: u8 = 2;
/// `skip_special_tokens` leaves it out.
const SPECIAL: u8 = 4;

/// Zeros behind the last token's bytes, so that a window never ends early.
const PAD: usize = 16;

/// In a slot: a piece of these bytes is this token, no merge is needed.
const PIECE: u32 = 1 << 24;
/// In a slot: merges make this token of its own bytes, so it can be part of a longer piece.
const MERGED: u32 = 1 << 25;
const ID_BITS: u32 = 0xFF_FFFF;

/// A token that can be found by its bytes: those of a short one are in the slot.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Slot {
    key: Key,
    /// Id and uses.
    id: u32,
    _padding: u32,
}

const EMPTY: u32 = u32::MAX;

/// No token.
const NONE: u32 = u32::MAX;

/// Characters in the table of characters.
const CHARACTERS: usize = 0x10000;

/// Slots of the table of lengths.
const LENGTHS: usize = 1 << 15;
/// In a mask of lengths: a token longer than [`SHORT`] may begin here.
const LONGER: u16 = 1;

/// How a token of the vocabulary comes about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// A piece of these bytes is this token.
    pub piece: bool,
    /// Merges make it of its own bytes.
    pub merged: bool,
}

/// The tables of a vocabulary.
#[derive(Clone, Copy)]
pub struct Vocabulary<'i> {
    /// All tokens' bytes, one after the other, and zeros behind.
    pub bytes: &'i [u8],
    /// Where token `i` lies: `starts[i]..starts[i + 1]`.
    pub starts: &'i [u32],
    /// By id: PRESENT, BYTES, SPECIAL.
    pub kinds: &'i [u8],
    /// Tokens in the byte-level alphabet, by the hash of their bytes.
    pub slots: &'i [Slot],
    /// The hashes that `slots` has.
    pub filter: Filter<'i>,
    /// By the hash of three bytes: the lengths of merged tokens that begin with them, a bit each.
    pub lengths: &'i [u16],
    /// Merged tokens longer than [`SHORT`], by their beginnings; of one beginning the longest first.
    pub long: &'i [u32],
    /// One more than where a beginning's tokens lie in `long`, by the hash of the beginning; 0 for none.
    pub long_slots: &'i [u32],
    /// By code point, below 0x10000: the merged token that a character of two or three bytes is, or [`NONE`].
    pub characters: &'i [u32],
    /// The hash function of these tables.
    pub hasher: Hasher,
}

impl<'i> Vocabulary<'i> {
    /// Whether the tables fit each other, so that what an index is not checked for cannot fail.
    pub fn fits(&self) -> bool {
        self.starts.len() == self.kinds.len() + 1
            && self.kinds.len() < MAX_ID as usize + 1
            && self.lengths.len() == LENGTHS
            && self.characters.len() == CHARACTERS
            && self.filter.fits()
            && !self.slots.is_empty()
            && !self.long_slots.is_empty()
    }

    /// One more than the highest id.
    #[inline]
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The ids whose token does not stand in the byte-level alphabet.
    pub fn texts(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len() as u32).filter(|&id| self.kind(id) & (PRESENT | BYTES) == PRESENT)
    }

    /// Whether `skip_special_tokens` leaves this id out.
    #[inline]
    pub fn is_special(&self, id: u32) -> bool {
        self.kind(id) & SPECIAL != 0
    }

    #[inline]
    fn kind(&self, id: u32) -> u8 {
        self.kinds.get(id as usize).copied().unwrap_or(0)
    }

    /// What token `id` decodes to; nothing for an id without a token.
    #[inline]
    pub fn bytes(&self, id: u32) -> &'i [u8] {
        let index = id as usize;
        match self.starts.get(index..index + 2) {
            Some(&[start, end]) => self.bytes.get(start as usize..end as usize).unwrap_or_default(),
            _ => &[],
        }
    }

    /// Asks for what tells where the bytes of a token are.
    #[inline]
    pub fn ask_bytes(&self, id: u32) {
        if let Some(start) = self.starts.get(id as usize) {
            fetch_value(start);
        }
    }

    /// How many spaces, in characters, are at the beginning and at the end of a token.
    pub fn spaces(&self, id: u32) -> (u32, u32) {
        let bytes = self.bytes(id);
        if self.kind(id) & BYTES != 0 {
            let count =
                |bytes: &mut dyn Iterator<Item = &u8>| bytes.take_while(|&&byte| byte == b' ').count() as u32;
            return (count(&mut bytes.iter()), count(&mut bytes.iter().rev()));
        }
        // The reference looks at the token's string, where a letter of the alphabet stands for the space.
        let text = String::from_utf8_lossy(bytes);
        let is_space = |c: &char| *c == byte_level::SPACE || c.is_whitespace();
        let leading = text.chars().take_while(is_space).count();
        (leading as u32, text.chars().rev().take_while(is_space).count() as u32)
    }

    /// The token's string, as tokenizer.json writes it.
    pub fn string(&self, id: u32) -> Option<String> {
        match self.kind(id) {
            0 => None,
            kind if kind & BYTES != 0 => Some(byte_level::string_of(self.bytes(id))),
            _ => Some(String::from_utf8_lossy(self.bytes(id)).into_owned()),
        }
    }

    /// The token of these bytes that is written in the byte-level alphabet.
    pub fn id_of_bytes(&self, bytes: &[u8]) -> Option<u32> {
        let (key, hash) = self.hasher.key_and_hash(bytes);
        self.find(bytes, key, hash, 0)
    }

    /// The token that a piece of these bytes and this hash is, if no merge is needed.
    #[inline]
    pub fn piece(&self, bytes: &[u8], hash: u64) -> Option<u32> {
        if self.filter.has(hash) { self.find(bytes, Key::of(bytes, hash), hash, PIECE) } else { None }
    }

    /// Asks for the memory where a piece of this hash would be.
    #[inline]
    pub fn ask(&self, hash: u64) {
        if self.filter.has(hash) {
            fetch_value(&self.slots[place(hash, self.slots.len())]);
        }
    }

    /// The token that merges make of a key's bytes.
    #[inline]
    pub fn merged_of_key(&self, key: Key) -> Option<u32> {
        let hash = self.hasher.key(key);
        if self.filter.has(hash) { self.probe(key, hash, MERGED, |_| true) } else { None }
    }

    #[inline]
    fn find(&self, bytes: &[u8], key: Key, hash: u64, use_: u32) -> Option<u32> {
        self.probe(key, hash, use_, |id| bytes.len() <= SHORT || self.bytes(id) == bytes)
    }

    /// The token of this key and use, if it `is_it` beyond its key.
    #[inline]
    fn probe(&self, key: Key, hash: u64, use_: u32, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let mut at = place(hash, self.slots.len());
        for _ in 0..MAX_PROBES {
            let slot = &self.slots[at];
            if slot.key == key && slot.id & use_ == use_ && is_it(slot.id & ID_BITS) {
                return Some(slot.id & ID_BITS).filter(|_| slot.id != EMPTY);
            }
            if slot.id == EMPTY {
                return None;
            }
            at += 1;
            if at == self.slots.len() {
                at = 0;
            }
        }
        None
    }

    /// The token that merges make of one character, which is not ASCII.
    #[inline]
    pub fn character(&self, utf8: &[u8]) -> Option<u32> {
        let bits = |byte: u8| u32::from(byte & 0x3F);
        let c = match *utf8 {
            [first, second] => u32::from(first & 0x1F) << 6 | bits(second),
            [first, second, third] => u32::from(first & 0xF) << 12 | bits(second) << 6 | bits(third),
            _ => return self.merged_of_key(Key::new(window(utf8, 0), utf8.len())),
        };
        Some(self.characters[c as usize]).filter(|&id| id != NONE)
    }

    /// The longest merged token at `at`, of at most `limit` bytes and not beyond the end of `piece`; its id and length.
    ///
    /// None only for a limit of 0: each byte is a token.
    #[inline]
    pub fn longest(&self, piece: &[u8], at: usize, limit: usize) -> Option<(u32, usize)> {
        let limit = limit.min(piece.len() - at);
        let window = window(piece, at);
        let mut lengths = if limit < 3 { 0b110 } else { self.lengths[lengths_place(window)] };
        if lengths & LONGER != 0
            && limit > SHORT
            && let Some(found) = self.longest_long(&piece[at..at + limit], Key::new(window, SHORT))
        {
            return Some(found);
        }
        lengths &= u16::MAX >> (SHORT - limit.min(SHORT));
        lengths &= !LONGER;
        while lengths != 0 {
            let len = lengths.ilog2() as usize;
            lengths ^= 1 << len;
            if let Some(id) = self.merged_of_key(Key::new(window, len)) {
                return Some((id, len));
            }
        }
        None
    }

    #[cold]
    fn longest_long(&self, text: &[u8], beginning: Key) -> Option<(u32, usize)> {
        let begins = |id: u32| Key::new(window(self.bytes(id), 0), SHORT) == beginning;
        let mut at = place(self.hasher.key(beginning), self.long_slots.len());
        for _ in 0..self.long_slots.len() {
            let first = (self.long_slots[at] as usize).checked_sub(1)?;
            let candidates = self.long.get(first..)?;
            if candidates.first().is_some_and(|&id| begins(id)) {
                let same = candidates.iter().copied().take_while(|&id| begins(id));
                return same
                    .map(|id| (id, self.bytes(id)))
                    .find(|(_, token)| text.starts_with(token))
                    .map(|(id, token)| (id, token.len()));
            }
            at = (at + 1) % self.long_slots.len();
        }
        None
    }
}

#[inline]
fn lengths_place(window: u128) -> usize {
    ((window as u32) << 8).wrapping_mul(0x9E37_79B1) as usize >> (32 - LENGTHS.ilog2())
}

/// A vocabulary while it is built.
pub struct VocabularyTables {
    pub bytes: Vec<u8>,
    pub starts: Vec<u32>,
    pub kinds: Vec<u8>,
    pub slots: Vec<Slot>,
    pub filter: Vec<u64>,
    pub lengths: Vec<u16>,
    pub long: Vec<u32>,
    pub long_slots: Vec<u32>,
    pub characters: Vec<u32>,
    pub seed: u64,
    /// The tokens that are not written in the byte-level alphabet.
    pub texts: HashMap<Vec<u8>, u32>,
    place: &'static str,
}

/// Tokens in rising order of their ids.
pub struct TokenList {
    bytes: Vec<u8>,
    starts: Vec<u32>,
    kinds: Vec<u8>,
    place: &'static str,
}

impl TokenList {
    /// An empty list; `place` names it in errors.
    pub fn new(place: &'static str) -> Self {
        Self { bytes: Vec::new(), starts: vec![0], kinds: Vec::new(), place }
    }

    /// Adds a token's string: its bytes if it is written in the byte-level alphabet, else the string itself.
    pub fn push_string(&mut self, string: &str, id: u32) -> Result<()> {
        let start = self.bytes.len();
        if byte_level::append_bytes_of(string, &mut self.bytes) {
            return self.finish(id, PRESENT | BYTES, start);
        }
        self.bytes.truncate(start);
        self.bytes.extend_from_slice(string.as_bytes());
        self.finish(id, PRESENT, start)
    }

    /// Adds a token's bytes.
    pub fn push_bytes(&mut self, bytes: &[u8], id: u32) -> Result<()> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.finish(id, PRESENT | BYTES, start)
    }

    fn finish(&mut self, id: u32, kind: u8, start: usize) -> Result<()> {
        let place = self.place;
        if id >= MAX_ID {
            return Err(invalid(place, format!("ids below {MAX_ID}"), id.to_string()));
        }
        let index = id as usize;
        if index < self.kinds.len() {
            return Err(invalid(place, "an id of its own for each token", format!("{id} twice")));
        }
        if index - self.kinds.len() > MAX_GAPS {
            return Err(invalid(
                place,
                format!("at most {MAX_GAPS} ids without a token"),
                format!("id {id}"),
            ));
        }
        if self.bytes.len() - start > MAX_TOKEN_BYTES {
            let got = format!("{} bytes with id {id}", self.bytes.len() - start);
            return Err(invalid(place, format!("tokens of at most {MAX_TOKEN_BYTES} bytes"), got));
        }
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| invalid(place, "less than 4 GiB of tokens", "more"))?;
        self.kinds.resize(index, 0);
        self.starts.resize(index + 1, start as u32);
        self.kinds.push(kind);
        self.starts.push(end);
        Ok(())
    }
}

impl VocabularyTables {
    /// The tables of the tokens, with room for `spare` more; no token has a use yet.
    pub fn new(mut tokens: TokenList, spare: usize) -> Result<Self> {
        tokens.bytes.extend([0; PAD]);
        let count = tokens.kinds.iter().filter(|&&kind| kind & BYTES != 0).count();
        let mut tables = Self {
            bytes: tokens.bytes,
            starts: tokens.starts,
            kinds: tokens.kinds,
            slots: Vec::new(),
            filter: vec![u64::MAX],
            lengths: Vec::new(),
            long: Vec::new(),
            long_slots: Vec::new(),
            characters: Vec::new(),
            seed: 0,
            texts: HashMap::new(),
            place: tokens.place,
        };
        for seed in 0..SEEDS {
            tables.seed = seed;
            tables.slots =
                vec![Slot { key: Key::zeroed(), id: EMPTY, _padding: 0 }; (count + spare) * 5 / 3 + 1];
            tables.texts.clear();
            if !tables.fill()? {
                continue;
            }
            let vocabulary = tables.view();
            if let Some(byte) = (0..=255u8).find(|&byte| vocabulary.id_of_bytes(&[byte]).is_none()) {
                let got = format!("none for 0x{byte:02X}");
                return Err(invalid(tables.place, "a token for each of the 256 bytes", got));
            }
            return Ok(tables);
        }
        Err(tables.collide())
    }

    fn collide(&self) -> TokenizerError {
        invalid(self.place, "tokens that can be told apart by a hash", "tokens that collide")
    }

    /// Fills the slots; false if too many keys collide.
    fn fill(&mut self) -> Result<bool> {
        for id in 0..self.kinds.len() as u32 {
            if !self.index(id)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes a token findable by its bytes; false if too many keys collide.
    fn index(&mut self, id: u32) -> Result<bool> {
        let kind = self.kinds[id as usize];
        let twice = |bytes: &[u8]| {
            invalid(self.place, "each token once", format!("{:?} twice", String::from_utf8_lossy(bytes)))
        };
        if kind & BYTES == 0 {
            if kind != 0 {
                let bytes = self.view().bytes(id).to_vec();
                if let Some(other) = self.texts.insert(bytes, id) {
                    return Err(twice(self.view().bytes(other)));
                }
            }
            return Ok(true);
        }
        let vocabulary = self.view();
        let bytes = vocabulary.bytes(id);
        let (key, hash) = vocabulary.hasher.key_and_hash(bytes);
        let mut at = place(hash, self.slots.len());
        for _ in 0..MAX_PROBES {
            let slot = self.slots[at];
            if slot.id == EMPTY {
                self.slots[at] = Slot { key, id, _padding: 0 };
                return Ok(true);
            }
            if slot.key == key && vocabulary.bytes(slot.id) == bytes {
                return Err(twice(bytes));
            }
            at = (at + 1) % self.slots.len();
        }
        Ok(false)
    }

    /// Adds a token behind the others, of no use to merges.
    pub fn push_string(&mut self, string: &str, id: u32, place: &str) -> Result<()> {
        self.bytes.truncate(self.bytes.len() - PAD);
        let mut list = TokenList {
            bytes: std::mem::take(&mut self.bytes),
            starts: std::mem::take(&mut self.starts),
            kinds: std::mem::take(&mut self.kinds),
            place: self.place,
        };
        list.push_string(string, id).map_err(|error| error.at(place))?;
        list.bytes.extend([0; PAD]);
        (self.bytes, self.starts, self.kinds) = (list.bytes, list.starts, list.kinds);
        if self.index(id).map_err(|error| error.at(place))? { Ok(()) } else { Err(self.collide().at(place)) }
    }

    /// The id of a token's string, as tokenizer.json writes it.
    pub fn id_of_string(&self, string: &str) -> Option<u32> {
        match byte_level::bytes_of(string) {
            Some(bytes) => self.view().id_of_bytes(&bytes),
            None => self.texts.get(string.as_bytes()).copied(),
        }
    }

    /// Says of each id what it is used for, and builds what [`Vocabulary::longest`] and the quick lookups need.
    pub fn set_uses(&mut self, uses: &[Uses]) -> Result<()> {
        let hasher = Hasher::new(self.seed);
        let bits = |id: u32| {
            let uses = uses.get(id as usize).copied().unwrap_or_default();
            (u32::from(uses.piece) * PIECE) | (u32::from(uses.merged) * MERGED)
        };
        for slot in self.slots.iter_mut().filter(|slot| slot.id != EMPTY) {
            slot.id |= bits(slot.id);
        }
        let vocabulary = self.view();
        let used: Vec<u32> = (0..self.kinds.len() as u32).filter(|&id| bits(id) != 0).collect();
        let hashes = used.iter().map(|&id| hasher.bytes(vocabulary.bytes(id)));
        let filter = Filter::build(hashes, used.len());
        let mut lengths = vec![0u16; LENGTHS];
        let mut characters = vec![NONE; CHARACTERS];
        let mut long = Vec::new();
        for &id in used.iter().filter(|&&id| bits(id) & MERGED != 0) {
            let bytes = vocabulary.bytes(id);
            if bytes.len() > SHORT {
                long.push(id);
            }
            let mask = if bytes.len() > SHORT { LONGER } else { 1 << bytes.len() };
            if (2..=3).contains(&bytes.len())
                && let Ok(text) = std::str::from_utf8(bytes)
                && let Some(c) = text.chars().next().filter(|c| c.len_utf8() == bytes.len())
            {
                characters[c as usize] = id;
            }
            if bytes.len() >= 3 {
                lengths[lengths_place(window(bytes, 0))] |= mask;
            }
        }
        // Tokens of one and two bytes begin any three.
        lengths.iter_mut().for_each(|mask| *mask |= 0b110);
        long.sort_by(|&a, &b| {
            let (a_bytes, b_bytes) = (vocabulary.bytes(a), vocabulary.bytes(b));
            (&a_bytes[..SHORT], b_bytes.len()).cmp(&(&b_bytes[..SHORT], a_bytes.len())).then(a.cmp(&b))
        });
        let mut long_slots = vec![0u32; long.len() * 2 + 1];
        for (index, &id) in long.iter().enumerate() {
            let beginning = &vocabulary.bytes(id)[..SHORT];
            if index > 0 && vocabulary.bytes(long[index - 1]).starts_with(beginning) {
                continue;
            }
            let mut at = place(hasher.bytes(beginning), long_slots.len());
            let mut probes = 0;
            while long_slots[at] != 0 {
                at = (at + 1) % long_slots.len();
                probes += 1;
                if probes == MAX_PROBES {
                    return Err(self.collide());
                }
            }
            long_slots[at] = index as u32 + 1;
        }
        self.filter = filter;
        self.lengths = lengths;
        self.long = long;
        self.long_slots = long_slots;
        self.characters = characters;
        Ok(())
    }

    /// Flags a token as special.
    pub fn set_special(&mut self, id: u32) {
        if let Some(kind) = self.kinds.get_mut(id as usize) {
            *kind |= SPECIAL;
        }
    }

    /// The tables, to be read.
    pub fn view(&self) -> Vocabulary<'_> {
        Vocabulary {
            bytes: &self.bytes,
            starts: &self.starts,
            kinds: &self.kinds,
            slots: &self.slots,
            filter: Filter(&self.filter),
            lengths: &self.lengths,
            long: &self.long,
            long_slots: &self.long_slots,
            characters: &self.characters,
            hasher: Hasher::new(self.seed),
        }
    }
}
