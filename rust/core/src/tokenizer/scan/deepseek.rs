//! DeepSeek V3: digits by three, Han and kana cut out, then six alternatives on each segment between.
//!
//! Nothing looks across an edge of a segment: the end of one is as the end of the text.

use crate::tokenizer::scan::driver::Rules;
use crate::tokenizer::scan::parts::{Threes, View, White};
use crate::tokenizer::scan::word::{Groups, WITH_CUT, Word, last_before, later};

/// The state between two words.
#[derive(Clone, Copy)]
pub(super) struct DeepSeek {
    before: Word,
    /// ASCII punctuation that letters may join (`[!-~][A-Za-z]+`).
    joiner: u64,
    /// Whether such letters ran to the end of the word.
    joined: bool,
    white: White,
    threes: Threes,
}

impl DeepSeek {
    pub fn new() -> Self {
        Self {
            before: Word::default(),
            joiner: 0,
            joined: false,
            white: White::new(false),
            threes: Threes::default(),
        }
    }
}

impl Rules for DeepSeek {
    fn groups(&self) -> &'static Groups {
        &WITH_CUT
    }

    #[inline(always)]
    fn starts(&mut self, view: &View<'_>, due: &mut u32) -> u64 {
        let (word, next) = (view.word, view.next);
        let Word { letter, punctuation, blank, space, other, cut, .. } = *word;
        let before = std::mem::replace(&mut self.before, *word);
        let edge = cut ^ later(cut, before.cut);
        let next_edge = next.cut ^ later(next.cut, cut);
        let same = !edge;

        // An edge is a start whatever the rules below say; `same` stands where they would have an effect beyond it.
        let punctuation_starts = punctuation & !(later(punctuation, before.punctuation) & same);
        let behind_space = later(space, before.space);
        // Alternative 1: punctuation where a match begins, with ASCII letters alone behind it; another letter behind those
        // begins a piece. The sum carries the first letter of each such run to the run's end.
        let joiner = punctuation_starts & word.ascii_punctuation & !behind_space;
        let joined = later(joiner, self.joiner) & word.ascii_letter;
        let (sum, more) = word.ascii_letter.overflowing_add(joined | u64::from(self.joined));
        let joined_ends = sum & !word.ascii_letter & letter;
        (self.joiner, self.joined) = (joiner, more);
        // Alternative 2: the last blank or other character before letters is theirs.
        let prefixed = later(blank | other, before.blank | before.other);
        let letter_starts = letter & !later(letter, before.letter) & !prefixed & !joined;
        // No alternative takes other characters alone: a run of them is one piece.
        let other_starts = other & !later(other, before.other);
        let heads = [letter & same, next.letter & !next_edge];
        let prefixes = last_before([other, next.other], heads, word, next);

        let followers = |word: &Word| (word.letter | word.punctuation | word.other) & !word.cut;
        let white = self.white.starts(
            view,
            later(punctuation, before.punctuation) & same,
            [followers(word), followers(next)],
            due,
        );
        edge | punctuation_starts & !behind_space
            | joined_ends
            | letter_starts
            | other_starts
            | prefixes
            | white
            | self.threes.starts(word)
    }
}
