//! The class of a character, as the scanners need it: one byte by a table of two levels.
//!
//! The table is made once a process from the classes of the reference engine (`unicode`).

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

use crate::tokenizer::unicode;

/// What a character is. The `Cut` classes are those of U+3040-30FF and U+4E00-9FA5, which DeepSeek's second split cuts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// None of the others: control, format, private, unassigned.
    Other,
    /// Lu or Lt.
    Upper,
    /// Ll.
    Lower,
    /// Lm or Lo.
    Letter,
    /// M.
    Mark,
    /// N.
    Number,
    /// P or S.
    Punctuation,
    /// \s.
    Space,
    CutLetter,
    CutMark,
    CutPunctuation,
    CutOther,
}

impl Class {
    pub const COUNT: usize = 12;
    const ALL: [Class; Self::COUNT] = [
        Self::Other,
        Self::Upper,
        Self::Lower,
        Self::Letter,
        Self::Mark,
        Self::Number,
        Self::Punctuation,
        Self::Space,
        Self::CutLetter,
        Self::CutMark,
        Self::CutPunctuation,
        Self::CutOther,
    ];

    /// The class of the same characters inside DeepSeek's cut; those hold no numbers and no white space.
    fn cut(self) -> Self {
        match self {
            Self::Other => Self::CutOther,
            Self::Upper | Self::Lower | Self::Letter => Self::CutLetter,
            Self::Mark => Self::CutMark,
            Self::Punctuation => Self::CutPunctuation,
            other => other,
        }
    }

    /// True of \p{L}.
    pub fn is_letter(self) -> bool {
        matches!(self, Self::Upper | Self::Lower | Self::Letter | Self::CutLetter)
    }

    /// True inside DeepSeek's cut.
    pub fn is_cut(self) -> bool {
        matches!(self, Self::CutLetter | Self::CutMark | Self::CutPunctuation | Self::CutOther)
    }
}

/// What DeepSeek's second split cuts out.
const CUT: [RangeInclusive<usize>; 2] = [0x3040..=0x30FF, 0x4E00..=0x9FA5];

const CODE_POINTS: usize = 0x11_0000;
const BLOCK: usize = 128;

/// Blocks of 128 code points; equal ones are kept once.
pub struct Table {
    /// Where the block of `code point / 128` begins.
    starts: Box<[u16; CODE_POINTS / BLOCK]>,
    classes: Vec<Class>,
}

static TABLE: LazyLock<Table> = LazyLock::new(Table::new);

impl Table {
    /// The table.
    pub fn get() -> &'static Self {
        &TABLE
    }

    fn new() -> Self {
        let mut all = vec![Class::Other; CODE_POINTS];
        let mut fill = |class: &regex_syntax::hir::ClassUnicode, value| {
            for range in class.iter() {
                all[range.start() as usize..=range.end() as usize].fill(value);
            }
        };
        let property = |name| unicode::property(name).expect("a general category");
        for (name, class) in [
            ("L", Class::Letter),
            ("Lu", Class::Upper),
            ("Lt", Class::Upper),
            ("Ll", Class::Lower),
            ("M", Class::Mark),
            ("N", Class::Number),
            ("P", Class::Punctuation),
            ("S", Class::Punctuation),
        ] {
            fill(&property(name), class);
        }
        fill(&unicode::space(), Class::Space);
        for range in CUT {
            all[range].iter_mut().for_each(|class| *class = class.cut());
        }
        let mut seen: HashMap<&[u8], u16> = HashMap::new();
        let bytes: Vec<u8> = all.iter().map(|&class| class as u8).collect();
        let mut classes = Vec::new();
        let mut starts = Box::new([0; CODE_POINTS / BLOCK]);
        for (start, block) in starts.iter_mut().zip(bytes.chunks_exact(BLOCK)) {
            *start = *seen.entry(block).or_insert_with(|| {
                let at = classes.len();
                classes.extend(block.iter().map(|&class| Class::ALL[usize::from(class)]));
                u16::try_from(at / BLOCK).expect("fewer blocks than 65,536")
            });
        }
        Self { starts, classes }
    }

    /// The class of a code point; of a number beyond them, `Other`.
    #[inline(always)]
    pub fn class(&self, code_point: u32) -> Class {
        let block = self.starts.get(code_point as usize / BLOCK).copied().unwrap_or(0);
        let at = usize::from(block) * BLOCK + code_point as usize % BLOCK;
        self.classes.get(at).copied().unwrap_or(Class::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_has_the_class_of_the_reference_engine() {
        let holds = |name: &str| {
            let mut found = vec![false; CODE_POINTS];
            let class = if name == "s" { unicode::space() } else { unicode::property(name).unwrap() };
            class.iter().for_each(|r| found[r.start() as usize..=r.end() as usize].fill(true));
            found
        };
        let [l, lu, lt, ll, m, n, p, s, space] = ["L", "Lu", "Lt", "Ll", "M", "N", "P", "S", "s"].map(holds);
        for c in ('\0'..=char::MAX).map(|c| c as usize) {
            let class = Table::get().class(c as u32);
            let is = |plain, cut| class == plain || class == cut;
            assert_eq!(class.is_letter(), l[c], "{c:X}");
            assert_eq!(class == Class::Upper, lu[c] || lt[c], "{c:X}");
            assert_eq!(class == Class::Lower, ll[c], "{c:X}");
            assert_eq!(is(Class::Mark, Class::CutMark), m[c], "{c:X}");
            assert_eq!(class == Class::Number, n[c], "{c:X}");
            assert_eq!(is(Class::Punctuation, Class::CutPunctuation), p[c] || s[c], "{c:X}");
            assert_eq!(class == Class::Space, space[c], "{c:X}");
            let cut = matches!(c, 0x3040..=0x30FF | 0x4E00..=0x9FA5);
            assert_eq!(class.is_cut(), cut, "{c:X}");
        }
        assert_eq!(Table::get().class(0x11_0000), Class::Other);
    }

    #[test]
    fn the_table_is_small() {
        assert!(Table::get().classes.len() < 64 << 10, "{}", Table::get().classes.len());
    }
}
