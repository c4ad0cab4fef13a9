//! The stream of one sequence's text.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;
use crate::tokenizer::stream::stop::{StopSearch, StopStrings};
use crate::tokenizer::stream::utf8::Utf8Stream;

/// The longest beginning of a character.
const MAX_PENDING: usize = 3;

/// What a token adds to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'t> {
    /// The token's own text, which is always the same for its id.
    Token(&'t str),
    /// Another text, or none.
    Text(&'t str),
}

impl<'t> Piece<'t> {
    /// The text.
    #[inline]
    pub fn text(self) -> &'t str {
        match self {
            Self::Token(text) | Self::Text(text) => text,
        }
    }
}

/// The state of one decoded sequence. Between calls it holds back at most one unfinished character, and the text with which
/// a stop string may begin.
///
/// All texts and the last `flush` together are the decoded text of all ids, up to the stop string if there is one.
#[derive(Clone, Debug, Default)]
pub struct TokenStream {
    utf8: Utf8Stream,
    skip_special_tokens: bool,
    stop: Option<StopSearch>,
    /// The text of the last call, if it is not a token's own.
    text: String,
    /// Decoded text on its way to the search for stop strings.
    part: String,
}

impl TokenStream {
    /// A stream at its beginning.
    pub fn new(skip_special_tokens: bool) -> Self {
        Self { skip_special_tokens, ..Self::default() }
    }

    /// The same behind a prompt: a character that the prompt began is completed here. The prompt's text up to that character
    /// and the stream's texts together are the decoded text of prompt and ids.
    #[must_use]
    pub fn with_prompt(mut self, tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        // A character's first byte is no other's second, so the last bytes tell what is begun, whatever stands before them.
        let mut last = [0; MAX_PENDING];
        let mut free = MAX_PENDING;
        for &id in prompt.iter().rev() {
            if self.skip_special_tokens && tokenizer.is_special(id) {
                continue;
            }
            let bytes = tokenizer.token_bytes(id);
            let taken = bytes.len().min(free);
            last[free - taken..free].copy_from_slice(&bytes[bytes.len() - taken..]);
            free -= taken;
            if free == 0 {
                break;
            }
        }
        self.utf8 = Utf8Stream::default();
        self.utf8.push(&last[free..], &mut String::new());
        self
    }

    /// The same with strings that end the text. `include`: the one found is part of the text.
    #[must_use]
    pub fn with_stop(mut self, stop: Arc<StopStrings>, include: bool) -> Self {
        self.stop = Some(StopSearch::new(stop, include));
        self
    }

    /// The stop string that ended the text.
    ///
    /// It is looked for after each token: the first token that completes one ends the text where the earliest begins; of
    /// several that begin there, it is the shortest. From then on all texts are empty.
    pub fn stopped(&self) -> Option<&str> {
        self.stop.as_ref()?.found()
    }

    /// The text that token `id` completes.
    #[inline]
    pub fn push<'t>(&'t mut self, tokenizer: &'t Tokenizer, id: u32) -> Piece<'t> {
        let (bytes, special) = tokenizer.decode_table().token(id);
        if special && self.skip_special_tokens {
            return Piece::Text("");
        }
        if self.utf8.is_empty()
            && let Ok(token) = std::str::from_utf8(bytes)
        {
            let Some(stop) = &mut self.stop else { return Piece::Token(token) };
            self.text.clear();
            let whole = stop.push(token, &mut self.text);
            return if whole { Piece::Token(token) } else { Piece::Text(&self.text) };
        }
        self.text.clear();
        match &mut self.stop {
            None => self.utf8.push(bytes, &mut self.text),
            Some(stop) => {
                self.part.clear();
                self.utf8.push(bytes, &mut self.part);
                if stop.push(&self.part, &mut self.text) {
                    self.text.push_str(&self.part);
                }
            }
        }
        Piece::Text(&self.text)
    }

    /// The text that these tokens complete, one behind the other.
    pub fn push_many(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let mut text = String::new();
        if self.stop.is_none()
            && let Ok(bytes) = tokenizer.decode_bytes(ids, self.skip_special_tokens)
        {
            self.utf8.push(&bytes, &mut text);
            return text;
        }
        for &id in ids {
            text.push_str(self.push(tokenizer, id).text());
            if self.stopped().is_some() {
                break;
            }
        }
        text
    }

    /// What is still held back. The stream is at its beginning again, without a prompt, unless a stop string was found: that
    /// is kept.
    pub fn flush(&mut self) -> &str {
        self.text.clear();
        match &mut self.stop {
            None => self.utf8.flush(&mut self.text),
            Some(stop) => {
                self.part.clear();
                self.utf8.flush(&mut self.part);
                if stop.push(&self.part, &mut self.text) {
                    self.text.push_str(&self.part);
                }
                stop.flush(&mut self.text);
            }
        }
        &self.text
    }
}
