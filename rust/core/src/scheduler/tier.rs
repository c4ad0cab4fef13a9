//! The host tier in the plan: pages for what a step writes, moves between the device and the host, and the latent caches' own tables.

use super::{Scheduler, SchedulerConfig, SchedulerError, Step};
use crate::cache::{FetchPlan, HotRows, Residencies};

/// Latent rows in fewer device pages than there are blocks.
#[derive(Debug)]
pub(super) struct Tier {
    pub residencies: Residencies,
    pub hot_rows: HotRows,
}

impl Tier {
    /// The tier of this configuration, if there is one.
    pub fn new(config: &SchedulerConfig) -> Option<Self> {
        let pages = config.num_latent_blocks? as u32;
        Some(Self {
            residencies: Residencies::new(pages, config.most_written_blocks()),
            hot_rows: HotRows::new(config.hot_rows as u32),
        })
    }
}

impl SchedulerConfig {
    /// Blocks that a step writes or copies from at most: those that its tokens fill, and of each request the first and the last one
    /// and one that is copied.
    pub(super) fn most_written_blocks(&self) -> usize {
        let seqs = self.max_num_seqs.min(self.max_batched_tokens);
        self.blocks_for(self.max_batched_tokens).saturating_add(seqs.saturating_mul(3))
    }
}

impl Scheduler {
    /// Where to read a layer's selection, and what to fetch from the host tier before.
    ///
    /// `slots` are block * block_size + offset, -1 for none. What is planned counts as fetched.
    ///
    /// # Errors
    /// There is no host tier, or the selection cannot be fetched.
    pub fn plan_fetch(
        &mut self,
        layer: usize,
        slots: &[i64],
        plan: &mut FetchPlan,
    ) -> Result<(), SchedulerError> {
        let Some(tier) = &mut self.tier else { return Err(SchedulerError::NoHostTier) };
        tier.hot_rows
            .plan(layer, slots, &tier.residencies, self.config.block_size, plan)
            .map_err(SchedulerError::Fetch)
    }

    /// Gives the planned blocks their pages and writes the latent caches' tables.
    pub(super) fn plan_pages(&mut self, step: &mut Step) {
        let Some(tier) = &mut self.tier else { return };
        let size = self.config.block_size;
        for block in self.pool.take_freed() {
            tier.residencies.forget(block);
        }
        tier.residencies.begin(self.pool.clock, &mut step.moves);
        for &key in &self.flight.keys {
            let key = key as usize;
            let start = self.requests.computed[key] as usize;
            let end = start + self.requests.planned[key] as usize;
            for place in start / size..end.div_ceil(size) {
                let block = self.requests.tables[key].blocks()[place];
                tier.residencies.write(block, place * size < start, &mut step.moves);
            }
        }
        for &[source, target] in &step.copies {
            tier.residencies.copy(source as u32, target as u32, &mut step.moves);
        }
        tier.residencies.finish(&mut step.moves);
        for (place, &key) in self.flight.keys.iter().enumerate() {
            let key = key as usize;
            let start = self.requests.computed[key] as usize;
            let end = start + self.requests.planned[key] as usize;
            let blocks = self.requests.tables[key].blocks();
            let page = |block: u32| tier.residencies.page(block);
            step.latent_tables.extend(blocks.iter().map(|&block| page(block).map_or(-1, |page| page as i32)));
            step.latent_tables.resize((place + 1) * step.table_width, -1);
            step.latent_slot_mapping.extend((start..end).map(|position| {
                let page = page(blocks[position / size]).expect("what is written has a page");
                i64::from(page) * size as i64 + (position % size) as i64
            }));
        }
    }
}
