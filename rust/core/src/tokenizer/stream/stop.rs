//! Stop strings in a text that comes in parts.

use std::sync::Arc;

use aho_corasick::automaton::{Automaton, StateID};
use aho_corasick::nfa::noncontiguous::NFA;
use aho_corasick::{Anchored, MatchKind};

use crate::tokenizer::error::{Result, TokenizerError};

/// Strings that end a text, as one automaton over bytes. Its state is the longest end of the text so far with which a
/// string begins, so the state's depth is also how much must be held back.
#[derive(Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    automaton: NFA,
    start: StateID,
    /// By state.
    depths: Vec<usize>,
}

impl StopStrings {
    /// Prepares `strings`.
    ///
    /// # Errors
    /// [`TokenizerError::Argument`] if one is empty, or they are too many or too long for an automaton.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        let refused =
            |got| TokenizerError::Argument { name: "stop", expected: "non-empty strings".into(), got };
        if let Some(place) = strings.iter().position(String::is_empty) {
            return Err(refused(format!("an empty one at {place}")));
        }
        let too_large = |error: &dyn std::error::Error| TokenizerError::Argument {
            name: "stop",
            expected: "fewer or shorter strings".into(),
            got: error.to_string(),
        };
        let mut builder = NFA::builder();
        let automaton = builder
            .match_kind(MatchKind::Standard)
            .prefilter(false)
            .build(&strings)
            .map_err(|error| too_large(&error))?;
        let start = automaton.start_state(Anchored::No).map_err(|error| too_large(&error))?;
        let mut depths = Vec::new();
        for string in &strings {
            let mut state = start;
            for (depth, &byte) in (1..).zip(string.as_bytes()) {
                // Along its own string no failure link is taken.
                state = automaton.next_state(Anchored::No, state, byte);
                if depths.len() <= state.as_usize() {
                    depths.resize(state.as_usize() + 1, 0);
                }
                depths[state.as_usize()] = depth;
            }
        }
        Ok(Self { strings, automaton, start, depths })
    }

    fn depth(&self, state: StateID) -> usize {
        self.depths.get(state.as_usize()).copied().unwrap_or(0)
    }
}

/// A stop string in the part just read.
struct Found {
    /// Where in the part it begins: below 0 if it begins before it.
    start: isize,
    len: usize,
    string: usize,
}

/// The search in one text.
#[derive(Clone, Debug)]
pub(super) struct StopSearch {
    stop: Arc<StopStrings>,
    include: bool,
    state: StateID,
    /// The text's end; what is behind `given` may be the beginning of a stop string and is held back.
    held: String,
    given: usize,
    found: Option<usize>,
}

impl StopSearch {
    /// A text's beginning. `include`: the stop string is part of the text that it ends.
    pub fn new(stop: Arc<StopStrings>, include: bool) -> Self {
        Self { state: stop.start, stop, include, held: String::new(), given: 0, found: None }
    }

    /// The stop string that ended the text.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|string| &self.stop.strings[string][..])
    }

    /// Reads `part`; true if it passes whole, with nothing before it, nothing held back and no stop string in it.
    /// Otherwise what may be given is appended to `text`.
    pub fn push(&mut self, part: &str, text: &mut String) -> bool {
        if self.found.is_some() {
            return false;
        }
        let found = self.read(part.as_bytes());
        let clear = self.held.is_empty();
        if let Some(Found { start, len, string }) = found {
            self.found = Some(string);
            self.held.push_str(part);
            let before = (self.held.len() - part.len()).saturating_add_signed(start);
            let end = if self.include { before + len } else { before };
            text.push_str(&self.held[self.given..end]);
            self.held = String::new();
            self.given = 0;
            return false;
        }
        let depth = self.stop.depth(self.state);
        if clear && depth == 0 {
            return true;
        }
        self.held.push_str(part);
        let sure = self.held.len() - depth;
        text.push_str(&self.held[self.given..sure]);
        self.given = sure;
        // Only then is less moved than was given: a byte costs the same however much is held back.
        if sure > self.held.len() / 2 {
            self.held.drain(..sure);
            self.given = 0;
        }
        false
    }

    /// Appends what is held back: nothing more will come. The next part begins a new text, unless a stop string was found.
    pub fn flush(&mut self, text: &mut String) {
        text.push_str(&self.held[self.given..]);
        self.held.clear();
        self.given = 0;
        self.state = self.stop.start;
    }

    /// Of the stop strings that end in `part` the one that begins first; of several there, the shortest.
    fn read(&mut self, part: &[u8]) -> Option<Found> {
        let automaton = &self.stop.automaton;
        let mut found: Option<Found> = None;
        for (end, &byte) in (1..).zip(part) {
            self.state = automaton.next_state(Anchored::No, self.state, byte);
            if !automaton.is_match(self.state) {
                continue;
            }
            // The first of a state's strings is the longest: the one that begins first.
            let string = automaton.match_pattern(self.state, 0);
            let len = automaton.pattern_len(string);
            let start = end - len as isize;
            if found.as_ref().is_none_or(|first| start < first.start) {
                found = Some(Found { start, len, string: string.as_usize() });
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What must be held back: the longest end of `text` with which a stop string begins.
    fn held(text: &str, stop: &[String]) -> usize {
        let ends = text.char_indices().map(|(at, _)| &text[at..]);
        ends.filter(|end| stop.iter().any(|string| string.starts_with(end))).map(str::len).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn the_text_ends_at_the_first_part_that_completes_a_stop_string(
            parts in prop::collection::vec("[abé中]{0,4}", 0..12),
            stop in prop::collection::vec("[abé中]{1,5}", 0..4),
            include in any::<bool>(),
        ) {
            let mut search = StopSearch::new(Arc::new(StopStrings::new(stop.clone()).unwrap()), include);
            let (mut given, mut whole) = (String::new(), String::new());
            for part in &parts {
                if search.push(part, &mut given) {
                    given.push_str(part);
                }
                whole.push_str(part);
                let places = stop.iter().filter_map(|string| Some((whole.find(&string[..])?, string)));
                if let Some((at, string)) = places.min() {
                    prop_assert_eq!(search.found(), Some(&string[..]));
                    let end = if include { at + string.len() } else { at };
                    prop_assert_eq!(&given, &whole[..end]);
                    prop_assert!(!search.push(part, &mut given));
                    search.flush(&mut given);
                    prop_assert_eq!(&given, &whole[..end]);
                    return Ok(());
                }
                prop_assert_eq!(&given, &whole[..whole.len() - held(&whole, &stop)]);
            }
            prop_assert_eq!(search.found(), None);
            search.flush(&mut given);
            prop_assert_eq!(given, whole);
        }
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopStrings::new(vec!["a".into(), String::new()]).unwrap_err();
        assert_eq!(error.to_string(), "stop: expected non-empty strings, got an empty one at 1");
    }
}
