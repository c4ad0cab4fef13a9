//! The step in flight: what was planned and not yet updated.

use std::sync::Arc;

use super::request::Requests;
use crate::cache::BlockTable;

/// A sample row of the step: which of its requests it belongs to, and which completion it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct SampleRow {
    pub place: u32,
    pub branch: u32,
}

/// Names of a step's requests.
type Names = Arc<[Arc<str>]>;

/// What `update` must know of the plan; its memory is used again.
#[derive(Debug, Default)]
pub(super) struct Flight {
    is_in: bool,
    /// Keys of its requests, in its order.
    pub keys: Vec<u32>,
    pub rows: Vec<SampleRow>,
    /// Blocks that are copied from in this step, kept until they are.
    pub held: BlockTable,
    /// Keys of requests that begin from a copy.
    pub copied: Vec<u32>,
    /// Keys of requests whose rows were kept in this plan, and of those that go on with kept rows.
    pub swapped_out: Vec<u32>,
    pub swapped_in: Vec<u32>,
    /// Blocks that may still be made reusable in this update.
    pub offers_left: usize,
    /// Tokens that each request of the last step got, by its place.
    pub new_tokens: Vec<i32>,
    /// Names of the last step's requests, as long as no name changes.
    names: Option<(Vec<u32>, Names)>,
}

impl Flight {
    /// Whether a step is in flight.
    pub fn is_in(&self) -> bool {
        self.is_in
    }

    /// Begins a plan.
    pub fn clear(&mut self) {
        debug_assert!(!self.is_in && self.held.is_empty());
        self.keys.clear();
        self.rows.clear();
        self.copied.clear();
        self.swapped_out.clear();
        self.swapped_in.clear();
    }

    /// The plan is complete.
    pub fn start(&mut self) {
        self.is_in = true;
    }

    /// The plan was carried out, or given up.
    pub fn land(&mut self) {
        self.is_in = false;
    }

    /// A key has another name than before, or none.
    pub fn names_changed(&mut self) {
        self.names = None;
    }

    /// Names of the plan's requests; the same object while nothing changes.
    pub fn names(&mut self, requests: &Requests) -> Names {
        if let Some((keys, names)) = &self.names
            && *keys == self.keys
        {
            return names.clone();
        }
        let names: Names = self.keys.iter().map(|&key| requests.terms(key as usize).id.clone()).collect();
        self.names = Some((self.keys.clone(), names.clone()));
        names
    }
}
