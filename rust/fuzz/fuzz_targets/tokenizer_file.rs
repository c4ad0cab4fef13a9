//! Any file: what loads encodes and decodes without a panic. Half of the inputs are the bytes of a file, half say how a
//! small valid file is changed, so that the fuzzer gets behind the parser.
#![no_main]

use arbitrary::Arbitrary;
use heedful_core::tokenizer::{AllowedSpecial, Tokenizer};
use heedful_fuzz::{CL100K, DEEPSEEK, O200K, added, check_decoding, document, options, split, tokens};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// Steps, added tokens and merges in one input: more are more of the same.
const MOST: usize = 8;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    File(&'a [u8]),
    Changes(Changes<'a>),
}

#[derive(Arbitrary, Debug)]
struct Changes<'a> {
    steps: Vec<Step<'a>>,
    added: Vec<(u8, u8, &'a str)>,
    normalizer: u8,
    ignore_merges: bool,
    merges: Vec<(u16, u16)>,
    entries: Vec<(&'a str, u32)>,
    template: Option<(u8, u16)>,
    /// A part of the text that is written over in the end.
    damage: Option<(u16, &'a str)>,
    text: &'a str,
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Known { pattern: u8, behavior: u8, invert: bool },
    Regex { pattern: &'a str, behavior: u8, invert: bool },
    Literal { pattern: &'a str, behavior: u8, invert: bool },
    Digits { individual: bool },
    Bytes { prefix: bool, regex: bool },
}

fn behavior(number: u8) -> &'static str {
    ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"][usize::from(number) % 5]
}

fn step(step: &Step<'_>) -> Value {
    match *step {
        Step::Known { pattern, behavior: number, invert } => {
            let patterns = [DEEPSEEK, CL100K, O200K, r"\p{N}{1,3}", r"\s+(?!\S)|\s+", r" ?\p{L}+|."];
            split(patterns[usize::from(pattern) % patterns.len()], behavior(number), invert)
        }
        Step::Regex { pattern, behavior: number, invert } => split(pattern, behavior(number), invert),
        Step::Literal { pattern, behavior: number, invert } => {
            json!({"type": "Split", "pattern": {"String": pattern}, "behavior": behavior(number), "invert": invert})
        }
        Step::Digits { individual } => json!({"type": "Digits", "individual_digits": individual}),
        Step::Bytes { prefix, regex } => {
            json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex})
        }
    }
}

impl Changes<'_> {
    fn file(&self) -> String {
        let marks =
            self.added.iter().take(MOST).map(|&(id, flags, content)| {
                added(tokens().len() - 4 + usize::from(id % 16), content, flags)
            });
        let normalizer = match self.normalizer % 4 {
            0 => json!({"type": "NFC"}),
            1 => json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
            _ => Value::Null,
        };
        let steps = self.steps.iter().take(MOST).map(step).collect();
        let mut file = document(steps, marks.collect(), normalizer);
        file["model"]["ignore_merges"] = json!(self.ignore_merges);
        let vocab: Vec<String> = tokens().iter().map(|token| heedful_fuzz::byte_level(token)).collect();
        let named = |index: u16| vocab[usize::from(index) % vocab.len()].clone();
        if let Some(merges) = file["model"]["merges"].as_array_mut() {
            merges.extend(
                self.merges.iter().take(MOST).map(|&(left, right)| json!([named(left), named(right)])),
            );
        }
        for (token, id) in self.entries.iter().take(MOST) {
            file["model"]["vocab"][*token] = json!(id);
        }
        if let Some((place, id)) = self.template {
            let (token, text) = (
                json!({"SpecialToken": {"id": "t", "type_id": 0}}),
                json!({"Sequence": {"id": "A", "type_id": 0}}),
            );
            let single = if place % 2 == 0 { [token, text] } else { [text, token] };
            file["post_processor"] = json!({"type": "TemplateProcessing", "single": single, "pair": [],
                "special_tokens": {"t": {"id": "t", "ids": [id], "tokens": ["t"]}}});
        }
        let mut text = file.to_string();
        if let Some((at, put)) = self.damage {
            let at = text.floor_char_boundary(usize::from(at) % text.len());
            let end = text.ceil_char_boundary((at + put.len()).min(text.len()));
            text.replace_range(at..end, put);
        }
        text
    }
}

fuzz_target!(|input: Input<'_>| {
    let (file, given) = match &input {
        Input::File(bytes) => (String::from_utf8_lossy(bytes).into_owned(), ""),
        Input::Changes(changes) => (changes.file(), changes.text),
    };
    let Ok(tokenizer) = Tokenizer::from_json(&file) else { return };
    for text in [given, "hello the 123  \n\n 中文 é e\u{301} <think>'s", ""] {
        for allowed in [AllowedSpecial::None, AllowedSpecial::All] {
            for add_special_tokens in [false, true] {
                let ids =
                    tokenizer.encode(text, options(allowed, add_special_tokens)).expect("any text encodes");
                assert!(
                    ids.iter().all(|&id| tokenizer.id_to_token(id).is_some()),
                    "an id without a token in {ids:?}"
                );
                check_decoding(&tokenizer, &ids, add_special_tokens);
            }
        }
    }
    check_decoding(&tokenizer, &[0, u32::MAX, tokenizer.vocab_size() as u32, 300], true);
});
