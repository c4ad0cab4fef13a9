//! The tokenizer: one immutable object, for any number of threads, without a lock.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use crate::tokenizer::added_tokens::{AddedToken, AddedTokens, AllowedSpecial, Section};
use crate::tokenizer::bpe::Bpe;
use crate::tokenizer::byte_level;
use crate::tokenizer::decode::DecodeTable;
use crate::tokenizer::error::{Result, TokenizerError, invalid, unsupported};
use crate::tokenizer::image::{Compiled, Image};
use crate::tokenizer::pre_tokenizer::{PreTokenizer, Step};
use crate::tokenizer::scan::Scanner;
use crate::tokenizer::scratch::Pool;
use crate::tokenizer::settings::Settings;

/// Positions inside a piece are u32.
const MAX_TEXT_BYTES: usize = u32::MAX as usize - 1;

/// How a text is encoded.
#[derive(Clone, Copy, Debug)]
pub struct EncodeOptions<'a> {
    /// Whether the post-processor's tokens (a BOS, say) are put around the text.
    pub add_special_tokens: bool,
    /// Which added tokens are recognised in the text.
    pub allowed_special: AllowedSpecial<'a>,
}

/// A text to encode.
#[derive(Clone, Copy, Debug)]
pub enum Text<'t> {
    /// Unicode.
    Unicode(&'t str),
    /// Bytes, of which those that are not UTF-8 become their byte tokens: `decode_bytes` gives them back.
    Raw(&'t [u8]),
}

impl Text<'_> {
    /// Its bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Unicode(text) => text.len(),
            Self::Raw(bytes) => bytes.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'t> From<&'t str> for Text<'t> {
    fn from(text: &'t str) -> Self {
        Self::Unicode(text)
    }
}

/// A byte-level BPE tokenizer.
pub struct Tokenizer {
    compiled: Compiled,
    settings: Settings,
    pre_tokenizer: PreTokenizer,
    /// What cuts the text in the pre-tokenizer's place, if its kind is known.
    scanner: Option<Scanner>,
    added_tokens: AddedTokens,
    /// Tokens that are not written in the byte-level alphabet. Made when a string is first looked for.
    texts: OnceLock<HashMap<String, u32>>,
    /// Made when ids are first decoded.
    decode_table: OnceLock<DecodeTable>,
    pool: Pool,
}

/// A part of a text on its way to ids.
pub(super) enum Part<'p> {
    /// An added token.
    Token(u32, Place),
    /// Normalized text in which no added token is to be found.
    Text(&'p str, Place),
}

/// Where a part comes from.
pub(super) struct Place {
    /// The stretch of the original text that was normalized.
    pub section: Range<usize>,
    /// Where the part lies in that stretch, normalized.
    pub range: Range<usize>,
    /// Whether normalization changed nothing.
    pub is_original: bool,
}

impl Tokenizer {
    /// From a compiled form; `place` names it in errors.
    pub(super) fn from_image(image: Image, place: &str) -> Result<Self> {
        let compiled = Compiled::new(image, place)?;
        let settings: Settings = serde_json::from_slice(compiled.settings(place)?)
            .map_err(|error| invalid(place, "the settings of a tokenizer", error.to_string()))?;
        let steps = settings
            .steps
            .iter()
            .map(|step| Step::new(step).map_err(|construct| unsupported("pattern", construct)))
            .collect::<Result<Vec<_>>>()?;
        let normalizer = settings.normalizer;
        let added_tokens =
            AddedTokens::new(settings.added_tokens.clone(), |text| normalizer.apply(text).into_owned())?;
        Ok(Self {
            compiled,
            scanner: Scanner::recognise(&steps),
            pre_tokenizer: PreTokenizer { steps },
            added_tokens,
            settings,
            texts: OnceLock::new(),
            decode_table: OnceLock::new(),
            pool: Pool::new(),
        })
    }

    /// Writes a cache file, which loads at once because it is mapped and used as it is.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] when it cannot be written; a file that was there before is left as it was then.
    pub fn save_cache(&self, path: &Path) -> Result<()> {
        self.compiled.image().save(path)
    }

    /// Maps a file that [`Tokenizer::save_cache`] wrote.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] when the file cannot be read, [`TokenizerError::Invalid`] when it is damaged or of another
    /// version.
    pub fn from_cache(path: &Path) -> Result<Self> {
        Self::from_image(Image::map(path)?, &path.display().to_string())
    }

    /// From a copy of a compiled form.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] when it is damaged or of another version.
    pub fn from_compiled_form(bytes: &[u8]) -> Result<Self> {
        Self::from_image(Image::copy(bytes), "data")
    }

    /// The compiled form: what a cache file or a pickle holds.
    pub fn compiled_form(&self) -> &[u8] {
        self.compiled.image().bytes()
    }

    #[inline]
    pub(super) fn bpe(&self) -> &Bpe<'_> {
        self.compiled.bpe()
    }

    #[inline]
    pub(super) fn scanner(&self) -> Option<Scanner> {
        self.scanner
    }

    pub(super) fn pre_tokenizer(&self) -> &PreTokenizer {
        &self.pre_tokenizer
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    #[inline]
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn decode_table(&self) -> &DecodeTable {
        self.decode_table.get_or_init(|| {
            let vocabulary = &self.bpe().vocabulary;
            let ids = 0..vocabulary.len() as u32;
            DecodeTable::new(ids.map(|id| (vocabulary.bytes(id), vocabulary.is_special(id))))
        })
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// [`TokenizerError::Argument`] for a text of 4 GiB or more, a set of allowed tokens with an unknown name, or an added
    /// token in a text that must have none.
    pub fn encode<'t>(&self, text: impl Into<Text<'t>>, options: EncodeOptions<'_>) -> Result<Vec<u32>> {
        let text = text.into();
        let mut ids = Vec::with_capacity(text.len() / 3 + 8); // more than most texts need; what is not touched takes no memory
        self.encode_into(text, options, &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of `text` to `out`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; something may have been appended then.
    pub fn encode_into<'t>(
        &self,
        text: impl Into<Text<'t>>,
        options: EncodeOptions<'_>,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        if options.add_special_tokens {
            out.extend_from_slice(&self.settings.before);
        }
        self.pool.with(|scratch| {
            let mut encode = |text: &str, out: &mut Vec<u32>| {
                self.for_each_part(text, options.allowed_special, |part| match part {
                    Part::Token(id, _) => out.push(id),
                    Part::Text(text, _) => self.encode_plain(text, scratch, out),
                })
            };
            match text.into() {
                Text::Unicode(text) => encode(text, out),
                Text::Raw(bytes) => bytes.utf8_chunks().try_for_each(|chunk| {
                    encode(chunk.valid(), out)?;
                    out.extend(chunk.invalid().iter().map(|&byte| self.bpe().merges.byte_id(byte)));
                    Ok(())
                }),
            }
        })?;
        if options.add_special_tokens {
            out.extend_from_slice(&self.settings.behind);
        }
        Ok(())
    }

    /// The ids of several texts as one text, in which added tokens are recognised in trusted texts alone: those that lie
    /// wholly in one, or in several that follow each other. Each stretch of trusted or other texts is normalized by itself.
    ///
    /// # Errors
    /// [`TokenizerError::Argument`] for 4 GiB of text or more.
    pub fn encode_segments<T: AsRef<str>>(
        &self,
        segments: &[(T, bool)],
        add_special_tokens: bool,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        if add_special_tokens {
            ids.extend_from_slice(&self.settings.before);
        }
        self.pool.with(|scratch| {
            let mut plain = String::new(); // since the last token
            for run in segments.chunk_by(|a, b| a.1 == b.1) {
                let text: String = run.iter().map(|(text, _)| text.as_ref()).collect();
                check_len(text.len() + plain.len())?;
                let allowed = if run[0].1 { AllowedSpecial::All } else { AllowedSpecial::None };
                self.for_each_part(&text, allowed, |part| match part {
                    Part::Token(id, _) => {
                        self.encode_plain(&plain, scratch, &mut ids);
                        plain.clear();
                        ids.push(id);
                    }
                    Part::Text(text, _) => plain.push_str(text),
                })?;
            }
            self.encode_plain(&plain, scratch, &mut ids);
            Ok(())
        })?;
        if add_special_tokens {
            ids.extend_from_slice(&self.settings.behind);
        }
        Ok(ids)
    }

    /// Cuts a text at its added tokens, in the reference's two passes, and normalizes what lies between.
    pub(super) fn for_each_part(
        &self,
        text: &str,
        allowed: AllowedSpecial<'_>,
        mut visit: impl FnMut(Part<'_>),
    ) -> Result<()> {
        check_len(text.len())?;
        let normalizer = self.settings.normalizer;
        let some;
        let added = match allowed {
            AllowedSpecial::None => None,
            AllowedSpecial::All => Some(&self.added_tokens),
            AllowedSpecial::Error => {
                self.refuse_added_tokens(text)?;
                None
            }
            AllowedSpecial::These(names) => {
                some = self.added_tokens.only(names, |text| normalizer.apply(text).into_owned())?;
                Some(&some)
            }
        };
        let Some(added) = added else {
            self.visit_text(text, 0..text.len(), None, &mut visit);
            return Ok(());
        };
        for section in added.split_raw(text) {
            match section {
                Section::Text(range) => self.visit_text(text, range, Some(added), &mut visit),
                Section::Token(id, section) => {
                    let range = 0..section.len();
                    visit(Part::Token(id, Place { section, range, is_original: true }));
                }
            }
        }
        Ok(())
    }

    /// The second pass, over a section of the text.
    fn visit_text(
        &self,
        text: &str,
        section: Range<usize>,
        added: Option<&AddedTokens>,
        visit: &mut impl FnMut(Part<'_>),
    ) {
        let normalized = self.settings.normalizer.apply(&text[section.clone()]);
        let is_original = matches!(normalized, Cow::Borrowed(_));
        let parts = match added {
            Some(added) => added.split_normalized(&normalized),
            None => vec![Section::Text(0..normalized.len())],
        };
        let place = |range: Range<usize>| Place { section: section.clone(), range, is_original };
        for part in parts {
            visit(match part {
                Section::Token(id, range) => Part::Token(id, place(range)),
                Section::Text(range) => Part::Text(&normalized[range.clone()], place(range)),
            });
        }
    }

    fn refuse_added_tokens(&self, text: &str) -> Result<()> {
        let mut found = None;
        self.for_each_part(text, AllowedSpecial::All, |part| {
            if let (Part::Token(id, place), None) = (part, &found) {
                found = Some((id, place.section.start + place.range.start));
            }
        })?;
        match found {
            None => Ok(()),
            Some((id, at)) => Err(TokenizerError::Argument {
                name: "text",
                expected: "no added token (allowed_special=\"error\")".into(),
                got: format!("{:?} at byte {at}", self.id_to_token(id).unwrap_or_default()),
            }),
        }
    }

    /// Forgets the pieces that were kept to be found again quickly.
    pub fn clear_cache(&self) {
        self.pool.clear();
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.bpe().vocabulary.len()
    }

    /// The id of a token's string, as tokenizer.json writes it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let vocabulary = &self.bpe().vocabulary;
        match byte_level::bytes_of(token) {
            Some(bytes) => vocabulary.id_of_bytes(&bytes),
            None => {
                let texts =
                    || vocabulary.texts().filter_map(|id| Some((vocabulary.string(id)?, id))).collect();
                self.texts.get_or_init(texts).get(token).copied()
            }
        }
    }

    /// A token's string, as tokenizer.json writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.bpe().vocabulary.string(id)
    }

    /// The added tokens, in the order of their file.
    pub fn added_tokens(&self) -> impl Iterator<Item = &AddedToken> {
        self.settings.added_tokens.iter()
    }
}

fn check_len(len: usize) -> Result<()> {
    if len <= MAX_TEXT_BYTES {
        return Ok(());
    }
    Err(TokenizerError::Argument {
        name: "text",
        expected: format!("at most {MAX_TEXT_BYTES} bytes"),
        got: len.to_string(),
    })
}
