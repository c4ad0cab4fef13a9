//! What runs in one step: flat arrays over its N tokens and B requests, ready for the model.

use std::sync::Arc;

/// One step's plan. Tokens of a request are consecutive; requests are in the order of service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// [B] names.
    pub request_ids: Vec<Arc<str>>,
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
    /// [B, M] blocks of each request, row by row, -1 past its end.
    pub block_tables: Vec<i32>,
    /// M: blocks of the longest request.
    pub table_width: usize,
    /// [n] rows among the N whose logits are sampled.
    pub sample_rows: Vec<i32>,
    /// [n] which of the B requests each sample row belongs to.
    pub sample_request: Vec<i32>,
    /// Names of requests that gave their blocks away for this step and will be computed anew.
    pub preempted: Vec<Arc<str>>,
}
