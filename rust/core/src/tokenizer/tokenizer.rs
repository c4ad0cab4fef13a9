//! The tokenizer: one immutable object, for any number of threads.

use rayon::prelude::*;
use regex_automata::util::pool::Pool;

use crate::tokenizer::added_tokens::{AddedToken, AddedTokens, AllowedSpecial, Section};
use crate::tokenizer::bpe::{Bpe, Scratch};
use crate::tokenizer::decode::DecodeTable;
use crate::tokenizer::error::{Result, TokenizerError};
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pre_tokenizer::{Caches, PreTokenizer};
use crate::tokenizer::vocabulary::Vocabulary;

/// Positions inside a piece are u32.
const MAX_TEXT_BYTES: usize = u32::MAX as usize - 1;

/// What a file describes.
pub(super) struct Parts {
    pub normalizer: Normalizer,
    pub pre_tokenizer: PreTokenizer,
    pub vocabulary: Vocabulary,
    pub bpe: Bpe,
    pub added_tokens: AddedTokens,
    /// Ids that `add_special_tokens` puts before and behind a text.
    pub before: Vec<u32>,
    pub behind: Vec<u32>,
}

/// How a text is encoded.
#[derive(Clone, Copy, Debug)]
pub struct EncodeOptions<'a> {
    /// Whether the post-processor's tokens (a BOS, say) are put around the text.
    pub add_special_tokens: bool,
    /// Which added tokens are recognised in the text.
    pub allowed_special: AllowedSpecial<'a>,
}

#[derive(Default)]
struct Memory {
    caches: Option<Caches>,
    scratch: Scratch,
}

/// A byte-level BPE tokenizer.
pub struct Tokenizer {
    parts: Parts,
    decode_table: DecodeTable,
    /// Working memory, one a thread at work.
    memory: Pool<Memory, fn() -> Memory>,
}

impl Tokenizer {
    pub(super) fn new(parts: Parts) -> Self {
        let mut special = vec![false; parts.vocabulary.len()];
        for token in parts.added_tokens.iter().filter(|token| token.special) {
            special[token.id as usize] = true;
        }
        let tokens = (0u32..).zip(&special).map(|(id, &special)| (parts.vocabulary.bytes(id), special));
        Self { decode_table: DecodeTable::new(tokens), parts, memory: Pool::new(Memory::default) }
    }

    pub(super) fn decode_table(&self) -> &DecodeTable {
        &self.decode_table
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// [`TokenizerError::Argument`] for a text of 4 GiB or more, or a set of allowed tokens with an unknown name.
    pub fn encode(&self, text: &str, options: EncodeOptions<'_>) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        match options.allowed_special {
            AllowedSpecial::None => self.encode_into(text, options.add_special_tokens, None, &mut ids)?,
            AllowedSpecial::All => {
                self.encode_into(text, options.add_special_tokens, Some(&self.parts.added_tokens), &mut ids)?;
            }
            AllowedSpecial::These(names) => {
                let normalizer = self.parts.normalizer;
                let these =
                    self.parts.added_tokens.only(names, |text| normalizer.apply(text).into_owned())?;
                self.encode_into(text, options.add_special_tokens, Some(&these), &mut ids)?;
            }
        }
        Ok(ids)
    }

    /// The ids of each text, over the threads of the current pool.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        options: EncodeOptions<'_>,
    ) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref(), options)).collect()
    }

    fn encode_into(
        &self,
        text: &str,
        add_special_tokens: bool,
        added_tokens: Option<&AddedTokens>,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TokenizerError::Argument {
                name: "text",
                expected: format!("at most {MAX_TEXT_BYTES} bytes"),
                got: text.len().to_string(),
            });
        }
        let mut memory = self.memory.get();
        if add_special_tokens {
            out.extend_from_slice(&self.parts.before);
        }
        let raw =
            added_tokens.map_or_else(|| vec![Section::Text(0..text.len())], |added| added.split_raw(text));
        for section in raw {
            match section {
                Section::Token(id) => out.push(id),
                Section::Text(range) => {
                    let normalized = self.parts.normalizer.apply(&text[range]);
                    let Some(added) = added_tokens else {
                        self.encode_plain(&normalized, &mut memory, out);
                        continue;
                    };
                    for section in added.split_normalized(&normalized) {
                        match section {
                            Section::Token(id) => out.push(id),
                            Section::Text(range) => self.encode_plain(&normalized[range], &mut memory, out),
                        }
                    }
                }
            }
        }
        if add_special_tokens {
            out.extend_from_slice(&self.parts.behind);
        }
        Ok(())
    }

    /// A normalized text in which no added token is to be found.
    fn encode_plain(&self, text: &str, memory: &mut Memory, out: &mut Vec<u32>) {
        let Parts { pre_tokenizer, vocabulary, bpe, .. } = &self.parts;
        let Memory { caches, scratch } = memory;
        let caches = caches.get_or_insert_with(|| pre_tokenizer.caches());
        pre_tokenizer
            .split(caches, text, &mut |piece| bpe.encode(vocabulary, piece.as_bytes(), scratch, out));
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.parts.vocabulary.len()
    }

    /// The id of a token's string, as tokenizer.json writes it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.parts.vocabulary.id_of_string(token)
    }

    /// A token's string, as tokenizer.json writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.parts.vocabulary.string(id)
    }

    /// The added tokens, in the order of their file.
    pub fn added_tokens(&self) -> impl Iterator<Item = &AddedToken> {
        self.parts.added_tokens.iter()
    }
}
