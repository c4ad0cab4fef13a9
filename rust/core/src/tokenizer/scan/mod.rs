//! Pre-tokenizers scanned by hand: the pieces of the generic patterns, some hundred times faster.
//!
//! ```text
//! 64 bytes ─▶ leaf: a mask for each kind of byte ─▶ word: a mask for each class of characters ─▶ rules: where pieces begin
//! ```
//!
//! A family's rules are bit algebra on the masks of a word, with carries from the word before and a look at the next; o200k's,
//! which depend on case, are a loop over characters. What
//! the generic path (`pre_tokenizer`) cuts is the definition; the tests compare with it.

mod cl100k;
mod class;
mod contraction;
mod deepseek;
mod driver;
mod gpt2;
mod leaf;
mod o200k;
mod parts;
mod recognise;
#[cfg(test)]
mod tests;
mod word;

use crate::simd::Level;
use crate::tokenizer::pre_tokenizer::Step;
use cl100k::{Cl100k, Variant};
use class::{Class, Table};
use deepseek::DeepSeek;
use driver::Driver;
use gpt2::Gpt2;
use leaf::Instructions;
pub(super) use leaf::{Leaf, Work};
use o200k::O200k;

/// How many ends [`Cursor::fill`] can write.
pub const BATCH: usize = 1024;

/// Pre-tokenizers of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    DeepSeek,
    Cl100k(Variant),
    Gpt2,
    O200k(o200k::Variant),
}

/// A pre-tokenizer that is scanned by hand.
#[derive(Clone, Copy, Debug)]
pub struct Scanner {
    family: Family,
    instructions: Instructions,
}

impl Scanner {
    /// The scanner that cuts exactly as these steps do, if there is one.
    pub fn recognise(steps: &[Step]) -> Option<Self> {
        let family = recognise::family(steps)?;
        // A level that cannot be had is an operator's error, not a tokenizer's: it is answered with the least.
        let level = Level::current().unwrap_or(Level::Portable);
        Some(Self { family, instructions: Instructions::at(level) })
    }

    /// Runs `work` on the instructions that the scanner runs on.
    #[inline]
    pub fn run<W: Work>(&self, work: W) -> W::Output {
        self.instructions.run(work)
    }

    /// A cursor over `text`, which is shorter than 4 GiB - 1.
    pub fn cursor<'t>(&self, text: &'t str) -> Cursor<'t> {
        let instructions = self.instructions;
        Cursor(match self.family {
            Family::DeepSeek => Kind::DeepSeek(Driver::new(text, DeepSeek::new(), instructions)),
            Family::Cl100k(variant) => Kind::Cl100k(Driver::new(text, Cl100k::new(variant), instructions)),
            Family::Gpt2 => Kind::Gpt2(Driver::new(text, Gpt2::default(), instructions)),
            Family::O200k(variant) => Kind::O200k(O200k::new(text, variant)),
        })
    }

    /// The first place at or behind `from`, and less than `limit` bytes behind it, where `text` may be cut in two whose
    /// pieces together are the text's; None if there is none. Neither 0 nor the text's end is such a place.
    pub fn safe_cut(&self, text: &str, from: usize, limit: usize) -> Option<usize> {
        let end = from.saturating_add(limit).min(text.len());
        let start = (from.max(1)..end).find(|&at| text.is_char_boundary(at))?;
        let class = |c: char| Table::get().class(u32::from(c));
        let mut before = class(text[..start].chars().next_back()?);
        for (at, c) in text[start..].char_indices().take_while(|(at, _)| start + at < end) {
            let next = class(c);
            // Nothing takes white space or punctuation behind a letter or a number; but o200k takes an apostrophe.
            let closes = before.is_letter() || before == Class::Number;
            let opens = matches!(next, Class::Space | Class::Punctuation) && c != '\'';
            // Nothing looks across the edges of DeepSeek's cut.
            let edge = self.family == Family::DeepSeek && before.is_cut() != next.is_cut();
            if closes && opens || edge {
                return Some(start + at);
            }
            before = next;
        }
        None
    }
}

/// A text that is being cut.
pub struct Cursor<'t>(Kind<'t>);

enum Kind<'t> {
    DeepSeek(Driver<'t, DeepSeek>),
    Cl100k(Driver<'t, Cl100k>),
    Gpt2(Driver<'t, Gpt2>),
    O200k(O200k<'t>),
}

impl Cursor<'_> {
    /// Writes where the next pieces end, in bytes from the text's start and rising, and returns how many; 0 when the text
    /// is used up. Each piece begins where the one before ended, the first at 0; the last end is the text's.
    pub fn fill(&mut self, ends: &mut [u32; BATCH]) -> usize {
        self.fill_some(ends)
    }

    fn fill_some<const N: usize>(&mut self, ends: &mut [u32; N]) -> usize {
        match &mut self.0 {
            Kind::DeepSeek(driver) => driver.fill(ends),
            Kind::Cl100k(driver) => driver.fill(ends),
            Kind::Gpt2(driver) => driver.fill(ends),
            Kind::O200k(scanner) => scanner.fill(ends),
        }
    }
}
