//! Which steps are those of a scanner. What patterns say is compared, not how they are spelled.

use crate::tokenizer::pattern::{Dialect, Pattern};
use crate::tokenizer::pre_tokenizer::{Behavior, Step};
use crate::tokenizer::scan::Family;
use crate::tokenizer::scan::cl100k::Variant;
use crate::tokenizer::scan::o200k;

/// DeepSeek's three splits.
pub(super) const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

/// cl100k in Hugging Face's spelling, Llama 3, GLM-4.
pub(super) const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// cl100k as tiktoken has it.
pub(super) const CL100K_TIKTOKEN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// Qwen 2, 2.5 and 3.
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 3.5.
pub(super) const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// GPT-2 as tiktoken has it.
pub(super) const GPT2_TIKTOKEN: &str =
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";

/// o200k, Llama 4, MiniMax.
pub(super) const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Mistral's Tekken: without contractions, and every digit alone.
pub(super) const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Patterns that take every character.
pub(super) const WHOLE: [(&str, Dialect, Family); 8] = {
    use Dialect::{Fancy, Oniguruma};
    const fn cl100k(threes: bool, marks: bool, keeps_end_whole: bool) -> Family {
        Family::Cl100k(Variant { threes, marks, keeps_end_whole })
    }
    [
        (CL100K, Oniguruma, cl100k(true, false, false)),
        (CL100K_TIKTOKEN, Fancy, cl100k(true, false, true)),
        (QWEN2, Oniguruma, cl100k(false, false, false)),
        (QWEN3_5, Oniguruma, cl100k(false, true, false)),
        (GPT2, Oniguruma, Family::Gpt2),
        (GPT2_TIKTOKEN, Fancy, Family::Gpt2),
        (O200K, Oniguruma, Family::O200k(o200k::Variant { threes: true, contractions: true })),
        (TEKKEN, Oniguruma, Family::O200k(o200k::Variant { threes: false, contractions: false })),
    ]
};

/// The family whose cuts these steps make.
pub(super) fn family(steps: &[Step]) -> Option<Family> {
    match steps {
        [step] => {
            let pattern = pattern(step, true)?;
            WHOLE.iter().find(|(text, dialect, _)| pattern.says(text, *dialect)).map(|&(_, _, family)| family)
        }
        [_, _, _] => {
            let same = |(step, text): (&Step, &str)| {
                pattern(step, false).is_some_and(|pattern| pattern.says(text, Dialect::Oniguruma))
            };
            steps.iter().zip(DEEPSEEK).all(same).then_some(Family::DeepSeek)
        }
        _ => None,
    }
}

/// The pattern whose every match is a piece, as is what stands between matches; where nothing does (`whole`), it may also
/// be that only the matches are kept.
fn pattern(step: &Step, whole: bool) -> Option<&Pattern> {
    match step {
        Step::Split { pattern, behavior: Behavior::Isolated, .. } => Some(pattern),
        Step::Split { pattern, behavior: Behavior::Removed, invert: true } if whole => Some(pattern),
        _ => None,
    }
}
