//! What a tokenizer does around BPE, as its file says it; a cache file holds the same as JSON.

use serde::{Deserialize, Serialize};

use crate::tokenizer::added_tokens::AddedToken;
use crate::tokenizer::normalizer::Normalizer;
use crate::tokenizer::pre_tokenizer::StepSettings;

/// How the spaces of a token count in its offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trim {
    /// A token's offsets leave out the spaces at its ends.
    pub spaces: bool,
    /// But not a space at the beginning of the text, which may be one that was put there.
    pub keeps_first: bool,
}

/// The settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// What is done to a text before it is cut.
    pub normalizer: Normalizer,
    /// How it is cut into pieces.
    pub steps: Vec<StepSettings>,
    /// Tokens that are found in the text as they stand, in the order of the file.
    pub added_tokens: Vec<AddedToken>,
    /// Ids that `add_special_tokens` puts before a text.
    pub before: Vec<u32>,
    /// Ids that it puts behind.
    pub behind: Vec<u32>,
    /// Concerns offsets.
    pub trim: Trim,
}
