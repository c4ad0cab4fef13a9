//! The tokenizer as a whole, on a small file. Real files are compared with their references from Python.

use std::collections::HashSet;
use std::thread;

use proptest::prelude::*;
use serde_json::json;

use crate::tokenizer::byte_level::string_of;
use crate::tokenizer::{AllowedSpecial, EncodeOptions, Text, TokenStream, Tokenizer};

fn small() -> Tokenizer {
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hell"];
    let bytes = (0..=255u8).map(|byte| string_of(&[byte]));
    let tokens = bytes.chain(merges.iter().map(|merge| merge.replace(' ', "")));
    let vocab: serde_json::Map<_, _> = tokens.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let token = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let document = json!({
        "added_tokens": [token(261, "<end>", true), token(262, "<user>", false)],
        "pre_tokenizer": byte_level, "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    });
    Tokenizer::from_json(&document.to_string()).unwrap()
}

fn plain<'a>(allowed_special: AllowedSpecial<'a>) -> EncodeOptions<'a> {
    EncodeOptions { add_special_tokens: false, allowed_special }
}

#[test]
fn added_tokens_are_text_unless_allowed() {
    let tokenizer = small();
    let text = "<user>hello<end>";
    let all = tokenizer.encode(text, plain(AllowedSpecial::All)).unwrap();
    assert_eq!(all, [262, 259, 261]);
    let names = HashSet::from(["<end>".to_owned()]);
    let some = tokenizer.encode(text, plain(AllowedSpecial::These(&names))).unwrap();
    assert_eq!(some.last(), Some(&261));
    assert!(!some.contains(&262));
    let none = tokenizer.encode(text, plain(AllowedSpecial::None)).unwrap();
    assert!(none.iter().all(|&id| id < 261));
    for ids in [&all, &some, &none] {
        assert_eq!(tokenizer.decode(ids, false), text);
    }
    assert_eq!(tokenizer.decode(&all, true), "<user>hello");
    let unknown = HashSet::from(["<begin>".to_owned()]);
    assert!(tokenizer.encode(text, plain(AllowedSpecial::These(&unknown))).is_err());
}

#[test]
fn threads_share_a_tokenizer() {
    let tokenizer = small();
    let text = "hello hello world ".repeat(50);
    let expected = tokenizer.encode(&text[..], plain(AllowedSpecial::None)).unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(tokenizer.encode(&text[..], plain(AllowedSpecial::None)).unwrap(), expected);
                }
            });
        }
    });
    let batch = tokenizer.encode_batch(&[Text::from(&text[..]); 9], plain(AllowedSpecial::None)).unwrap();
    assert!(batch.iter().all(|ids| *ids == expected));
}

proptest! {
    #[test]
    fn text_comes_back_whole_and_streams_to_the_same(text in "(hello|<end>|<user>| |[a-zé中😀\n]|\\PC){0,40}") {
        let tokenizer = small();
        let ids = tokenizer.encode(&text[..], plain(AllowedSpecial::All)).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids, false), text.as_str());
        for skip in [false, true] {
            let mut stream = TokenStream::new(skip);
            let mut streamed: String = ids.iter().map(|&id| stream.push(&tokenizer, id)).collect();
            streamed.push_str(&stream.flush());
            prop_assert_eq!(streamed, tokenizer.decode(&ids, skip));
        }
    }
}
