//! GPT-2: runs of letters, numbers or the rest, each with the space before it.

use crate::tokenizer::scan::contraction;
use crate::tokenizer::scan::driver::Rules;
use crate::tokenizer::scan::parts::View;
use crate::tokenizer::scan::word::{Groups, WITHOUT_MARKS, Word, last_before, later};

/// The state between two words.
#[derive(Clone, Copy, Default)]
pub(super) struct Gpt2 {
    before: Word,
    /// Apostrophes where a match begins.
    quotes: u64,
    /// Ends of contractions that began in the word before.
    contracted: u64,
}

impl Rules for Gpt2 {
    fn groups(&self) -> &'static Groups {
        &WITHOUT_MARKS
    }

    #[inline(always)]
    fn starts(&mut self, view: &View<'_>, _due: &mut u32) -> u64 {
        let (word, next) = (view.word, view.next);
        let before = std::mem::replace(&mut self.before, *word);
        let Word { letter, punctuation, digit, space, apostrophe, .. } = *word;
        let free = !later(space, before.space);
        let letter_runs = letter & !later(letter, before.letter);
        let digit_runs = digit & !later(digit, before.digit);
        let punctuation_runs = punctuation & !later(punctuation, before.punctuation);
        let mut starts = (letter_runs | digit_runs | punctuation_runs) & free;

        let quotes = punctuation_runs & apostrophe & free;
        let mut quoted = letter_runs & later(quotes, self.quotes);
        self.quotes = quotes;
        starts |= std::mem::take(&mut self.contracted);
        while quoted != 0 {
            let place = quoted.trailing_zeros() as usize;
            quoted &= quoted - 1;
            let len = contraction::exact(view.text, view.base + place);
            if len > 0 {
                starts &= !(1 << place);
                let ends = 1u128 << (place + len);
                starts |= ends as u64;
                self.contracted |= (ends >> 64) as u64;
            }
        }

        let white = |word: &Word| word.blank | word.newline;
        let white_starts = white(word) & !later(white(word), white(&before));
        let followers = |word: &Word| word.letter | word.punctuation | word.digit;
        let last = last_before([white(word), white(next)], [followers(word), followers(next)], word, next);
        starts | white_starts | last
    }
}
