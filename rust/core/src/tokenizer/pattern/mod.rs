//! The patterns that pre-tokenizers split with, matched without backtracking.
//!
//! A pattern is parsed here (the dialects of regular expressions differ, and what is not understood must be refused), then
//! matched by regex-automata, whose time is linear. Its automata know no look-ahead, so an alternative `X(?!\S)` becomes two:
//! `X` at the end of the text, and `X\s` whose last character is given back.

mod parse;

use std::ops::Range;

use regex_automata::meta::{Cache, Regex};
use regex_automata::util::syntax;
use regex_automata::{Anchored, Input};
use regex_syntax::hir::{Class, ClassUnicode, Hir};
use serde::{Deserialize, Serialize};

use crate::tokenizer::unicode;

use parse::Node;

pub use parse::Dialect;

/// Memory the compiled automaton may take: a hostile pattern is refused, not compiled for ever.
const MAX_AUTOMATON_BYTES: usize = 8 << 20;
const MAX_PATTERN_BYTES: usize = 16 << 10;

/// What a pattern is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A regular expression.
    Regex(String, Dialect),
    /// This text alone.
    Literal(String),
    /// One character of \p{N}.
    Number,
}

/// A compiled pattern.
pub struct Pattern {
    regex: Regex,
    /// For each alternative: whether its match ends before the last character it read.
    gives_back: Vec<bool>,
    /// What was parsed, if it was a regular expression.
    tree: Option<Node>,
}

impl Pattern {
    /// Compiles a pattern; the error says what of it cannot be served exactly.
    pub fn new(source: &Source) -> Result<Self, String> {
        match source {
            Source::Regex(pattern, dialect) => Self::regex(pattern, *dialect),
            Source::Literal(text) => Self::literal(text),
            Source::Number => Ok(Self::class(unicode::property("N").expect("a general category"))),
        }
    }

    /// Compiles a regular expression; the error says what of it cannot be served exactly.
    pub fn regex(pattern: &str, dialect: Dialect) -> Result<Self, String> {
        if pattern.len() > MAX_PATTERN_BYTES {
            return Err(format!("a pattern of {} bytes (at most {MAX_PATTERN_BYTES})", pattern.len()));
        }
        let tree = parse::tree(pattern, dialect)?;
        Ok(Self { tree: Some(tree.clone()), ..Self::build(parse::alternatives(tree)?)? })
    }

    /// Whether this was made from a regular expression that says the same as `pattern`, however it is spelled: escapes,
    /// the order of a class's members and redundant brackets may differ.
    pub fn says(&self, pattern: &str, dialect: Dialect) -> bool {
        self.tree.as_ref().is_some_and(|tree| parse::tree(pattern, dialect).as_ref() == Ok(tree))
    }

    /// A pattern that matches this text alone.
    pub fn literal(text: &str) -> Result<Self, String> {
        Self::build(vec![(Hir::literal(text.as_bytes()), false)])
    }

    /// A pattern that matches one character of a class.
    pub fn class(class: ClassUnicode) -> Self {
        Self::build(vec![(Hir::class(Class::Unicode(class)), false)]).expect("one class is a small automaton")
    }

    fn build(alternatives: Vec<(Hir, bool)>) -> Result<Self, String> {
        if alternatives.iter().any(|(hir, _)| hir.properties().minimum_len().is_none_or(|len| len == 0)) {
            return Err("a pattern that can match the empty string, or nothing at all,".into());
        }
        let (hirs, gives_back): (Vec<Hir>, Vec<bool>) = alternatives.into_iter().unzip();
        let config = Regex::config().nfa_size_limit(Some(MAX_AUTOMATON_BYTES));
        let regex = Regex::builder()
            .configure(config)
            .syntax(syntax::Config::new())
            .build_many_from_hir(&hirs)
            .map_err(|error| format!("a pattern that does not compile ({error})"))?;
        Ok(Self { regex, gives_back, tree: None })
    }

    /// Working memory for [`Pattern::find`].
    pub fn cache(&self) -> Cache {
        self.regex.create_cache()
    }

    /// The leftmost match at or after `from`, as if the text began there.
    pub fn find(&self, cache: &mut Cache, text: &str, from: usize) -> Option<Range<usize>> {
        // Most matches begin where the last one ended: look there first, one automaton is then enough.
        let input = Input::new(text).range(from..);
        if let Some(half) = self.regex.search_half_with(cache, &input.clone().anchored(Anchored::Yes)) {
            return Some(from..self.end(text, half.pattern().as_usize(), half.offset()));
        }
        let found = self.regex.search_with(cache, &input)?;
        Some(found.start()..self.end(text, found.pattern().as_usize(), found.end()))
    }

    fn end(&self, text: &str, alternative: usize, end: usize) -> usize {
        if !self.gives_back[alternative] {
            return end;
        }
        end - text[..end].chars().next_back().map_or(0, char::len_utf8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEEPSEEK: &str = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+\
                            | ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";

    fn split<'t>(pattern: &Pattern, text: &'t str) -> Vec<&'t str> {
        let (mut cache, mut at, mut found) = (pattern.cache(), 0, Vec::new());
        while let Some(range) = pattern.find(&mut cache, text, at) {
            at = range.end;
            found.push(&text[range]);
        }
        found
    }

    fn deepseek(text: &str) -> Vec<&str> {
        split(&Pattern::regex(DEEPSEEK, Dialect::Oniguruma).unwrap(), text)
    }

    #[test]
    fn the_last_space_joins_the_word() {
        assert_eq!(deepseek("a   b"), ["a", "  ", " b"]);
        assert_eq!(deepseek("a   "), ["a", "   "]);
        assert_eq!(deepseek("a b"), ["a", " b"]);
        assert_eq!(deepseek("\u{3000}\u{3000}!"), ["\u{3000}", "\u{3000}", "!"]);
        assert_eq!(deepseek("x \n\n  y"), ["x", " \n\n", " ", " y"]);
    }

    #[test]
    fn punctuation_takes_letters_and_line_ends() {
        assert_eq!(deepseek("don't!\n\nx"), ["don", "'t", "!\n\n", "x"]);
        assert_eq!(deepseek(" $$\r\na\u{301}"), [" $$\r\n", "a\u{301}"]);
    }

    #[test]
    fn what_no_alternative_takes_is_stepped_over() {
        assert_eq!(deepseek("\u{E000}\u{E000}a"), ["\u{E000}a"]);
        assert_eq!(deepseek("1 \u{0}"), [" "]);
    }

    #[test]
    fn possessive_quantifiers_and_case_folding_of_cl100k() {
        let cl100k = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
        let pattern = Pattern::regex(cl100k, Dialect::Fancy).unwrap();
        assert_eq!(
            split(&pattern, "It'LL  be 12345\n\n ok  "),
            ["It", "'LL", " ", " be", " ", "123", "45", "\n\n", " ok", "  "]
        );
        assert_eq!(split(&pattern, "I'\u{17F}x"), ["I", "'\u{17F}", "x"]);
        assert!(Pattern::regex(cl100k, Dialect::Oniguruma).is_err());
    }

    #[test]
    fn time_is_linear_on_a_long_run() {
        let text = " ".repeat(1 << 20);
        assert_eq!(deepseek(&text), [text.as_str()]);
        assert_eq!(deepseek(&"a".repeat(1 << 20)).len(), 1);
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        for (pattern, named) in [
            (r"(a)\1", r"\1"),
            (r"(?<=a)b", "(?<"),
            (r"\bfoo\b", r"\b"),
            (r"^a", "^"),
            (r"a$", "$"),
            (r"a*", "empty string"),
            (r"(?:a(?!b)c)", "look-ahead"),
            (r"\p{Punct}+", r"\p{Punct}"),
            (r"[[:alpha:]]", "[:"),
            (r"[a&&b]", "&&"),
            (r"\w+", r"\w"),
            (r"a+?", "lazy"),
            (r"(?i:strasse)", "(?i:"),
            (r"(?i:\p{Lu})", "(?i:"),
            (r"a{2,1}", "{2,1}"),
            (r"a{1,100000}", "{1,100000}"),
            (r"(a", "("),
            (r"a)", ")"),
            (r"[a", "["),
            (r"[z-a]", "z-a"),
            (r"*a", "*"),
            (r"\p{L}++\p{Lu}", "possessive"),
            (r"(?:b\p{L}++)a", "possessive"),
            (r"(?x: a)", "(?x"),
            ("", "empty string"),
        ] {
            let error = Pattern::regex(pattern, Dialect::Oniguruma).err().unwrap_or_default();
            assert!(error.contains(named), "{pattern}: {error}");
        }
        let deep = format!("{}a{}", "(".repeat(500), ")".repeat(500));
        assert!(Pattern::regex(&deep, Dialect::Oniguruma).err().unwrap().contains("nested"));
        let huge = r"(\p{L}{1000}|\p{N}{1000}){1000}";
        assert!(Pattern::regex(huge, Dialect::Oniguruma).is_err());
    }
}
