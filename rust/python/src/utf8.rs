//! Long strings of Python as UTF-8.
//!
//! The limited API has one way to a string that is not ASCII as UTF-8, and it is slow and leaves a copy inside the string.
//! Its code points, though, come at the speed of memory, and from a part of it at that of the nearest caches.

use std::cell::RefCell;
use std::ops::Deref;

use heedful_core::tokenizer::code_points;
use pyo3::ffi::{PyUnicode_AsUCS4, PyUnicode_GetLength, PyUnicode_Substring};
use pyo3::prelude::*;
use pyo3::types::PyString;

/// A shorter string is not worth asking whether it is ASCII.
const LONG: usize = 4096;
/// Code points of a part.
const PART: usize = 4096;
/// Room for this many bytes is kept from call to call.
const KEPT: usize = 2 << 20;

thread_local! {
    static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// UTF-8, in the string's own memory where it is there.
pub enum Utf8<'a> {
    Borrowed(&'a str),
    Converted(Converted),
}

/// UTF-8 in room that the thread keeps for the next string.
pub struct Converted(String);

impl Drop for Converted {
    fn drop(&mut self) {
        let room = std::mem::take(&mut self.0).into_bytes();
        ROOM.with_borrow_mut(|kept| {
            if (kept.capacity() + 1..=KEPT).contains(&room.capacity()) {
                *kept = room;
            }
        });
    }
}

impl Deref for Utf8<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Converted(Converted(text)) => text,
        }
    }
}

impl From<String> for Utf8<'_> {
    fn from(text: String) -> Self {
        Self::Converted(Converted(text))
    }
}

/// The string as UTF-8; an error for lone surrogates.
pub fn utf8<'a>(text: &'a Bound<'_, PyString>) -> PyResult<Utf8<'a>> {
    let len = length(text);
    if len < LONG || text.call_method0("isascii")?.is_truthy()? {
        return text.to_str().map(Utf8::Borrowed);
    }
    match converted(text, len) {
        Some(converted) => Ok(converted.into()),
        None => text.to_str().map(Utf8::Borrowed), // which says what is wrong
    }
}

/// Code points of a string.
pub fn length(text: &Bound<'_, PyString>) -> usize {
    // SAFETY: `text` is a string.
    usize::try_from(unsafe { PyUnicode_GetLength(text.as_ptr()) }).unwrap_or(0)
}

/// A string of `len` code points; None if Python has no memory or one is a surrogate.
fn converted(text: &Bound<'_, PyString>, len: usize) -> Option<String> {
    let mut out = ROOM.take();
    out.clear();
    out.reserve(len + len / 8);
    let mut points = [0; PART];
    for start in (0..len).step_by(PART) {
        let end = (start + PART).min(len);
        // SAFETY: `text` is a string, and what is asked for lies within it.
        let part = unsafe { PyUnicode_Substring(text.as_ptr(), start as isize, end as isize) };
        // SAFETY: this is a new reference, or null with the error set.
        let part = unsafe { Bound::from_owned_ptr_or_err(text.py(), part) }.ok()?;
        // SAFETY: there is room for the part's code points, and nothing is written behind them.
        let filled = unsafe { PyUnicode_AsUCS4(part.as_ptr(), points.as_mut_ptr(), PART as isize, 0) };
        if filled.is_null() {
            drop(PyErr::take(text.py()));
            return None;
        }
        code_points::encode(&points[..end - start], &mut out)?;
    }
    debug_assert!(std::str::from_utf8(&out).is_ok());
    // SAFETY: `code_points::encode` appends whole characters, and none of surrogates.
    Some(unsafe { String::from_utf8_unchecked(out) })
}
