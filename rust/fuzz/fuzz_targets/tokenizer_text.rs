//! Any text and any policy, on tokenizers of three constructions: it comes back whole, streams to the same, and is the same
//! in a batch.
#![no_main]

use std::collections::HashSet;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use heedful_core::tokenizer::{AllowedSpecial, Tokenizer, Unit};
use heedful_fuzz::{check_decoding, options, tokenizers};
use libfuzzer_sys::fuzz_target;

static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(tokenizers);

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    tokenizer: u8,
    /// Two bits: none, all, the first added token, the last.
    allowed: u8,
    skip_special_tokens: bool,
    text: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let tokenizer = &TOKENIZERS[usize::from(input.tokenizer) % TOKENIZERS.len()];
    let text = String::from_utf8_lossy(input.text);
    let mut names = tokenizer.added_tokens().map(|token| token.content.clone());
    let one: HashSet<String> = match input.allowed & 3 {
        2 => names.next().into_iter().collect(),
        _ => names.last().into_iter().collect(),
    };
    let allowed = match input.allowed & 3 {
        0 => AllowedSpecial::None,
        1 => AllowedSpecial::All,
        _ => AllowedSpecial::These(&one),
    };
    let ids = tokenizer.encode(&*text, options(allowed, false)).expect("any text encodes");
    assert_eq!(tokenizer.decode(&ids, false).as_deref(), Ok(&*text));
    let (same, offsets) =
        tokenizer.encode_with_offsets(&text, options(allowed, false), Unit::Byte).expect("any text encodes");
    assert_eq!((same, offsets.last().map_or(0, |last| last[1] as usize)), (ids.clone(), text.len()));
    check_decoding(tokenizer, &ids, input.skip_special_tokens);
    if matches!(allowed, AllowedSpecial::None) {
        assert!(tokenizer.added_tokens().all(|token| !ids.contains(&token.id)), "a forged token in {text:?}");
    }
});
