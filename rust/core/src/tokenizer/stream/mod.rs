//! Decoding token by token: bytes to text as they come, and stop strings found in it.

mod stop;
mod stream;
mod utf8;

pub use stop::StopStrings;
pub use stream::{Piece, TokenStream};
pub use utf8::Utf8Stream;
