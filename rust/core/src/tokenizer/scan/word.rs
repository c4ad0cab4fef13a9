//! A word: 64 bytes of text as one mask for each class of characters, non-ASCII characters included.
//!
//! Every byte of a character has the character's class, so runs of a class have no holes; `tail` tells the bytes that are
//! not the first of their character.

use crate::tokenizer::scan::class::{Class, Table};
use crate::tokenizer::scan::leaf::{Ascii, Block, Leaf};

/// Bytes in a word.
pub(super) const WORD: usize = 64;

/// The masks; bit i stands for byte i. Beyond the end of the text all are 0.
#[derive(Clone, Copy, Default)]
pub(super) struct Word {
    /// Characters that form words.
    pub letter: u64,
    /// Characters that form runs of their own, in the family's sense.
    pub punctuation: u64,
    /// White space but CR and LF.
    pub blank: u64,
    /// U+0020, which is also `blank`.
    pub space: u64,
    /// CR and LF.
    pub newline: u64,
    /// \p{N}
    pub digit: u64,
    /// What is in none of these.
    pub other: u64,
    /// What DeepSeek's second split cuts out, whatever else it is.
    pub cut: u64,
    /// Not the first byte of its character.
    pub tail: u64,
    /// A-Z a-z
    pub ascii_letter: u64,
    /// The 32 of ASCII's P and S.
    pub ascii_punctuation: u64,
    /// U+0027
    pub apostrophe: u64,
    /// Bytes of the text.
    pub text: u64,
}

/// What a family makes of a class.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(super) enum Group {
    Letter,
    Punctuation,
    Blank,
    Digit,
    Other,
    CutLetter,
    CutPunctuation,
    CutOther,
}

const GROUPS: usize = 8;

/// A group for each class, and for ASCII's control characters that are no white space.
pub(super) struct Groups {
    of: [Group; Class::COUNT],
    controls_are_other: bool,
}

/// DeepSeek: letters and marks form words, and the cut stays visible.
pub(super) static WITH_CUT: Groups = {
    use Group::*;
    let of = [
        Other,
        Letter,
        Letter,
        Letter,
        Letter,
        Digit,
        Punctuation,
        Blank,
        CutLetter,
        CutLetter,
        CutPunctuation,
        CutOther,
    ];
    Groups { of, controls_are_other: true }
};

/// cl100k and GPT-2: letters form words; what is no letter, number or white space is punctuation.
pub(super) static WITHOUT_MARKS: Groups = {
    use Group::*;
    let of = [
        Punctuation,
        Letter,
        Letter,
        Letter,
        Punctuation,
        Digit,
        Punctuation,
        Blank,
        Letter,
        Punctuation,
        Punctuation,
        Punctuation,
    ];
    Groups { of, controls_are_other: false }
};

/// Qwen 3.5: the same, but marks are in words.
pub(super) static WITH_MARKS: Groups = {
    use Group::*;
    let of = [
        Punctuation,
        Letter,
        Letter,
        Letter,
        Letter,
        Digit,
        Punctuation,
        Blank,
        Letter,
        Letter,
        Punctuation,
        Punctuation,
    ];
    Groups { of, controls_are_other: false }
};

/// Reads a text word by word.
#[derive(Clone, Copy)]
pub(super) struct Reader<'t> {
    pub text: &'t [u8],
    groups: &'static Groups,
    table: &'static Table,
    /// By group: the bytes of the next word that belong to this one's last character.
    spill: [u64; GROUPS],
}

impl<'t> Reader<'t> {
    /// A reader at the text's start.
    pub fn new(text: &'t str, groups: &'static Groups) -> Self {
        Self { text: text.as_bytes(), groups, table: Table::get(), spill: [0; GROUPS] }
    }

    /// The word at `at`, which is where the word before ended.
    ///
    /// # Safety
    /// The machine must have the instructions of `L`.
    #[inline(always)]
    pub unsafe fn read<L: Leaf>(&mut self, at: usize) -> Word {
        let rest = self.text.get(at..).unwrap_or_default();
        if let Some(block) = rest.first_chunk() {
            // SAFETY: the caller's promise.
            unsafe { self.classify::<L>(block, u64::MAX, at) }
        } else if rest.is_empty() {
            Word::default()
        } else {
            let mut block = [0; WORD];
            block[..rest.len()].copy_from_slice(rest);
            // SAFETY: the caller's promise.
            unsafe { self.classify::<L>(&block, (1 << rest.len()) - 1, at) }
        }
    }

    #[inline(always)]
    unsafe fn classify<L: Leaf>(&mut self, block: &Block, text: u64, at: usize) -> Word {
        // SAFETY: the caller's promise.
        let ascii = unsafe { L::ascii(block) };
        let mut word = self.ascii(ascii, text);
        if ascii.wide != 0 {
            // SAFETY: the caller's promise.
            unsafe { self.beyond_ascii::<L>(block, &mut word, ascii.wide, at) }
        }
        word
    }

    #[inline(always)]
    fn ascii(&self, ascii: Ascii, text: u64) -> Word {
        let Ascii { letter, digit, space, blank, newline, punctuation, apostrophe, wide } = ascii;
        let ascii_punctuation = punctuation | apostrophe;
        let control = text & !(letter | digit | space | blank | newline | ascii_punctuation | wide);
        let (other, also) = if self.groups.controls_are_other { (control, 0) } else { (0, control) };
        Word {
            letter,
            punctuation: ascii_punctuation | also,
            blank: blank | space,
            space,
            newline,
            digit,
            other,
            cut: 0,
            tail: 0,
            ascii_letter: letter,
            ascii_punctuation,
            apostrophe,
            text,
        }
    }

    /// Puts the characters beyond ASCII into the word.
    #[inline(always)]
    unsafe fn beyond_ascii<L: Leaf>(&mut self, block: &Block, word: &mut Word, wide: u64, at: usize) {
        // SAFETY: the caller's promise.
        let bytes = unsafe { L::wide(block) };
        word.tail = bytes.tail;
        let mut masks = std::mem::take(&mut self.spill);
        // U+4E00-9FA5 by the first two bytes, for Chinese text is made of them; the few that need the third wait below.
        let han =
            bytes.lead_e5_e8 | bytes.lead_e4 & (bytes.from_b8 >> 1) | bytes.lead_e9 & (bytes.to_bd >> 1);
        const HAN: usize = Group::CutLetter as usize;
        masks[HAN] |= han | han << 1 | han << 2;
        self.spill[HAN] = han >> 63 | han >> 62;
        let mut leads = wide & !bytes.tail & !han;
        let (mut letters, mut letters_spill) = (0, 0);
        while leads != 0 {
            let place = leads.trailing_zeros();
            leads &= leads - 1;
            let (code_point, len) = decode(self.text, at + place as usize);
            let group = self.groups.of[self.table.class(code_point) as usize];
            let (mask, spill) = span(place, len);
            if matches!(group, Group::Letter) {
                letters |= mask;
                letters_spill |= spill;
            } else {
                masks[group as usize] |= mask;
                self.spill[group as usize] |= spill;
            }
        }
        self.spill[Group::Letter as usize] |= letters_spill;
        let [letter, punctuation, blank, digit, other, cut_letter, cut_punctuation, cut_other] = masks;
        word.letter |= letters | letter | cut_letter;
        word.punctuation |= punctuation | cut_punctuation;
        word.blank |= blank;
        word.digit |= digit;
        word.other |= other | cut_other;
        word.cut = cut_letter | cut_punctuation | cut_other;
    }
}

/// The bits of `len` bytes from `place` on, in this word and in the next.
#[inline(always)]
fn span(place: u32, len: u32) -> (u64, u64) {
    let bits = (1u64 << len) - 1;
    // Two shifts, because one by 64 is none.
    (bits << place, bits >> 1 >> (63 - place))
}

/// The character beyond ASCII that begins at `at` in valid UTF-8: its code point and how many bytes it has.
#[inline(always)]
pub(super) fn decode(text: &[u8], at: usize) -> (u32, u32) {
    let byte = |i: usize| u32::from(text.get(at + i).copied().unwrap_or(0));
    let tail = |i: usize| byte(i) & 0x3F;
    match byte(0) {
        lead @ ..0xE0 => ((lead & 0x1F) << 6 | tail(1), 2),
        lead @ ..0xF0 => ((lead & 0xF) << 12 | tail(1) << 6 | tail(2), 3),
        lead => ((lead & 7) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    }
}

/// `mask` one byte later; `before` is the word before.
#[inline(always)]
pub(super) fn later(mask: u64, before: u64) -> u64 {
    mask << 1 | before >> 63
}

/// The first bytes of the characters of a class that stand directly before `followers`. `class` and `followers` are those of
/// a word and of the next.
#[inline(always)]
pub(super) fn last_before(class: [u64; 2], followers: [u64; 2], word: &Word, next: &Word) -> u64 {
    let last = class[0] & (followers[0] >> 1 | followers[1] << 63);
    if class[0] & word.tail | class[0] >> 63 & next.tail == 0 {
        return last;
    }
    let wide = |[low, high]: [u64; 2]| u128::from(high) << 64 | u128::from(low);
    let tail = wide([word.tail, next.tail]);
    let mut last = wide(class) & wide(followers) >> 1;
    for _ in 0..3 {
        last = last & !tail | (last & tail) >> 1;
    }
    last as u64
}
