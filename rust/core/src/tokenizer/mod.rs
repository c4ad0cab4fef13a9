//! Byte-level BPE: text to ids and back, with the ids of Hugging Face tokenizers.
//!
//! ```text
//! text ─▶ added tokens ─▶ normalizer ─▶ pre-tokenizer ─▶ BPE ─▶ ids ─▶ bytes ─▶ UTF-8 stream ─▶ text
//! ```
//!
//! `hugging_face` reads tokenizer.json, `tiktoken` files of ranks. What would not give exactly the reference's ids is
//! refused when it is loaded, with a message that names it.

mod added_tokens;
mod batch;
mod bpe;
mod build;
mod byte_level;
pub mod code_points;
mod decode;
mod encode;
mod error;
mod file;
mod hugging_face;
mod image;
mod join;
mod key;
mod merges;
mod normalizer;
mod offsets;
mod pattern;
mod piece_cache;
mod pre_tokenizer;
mod scan;
mod scratch;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod tiktoken;
mod tokenizer;
mod truncate;
mod unicode;
mod vocabulary;

pub use added_tokens::{AddedToken, AllowedSpecial};
pub use batch::Flat;
pub use decode::TokenId;
pub use error::{Result, TokenizerError};
pub use offsets::{Located, Unit};
pub use stream::{Piece, StopStrings, TokenStream, Utf8Stream};
pub use tokenizer::{EncodeOptions, Text, Tokenizer};
pub use truncate::Side;

/// From this many bytes on, a call is worth a thread pool.
pub const PARALLEL_BYTES: usize = encode::PARALLEL_BYTES;

/// Memory in which each thread that encodes keeps pieces, in bytes.
pub const PIECE_CACHE_BYTES: usize = piece_cache::BYTES;
