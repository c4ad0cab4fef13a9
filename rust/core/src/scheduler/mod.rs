//! Continuous batching: which tokens of which requests run in the next step, and where their cache rows go.
//!
//! There is no prefill phase and no decode phase. A request has tokens (prompt and output so far) and a count of those whose cache
//! rows are computed; a step computes some of the rest. When the last of them is computed, its logits are sampled, which adds one more.

mod apply;
mod config;
mod error;
mod explain;
mod flight;
mod invariants;
mod plan;
mod request;
mod scheduler;
mod stats;
mod step;
mod swap;
mod tenants;
mod tier;
mod waiting;

pub use apply::Finished;
pub use config::{Policy, Preemption, SchedulerConfig};
pub use error::SchedulerError;
pub use explain::{Explanation, WaitReason};
pub use request::{FinishReason, NewRequest};
pub use scheduler::Scheduler;
pub use stats::Stats;
pub use step::Step;

#[cfg(test)]
mod tests;
