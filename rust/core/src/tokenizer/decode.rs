//! Ids to bytes.
//!
//! Each id has one slot of 16 bytes, so most tokens cost one load and one store of fixed size: the bytes lie in the slot
//! itself, and what stands behind them is overwritten by the next token. Longer tokens lie in a buffer of their own.

use crate::tokenizer::Tokenizer;

/// The low bits of a tag: how many bytes of the slot are the token's.
const LEN: u8 = 0x0F;
/// The token is in the buffer of long ones; the slot's first four bytes say where.
const LONG: u8 = 0x10;
/// `skip_special_tokens` leaves it out.
const SPECIAL: u8 = 0x20;

const SLOT: usize = 16;
const TAG: usize = SLOT - 1;
/// Ids between two checks that the output has room.
const CHUNK: usize = 128;
/// Room made at first for each id; text has 3 to 5 bytes a token.
const BYTES_PER_ID: usize = 6;

/// An integer that may be an id.
pub trait TokenId: Copy {
    /// Its value, sign-extended: a negative one is above all ids.
    fn value(self) -> u64;
}

impl TokenId for u32 {
    fn value(self) -> u64 {
        self.into()
    }
}

impl TokenId for i32 {
    fn value(self) -> u64 {
        i64::from(self).cast_unsigned()
    }
}

impl TokenId for i64 {
    fn value(self) -> u64 {
        self.cast_unsigned()
    }
}

#[derive(Clone, Copy)]
#[repr(align(16))] // never across two cache lines
struct Slot([u8; SLOT]);

/// The bytes of every token.
pub(super) struct DecodeTable {
    slots: Vec<Slot>,
    /// Long token `i` is `long[starts[i]..starts[i + 1]]`.
    long: Vec<u8>,
    starts: Vec<usize>,
}

impl DecodeTable {
    /// `tokens`: the bytes of ids 0, 1, 2, ... and whether the token is special.
    pub fn new<'t>(tokens: impl Iterator<Item = (&'t [u8], bool)>) -> Self {
        let mut table = Self { slots: Vec::new(), long: Vec::new(), starts: vec![0] };
        for (bytes, special) in tokens {
            let mut slot = [0; SLOT];
            if bytes.len() < SLOT {
                slot[..bytes.len()].copy_from_slice(bytes);
                slot[TAG] = bytes.len() as u8;
            } else {
                // Fewer than 2^24 tokens, by the vocabulary's limit on ids.
                let index = (table.starts.len() - 1) as u32;
                slot[..4].copy_from_slice(&index.to_le_bytes());
                slot[TAG] = LONG;
                table.long.extend_from_slice(bytes);
                table.starts.push(table.long.len());
            }
            if special {
                slot[TAG] |= SPECIAL;
            }
            table.slots.push(Slot(slot));
        }
        table
    }

    /// The bytes of token `id` and whether it is special; nothing for an id without a token.
    #[inline]
    pub fn token(&self, id: u32) -> (&[u8], bool) {
        let Some(Slot(slot)) = self.slots.get(id as usize) else { return (&[], false) };
        let tag = slot[TAG];
        let bytes = if tag & LONG == 0 { &slot[..usize::from(tag & LEN)] } else { self.long(slot) };
        (bytes, tag & SPECIAL != 0)
    }

    #[inline]
    fn long(&self, slot: &[u8; SLOT]) -> &[u8] {
        let index = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]) as usize;
        &self.long[self.starts[index]..self.starts[index + 1]]
    }

    /// The bytes of `ids`; the first value that is no id of 32 bits ends it as an error.
    fn decode<I: TokenId>(&self, ids: &[I], skip_special_tokens: bool) -> Result<Vec<u8>, I> {
        let rare = if skip_special_tokens { LONG | SPECIAL } else { LONG };
        let mut bytes = vec![0; ids.len() * BYTES_PER_ID + SLOT];
        let mut end = 0;
        for chunk in ids.chunks(CHUNK) {
            make_room(&mut bytes, end + chunk.len() * SLOT);
            for (place, &id) in chunk.iter().enumerate() {
                let index = usize::try_from(id.value()).unwrap_or(usize::MAX);
                let Some(Slot(slot)) = self.slots.get(index) else {
                    if id.value() > u32::MAX.into() {
                        return Err(id);
                    }
                    continue;
                };
                let tag = slot[TAG];
                if tag & rare != 0 {
                    if !(skip_special_tokens && tag & SPECIAL != 0) {
                        let token = self.long(slot);
                        make_room(&mut bytes, end + token.len() + (chunk.len() - place) * SLOT);
                        bytes[end..end + token.len()].copy_from_slice(token);
                        end += token.len();
                    }
                    continue;
                }
                bytes[end..end + SLOT].copy_from_slice(slot);
                end += usize::from(tag & LEN);
            }
        }
        bytes.truncate(end);
        Ok(bytes)
    }
}

/// Grows `bytes` to at least `len`, and by a half at least.
#[inline]
fn make_room(bytes: &mut Vec<u8>, len: usize) {
    if bytes.len() < len {
        bytes.resize(len.max(bytes.len() + bytes.len() / 2), 0);
    }
}

impl Tokenizer {
    /// The bytes of `ids`; an id without a token adds nothing.
    ///
    /// # Errors
    /// The first value that is negative or of more than 32 bits.
    pub fn decode_bytes<I: TokenId>(&self, ids: &[I], skip_special_tokens: bool) -> Result<Vec<u8>, I> {
        self.decode_table().decode(ids, skip_special_tokens)
    }

    /// The text of `ids`; U+FFFD stands for what is not UTF-8, an id without a token adds nothing.
    ///
    /// # Errors
    /// As [`Tokenizer::decode_bytes`].
    pub fn decode<I: TokenId>(&self, ids: &[I], skip_special_tokens: bool) -> Result<String, I> {
        let bytes = self.decode_bytes(ids, skip_special_tokens)?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// The bytes that token `id` decodes to; none for an id without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.decode_table().token(id).0
    }

    /// Whether `skip_special_tokens` leaves out this id.
    pub fn is_special(&self, id: u32) -> bool {
        self.decode_table().token(id).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Tokens of every length about the slot's, more ids than a chunk holds, ids without a token.
        #[test]
        fn the_bytes_are_the_tokens_in_a_row(
            tokens in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), any::<bool>()), 1..12),
            ids in prop::collection::vec(0i64..14, 0..600),
            skip in any::<bool>(),
        ) {
            let table = DecodeTable::new(tokens.iter().map(|(bytes, special)| (&bytes[..], *special)));
            let mut expected = Vec::new();
            for &id in &ids {
                if let Some((bytes, special)) = tokens.get(id as usize) {
                    prop_assert_eq!(table.token(id as u32), (&bytes[..], *special));
                    if !(skip && *special) {
                        expected.extend_from_slice(bytes);
                    }
                } else {
                    prop_assert_eq!(table.token(id as u32), (&[][..], false));
                }
            }
            prop_assert_eq!(table.decode(&ids, skip), Ok(expected.clone()));
            let narrow: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
            prop_assert_eq!(table.decode(&narrow, skip), Ok(expected.clone()));
            let signed: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            prop_assert_eq!(table.decode(&signed, skip), Ok(expected));
        }
    }

    #[test]
    fn what_is_no_id_is_given_back() {
        let table = DecodeTable::new([(&b"a"[..], false)].into_iter());
        assert_eq!(table.decode(&[0i64, 5, i64::from(u32::MAX)], false), Ok(b"a".to_vec()));
        assert_eq!(table.decode(&[0i64, 1 << 32, -1], false), Err(1 << 32));
        assert_eq!(table.decode(&[0i32, -7], false), Err(-7));
        assert_eq!(table.decode(&[u32::MAX], false), Ok(vec![]));
    }
}
