//! What runs in one step: flat arrays over its N tokens and B requests, ready for the model.

use std::sync::Arc;

use crate::cache::Moves;

/// One step's plan. Tokens of a request are consecutive; requests are in the order of service. Its buffers are used again: handed
/// back to `schedule_into`, a step is filled anew without taking memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// [B] names.
    pub request_ids: Arc<[Arc<str>]>,
    /// [B] small numbers, one for each request that is there.
    pub request_keys: Vec<i32>,
    /// [N] ids to compute.
    pub token_ids: Vec<i32>,
    /// [N] their positions in their sequences.
    pub positions: Vec<i64>,
    /// [N] cache rows they are written to: block * block_size + offset.
    pub slot_mapping: Vec<i64>,
    /// [B + 1] each request's first token among the N.
    pub query_start_loc: Vec<i32>,
    /// [B] keys of each request, this step's included.
    pub seq_lens: Vec<i32>,
    /// [B] draft tokens at the end of each request's tokens.
    pub num_drafts: Vec<i32>,
    /// [B, M] blocks of each request, row by row, -1 past its end.
    pub block_tables: Vec<i32>,
    /// M: blocks of the longest request.
    pub table_width: usize,
    /// [n] rows among the N whose logits are sampled. The row of a prompt's last token comes once for each completion.
    pub sample_rows: Vec<i32>,
    /// [n] which of the B requests each sample row belongs to.
    pub sample_request: Vec<i32>,
    /// [n] which completion each sample row is for: 0 is the request itself, i the i-th of its forks.
    pub sample_branch: Vec<i32>,
    /// [c, 2] blocks (source, target) to copy in every cache before anything is written.
    pub copies: Vec<[i32; 2]>,
    /// [o, 2] with a host tier: (block, place) of index keys, and of a draft model's rows, to copy out to the places that are kept for
    /// preempted requests: before everything else of the step.
    pub swap_outs: Vec<[i32; 2]>,
    /// [i, 2] (place, block) of those to copy back in, after `swap_outs` and before `copies`.
    pub swap_ins: Vec<[i32; 2]>,
    /// With a host tier: latent rows to move between the device and the host. All of it comes before the step's tokens are computed:
    /// the stores, then the loads, then the copies, which are those of the latent caches in place of `copies`.
    pub moves: Moves,
    /// With a host tier: [N] latent rows the tokens are written to: page * block_size + offset.
    pub latent_slot_mapping: Vec<i64>,
    /// With a host tier: [B, M] pages of each request's latent rows, -1 where they are in the host tier alone.
    pub latent_tables: Vec<i32>,
    /// Names of requests that gave their blocks away for this step.
    pub preempted: Vec<Arc<str>>,
    /// Those of them whose rows are kept; the others will be computed anew.
    pub swapped: Vec<Arc<str>>,
}

impl Step {
    /// N, the tokens of this step.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// B, the requests of this step.
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// Empties it and keeps its memory.
    pub(super) fn clear(&mut self) {
        self.request_keys.clear();
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.query_start_loc.clear();
        self.seq_lens.clear();
        self.num_drafts.clear();
        self.block_tables.clear();
        self.table_width = 0;
        self.sample_rows.clear();
        self.sample_request.clear();
        self.sample_branch.clear();
        self.copies.clear();
        self.swap_outs.clear();
        self.swap_ins.clear();
        self.moves.clear();
        self.latent_slot_mapping.clear();
        self.latent_tables.clear();
        self.preempted.clear();
        self.swapped.clear();
    }
}
