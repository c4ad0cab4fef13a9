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
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text);
    }
    assert_eq!(tokenizer.decode(&all, true).unwrap(), "<user>hello");
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
        prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text.as_str());
        for skip in [false, true] {
            let mut stream = TokenStream::new(skip);
            let mut streamed: String = ids.iter().map(|&id| stream.push(&tokenizer, id).text().to_owned()).collect();
            streamed.push_str(stream.flush());
            prop_assert_eq!(streamed, tokenizer.decode(&ids, skip).unwrap());
        }
    }

    /// Ids of single bytes near the edges of UTF-8, special tokens among them, ids without a token.
    #[test]
    fn a_prompt_and_its_stream_are_the_text_of_both(
        bytes in prop::collection::vec(prop_oneof![
            Just(b'a'), Just(0xE4), Just(0xB8), Just(0xF0), Just(0x9F), Just(0x80), Just(0xC0), Just(0xED), any::<u8>()
        ].prop_map(u32::from), 0..12),
        others in prop::collection::vec((0usize..12, 258u32..265), 0..3),
        cut in 0usize..14,
        skip in any::<bool>(),
    ) {
        let tokenizer = small();
        let mut ids = bytes;
        for (place, id) in others {
            ids.insert(place.min(ids.len()), id);
        }
        let (prompt, answer) = ids.split_at(cut.min(ids.len()));
        let mut begun = tokenizer.decode_bytes(prompt, skip).unwrap();
        // Only a character begun fails without a length.
        let tail = begun.utf8_chunks().last().map_or(Vec::new(), |last| last.invalid().to_vec());
        if std::str::from_utf8(&tail).is_err_and(|error| error.error_len().is_none()) {
            begun.truncate(begun.len() - tail.len());
        }
        let begun = String::from_utf8_lossy(&begun).into_owned();
        let mut stream = TokenStream::new(skip).with_prompt(&tokenizer, prompt);
        let text = begun + &stream.push_many(&tokenizer, answer) + stream.flush();
        prop_assert_eq!(text, tokenizer.decode(&ids, skip).unwrap());
    }
}
