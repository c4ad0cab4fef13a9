//! o200k and its relatives: words that end where an upper-case letter follows a lower-case one. Character by character.
//!
//! A word's pattern is `[upper both]*[lower both]+` or else `[upper both]+[lower both]*`, where `both` are marks and letters
//! without case. Matched with backtracking, that is: all of `[upper both]*` and the lower case behind it; where none is
//! behind it, up to the last of `both`; where there is none of those either, all of it.

use crate::tokenizer::scan::class::{Class, Table};
use crate::tokenizer::scan::contraction;
use crate::tokenizer::scan::word::decode;

/// Where the relatives differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    /// Digits stand by three, not alone.
    pub threes: bool,
    /// A word takes the contraction behind it.
    pub contractions: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Upper,
    Lower,
    /// A letter without case.
    Letter,
    Mark,
    Number,
    Blank,
    Newline,
    Rest,
    End,
}

static ASCII: [Kind; 128] = {
    let mut table = [Kind::Rest; 128];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = match byte as u8 {
            b'A'..=b'Z' => Kind::Upper,
            b'a'..=b'z' => Kind::Lower,
            b'0'..=b'9' => Kind::Number,
            b'\n' | b'\r' => Kind::Newline,
            b'\t'..=b'\r' | b' ' => Kind::Blank,
            _ => Kind::Rest,
        };
        byte += 1;
    }
    table
};

/// A text, and how far it is scanned.
pub(super) struct O200k<'t> {
    text: &'t [u8],
    at: usize,
    variant: Variant,
    table: &'static Table,
}

impl<'t> O200k<'t> {
    pub fn new(text: &'t str, variant: Variant) -> Self {
        Self { text: text.as_bytes(), at: 0, variant, table: Table::get() }
    }

    /// As [`Cursor::fill`](super::Cursor::fill).
    pub fn fill(&mut self, ends: &mut [u32]) -> usize {
        let mut count = 0;
        while count < ends.len() && self.at < self.text.len() {
            self.at = self.piece(self.at);
            ends[count] = self.at as u32;
            count += 1;
        }
        count
    }

    /// The kind of the character at `at`, and where the next begins.
    #[inline(always)]
    fn look(&self, at: usize) -> (Kind, usize) {
        match self.text.get(at) {
            Some(&byte) if byte < 128 => (ASCII[usize::from(byte)], at + 1),
            Some(_) => {
                let (code_point, len) = decode(self.text, at);
                let kind = match self.table.class(code_point) {
                    Class::Upper => Kind::Upper,
                    Class::Lower => Kind::Lower,
                    Class::Letter | Class::CutLetter => Kind::Letter,
                    Class::Mark | Class::CutMark => Kind::Mark,
                    Class::Number => Kind::Number,
                    Class::Space => Kind::Blank,
                    _ => Kind::Rest,
                };
                (kind, at + len as usize)
            }
            None => (Kind::End, at),
        }
    }

    /// The end of the run of these kinds at `at`.
    #[inline(always)]
    fn run(&self, mut at: usize, is: impl Fn(Kind) -> bool) -> usize {
        loop {
            match self.look(at) {
                (kind, next) if is(kind) => at = next,
                _ => return at,
            }
        }
    }

    /// The end of the piece that begins at `at`, which is not the text's end.
    #[inline(always)]
    fn piece(&self, at: usize) -> usize {
        let (kind, next) = self.look(at);
        match kind {
            Kind::Upper | Kind::Lower | Kind::Letter => self.contracted(self.word(at).unwrap_or(next)),
            // A mark may stand before a word; before capitals alone it is a word itself.
            Kind::Mark => {
                let word = self.word(next).filter(|&end| self.run(next, |kind| kind == Kind::Upper) < end);
                self.contracted(word.unwrap_or(next))
            }
            Kind::Number if self.variant.threes => {
                let second = self.number(next);
                if second == next { next } else { self.number(second) }
            }
            Kind::Number => next,
            Kind::Newline => self.white(at),
            Kind::Blank | Kind::Rest => match self.word(next) {
                Some(end) => self.contracted(end),
                None if kind == Kind::Rest => self.punctuation(next),
                None if self.text[at] == b' ' && self.look(next).0 == Kind::Rest => self.punctuation(next),
                None => self.white(at),
            },
            Kind::End => next,
        }
    }

    /// Behind one more number, if there is one.
    fn number(&self, at: usize) -> usize {
        match self.look(at) {
            (Kind::Number, next) => next,
            _ => at,
        }
    }

    /// The end of the letters and marks of a word that begins at `at`, if one does.
    #[inline(always)]
    fn word(&self, at: usize) -> Option<usize> {
        let (mut here, mut both) = (at, None);
        loop {
            match self.look(here) {
                (Kind::Upper, next) => here = next,
                (Kind::Letter | Kind::Mark, next) => {
                    here = next;
                    both = Some(next);
                }
                (Kind::Lower, next) => {
                    let lower = |kind| matches!(kind, Kind::Lower | Kind::Letter | Kind::Mark);
                    return Some(self.run(next, lower));
                }
                _ => return both.or((here > at).then_some(here)),
            }
        }
    }

    /// Behind the contraction at `at`, if there is one.
    #[inline(always)]
    fn contracted(&self, at: usize) -> usize {
        if !self.variant.contractions || self.text.get(at) != Some(&b'\'') {
            return at;
        }
        match contraction::folded(self.text, at + 1) {
            0 => at,
            len => at + 1 + len,
        }
    }

    /// The end of `[^\s\p{L}\p{N}]*[\r\n/]*` at `at`.
    fn punctuation(&self, at: usize) -> usize {
        let end = self.run(at, |kind| matches!(kind, Kind::Rest | Kind::Mark));
        let more = self.text[end..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n' | b'/'));
        end + more.count()
    }

    /// The end of `\s*[\r\n]+`, `\s+(?!\S)` or `\s+` at `at`, where white space is.
    fn white(&self, at: usize) -> usize {
        let (mut here, mut last, mut line) = (at, at, None);
        loop {
            match self.look(here) {
                (Kind::Newline, next) => {
                    line = Some(next);
                    here = next;
                }
                (Kind::Blank, next) => {
                    last = here;
                    here = next;
                }
                (kind, _) => {
                    return line.unwrap_or(if kind == Kind::End || last == at { here } else { last });
                }
            }
        }
    }
}
