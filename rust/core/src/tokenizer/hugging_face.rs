//! tokenizer.json of Hugging Face tokenizers, read strictly: an unknown key or kind is refused by its path.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use crate::tokenizer::added_tokens::{AddedToken, AddedTokens};
use crate::tokenizer::bpe::Bpe;
use crate::tokenizer::error::{Result, invalid, unsupported};
use crate::tokenizer::file::read;
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pattern::{Dialect, Pattern};
use crate::tokenizer::pre_tokenizer::{Behavior, PreTokenizer, Step};
use crate::tokenizer::tokenizer::{Parts, Tokenizer};
use crate::tokenizer::unicode;
use crate::tokenizer::vocabulary::Vocabulary;

/// More steps than this are no real file.
const MAX_STEPS: usize = 64;

/// What `ByteLevel` cuts with when `use_regex` is set (GPT-2).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// # Errors
    /// [`TokenizerError`](crate::tokenizer::TokenizerError) when the file cannot be read, is damaged, or asks for
    /// something that would not be computed exactly; the text names the key.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(&read(path)?)
    }

    /// The same from the file's text.
    ///
    /// # Errors
    /// As [`Tokenizer::from_file`].
    pub fn from_json(json: &str) -> Result<Self> {
        let document: Document = serde_json::from_str(json).map_err(|error| refuse_kind(json, &error))?;
        for (key, value) in [("truncation", &document.truncation), ("padding", &document.padding)] {
            if value.is_some() {
                return Err(unsupported(key, "a setting that changes every encoding"));
            }
        }
        if let Some(version) = document.version.filter(|version| version != "1.0") {
            return Err(unsupported("version", format!("{version:?}")));
        }
        let normalizer = normalizer(document.normalizer.as_ref(), "normalizer")?;
        let mut steps = Steps::default();
        steps.read(document.pre_tokenizer.as_ref(), "pre_tokenizer")?;
        if !steps.byte_level {
            return Err(unsupported("pre_tokenizer", "a tokenizer without ByteLevel"));
        }
        if kind(document.decoder.as_ref(), "decoder")? != Some("ByteLevel") {
            return Err(unsupported("decoder", "a decoder other than ByteLevel"));
        }
        let (mut vocabulary, bpe) = document.model.build()?;
        let added = document.added_tokens;
        add(&mut vocabulary, document.model.vocab.0.len(), &added)?;
        let (before, behind) =
            special_tokens(document.post_processor.as_ref(), "post_processor", &vocabulary)?;
        Ok(Self::new(Parts {
            normalizer,
            pre_tokenizer: PreTokenizer { steps: steps.steps },
            vocabulary,
            bpe,
            added_tokens: AddedTokens::new(added, |text| normalizer.apply(text).into_owned())?,
            before,
            behind,
        }))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: Option<String>,
    truncation: Option<IgnoredAny>,
    padding: Option<IgnoredAny>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    #[serde(rename = "unk_token")]
    _unk_token: Option<String>, // never produced: every byte has a token
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(rename = "fuse_unk", default)]
    _fuse_unk: bool,
    #[serde(rename = "byte_fallback", default)]
    _byte_fallback: bool, // never needed, likewise
    #[serde(default)]
    ignore_merges: bool,
    vocab: Vocab,
    merges: Vec<Merge>,
}

impl Model {
    fn build(&self) -> Result<(Vocabulary, Bpe)> {
        if let Some(kind) = self.kind.as_deref().filter(|&kind| kind != "BPE") {
            return Err(unsupported("model.type", format!("{kind:?}")));
        }
        if let Some(dropout) = self.dropout.filter(|&dropout| dropout != 0.0) {
            return Err(unsupported("model.dropout", dropout.to_string()));
        }
        for (key, value) in [
            ("model.continuing_subword_prefix", &self.continuing_subword_prefix),
            ("model.end_of_word_suffix", &self.end_of_word_suffix),
        ] {
            if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
                return Err(unsupported(key, format!("{value:?}")));
            }
        }
        let tokens = self.vocab.0.iter().map(|(token, id)| (token.as_str(), *id));
        let vocabulary = Vocabulary::from_strings(tokens, "model.vocab")?;
        let merges = self.merges.iter().map(|Merge(left, right)| (left.as_str(), right.as_str()));
        let bpe = Bpe::from_merges(&vocabulary, merges, self.ignore_merges, "model.merges")?;
        Ok((vocabulary, bpe))
    }
}

/// Token strings and ids, in the file's order.
struct Vocab(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab, A::Error> {
                let mut tokens = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    tokens.push(entry);
                }
                Ok(Vocab(tokens))
            }
        }
        deserializer.deserialize_map(Tokens)
    }
}

/// Two tokens: "left right" in older files, ["left", "right"] in newer ones.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: two tokens")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Merge, E> {
                let mut parts = text.split(' ');
                match (parts.next(), parts.next(), parts.next()) {
                    (Some(left), Some(right), None) => Ok(Merge(left.into(), right.into())),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> std::result::Result<Merge, A::Error> {
                match (parts.next_element()?, parts.next_element()?, parts.next_element::<IgnoredAny>()?) {
                    (Some(left), Some(right), None) => Ok(Merge(left, right)),
                    _ => Err(de::Error::invalid_length(0, &self)),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

/// The error of a file that does not parse; when it is of another kind of model, that is the better reason.
fn refuse_kind(json: &str, error: &serde_json::Error) -> crate::tokenizer::TokenizerError {
    #[derive(Deserialize)]
    struct Probe {
        model: ProbeModel,
    }
    #[derive(Deserialize)]
    struct ProbeModel {
        r#type: String,
    }
    match serde_json::from_str::<Probe>(json) {
        Ok(Probe { model }) if model.r#type != "BPE" => {
            unsupported("model.type", format!("{:?}", model.r#type))
        }
        _ => invalid("tokenizer.json", "the layout of Hugging Face tokenizers", error.to_string()),
    }
}

/// The `type` of a component; None when it is null or absent.
fn kind<'v>(component: Option<&'v Value>, place: &str) -> Result<Option<&'v str>> {
    let Some(component) = component else { return Ok(None) };
    match component.get("type").and_then(Value::as_str) {
        Some(kind) => Ok(Some(kind)),
        None => Err(invalid(place, "an object with a type", excerpt(component))),
    }
}

fn excerpt(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

/// A component's settings, all of which must be known.
fn settings<T: DeserializeOwned>(component: &Value, place: &str) -> Result<T> {
    T::deserialize(component).map_err(|error| invalid(place, "the settings of its type", error.to_string()))
}

/// A component that is a list of components.
fn members<'v>(
    component: &'v Value,
    key: &str,
    place: &str,
) -> Result<impl Iterator<Item = (String, &'v Value)>> {
    let place = format!("{place}.{key}");
    let Some(values) = component.get(key).and_then(Value::as_array) else {
        return Err(invalid(place, "a list", component.get(key).map_or_else(|| "nothing".into(), excerpt)));
    };
    Ok(values.iter().enumerate().map(move |(index, value)| (format!("{place}[{index}]"), value)))
}

fn normalizer(component: Option<&Value>, place: &str) -> Result<Normalizer> {
    match (kind(component, place)?, component) {
        (Some("NFC"), _) => Ok(Normalizer::Nfc),
        (Some("Sequence"), Some(sequence)) => {
            let mut found = Normalizer::Identity;
            for (place, member) in members(sequence, "normalizers", place)? {
                if normalizer(Some(member), &place)? == Normalizer::Nfc {
                    found = Normalizer::Nfc; // twice is as once
                }
            }
            Ok(found)
        }
        (Some(other), _) => Err(unsupported(place, other)),
        (None, _) => Ok(Normalizer::Identity),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Split {
    #[serde(rename = "type")]
    _kind: String,
    pattern: SplitPattern,
    behavior: Behavior,
    #[serde(default)]
    invert: bool,
}

#[derive(Deserialize)]
enum SplitPattern {
    String(String),
    Regex(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Digits {
    #[serde(rename = "type")]
    _kind: String,
    #[serde(default)]
    individual_digits: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ByteLevel {
    #[serde(rename = "type")]
    _kind: String,
    add_prefix_space: bool,
    #[serde(rename = "trim_offsets")]
    _trim_offsets: bool,
    #[serde(default = "yes")]
    use_regex: bool,
}

fn yes() -> bool {
    true
}

/// The pre-tokenizer, flattened.
#[derive(Default)]
struct Steps {
    steps: Vec<Step>,
    byte_level: bool,
}

impl Steps {
    fn read(&mut self, component: Option<&Value>, place: &str) -> Result<()> {
        let (Some(kind), Some(component)) = (kind(component, place)?, component) else { return Ok(()) };
        if self.byte_level {
            return Err(unsupported(place, "a pre-tokenizer behind ByteLevel"));
        }
        if self.steps.len() >= MAX_STEPS {
            return Err(unsupported(place, format!("a pre-tokenizer of more than {MAX_STEPS} steps")));
        }
        match kind {
            "Sequence" => {
                for (place, member) in members(component, "pretokenizers", place)? {
                    self.read(Some(member), &place)?;
                }
            }
            "Split" => {
                let split: Split = settings(component, place)?;
                let pattern = match split.pattern {
                    SplitPattern::String(text) => Pattern::literal(&text),
                    SplitPattern::Regex(regex) => Pattern::regex(&regex, Dialect::Oniguruma),
                };
                let pattern =
                    pattern.map_err(|construct| unsupported(format!("{place}.pattern"), construct))?;
                self.steps.push(Step::Split { pattern, behavior: split.behavior, invert: split.invert });
            }
            "Digits" => {
                let digits: Digits = settings(component, place)?;
                let behavior =
                    if digits.individual_digits { Behavior::Isolated } else { Behavior::Contiguous };
                let class = unicode::property("N").expect("a general category");
                self.steps.push(Step::Split { pattern: Pattern::class(class), behavior, invert: false });
            }
            "ByteLevel" => {
                let byte_level: ByteLevel = settings(component, place)?;
                if byte_level.add_prefix_space {
                    self.steps.push(Step::PrefixSpace);
                }
                if byte_level.use_regex {
                    let pattern = Pattern::regex(GPT2, Dialect::Oniguruma).expect("a pattern of the subset");
                    self.steps.push(Step::Split { pattern, behavior: Behavior::Isolated, invert: false });
                }
                self.byte_level = true;
            }
            other => return Err(unsupported(place, other)),
        }
        Ok(())
    }
}

/// Puts the added tokens beside the model's. The reference numbers them itself, so a file that says otherwise is refused.
fn add(vocabulary: &mut Vocabulary, model_tokens: usize, added: &[AddedToken]) -> Result<()> {
    let mut next = model_tokens as u32;
    for (index, token) in added.iter().enumerate() {
        let place = format!("added_tokens[{index}]");
        if token.content.is_empty() {
            return Err(invalid(place, "a token that is not empty", "\"\""));
        }
        let expected = vocabulary.id_of_string(&token.content).unwrap_or(next);
        if token.id != expected {
            let got = format!("{} for {:?}", token.id, token.content);
            return Err(invalid(place, format!("id {expected}, which the reference gives it"), got));
        }
        vocabulary.add(&token.content, token.id, &place)?;
        next = next.max(token.id + 1);
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateProcessing {
    #[serde(rename = "type")]
    _kind: String,
    single: Vec<Piece>,
    #[serde(rename = "pair")]
    _pair: IgnoredAny,
    special_tokens: HashMap<String, TemplateToken>,
}

#[derive(Deserialize)]
enum Piece {
    Sequence {
        #[serde(rename = "id")]
        _id: String,
        #[serde(rename = "type_id")]
        _type_id: u32,
    },
    SpecialToken {
        id: String,
        #[serde(rename = "type_id")]
        _type_id: u32,
    },
}

#[derive(Deserialize)]
struct TemplateToken {
    ids: Vec<u32>,
}

/// The ids that a post-processor puts before and behind a text.
fn special_tokens(
    component: Option<&Value>,
    place: &str,
    vocabulary: &Vocabulary,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let none = (Vec::new(), Vec::new());
    let (Some(kind), Some(component)) = (kind(component, place)?, component) else { return Ok(none) };
    match kind {
        "ByteLevel" => Ok(none), // concerns offsets
        "Sequence" => {
            let mut found = none;
            for (place, member) in members(component, "processors", place)? {
                let (before, behind) = special_tokens(Some(member), &place, vocabulary)?;
                if !(before.is_empty() && behind.is_empty() || found.0.is_empty() && found.1.is_empty()) {
                    return Err(unsupported(place, "a second post-processor that adds tokens"));
                }
                found.0.extend(before);
                found.1.extend(behind);
            }
            Ok(found)
        }
        "TemplateProcessing" => {
            let template: TemplateProcessing = settings(component, place)?;
            let (mut sides, mut texts) = ([Vec::new(), Vec::new()], 0);
            for piece in template.single {
                match piece {
                    Piece::Sequence { .. } => texts += 1,
                    Piece::SpecialToken { id, .. } => {
                        let Some(token) = template.special_tokens.get(&id) else {
                            return Err(invalid(
                                format!("{place}.single"),
                                "a special token of the template",
                                format!("{id:?}"),
                            ));
                        };
                        if let Some(unknown) = token.ids.iter().find(|&&id| vocabulary.string(id).is_none()) {
                            let place = format!("{place}.special_tokens");
                            return Err(invalid(place, "ids of the vocabulary", unknown.to_string()));
                        }
                        sides[usize::from(texts > 0)].extend_from_slice(&token.ids);
                    }
                }
            }
            if texts != 1 {
                return Err(unsupported(format!("{place}.single"), format!("a template with {texts} texts")));
            }
            let [before, behind] = sides;
            Ok((before, behind))
        }
        other => Err(unsupported(place, other)),
    }
}
