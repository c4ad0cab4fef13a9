//! The scanners against the generic path, which is exact.

use proptest::prelude::*;

use super::leaf::Instructions;
use super::recognise::{
    CL100K, CL100K_TIKTOKEN, DEEPSEEK, GPT2, GPT2_TIKTOKEN, O200K, QWEN2, QWEN3_5, TEKKEN,
};
use super::*;
use crate::tokenizer::pattern::{Dialect, Pattern};
use crate::tokenizer::pre_tokenizer::{Behavior, Caches, PreTokenizer};

fn steps(patterns: &[&str], dialect: Dialect) -> Vec<Step> {
    let step = |pattern: &&str| Step::Split {
        pattern: Pattern::regex(pattern, dialect).unwrap(),
        behavior: Behavior::Isolated,
        invert: false,
    };
    patterns.iter().map(step).collect()
}

/// A scanner beside the path that defines it.
struct Pair {
    name: &'static str,
    scanner: Scanner,
    generic: PreTokenizer,
    caches: Caches,
}

impl Pair {
    fn new(name: &'static str, patterns: &[&str], dialect: Dialect) -> Self {
        let generic = PreTokenizer { steps: steps(patterns, dialect) };
        let scanner = Scanner::recognise(&generic.steps).expect(name);
        Self { name, scanner, caches: generic.caches(), generic }
    }

    fn all() -> Vec<Self> {
        use Dialect::{Fancy, Oniguruma};
        vec![
            Self::new("DeepSeek", &DEEPSEEK, Oniguruma),
            Self::new("cl100k", &[CL100K], Oniguruma),
            Self::new("tiktoken's cl100k", &[CL100K_TIKTOKEN], Fancy),
            Self::new("Qwen 2", &[QWEN2], Oniguruma),
            Self::new("Qwen 3.5", &[QWEN3_5], Oniguruma),
            Self::new("GPT-2", &[GPT2], Oniguruma),
            Self::new("tiktoken's GPT-2", &[GPT2_TIKTOKEN], Fancy),
            Self::new("o200k", &[O200K], Fancy),
            Self::new("Tekken", &[TEKKEN], Oniguruma),
        ]
    }

    fn expected(&mut self, text: &str) -> Vec<u32> {
        let (mut ends, mut at) = (Vec::new(), 0);
        self.generic.split(&mut self.caches, text, &mut |piece, _| {
            at += piece.len() as u32;
            ends.push(at);
        });
        assert_eq!(at as usize, text.len());
        ends
    }

    fn check(&mut self, text: &str) {
        let expected = self.expected(text);
        for instructions in Instructions::available() {
            let scanner = Scanner { instructions, ..self.scanner };
            let found = ends::<BATCH>(scanner, text);
            assert!(
                found == expected,
                "{} on {instructions:?}:\n{:?}\n{:?}",
                self.name,
                pieces(text, &found),
                pieces(text, &expected)
            );
        }
    }
}

fn ends<const N: usize>(scanner: Scanner, text: &str) -> Vec<u32> {
    let (mut cursor, mut buffer, mut found) = (scanner.cursor(text), [0; N], Vec::new());
    loop {
        let count = cursor.fill_some(&mut buffer);
        if count == 0 {
            return found;
        }
        found.extend_from_slice(&buffer[..count]);
    }
}

fn pieces<'t>(text: &'t str, ends: &[u32]) -> Vec<&'t str> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends).map(|(from, &to)| text.get(from as usize..to as usize).unwrap_or("(broken)")).collect()
}

/// At least one character of each kind that any family tells from others, in one byte and in several.
const ALPHABET: &[&str] = &[
    "a",
    "s",
    "L",
    "E",
    "Z",
    "é",
    "É",
    "ſ",
    "ǅ",
    "ʰ",
    "한",
    "\u{301}",
    "\u{20DD}",
    "中",
    "\u{4E00}",
    "\u{9FA5}",
    "\u{9FA6}",
    "\u{3400}",
    "\u{20000}",
    "あ",
    "ア",
    "ー",
    "・",
    "\u{30A0}",
    "\u{309B}",
    "\u{3099}",
    "\u{3040}",
    "\u{3097}",
    "々",
    "1",
    "²",
    "٣",
    "Ⅷ",
    "𝟘",
    " ",
    "\t",
    "\u{B}",
    "\u{A0}",
    "\u{3000}",
    "\u{2028}",
    "\u{85}",
    "\r",
    "\n",
    "!",
    "'",
    "/",
    "—",
    "€",
    "’",
    "\0",
    "\u{7F}",
    "\u{200D}",
    "\u{E000}",
    "\u{10FFFF}",
    "😀",
    "\u{378}",
];

#[test]
fn every_pair_and_triple_is_cut_as_the_patterns_cut_it() {
    for mut pair in Pair::all() {
        let mut text = String::new();
        for a in ALPHABET {
            for b in ALPHABET {
                pair.check(&format!("{a}{b}"));
                for c in ALPHABET {
                    text.push_str(a);
                    text.push_str(b);
                    text.push_str(c);
                    text.push('x');
                }
            }
            pair.check(&text);
            text.clear();
        }
    }
}

#[test]
fn words_may_end_anywhere_in_a_character() {
    let texts =
        [" \n \u{3000}a", "'ll\u{3000}!\n", "12٣4中・ア\u{3097}あ", "\u{10FFFF}é!ab\u{301}", "  \r\n\t😀'ſx"];
    for mut pair in Pair::all() {
        for text in texts {
            for lead in 50..=64 {
                for filler in ["a", " ", "\n", "1"] {
                    pair.check(&format!("{}{text}{text}", filler.repeat(lead)));
                }
            }
        }
    }
}

fn run() -> impl Strategy<Value = String> {
    let len = prop_oneof![12 => 1..=4usize, 2 => 60..=68usize, 1 => 124..=132usize];
    (prop::sample::select(ALPHABET), len).prop_map(|(c, len)| c.repeat(len))
}

/// Texts made of runs: mostly short, some longer than a word.
fn runs() -> impl Strategy<Value = String> {
    let narrow = prop::collection::vec(prop::sample::select(ALPHABET), 2..6).prop_flat_map(|some| {
        let run = (prop::sample::select(some), prop_oneof![8 => 1..=3usize, 1 => 60..=68usize]);
        prop::collection::vec(run.prop_map(|(c, len)| c.repeat(len)), 0..30)
    });
    prop_oneof![prop::collection::vec(run(), 0..60), narrow].prop_map(|runs| runs.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1))]

    #[test]
    fn texts_are_cut_as_the_patterns_cut_them(texts in prop::collection::vec(runs(), 3000)) {
        for mut pair in Pair::all() {
            texts.iter().for_each(|text| pair.check(text));
            texts.iter().for_each(|text| check_cuts(&pair, text));
        }
    }
}

/// Cutting at the places that are called safe changes no piece.
fn check_cuts(pair: &Pair, text: &str) {
    let expected = ends::<BATCH>(pair.scanner, text);
    let (mut found, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let end = pair.scanner.safe_cut(text, at + 1, 50).unwrap_or(text.len());
        assert!(at < end && end - at <= 50 || end == text.len());
        let part = ends::<BATCH>(pair.scanner, &text[at..end]);
        found.extend(part.into_iter().map(|piece| piece + at as u32));
        at = end;
    }
    assert!(found == expected, "{}:\n{:?}\n{:?}", pair.name, pieces(text, &found), pieces(text, &expected));
}

#[test]
fn safe_cuts_are_found() {
    for pair in Pair::all() {
        let cut = |text, from, limit| pair.scanner.safe_cut(text, from, limit);
        assert_eq!(cut("some words", 0, 100), Some(4));
        assert_eq!(cut("some words", 4, 100), Some(4));
        assert_eq!(cut("some words", 0, 4), None);
        assert_eq!(cut("some words", 5, 100), None);
        assert_eq!(cut("some words", 50, 100), None);
        assert_eq!(cut("中文，", 1, 100), Some(6));
        assert_eq!(cut("it's", 0, 100), None);
        assert_eq!(cut(" \n !?! \n 55", 0, 100), None);
        assert_eq!(cut("", 0, 100), None);
        assert_eq!(cut("abc", 0, usize::MAX), None);
    }
}

#[test]
fn long_runs_are_cut_as_the_patterns_cut_them() {
    for mut pair in Pair::all() {
        for c in ALPHABET {
            for len in [1020, 1024, 1030] {
                let run = c.repeat(len);
                pair.check(&run);
                pair.check(&format!("\n{run}a"));
                pair.check(&format!("\n{run}\na"));
            }
        }
    }
}

fn deepseek(text: &str) -> Vec<&str> {
    let scanner = Scanner::recognise(&steps(&DEEPSEEK, Dialect::Oniguruma)).unwrap();
    pieces(text, &ends::<BATCH>(scanner, text))
}

#[test]
fn deepseek_by_example() {
    // The last blank joins the word; before a number or a cut there is an end, so blanks stay together.
    assert_eq!(deepseek("a   b"), ["a", "  ", " b"]);
    assert_eq!(deepseek("   5  中  "), ["   ", "5", "  ", "中", "  "]);
    // Up to the last line end, then the rest.
    assert_eq!(deepseek("x \n\n  y"), ["x", " \n\n", " ", " y"]);
    assert_eq!(deepseek("x\n \n "), ["x", "\n \n", " "]);
    // Punctuation takes a space before, line ends behind, or ASCII letters behind if it is alone.
    assert_eq!(deepseek("a !!\n\nb"), ["a", " !!\n\n", "b"]);
    assert_eq!(deepseek("don't(éa)!aéb"), ["don", "'t", "(", "éa", ")!", "aéb"]);
    assert_eq!(deepseek("x!aéb ?c"), ["x", "!a", "éb", " ?", "c"]);
    // Numbers by three characters, whatever their bytes.
    assert_eq!(deepseek("12345٣678"), ["123", "45٣", "678"]);
    // Inside the cut, punctuation is still cut; outside of it, marks and other letters join words.
    assert_eq!(deepseek("テスト・中文々a"), ["テスト", "・", "中文", "々a"]);
    // What no alternative takes stands alone, but for the last before letters.
    assert_eq!(deepseek("\0\0a\0\0!"), ["\0", "\0a", "\0\0", "!"]);
}

#[test]
fn spellings_do_not_matter_but_meanings_do() {
    let one =
        |text: &str, dialect| Scanner::recognise(&steps(&[text], dialect)).map(|scanner| scanner.family);
    let spelled = CL100K.replace(r"[\r\n]", "[\n\r]").replace("\\p{L}+", "(?:\\p{L})+");
    assert_eq!(one(&spelled, Dialect::Oniguruma), one(CL100K, Dialect::Oniguruma));
    assert_ne!(one(CL100K, Dialect::Oniguruma), one(QWEN2, Dialect::Oniguruma));
    assert_eq!(one(&CL100K.replace("{1,3}", "{1,4}"), Dialect::Oniguruma), None);
    assert_eq!(one(&CL100K.replace("|'m", ""), Dialect::Oniguruma), None);
    assert_eq!(one(DEEPSEEK[2], Dialect::Oniguruma), None);
    assert!(Scanner::recognise(&[]).is_none());
    assert!(Scanner::recognise(&[Step::PrefixSpace]).is_none());
    let with = |behavior, invert| {
        let pattern = Pattern::regex(CL100K, Dialect::Oniguruma).unwrap();
        Scanner::recognise(&[Step::Split { pattern, behavior, invert }]).is_some()
    };
    assert!(with(Behavior::Isolated, true) && with(Behavior::Removed, true));
    assert!(!with(Behavior::Removed, false) && !with(Behavior::Contiguous, false));
}

#[test]
fn batches_may_end_anywhere() {
    let text = "1 a\n  !b'll\u{3000}中文・ \r\n".repeat(60);
    for pair in Pair::all() {
        let expected = ends::<BATCH>(pair.scanner, &text);
        assert!(expected.len() > BATCH / 2);
        assert_eq!(ends::<{ driver::MOST }>(pair.scanner, &text), expected);
        assert_eq!(ends::<{ driver::MOST + 7 }>(pair.scanner, &text), expected);
        assert!(ends::<BATCH>(pair.scanner, "").is_empty());
    }
}
