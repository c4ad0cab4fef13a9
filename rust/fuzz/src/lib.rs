//! What the fuzz targets share: small tokenizers of the constructions that are in use, and what must hold of any.

use heedful_core::tokenizer::{AllowedSpecial, EncodeOptions, TokenStream, Tokenizer};
use serde_json::{Value, json};

/// DeepSeek's third split.
pub const DEEPSEEK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// cl100k_base's pattern.
pub const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";

/// o200k_base's pattern.
pub const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokens that merges make from bytes, each of two that come before it.
const MERGED: [&[u8]; 22] = [
    b"he",
    b"ll",
    b"hell",
    b"hello",
    b" t",
    b" the",
    b"in",
    b"ing",
    b"  ",
    b"    ",
    b"\n\n",
    b"'s",
    b"12",
    b"123",
    b"aa",
    b"aaaa",
    b"\xC3\xA9",
    b"\xE4\xB8",
    b"\xE4\xB8\xAD",
    b"\xF0\x9F",
    b"<|",
    b"\xEF\xBD",
];

/// The byte-level alphabet of tokenizer.json.
pub fn byte_level(bytes: &[u8]) -> String {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let character = |byte: u8| {
        let others = (0..byte).filter(|&b| !printable(b)).count() as u32;
        if printable(byte) { char::from(byte) } else { char::from_u32(0x100 + others).unwrap_or('\0') }
    };
    bytes.iter().map(|&byte| character(byte)).collect()
}

/// The tokens of a small vocabulary: the bytes, then what merges make.
pub fn tokens() -> Vec<Vec<u8>> {
    (0..=255u8).map(|byte| vec![byte]).chain(MERGED.iter().map(|token| token.to_vec())).collect()
}

/// The merges that make the vocabulary's tokens: for each, the first way of cutting it into two tokens that are there.
pub fn merges(tokens: &[Vec<u8>]) -> Vec<[String; 2]> {
    let made = tokens.iter().enumerate().skip(256);
    made.filter_map(|(index, token)| {
        let known = |part: &[u8]| tokens[..index].iter().any(|token| token == part);
        (1..token.len())
            .map(|cut| token.split_at(cut))
            .find(|(left, right)| known(left) && known(right))
            .map(|(left, right)| [byte_level(left), byte_level(right)])
    })
    .collect()
}

/// A Split of tokenizer.json.
pub fn split(pattern: &str, behavior: &str, invert: bool) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert})
}

/// An entry of added_tokens.
pub fn added(id: usize, content: &str, flags: u8) -> Value {
    let flag = |bit: u8| flags & (1 << bit) != 0;
    json!({"id": id, "content": content, "single_word": flag(0), "lstrip": flag(1), "rstrip": flag(2),
           "normalized": flag(3), "special": flag(4)})
}

/// A small tokenizer.json, of these pre-tokenizers (ByteLevel is put behind them), added tokens and normalizer.
pub fn document(mut steps: Vec<Value>, added_tokens: Vec<Value>, normalizer: Value) -> Value {
    let tokens = tokens();
    let byte_level_step =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    steps.push(byte_level_step.clone());
    let strings = tokens.iter().enumerate().map(|(id, token)| (byte_level(token), json!(id)));
    let vocab: serde_json::Map<String, Value> = strings.collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens, "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": byte_level_step, "decoder": byte_level_step,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges(&tokens)},
    })
}

/// The tokenizers whose text is fuzzed: DeepSeek's splits, cl100k_base's and o200k_base's.
pub fn tokenizers() -> Vec<Tokenizer> {
    let first = tokens().len();
    let marks: Vec<Value> = ["<｜User｜>", "<think>", "<｜end▁of▁sentence｜>", "<<"]
        .iter()
        .enumerate()
        .map(|(index, mark)| added(first + index, mark, if index == 2 { 16 } else { 0 }))
        .collect();
    let isolated = |pattern| split(pattern, "Isolated", false);
    let splits = vec![isolated(r"\p{N}{1,3}"), isolated("[一-龥\u{3040}-ゟ゠-ヿ]+"), isolated(DEEPSEEK)];
    let deepseek = Tokenizer::from_json(&document(splits, marks, Value::Null).to_string());
    let ranks: String =
        tokens().iter().enumerate().map(|(rank, token)| format!("{} {rank}\n", base64(token))).collect();
    let openai = |pattern| {
        let special =
            vec![("<|endoftext|>".to_owned(), first as u32), ("<|fim|>".to_owned(), first as u32 + 1)];
        Tokenizer::from_tiktoken_text(&ranks, pattern, special)
    };
    let made = [deepseek, openai(CL100K), openai(O200K)];
    made.into_iter()
        .map(|tokenizer| tokenizer.expect("a tokenizer of a construction that is served"))
        .collect()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().chain([&0, &0]).take(3).fold(0u32, |bits, &byte| bits << 8 | u32::from(byte));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// Options of an encoding.
pub fn options(allowed_special: AllowedSpecial<'_>, add_special_tokens: bool) -> EncodeOptions<'_> {
    EncodeOptions { add_special_tokens, allowed_special }
}

/// Ids decode to the same text at once and one by one; ids of any kind do not panic.
///
/// # Panics
/// When they do not.
pub fn check_decoding(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) {
    let whole = tokenizer.decode(ids, skip_special_tokens).expect("ids of 32 bits");
    let mut stream = TokenStream::new(skip_special_tokens);
    let mut streamed = String::new();
    ids.iter().for_each(|&id| streamed.push_str(stream.push(tokenizer, id).text()));
    streamed.push_str(stream.flush());
    assert_eq!(streamed, whole, "a stream of {ids:?}");
    let bytes = tokenizer.decode_bytes(ids, skip_special_tokens).expect("ids of 32 bits");
    assert_eq!(String::from_utf8_lossy(&bytes), whole, "the bytes of {ids:?}");
}
