//! Cutting text into the pieces that BPE works on.
//!
//! Each step cuts every piece of the step before it, and a pattern sees its piece alone: nothing looks across a cut.

use std::ops::Range;

use regex_automata::meta::Cache;
use serde::{Deserialize, Serialize};

use crate::tokenizer::pattern::{Pattern, Source};

/// What becomes of a pattern's matches and of the text between them. Names and meanings are those of tokenizer.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Behavior {
    /// Each match and each text between is a piece.
    Isolated,
    /// Matches are dropped.
    Removed,
    /// A match ends the piece before it.
    MergedWithPrevious,
    /// A match begins the piece behind it.
    MergedWithNext,
    /// Neighbouring matches are one piece.
    Contiguous,
}

/// One step, as files and cache files describe it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepSettings {
    /// Cut at the matches of a pattern.
    Split {
        /// What to look for.
        pattern: Source,
        /// What to do with it.
        behavior: Behavior,
        /// Whether the text between counts as the match.
        invert: bool,
    },
    /// Put a space before a piece that does not begin with one.
    PrefixSpace,
}

/// One step.
pub enum Step {
    /// Cut at the matches of a pattern; `invert` exchanges matches and the text between.
    Split {
        /// What to look for.
        pattern: Pattern,
        /// What to do with it.
        behavior: Behavior,
        /// Whether the text between counts as the match.
        invert: bool,
    },
    /// Put a space before a piece that does not begin with one.
    PrefixSpace,
}

/// The steps, in order.
pub struct PreTokenizer {
    /// Empty: the text is one piece.
    pub steps: Vec<Step>,
}

/// Working memory: one automaton cache a step.
pub struct Caches(Vec<Option<Cache>>);

impl Step {
    /// The step that is described; the error says what of it cannot be served exactly.
    pub fn new(settings: &StepSettings) -> Result<Self, String> {
        Ok(match settings {
            StepSettings::Split { pattern, behavior, invert } => {
                Self::Split { pattern: Pattern::new(pattern)?, behavior: *behavior, invert: *invert }
            }
            StepSettings::PrefixSpace => Self::PrefixSpace,
        })
    }
}

impl PreTokenizer {
    /// Working memory for [`PreTokenizer::split`].
    pub fn caches(&self) -> Caches {
        Caches(
            self.steps
                .iter()
                .map(|step| match step {
                    Step::Split { pattern, .. } => Some(pattern.cache()),
                    Step::PrefixSpace => None,
                })
                .collect(),
        )
    }

    /// Whether the pieces, one after the other, are the text.
    pub fn covers(&self) -> bool {
        let covers =
            |step: &Step| matches!(step, Step::Split { behavior, .. } if *behavior != Behavior::Removed);
        self.steps.iter().all(covers)
    }

    /// Hands the pieces of `text` to `emit`, in order; none is empty.
    pub fn split(&self, caches: &mut Caches, text: &str, emit: &mut dyn FnMut(&str, From)) {
        run(&self.steps, &mut caches.0, text, From { at: 0, prefixed: false }, emit);
    }
}

/// Where a piece comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct From {
    /// The byte of the text that its first byte is, not counting a space that was put there.
    pub at: usize,
    /// Whether its first byte is a space that was put there.
    pub prefixed: bool,
}

impl From {
    /// Of the part of this piece that begins at its byte `start`.
    fn part(self, start: usize) -> Self {
        match start {
            0 => self,
            _ => Self { at: self.at + start - usize::from(self.prefixed), prefixed: false },
        }
    }
}

fn run(
    steps: &[Step],
    caches: &mut [Option<Cache>],
    text: &str,
    from: From,
    emit: &mut dyn FnMut(&str, From),
) {
    let (Some((step, steps)), Some((cache, caches))) = (steps.split_first(), caches.split_first_mut()) else {
        if !text.is_empty() {
            emit(text, from);
        }
        return;
    };
    match (step, cache) {
        (Step::Split { pattern, behavior, invert }, Some(cache)) => {
            let mut next = |piece: Range<usize>| {
                let from = from.part(piece.start);
                run(steps, caches, &text[piece], from, emit)
            };
            match behavior {
                Behavior::Isolated => sections(pattern, cache, text, |section, _| next(section)),
                Behavior::Removed => sections(pattern, cache, text, |section, is_match| {
                    if is_match == *invert {
                        next(section);
                    }
                }),
                Behavior::MergedWithPrevious | Behavior::MergedWithNext | Behavior::Contiguous => {
                    let mut found = Vec::new();
                    sections(pattern, cache, text, |section, is_match| {
                        found.push((section, is_match != *invert))
                    });
                    merged(&found, *behavior).into_iter().for_each(next);
                }
            }
        }
        (Step::PrefixSpace, _) if !text.starts_with(' ') => {
            run(steps, caches, &format!(" {text}"), From { prefixed: true, ..from }, emit)
        }
        _ => run(steps, caches, text, from, emit),
    }
}

/// The matches and the texts between them, which cover `text`.
fn sections(pattern: &Pattern, cache: &mut Cache, text: &str, mut emit: impl FnMut(Range<usize>, bool)) {
    let mut at = 0;
    while let Some(found) = pattern.find(cache, text, at) {
        if at < found.start {
            emit(at..found.start, false);
        }
        at = found.end;
        emit(found, true);
    }
    if at < text.len() {
        emit(at..text.len(), false);
    }
}

/// Joins sections; which of two neighbours is a match decides.
fn merged(sections: &[(Range<usize>, bool)], behavior: Behavior) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut previous: Option<bool> = None;
    for (section, is_match) in sections {
        let joins = previous.is_some_and(|previous| match behavior {
            Behavior::MergedWithPrevious => *is_match && !previous,
            Behavior::MergedWithNext => previous && !is_match,
            _ => previous == *is_match,
        });
        match pieces.last_mut().filter(|_| joins) {
            Some(last) => last.end = section.end,
            None => pieces.push(section.clone()),
        }
        previous = Some(*is_match);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::pattern::Dialect;

    fn pieces(behavior: Behavior, invert: bool, text: &str) -> Vec<String> {
        let pattern = Pattern::regex("-", Dialect::Oniguruma).unwrap();
        let steps = PreTokenizer { steps: vec![Step::Split { pattern, behavior, invert }] };
        let mut found = Vec::new();
        steps.split(&mut steps.caches(), text, &mut |piece, _| found.push(piece.to_owned()));
        found
    }

    /// The examples of the documentation of Hugging Face tokenizers.
    #[test]
    fn behaviors_are_those_of_the_file_format() {
        let text = "the-final--countdown";
        assert_eq!(pieces(Behavior::Removed, false, text), ["the", "final", "countdown"]);
        assert_eq!(pieces(Behavior::Isolated, false, text), ["the", "-", "final", "-", "-", "countdown"]);
        assert_eq!(pieces(Behavior::MergedWithPrevious, false, text), ["the-", "final-", "-", "countdown"]);
        assert_eq!(pieces(Behavior::MergedWithNext, false, text), ["the", "-final", "-", "-countdown"]);
        assert_eq!(pieces(Behavior::Contiguous, false, text), ["the", "-", "final", "--", "countdown"]);
        assert_eq!(pieces(Behavior::Removed, true, text), ["-", "-", "-"]);
        assert_eq!(pieces(Behavior::Isolated, false, ""), [""; 0]);
    }

    #[test]
    fn a_prefix_space_is_put_before_each_piece_that_has_none() {
        let pattern = Pattern::regex("-", Dialect::Oniguruma).unwrap();
        let split = Step::Split { pattern, behavior: Behavior::Removed, invert: false };
        let steps = PreTokenizer { steps: vec![split, Step::PrefixSpace] };
        let mut found = Vec::new();
        steps.split(&mut steps.caches(), "a- b-c", &mut |piece, _| found.push(piece.to_owned()));
        assert_eq!(found, [" a", " b", " c"]);
    }
}
