//! cl100k and its relatives: one pattern of seven alternatives, which takes every character.

use crate::tokenizer::scan::contraction;
use crate::tokenizer::scan::driver::Rules;
use crate::tokenizer::scan::parts::{Threes, View, White};
use crate::tokenizer::scan::word::{Groups, WITH_MARKS, WITHOUT_MARKS, Word, later};

/// Where the relatives differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    /// Digits stand by three, not alone.
    pub threes: bool,
    /// Marks belong to words.
    pub marks: bool,
    /// White space that ends the text is one piece, line ends included.
    pub keeps_end_whole: bool,
}

/// The state between two words.
#[derive(Clone, Copy)]
pub(super) struct Cl100k {
    variant: Variant,
    before: Word,
    /// Whether the last character of the word before is punctuation that a letter may join.
    joins: bool,
    /// Ends of contractions that began in the word before.
    contracted: u64,
    white: White,
    threes: Threes,
}

impl Cl100k {
    pub fn new(variant: Variant) -> Self {
        Self {
            variant,
            before: Word::default(),
            joins: false,
            contracted: 0,
            white: White::new(variant.keeps_end_whole),
            threes: Threes::default(),
        }
    }
}

impl Rules for Cl100k {
    fn groups(&self) -> &'static Groups {
        if self.variant.marks { &WITH_MARKS } else { &WITHOUT_MARKS }
    }

    #[inline(always)]
    fn starts(&mut self, view: &View<'_>, due: &mut u32) -> u64 {
        let (word, next) = (view.word, view.next);
        let Word { letter, punctuation, blank, space, digit, tail, .. } = *word;
        let before = std::mem::replace(&mut self.before, *word);

        // ` ?[^\s\p{L}\p{N}]+`: a run, with the space before it.
        let punctuation_starts =
            punctuation & !later(punctuation, before.punctuation) & !later(space, before.space);
        // `[^\r\n\p{L}\p{N}]?\p{L}+`: the last blank before letters is theirs, and punctuation that is alone where a match
        // begins. The sum steps over the bytes of each character that begins such a run.
        let (sum, over) = (punctuation_starts << 1 | u64::from(self.joins)).overflowing_add(tail);
        let joined = sum & !tail;
        self.joins = over || punctuation_starts >> 63 == 1;
        let runs = letter & !later(letter, before.letter);
        let letter_starts = runs & !later(blank, before.blank) & !joined;

        let mut contracted = std::mem::take(&mut self.contracted);
        let mut quoted = runs & joined & later(word.apostrophe, before.apostrophe);
        while quoted != 0 {
            let place = quoted.trailing_zeros() as usize;
            quoted &= quoted - 1;
            let len = contraction::folded(view.text, view.base + place);
            if len > 0 {
                let ends = 1u128 << (place + len);
                contracted |= ends as u64;
                self.contracted |= (ends >> 64) as u64;
            }
        }

        let followers = |word: &Word| word.letter | word.punctuation | word.digit;
        let white = self.white.starts(
            view,
            later(punctuation, before.punctuation),
            [followers(word), followers(next)],
            due,
        );
        let digits = if self.variant.threes { self.threes.starts(word) } else { digit & !tail };
        punctuation_starts | letter_starts | contracted | white | digits
    }
}
