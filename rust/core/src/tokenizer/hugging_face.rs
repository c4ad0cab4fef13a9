//! tokenizer.json of Hugging Face tokenizers, read strictly: an unknown key or kind is refused by its path.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::tokenizer::added_tokens::AddedToken;
use crate::tokenizer::build;
use crate::tokenizer::byte_level;
use crate::tokenizer::error::{Result, invalid, unsupported};
use crate::tokenizer::file::read;
use crate::tokenizer::merges::MergesTables;
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pattern::{Dialect, Pattern, Source};
use crate::tokenizer::pre_tokenizer::{Behavior, StepSettings};
use crate::tokenizer::settings::{Settings, Trim};
use crate::tokenizer::tokenizer::Tokenizer;
use crate::tokenizer::vocabulary::{TokenList, Vocabulary, VocabularyTables};

/// More steps than this are no real file.
const MAX_STEPS: usize = 16;
/// A longer description of a component is refused before it is taken apart; real ones have some kilobytes.
const MAX_COMPONENT_BYTES: usize = 1 << 18;
/// The same of all added tokens, of which real files have up to some thousands.
const MAX_ADDED_BYTES: usize = 32 << 20;
/// Bytes of an added token; one automaton is built of all of them.
const MAX_ADDED_TOKEN_BYTES: usize = 1024;
/// Ids that a post-processor may put around a text.
const MAX_AROUND: usize = 1024;

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
        let normalizer = normalizer(component(document.normalizer, "normalizer")?.as_ref(), "normalizer")?;
        let mut steps = Steps::default();
        steps.read(component(document.pre_tokenizer, "pre_tokenizer")?.as_ref(), "pre_tokenizer")?;
        if !steps.byte_level {
            return Err(unsupported("pre_tokenizer", "a tokenizer without ByteLevel"));
        }
        if kind(component(document.decoder, "decoder")?.as_ref(), "decoder")? != Some("ByteLevel") {
            return Err(unsupported("decoder", "a decoder other than ByteLevel"));
        }
        let model_tokens = document.model.vocab.0.len();
        let added_tokens: Vec<AddedToken> =
            parsed(document.added_tokens, "added_tokens", MAX_ADDED_BYTES)?.unwrap_or_default();
        let (mut vocabulary, merges) = document.model.build(added_tokens.len())?;
        add(&mut vocabulary, model_tokens, &added_tokens)?;
        let mut settings = Settings {
            normalizer,
            steps: steps.steps,
            added_tokens,
            before: Vec::new(),
            behind: Vec::new(),
            trim: Trim::default(),
        };
        let processor = component(document.post_processor, "post_processor")?;
        post_processor(processor.as_ref(), "post_processor", &vocabulary.view(), &mut settings)?;
        build::tokenizer(&settings, vocabulary, &merges, "tokenizer.json")
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'d> {
    version: Option<String>,
    truncation: Option<IgnoredAny>,
    padding: Option<IgnoredAny>,
    #[serde(borrow)]
    added_tokens: Option<&'d RawValue>,
    #[serde(borrow)]
    normalizer: Option<&'d RawValue>,
    #[serde(borrow)]
    pre_tokenizer: Option<&'d RawValue>,
    #[serde(borrow)]
    post_processor: Option<&'d RawValue>,
    #[serde(borrow)]
    decoder: Option<&'d RawValue>,
    #[serde(borrow)]
    model: Model<'d>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model<'d> {
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
    #[serde(borrow)]
    vocab: Vocab<'d>,
    #[serde(borrow)]
    merges: Vec<Merge<'d>>,
}

impl Model<'_> {
    fn build(mut self, added: usize) -> Result<(VocabularyTables, MergesTables)> {
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
        // Files list their tokens in order of id or nearly so, which a stable sort makes use of.
        self.vocab.0.sort_by_key(|&(_, id)| id);
        let mut tokens = TokenList::new("model.vocab");
        for (token, id) in &self.vocab.0 {
            tokens.push_string(token, *id)?;
        }
        drop(self.vocab);
        let mut vocabulary = VocabularyTables::new(tokens, added)?;
        let merges = merges(&vocabulary.view(), &self.merges)?;
        drop(self.merges);
        let merges = MergesTables::new(&vocabulary.view(), &merges, "model.merges")?;
        build::set_uses(&mut vocabulary, &merges, self.ignore_merges)?;
        Ok((vocabulary, merges))
    }
}

/// The ids of merges: of both neighbours and of what they become.
fn merges(vocabulary: &Vocabulary<'_>, merges: &[Merge<'_>]) -> Result<Vec<(u32, u32, u32)>> {
    let mut joined = Vec::new();
    let mut guess = 0; // files list their merges in order of what they make
    let merges = merges.iter().enumerate().map(|(rank, Merge(left, right))| {
        let unknown = |token: &str| {
            let place = format!("model.merges[{rank}]");
            invalid(place, "two tokens of the vocabulary that join to a third", format!("{token:?}"))
        };
        joined.clear();
        let mut known = |token: &str| {
            let start = joined.len();
            let is_written = !token.is_empty() && byte_level::append_bytes_of(token, &mut joined);
            let id = if is_written { vocabulary.id_of_bytes(&joined[start..]) } else { None };
            id.ok_or_else(|| unknown(token))
        };
        let (left_id, right_id) = (known(left)?, known(right)?);
        let id =
            if vocabulary.bytes(guess) == joined { Some(guess) } else { vocabulary.id_of_bytes(&joined) };
        let id = id.ok_or_else(|| unknown(&format!("{left}{right}")))?;
        guess = id + 1;
        Ok((left_id, right_id, id))
    });
    merges.collect()
}

/// Token strings and ids, in the file's order.
struct Vocab<'d>(Vec<(Cow<'d, str>, u32)>);

impl<'de: 'd, 'd> Deserialize<'de> for Vocab<'d> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab<'de>, A::Error> {
                let mut tokens = Vec::new();
                while let Some((Text(token), id)) = map.next_entry()? {
                    tokens.push((token, id));
                }
                Ok(Vocab(tokens))
            }
        }
        deserializer.deserialize_map(Tokens)
    }
}

/// Two tokens: "left right" in older files, ["left", "right"] in newer ones.
struct Merge<'d>(Cow<'d, str>, Cow<'d, str>);

/// A string, borrowed from the file where it has no escapes.
#[derive(Deserialize)]
struct Text<'d>(#[serde(borrow)] Cow<'d, str>);

impl<'de: 'd, 'd> Deserialize<'de> for Merge<'d> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge: two tokens")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> std::result::Result<Self::Value, E> {
                let (left, right) =
                    halves(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))?;
                Ok(Merge(left.into(), right.into()))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Self::Value, E> {
                let (left, right) =
                    halves(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))?;
                Ok(Merge(left.to_owned().into(), right.to_owned().into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut parts: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                match (parts.next_element()?, parts.next_element()?, parts.next_element::<IgnoredAny>()?) {
                    (Some(Text(left)), Some(Text(right)), None) => Ok(Merge(left, right)),
                    _ => Err(de::Error::invalid_length(0, &self)),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

/// Both sides of the only space.
fn halves(text: &str) -> Option<(&str, &str)> {
    text.split_once(' ').filter(|(_, right)| !right.contains(' '))
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

/// A component's description, if there is one.
fn component(raw: Option<&RawValue>, place: &str) -> Result<Option<Value>> {
    parsed(raw, place, MAX_COMPONENT_BYTES)
}

/// A part of the file, if it is there and not too long.
fn parsed<'d, T: Deserialize<'d>>(raw: Option<&'d RawValue>, place: &str, limit: usize) -> Result<Option<T>> {
    let Some(raw) = raw.map(RawValue::get) else { return Ok(None) };
    if raw.len() > limit {
        return Err(invalid(place, format!("at most {limit} bytes"), raw.len().to_string()));
    }
    serde_json::from_str(raw).map(Some).map_err(|error| {
        invalid("tokenizer.json", "the layout of Hugging Face tokenizers", format!("{place}: {error}"))
    })
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
    trim_offsets: bool,
    #[serde(default = "yes")]
    use_regex: bool,
}

fn yes() -> bool {
    true
}

/// The pre-tokenizer, flattened.
#[derive(Default)]
struct Steps {
    steps: Vec<StepSettings>,
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
                    SplitPattern::String(text) => Source::Literal(text),
                    SplitPattern::Regex(regex) => Source::Regex(regex, Dialect::Oniguruma),
                };
                self.push(pattern, split.behavior, split.invert, place)?;
            }
            "Digits" => {
                let digits: Digits = settings(component, place)?;
                let behavior =
                    if digits.individual_digits { Behavior::Isolated } else { Behavior::Contiguous };
                self.push(Source::Number, behavior, false, place)?;
            }
            "ByteLevel" => {
                let byte_level: ByteLevel = settings(component, place)?;
                if byte_level.add_prefix_space {
                    self.steps.push(StepSettings::PrefixSpace);
                }
                if byte_level.use_regex {
                    let pattern = Source::Regex(GPT2.into(), Dialect::Oniguruma);
                    self.push(pattern, Behavior::Isolated, false, place)?;
                }
                self.byte_level = true;
            }
            other => return Err(unsupported(place, other)),
        }
        Ok(())
    }

    /// Adds a step whose pattern can be served.
    fn push(&mut self, pattern: Source, behavior: Behavior, invert: bool, place: &str) -> Result<()> {
        Pattern::new(&pattern).map_err(|construct| unsupported(format!("{place}.pattern"), construct))?;
        self.steps.push(StepSettings::Split { pattern, behavior, invert });
        Ok(())
    }
}

/// Puts the added tokens beside the model's. The reference numbers them itself, so a file that says otherwise is refused.
fn add(vocabulary: &mut VocabularyTables, model_tokens: usize, added: &[AddedToken]) -> Result<()> {
    let mut seen = HashSet::new();
    let mut next = model_tokens as u32;
    for (index, token) in added.iter().enumerate() {
        let place = format!("added_tokens[{index}]");
        if token.content.is_empty() {
            return Err(invalid(place, "a token that is not empty", "\"\""));
        }
        if token.content.len() > MAX_ADDED_TOKEN_BYTES {
            let got = format!("{} bytes", token.content.len());
            return Err(invalid(place, format!("a token of at most {MAX_ADDED_TOKEN_BYTES} bytes"), got));
        }
        if !seen.insert(&token.content) {
            return Err(invalid(place, "each added token once", format!("{:?} twice", token.content)));
        }
        let expected = vocabulary.id_of_string(&token.content).unwrap_or(next);
        if token.id != expected {
            let got = format!("{} for {:?}", token.id, token.content);
            return Err(invalid(place, format!("id {expected}, which the reference gives it"), got));
        }
        if expected == next && vocabulary.id_of_string(&token.content).is_none() {
            vocabulary.push_string(&token.content, token.id, &place)?;
        }
        if token.special {
            vocabulary.set_special(token.id);
        }
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

/// What a post-processor adds to the settings: ids around a text, and how offsets are trimmed.
fn post_processor(
    component: Option<&Value>,
    place: &str,
    vocabulary: &Vocabulary<'_>,
    settings: &mut Settings,
) -> Result<()> {
    let (Some(kind), Some(component)) = (kind(component, place)?, component) else { return Ok(()) };
    match kind {
        "ByteLevel" => {
            let byte_level: ByteLevel = self::settings(component, place)?;
            settings.trim =
                Trim { spaces: byte_level.trim_offsets, keeps_first: byte_level.add_prefix_space };
            Ok(())
        }
        "Sequence" => {
            for (place, member) in members(component, "processors", place)? {
                post_processor(Some(member), &place, vocabulary, settings)?;
            }
            Ok(())
        }
        "TemplateProcessing" => {
            let template: TemplateProcessing = self::settings(component, place)?;
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
                        let side = &mut sides[usize::from(texts > 0)];
                        side.extend_from_slice(&token.ids);
                        if side.len() > MAX_AROUND {
                            let place = format!("{place}.single");
                            return Err(invalid(
                                place,
                                format!("at most {MAX_AROUND} ids around a text"),
                                "more",
                            ));
                        }
                    }
                }
            }
            if texts != 1 {
                return Err(unsupported(format!("{place}.single"), format!("a template with {texts} texts")));
            }
            if !(settings.before.is_empty() && settings.behind.is_empty()) {
                return Err(unsupported(place, "a second post-processor that adds tokens"));
            }
            [settings.before, settings.behind] = sides;
            Ok(())
        }
        other => Err(unsupported(place, other)),
    }
}
