//! Tokens that are found in the text as they stand, before it is cut into pieces.
//!
//! Two passes, as in the reference: tokens that are not `normalized` are looked for in the raw text, the others in what is
//! left, after normalization. In a pass the leftmost match wins, and of those the longest.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};
use regex_automata::meta::Regex;
use serde::{Deserialize, Serialize};

use crate::tokenizer::error::{Result, TokenizerError, invalid};

static BEGINS_WITH_WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\A\w").expect("a valid pattern"));
static ENDS_WITH_WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\w\z").expect("a valid pattern"));

/// An entry of tokenizer.json's `added_tokens`, and its flags.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Matches only between characters that are not word characters.
    #[serde(default)]
    pub single_word: bool,
    /// Takes the white space on its left.
    #[serde(default)]
    pub lstrip: bool,
    /// Takes the white space on its right.
    #[serde(default)]
    pub rstrip: bool,
    /// Is looked for in the normalized text.
    #[serde(default)]
    pub normalized: bool,
    /// Is left out of a text decoded with `skip_special_tokens`.
    #[serde(default)]
    pub special: bool,
}

/// Which added tokens are recognised in a text; of those that are not, the text is text.
#[derive(Clone, Copy, Debug)]
pub enum AllowedSpecial<'a> {
    /// None: no text can forge a control token.
    None,
    /// All, with Hugging Face's ids.
    All,
    /// None, and a text with one in it is refused.
    Error,
    /// Those named here.
    These(&'a HashSet<String>),
}

/// A part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    /// No added token is in it.
    Text(Range<usize>),
    /// An added token's id, and where it stands.
    Token(u32, Range<usize>),
}

/// The added tokens of a file.
pub struct AddedTokens {
    tokens: Vec<AddedToken>,
    raw: Finder,
    normalized: Finder,
}

/// Finds the tokens of one pass.
struct Finder {
    automaton: Option<AhoCorasick>,
    /// The token of each of the automaton's patterns.
    tokens: Vec<AddedToken>,
}

impl AddedTokens {
    /// `normalize` is applied to the contents of `normalized` tokens.
    pub fn new(tokens: Vec<AddedToken>, normalize: impl Fn(&str) -> String) -> Result<Self> {
        let (normalized, raw): (Vec<_>, Vec<_>) = tokens
            .iter()
            .filter(|token| !token.content.is_empty())
            .cloned()
            .partition(|token| token.normalized);
        let texts = normalized.iter().map(|token| normalize(&token.content)).collect();
        Ok(Self {
            raw: Finder::new(raw.iter().map(|token| token.content.clone()).collect(), raw)?,
            normalized: Finder::new(texts, normalized)?,
            tokens,
        })
    }

    /// The same tokens, cut down to those named.
    pub fn only(&self, names: &HashSet<String>, normalize: impl Fn(&str) -> String) -> Result<Self> {
        let known = |name: &&String| !self.tokens.iter().any(|token| token.content == **name);
        if let Some(unknown) = names.iter().find(known) {
            return Err(TokenizerError::Argument {
                name: "allowed_special",
                expected: "\"none\", \"all\", \"error\" or a set of this tokenizer's added tokens".into(),
                got: format!("{unknown:?}"),
            });
        }
        Self::new(
            self.tokens.iter().filter(|token| names.contains(&token.content)).cloned().collect(),
            normalize,
        )
    }

    /// The first pass, over the raw text.
    pub fn split_raw(&self, text: &str) -> Vec<Section> {
        self.raw.split(text)
    }

    /// The second pass, over a normalized section.
    pub fn split_normalized(&self, text: &str) -> Vec<Section> {
        self.normalized.split(text)
    }
}

impl Finder {
    fn new(texts: Vec<String>, tokens: Vec<AddedToken>) -> Result<Self> {
        let automaton = if tokens.is_empty() {
            None
        } else {
            let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
            Some(built.map_err(|error| {
                invalid("added_tokens", "tokens that an automaton can hold", error.to_string())
            })?)
        };
        Ok(Self { automaton, tokens })
    }

    fn split(&self, text: &str) -> Vec<Section> {
        let mut sections = Vec::new();
        let mut at = 0; // what is before it has been handed out
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            let token = &self.tokens[found.pattern().as_usize()];
            let (mut start, mut end) = (found.start(), found.end());
            if token.single_word
                && (ENDS_WITH_WORD.is_match(&text[..start]) || BEGINS_WITH_WORD.is_match(&text[end..]))
            {
                continue;
            }
            if token.lstrip {
                start = text[..start].trim_end().len().max(at);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if at < start {
                sections.push(Section::Text(at..start));
            }
            sections.push(Section::Token(token.id, start..end));
            at = end;
        }
        if at < text.len() {
            sections.push(Section::Text(at..text.len()));
        }
        sections
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &str, id: u32) -> AddedToken {
        AddedToken { id, content: content.into(), special: true, ..AddedToken::default() }
    }

    fn sections(tokens: Vec<AddedToken>, text: &str) -> Vec<String> {
        let added = AddedTokens::new(tokens, str::to_owned).unwrap();
        let show = |section| match section {
            Section::Text(range) => text[range].to_owned(),
            Section::Token(id, _) => id.to_string(),
        };
        added.split_raw(text).into_iter().map(show).collect()
    }

    #[test]
    fn the_leftmost_longest_token_wins() {
        let tokens = || vec![token("<a>", 1), token("<a>b", 2), token("b", 3)];
        assert_eq!(sections(tokens(), "x<a>bb<a>c"), ["x", "2", "3", "1", "c"]);
        assert_eq!(sections(tokens(), ""), [""; 0]);
    }

    #[test]
    fn a_single_word_stands_alone() {
        let word = AddedToken { single_word: true, ..token("if", 1) };
        assert_eq!(sections(vec![word], "if life, if_ (if) éif"), ["1", " life, if_ (", "1", ") éif"]);
    }

    #[test]
    fn stripping_takes_the_white_space_around() {
        let both = AddedToken { lstrip: true, rstrip: true, ..token("<m>", 1) };
        assert_eq!(sections(vec![both], "a \u{3000}<m>\n <m> b"), ["a", "1", "1", "b"]);
    }

    #[test]
    fn a_set_must_name_tokens_that_exist() {
        let added = AddedTokens::new(vec![token("<a>", 1), token("<b>", 2)], str::to_owned).unwrap();
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let only = added.only(&names(&["<b>"]), str::to_owned).unwrap();
        assert_eq!(only.split_raw("<a><b>"), [Section::Text(0..3), Section::Token(2, 3..6)]);
        assert!(added.only(&names(&["<c>"]), str::to_owned).is_err());
    }
}
