//! The rules that families share: white space, groups of digits.

use crate::tokenizer::scan::word::{Word, last_before, later};

/// No position.
pub(super) const NONE: u32 = u32::MAX;

/// A word with what stands around it.
pub(super) struct View<'v> {
    pub text: &'v [u8],
    /// Where the word begins.
    pub base: usize,
    pub word: &'v Word,
    pub next: &'v Word,
}

/// White space as `[\r\n]*` behind punctuation, `\s*[\r\n]+`, `\s+(?!\S)` and `\s+` cut it.
///
/// What `[\r\n]*` leaves of a run begins a piece. The last CR or LF in it ends that piece. The last blank of the run begins
/// another where something follows that does not end the text (or, for DeepSeek, the segment).
#[derive(Clone, Copy)]
pub(super) struct White {
    /// `\s++$` stands first: a run that ends the text is whole.
    keeps_end_whole: bool,
    absorbed: u64,
    free: u64,
    white: u64,
    /// Where blanks began behind a CR or LF. It is the start of a piece unless another CR or LF ends the run, and the end of
    /// the run is not in sight.
    pending: u32,
}

impl White {
    pub fn new(keeps_end_whole: bool) -> Self {
        Self { keeps_end_whole, absorbed: 0, free: 0, white: 0, pending: NONE }
    }

    /// The starts of pieces in white space. `behind_punctuation`: the bytes before which a run of punctuation ended;
    /// `followers`: what makes the last blank of a run a start (of this word and the next); `due` takes a start of an
    /// earlier word that is now certain.
    #[inline(always)]
    pub fn starts(
        &mut self,
        view: &View<'_>,
        behind_punctuation: u64,
        followers: [u64; 2],
        due: &mut u32,
    ) -> u64 {
        let (word, next) = (view.word, view.next);
        // The sum clears each run of newlines that is absorbed from its first on.
        let absorbing = word.newline & (behind_punctuation | self.absorbed >> 63);
        let absorbed = word.newline & !word.newline.wrapping_add(absorbing);
        let free = word.newline & !absorbed;
        let white = word.blank | free;
        let starts = white & !later(white, self.white);
        let mut lines = word.blank & later(free, self.free);
        (self.absorbed, self.free, self.white) = (absorbed, free, white);
        // The sum carries each of `lines` to the end of its blanks.
        let (sum, open) = word.blank.overflowing_add(lines);
        let ends = sum & !word.blank;
        let lost = ends & self.swallowing(word);
        if lost != 0 || open || self.pending != NONE {
            lines = self.settle(view, lines, lost, open, due);
        }
        let last = last_before([word.blank, next.blank], followers, word, next);
        starts | lines | last
    }

    /// What at the end of a run of blanks makes them part of the piece before.
    #[inline(always)]
    fn swallowing(&self, word: &Word) -> u64 {
        if self.keeps_end_whole { word.newline | !word.text } else { word.newline }
    }

    /// Whether the blanks that run into `word` are swallowed; None where they go on behind it.
    fn fate(&self, word: &Word) -> Option<bool> {
        let end = word.blank.trailing_ones();
        (end < 64).then(|| self.swallowing(word) >> end & 1 == 1)
    }

    /// `lines` without those that are no starts.
    fn settle(&mut self, view: &View<'_>, mut lines: u64, mut lost: u64, open: bool, due: &mut u32) -> u64 {
        if self.pending != NONE
            && let Some(swallowed) = self.fate(view.word).or_else(|| self.fate(view.next))
        {
            if !swallowed {
                *due = self.pending;
            }
            self.pending = NONE;
        }
        while lost != 0 {
            let end = lost.trailing_zeros();
            lines &= !highest(lines & ((1 << end) - 1));
            lost &= lost - 1;
        }
        if open {
            let last = highest(lines);
            let fate = self.fate(view.next);
            if fate.is_none() {
                self.pending = view.base as u32 + last.trailing_zeros();
            }
            if fate != Some(false) {
                lines &= !last;
            }
        }
        lines
    }
}

/// The highest bit alone.
fn highest(mask: u64) -> u64 {
    if mask == 0 { 0 } else { 1 << (63 - mask.leading_zeros()) }
}

/// Runs of digits in groups of up to three characters.
#[derive(Clone, Copy, Default)]
pub(super) struct Threes {
    digit: u64,
    /// Characters of the run so far, modulo 3.
    count: u32,
}

impl Threes {
    #[inline(always)]
    pub fn starts(&mut self, word: &Word) -> u64 {
        let digit = word.digit;
        let before = std::mem::replace(&mut self.digit, digit);
        if digit == 0 {
            return 0;
        }
        let runs = digit & !later(digit, before);
        if digit & word.tail != 0 {
            return self.one_by_one(digit & !word.tail, runs);
        }
        let mut starts = runs;
        if before >> 63 & digit == 1 {
            let wait = (3 - self.count) % 3;
            let needed = (2 << wait) - 1;
            starts |= u64::from(digit & needed == needed) << wait;
        }
        // Three bytes behind a start is another where the run reaches that far; then six, twelve, ... at once.
        let (mut reaches, mut step) = (digit & digit << 1 & digit << 2, 3);
        while reaches != 0 && step < 64 {
            starts |= starts << step & reaches;
            reaches &= reaches << step;
            step *= 2;
        }
        if digit >> 63 == 1 {
            self.count = (starts.leading_zeros() + 1) % 3;
        }
        starts
    }

    /// The same for digits of several bytes.
    fn one_by_one(&mut self, mut leads: u64, runs: u64) -> u64 {
        let mut starts = 0;
        while leads != 0 {
            let lead = leads & leads.wrapping_neg();
            leads ^= lead;
            if runs & lead != 0 {
                self.count = 0;
            }
            if self.count == 0 {
                starts |= lead;
            }
            self.count = (self.count + 1) % 3;
        }
        starts
    }
}
