//! Reading a tokenizer's file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::tokenizer::error::{Result, TokenizerError, invalid};

/// A larger file is refused unread; the largest real ones have 40 MB.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// A file and its length.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let io = |source| TokenizerError::Io { path: path.display().to_string(), source };
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(invalid(path.display().to_string(), "a file", "something else"));
    }
    Ok((file, metadata.len()))
}

/// A file's text.
pub(super) fn read(path: &Path) -> Result<String> {
    let (file, len) = open(path)?;
    let shown = path.display().to_string();
    let io = |source| TokenizerError::Io { path: shown.clone(), source };
    if len > MAX_FILE_BYTES {
        return Err(invalid(shown, format!("at most {MAX_FILE_BYTES} bytes"), len.to_string()));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(io)?;
    String::from_utf8(bytes).map_err(|error| {
        invalid(shown, "UTF-8 text", format!("another byte at {}", error.utf8_error().valid_up_to()))
    })
}
