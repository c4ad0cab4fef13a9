//! Tokenizers of tiktoken's form: a file of ranks, a pattern, and special tokens.

use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::tokenizer::added_tokens::AddedToken;
use crate::tokenizer::build;
use crate::tokenizer::error::{Result, TokenizerError, invalid, unsupported};
use crate::tokenizer::file::read;
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pattern::{Dialect, Pattern, Source};
use crate::tokenizer::pre_tokenizer::{Behavior, StepSettings};
use crate::tokenizer::settings::{Settings, Trim};
use crate::tokenizer::tokenizer::Tokenizer;
use crate::tokenizer::vocabulary::{TokenList, VocabularyTables};

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
        let pattern = Source::Regex(pattern.into(), Dialect::Fancy);
        Pattern::new(&pattern).map_err(|construct| unsupported("pattern", construct))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let mut ranks = lines.map(|(number, line)| rank(number + 1, line)).collect::<Result<Vec<_>>>()?;
        ranks.sort_by_key(|&(_, id)| id);
        let mut tokens = TokenList::new("ranks");
        for (bytes, id) in &ranks {
            tokens.push_bytes(bytes, *id)?;
        }
        drop(ranks);
        let mut vocabulary = VocabularyTables::new(tokens, special_tokens.len())?;
        let merges = build::merges_of_ranks(&vocabulary.view())?;
        build::set_uses(&mut vocabulary, &merges, true)?;
        special_tokens.sort_by_key(|&(_, id)| id);
        let mut added_tokens = Vec::with_capacity(special_tokens.len());
        for (content, id) in special_tokens {
            if content.is_empty() {
                let got = format!("\"\" with id {id}");
                return Err(invalid("special_tokens", "tokens that are not empty", got));
            }
            if vocabulary.id_of_string(&content) != Some(id) {
                vocabulary.push_string(&content, id, "special_tokens")?;
            }
            vocabulary.set_special(id);
            added_tokens.push(AddedToken { id, content, special: true, ..AddedToken::default() });
        }
        let settings = Settings {
            normalizer: Normalizer::Identity,
            steps: vec![StepSettings::Split { pattern, behavior: Behavior::Isolated, invert: false }],
            added_tokens,
            before: Vec::new(),
            behind: Vec::new(),
            trim: Trim::default(),
        };
        build::tokenizer(&settings, vocabulary, &merges, "ranks")
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
