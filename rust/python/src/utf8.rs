//! Long strings of Python as UTF-8.
//!
//! The limited API has one way to a string that is not ASCII as UTF-8, and it is slow and leaves a copy inside the string.
//! Its code points, though, come at the speed of memory.

use std::borrow::Cow;
use std::cell::RefCell;

use pyo3::ffi::{PyUnicode_AsUCS4, PyUnicode_GetLength};
use pyo3::prelude::*;
use pyo3::types::PyString;

/// A shorter string is not worth asking whether it is ASCII.
const LONG: usize = 4096;
/// Room for this many code points is kept from call to call, 4 MiB.
const KEPT: usize = 1 << 20;
/// So many are looked at together.
const BLOCK: usize = 16;

thread_local! {
    static CODE_POINTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// The string as UTF-8; an error for lone surrogates.
pub fn utf8<'a>(text: &'a Bound<'_, PyString>) -> PyResult<Cow<'a, str>> {
    // SAFETY: `text` is a string.
    let len = usize::try_from(unsafe { PyUnicode_GetLength(text.as_ptr()) }).unwrap_or(0);
    if len < LONG || text.call_method0("isascii")?.is_truthy()? {
        return text.to_str().map(Cow::Borrowed);
    }
    let converted = CODE_POINTS.with_borrow_mut(|points| {
        points.resize(len.max(points.len()), 0);
        // SAFETY: there is room for `len` code points, and nothing is written behind them.
        let filled = unsafe { PyUnicode_AsUCS4(text.as_ptr(), points.as_mut_ptr(), len as isize, 0) };
        if filled.is_null() {
            drop(PyErr::take(text.py())); // the slow way says it again
        }
        let converted = if filled.is_null() { None } else { encode(&points[..len]) };
        if points.len() > KEPT {
            *points = Vec::new();
        }
        converted
    });
    match converted {
        Some(converted) => Ok(Cow::Owned(converted)),
        None => text.to_str().map(Cow::Borrowed), // which says what is wrong
    }
}

/// Code points as UTF-8; None if one is a surrogate.
fn encode(points: &[u32]) -> Option<String> {
    let mut out = Vec::with_capacity(points.len() + points.len() / 8);
    for block in points.chunks(BLOCK) {
        if let Some(block) = block.first_chunk::<BLOCK>()
            && block.iter().fold(0, |all, point| all | point) < 0x80
        {
            out.extend_from_slice(&block.map(|point| point as u8));
            continue;
        }
        let mut bytes = [0; 4 * BLOCK];
        let mut len = 0;
        for &point in block {
            let c = char::from_u32(point)?;
            len += c.encode_utf8(&mut bytes[len..]).len();
        }
        out.extend_from_slice(&bytes[..len]);
    }
    String::from_utf8(out).ok()
}
