//! Many texts at once, over the threads of the current pool.

use std::ops::Range;

use rayon::prelude::*;

use crate::tokenizer::encode::in_pool;
use crate::tokenizer::error::Result;
use crate::tokenizer::tokenizer::{EncodeOptions, Text, Tokenizer};

/// Texts are handed to threads in groups of about this many bytes.
const GROUP_BYTES: usize = 1 << 16;

/// The ids of many texts, one after the other.
pub struct Flat {
    /// All ids.
    pub ids: Vec<u32>,
    /// Where the ids of text `i` lie: `row_offsets[i]..row_offsets[i + 1]`.
    pub row_offsets: Vec<i64>,
}

impl Default for Flat {
    /// Of no text.
    fn default() -> Self {
        Self { ids: Vec::new(), row_offsets: vec![0] }
    }
}

impl Flat {
    /// Of no text, with room for so many texts of so many bytes.
    pub fn with_room(texts: usize, bytes: usize) -> Self {
        let mut flat = Self::default();
        flat.row_offsets.reserve_exact(texts);
        flat.ids.reserve_exact(ids_of(bytes));
        flat
    }

    /// Behind these texts, others.
    fn append(&mut self, other: &Self) {
        let before = self.ids.len() as i64;
        self.ids.extend_from_slice(&other.ids);
        self.row_offsets.extend(other.row_offsets[1..].iter().map(|end| before + end));
    }
}

impl Tokenizer {
    /// The ids of each text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch(&self, texts: &[Text<'_>], options: EncodeOptions<'_>) -> Result<Vec<Vec<u32>>> {
        let encode = |group: Range<usize>| -> Result<Vec<Vec<u32>>> {
            texts[group].iter().map(|text| self.encode(*text, options)).collect()
        };
        let groups = groups(texts);
        if groups.len() == 1 || !in_pool() {
            return encode(0..texts.len());
        }
        let rows = groups.into_par_iter().map(encode).collect::<Result<Vec<_>>>()?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// The same in one buffer, behind what is there.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; then some of the texts have been appended.
    pub fn encode_batch_flat(
        &self,
        texts: &[Text<'_>],
        options: EncodeOptions<'_>,
        flat: &mut Flat,
    ) -> Result<()> {
        let encode = |group: Range<usize>, flat: &mut Flat| -> Result<()> {
            let texts = &texts[group];
            flat.ids.reserve(ids_of(texts.iter().map(|text| text.len()).sum()));
            for text in texts {
                self.encode_into(*text, options, &mut flat.ids)?;
                flat.row_offsets.push(flat.ids.len() as i64);
            }
            Ok(())
        };
        let groups = groups(texts);
        if groups.len() == 1 || !in_pool() {
            return encode(0..texts.len(), flat);
        }
        let part = |group| {
            let mut part = Flat::default();
            encode(group, &mut part).map(|()| part)
        };
        let parts = groups.into_par_iter().map(part).collect::<Result<Vec<_>>>()?;
        flat.ids.reserve(parts.iter().map(|part| part.ids.len()).sum());
        parts.iter().for_each(|part| flat.append(part));
        Ok(())
    }
}

/// Room for the ids of so many bytes of ordinary text.
fn ids_of(bytes: usize) -> usize {
    bytes / 3 + 8
}

/// Neighbouring texts that are encoded together; at least one group.
fn groups(texts: &[Text<'_>]) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.len();
        if bytes >= GROUP_BYTES {
            groups.push(start..index + 1);
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < texts.len() || groups.is_empty() {
        groups.push(start..texts.len());
    }
    groups
}
