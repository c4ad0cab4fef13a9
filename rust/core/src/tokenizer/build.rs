//! From a file's tokens and merges to a tokenizer: which tokens are used how, and the merges of a file of ranks.

use rayon::prelude::*;

use crate::tokenizer::bpe::{Bpe, Scratch};
use crate::tokenizer::error::{Result, invalid};
use crate::tokenizer::image::Image;
use crate::tokenizer::merges::MergesTables;
use crate::tokenizer::settings::Settings;
use crate::tokenizer::tokenizer::Tokenizer;
use crate::tokenizer::vocabulary::{Uses, Vocabulary, VocabularyTables};

/// The bytes of a token that a file of ranks may hold: every way to cut it is looked at. Real ones have 128.
const MAX_RANKED_BYTES: usize = 1024;

/// The tokenizer of these tables.
pub fn tokenizer(
    settings: &Settings,
    vocabulary: VocabularyTables,
    merges: &MergesTables,
    place: &str,
) -> Result<Tokenizer> {
    let json = serde_json::to_vec(settings)
        .map_err(|error| invalid(place, "settings that can be written", error.to_string()))?;
    let image = Image::new(&json, &vocabulary, merges);
    drop(vocabulary);
    Tokenizer::from_image(image, place)
}

/// Finds which tokens are pieces as they are, and which can be part of a longer piece. With `ignores_merges` a piece that is
/// a token is that token in any case.
pub fn set_uses(
    vocabulary: &mut VocabularyTables,
    merges: &MergesTables,
    ignores_merges: bool,
) -> Result<()> {
    let bpe = Bpe { vocabulary: vocabulary.view(), merges: merges.view() };
    let uses = if bpe.merges.are_ordered() {
        let whole = merges.made_whole(&bpe.vocabulary);
        whole.into_iter().map(|merged| Uses { piece: merged || ignores_merges, merged }).collect()
    } else {
        let is_piece = |scratch: &mut Scratch, id: u32| {
            let bytes = bpe.vocabulary.bytes(id);
            let piece = !bytes.is_empty()
                && (ignores_merges || {
                    let mut ids = Vec::new();
                    bpe.merge(bytes, scratch, &mut ids);
                    ids == [id]
                });
            Uses { piece, merged: false }
        };
        let ids = 0..bpe.vocabulary.len() as u32;
        ids.into_par_iter().map_init(Scratch::default, is_piece).collect::<Vec<_>>()
    };
    vocabulary.set_uses(&uses)
}

/// The merges of a file of ranks, where any two neighbours whose bytes together are a token may be joined, at its rank.
///
/// Mostly only one pair can ever become a token: the two that its bytes are merged to by the ranks before its own. Where
/// some token could also come about out of order, all pairs are merges.
pub fn merges_of_ranks(vocabulary: &Vocabulary<'_>) -> Result<MergesTables> {
    let ids = || (0..vocabulary.len() as u32).filter(|&id| vocabulary.bytes(id).len() > 1);
    if let Some(id) = ids().find(|&id| vocabulary.bytes(id).len() > MAX_RANKED_BYTES) {
        let got = format!("{} bytes with rank {id}", vocabulary.bytes(id).len());
        return Err(invalid("ranks", format!("tokens of at most {MAX_RANKED_BYTES} bytes"), got));
    }
    let ids: Vec<u32> = ids().collect();
    let last: Vec<Option<(u32, u32)>> =
        ids.par_iter().map(|&id| last_merge(vocabulary, vocabulary.bytes(id), id)).collect();
    let pairs = |id: u32| {
        let bytes = vocabulary.bytes(id);
        (1..bytes.len()).filter_map(move |cut| {
            let (left, right) = bytes.split_at(cut);
            Some((vocabulary.id_of_bytes(left)?, vocabulary.id_of_bytes(right)?, id))
        })
    };
    let out_of_order = |(&id, last): (&u32, &Option<(u32, u32)>)| {
        last.is_none() && pairs(id).any(|(left, right, _)| left.max(right) > id)
    };
    let merges: Vec<(u32, u32, u32)> = if ids.par_iter().zip(&last).any(out_of_order) {
        ids.iter().flat_map(|&id| pairs(id)).collect()
    } else {
        ids.iter().zip(last).filter_map(|(&id, last)| last.map(|(left, right)| (left, right, id))).collect()
    };
    MergesTables::new(vocabulary, &merges, "ranks")
}

/// The two tokens that `bytes` are merged to by the ranks below `limit`, if it is two.
fn last_merge(vocabulary: &Vocabulary<'_>, bytes: &[u8], limit: u32) -> Option<(u32, u32)> {
    let mut ends: Vec<usize> = (1..=bytes.len()).collect();
    let start = |ends: &[usize], part: usize| if part == 0 { 0 } else { ends[part - 1] };
    while ends.len() > 2 {
        let rank = |part: usize| vocabulary.id_of_bytes(&bytes[start(&ends, part)..ends[part + 1]]);
        let best = (0..ends.len() - 1)
            .filter_map(|part| Some((rank(part).filter(|&rank| rank < limit)?, part)))
            .min()?;
        ends.remove(best.1);
    }
    let &[cut, _] = &ends[..] else { return None };
    Some((vocabulary.id_of_bytes(&bytes[..cut])?, vocabulary.id_of_bytes(&bytes[cut..])?))
}
