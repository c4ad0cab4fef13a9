//! Unicode classes as the reference engine sees them.
//!
//! `onig_classes.tsv` lists which code points Oniguruma, inside Hugging Face tokenizers 0.23, counts as \p{L}, \p{M},
//! \p{N}, \p{P}, \p{S} and \s. It is compiled in, because another Unicode version splits newer characters elsewhere.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, HirKind};

static TABLE: &str = include_str!("onig_classes.tsv");

struct Tables {
    major: [(char, ClassUnicode); 5],
    space: ClassUnicode,
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| {
    let ranges = |letter: char| {
        let lines = TABLE.lines().filter(|line| !line.starts_with('#'));
        ClassUnicode::new(lines.filter_map(|line| {
            let mut fields = line.split('\t');
            let mut code_point =
                || char::from_u32(u32::from_str_radix(fields.next()?, 16).ok()?).or(Some('\u{10FFFF}'));
            let (first, last) = (code_point()?, code_point()?);
            fields.next()?.contains(letter).then(|| ClassUnicodeRange::new(first, last))
        }))
    };
    Tables { major: ['L', 'M', 'N', 'P', 'S'].map(|letter| (letter, ranges(letter))), space: ranges('s') }
});

/// \s
pub fn space() -> ClassUnicode {
    TABLES.space.clone()
}

/// \p{name}: a general category of one or two letters, or a script's long name; None if there is none of that name.
pub fn property(name: &str) -> Option<ClassUnicode> {
    if let Some((_, class)) =
        TABLES.major.iter().find(|(letter, _)| name.len() == 1 && name.starts_with(*letter))
    {
        return Some(class.clone());
    }
    if !name.chars().all(|c| c.is_ascii_alphabetic() || c == '_') {
        return None;
    }
    let query = match name.len() {
        0 | 1 => return None,
        2 => format!(r"\p{{general_category={name}}}"),
        _ => format!(r"\p{{script={name}}}"),
    };
    match regex_syntax::parse(&query).ok()?.into_kind() {
        HirKind::Class(Class::Unicode(class)) => Some(class),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(class: &ClassUnicode) -> usize {
        class.iter().map(|range| range.len()).sum()
    }

    #[test]
    fn the_table_holds_what_was_measured() {
        let counts = ["L", "M", "N", "P", "S"].map(|name| count(&property(name).unwrap()));
        assert_eq!(counts, [141_028, 2_501, 1_911, 855, 8_514]);
        assert_eq!(count(&space()), 25);
    }

    /// Subcategories and scripts come from regex-syntax: its Unicode version must be the table's.
    #[test]
    fn subcategories_are_of_the_same_unicode_version() {
        for (letter, class) in &TABLES.major {
            let HirKind::Class(Class::Unicode(other)) =
                regex_syntax::parse(&format!(r"\p{{{letter}}}")).unwrap().into_kind()
            else {
                panic!("{letter} is a class")
            };
            assert_eq!(class, &other, "{letter}");
        }
        assert_eq!(count(&property("Han").unwrap()), 99_030);
        assert!(property("Lx").is_none());
        assert!(property("Punct").is_none());
    }
}
