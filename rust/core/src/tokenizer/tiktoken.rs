//! Tokenizers of tiktoken's form: a file of ranks, a pattern, and special tokens.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::tokenizer::added_tokens::{AddedToken, AddedTokens};
use crate::tokenizer::bpe::Bpe;
use crate::tokenizer::error::{Result, TokenizerError, invalid, unsupported};
use crate::tokenizer::file::read;
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pattern::{Dialect, Pattern};
use crate::tokenizer::pre_tokenizer::{Behavior, PreTokenizer, Step};
use crate::tokenizer::tokenizer::{Parts, Tokenizer};
use crate::tokenizer::vocabulary::Vocabulary;

impl Tokenizer {
    /// Reads a file of lines "base64-bytes rank"; the rank is the id.
    ///
    /// # Errors
    /// [`TokenizerError`] when the file cannot be read or is damaged, the pattern cannot be served exactly, or a special
    /// token's id is taken.
    pub fn from_tiktoken(path: &Path, pattern: &str, special_tokens: Vec<(String, u32)>) -> Result<Self> {
        Self::from_tiktoken_text(&read(path)?, pattern, special_tokens)
    }

    /// The same from the file's text.
    ///
    /// # Errors
    /// As [`Tokenizer::from_tiktoken`].
    pub fn from_tiktoken_text(
        text: &str,
        pattern: &str,
        mut special_tokens: Vec<(String, u32)>,
    ) -> Result<Self> {
        let pattern =
            Pattern::regex(pattern, Dialect::Fancy).map_err(|construct| unsupported("pattern", construct))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let tokens = lines.map(|(number, line)| rank(number + 1, line)).collect::<Result<_>>()?;
        let mut vocabulary = Vocabulary::from_bytes(tokens, "ranks")?;
        let bpe = Bpe::from_ranks(&vocabulary);
        special_tokens.sort_by_key(|&(_, id)| id);
        let mut added = Vec::with_capacity(special_tokens.len());
        for (content, id) in special_tokens {
            if content.is_empty() {
                return Err(invalid(
                    "special_tokens",
                    "tokens that are not empty",
                    format!("\"\" with id {id}"),
                ));
            }
            vocabulary.add(&content, id, "special_tokens")?;
            added.push(AddedToken { id, content, special: true, ..AddedToken::default() });
        }
        Ok(Self::new(Parts {
            normalizer: Normalizer::Identity,
            pre_tokenizer: PreTokenizer {
                steps: vec![Step::Split { pattern, behavior: Behavior::Isolated, invert: false }],
            },
            vocabulary,
            bpe,
            added_tokens: AddedTokens::new(added, str::to_owned)?,
            before: Vec::new(),
            behind: Vec::new(),
        }))
    }
}

fn rank(number: usize, line: &str) -> Result<(Vec<u8>, u32)> {
    let error = || -> TokenizerError {
        let shown: String = line.chars().take(80).collect();
        invalid(format!("line {number}"), "base64, a space and a rank", format!("{shown:?}"))
    };
    let (token, rank) = line.trim_end().split_once(' ').ok_or_else(error)?;
    let bytes = BASE64_STANDARD.decode(token).map_err(|_| error())?;
    let rank = rank.parse().map_err(|_| error())?;
    if bytes.is_empty() { Err(error()) } else { Ok((bytes, rank)) }
}
