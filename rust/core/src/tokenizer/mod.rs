//! Byte-level BPE: text to ids and back, with the ids of Hugging Face tokenizers.
//!
//! ```text
//! text ─▶ added tokens ─▶ normalizer ─▶ pre-tokenizer ─▶ BPE ─▶ ids ─▶ bytes ─▶ UTF-8 stream ─▶ text
//! ```
//!
//! `hugging_face` reads tokenizer.json, `tiktoken` files of ranks. What would not give exactly the reference's ids is
//! refused when it is loaded, with a message that names it.

mod added_tokens;
mod bpe;
mod byte_level;
mod decode;
mod error;
mod file;
mod hugging_face;
mod normalizer;
mod pattern;
mod pre_tokenizer;
mod stream;
#[cfg(test)]
mod tests;
mod tiktoken;
mod tokenizer;
mod unicode;
mod vocabulary;

pub use added_tokens::{AddedToken, AllowedSpecial};
pub use decode::TokenId;
pub use error::{Result, TokenizerError};
pub use stream::{Piece, StopStrings, TokenStream, Utf8Stream};
pub use tokenizer::{EncodeOptions, Tokenizer};
