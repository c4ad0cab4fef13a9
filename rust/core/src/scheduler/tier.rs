//! The host tier in the plan: pages for what a step writes, moves between the device and the host, and the latent caches' own tables.

use super::swap::{Kept, Record, Swap};
use super::{Preemption, Scheduler, SchedulerConfig, SchedulerError, Step};
use crate::cache::{FetchPlan, HotRows, Residencies};

/// Latent rows in fewer device pages than there are blocks.
#[derive(Debug)]
pub(super) struct Tier {
    pub residencies: Residencies,
    pub hot_rows: HotRows,
    pub swap: Swap,
    /// The request that each block was last planned for.
    owners: Vec<u32>,
}

impl Tier {
    /// The tier of this configuration, if there is one.
    pub fn new(config: &SchedulerConfig) -> Option<Self> {
        let pages = config.num_latent_blocks? as u32;
        Some(Self {
            residencies: Residencies::new(pages, config.most_written_blocks()),
            hot_rows: HotRows::new(config.hot_rows as u32),
            swap: Swap::new(config),
            owners: Vec::new(),
        })
    }
}

impl Tier {
    /// Gives up what is kept for a request; whether anything was.
    pub fn forget_kept(&mut self, key: usize) -> bool {
        let Some(record) = self.swap.release(key) else { return false };
        record.blocks.iter().for_each(|kept| self.residencies.let_go(kept.latent_place));
        true
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
        let size = self.config.block_size;
        tier.hot_rows.plan(layer, slots, &tier.residencies, size, plan).map_err(SchedulerError::Fetch)?;
        if !plan.sources.is_empty() {
            let first = (tier.residencies.total() * size) as i64;
            let mut fetched = plan.targets.iter().peekable();
            for (&slot, row) in slots.iter().zip(&plan.rows).filter(|&(_, &row)| row >= first) {
                let owner = tier.owners.get((slot / size as i64) as usize).map(|&key| key as usize);
                if fetched.next_if_eq(&row).is_some()
                    && let Some(owner) = owner.filter(|&key| self.requests.planned[key] > 0)
                {
                    self.requests.fetched[owner] += 1;
                }
            }
        }
        Ok(())
    }

    /// Begins the plan of a step's moves.
    pub(super) fn begin_moves(&mut self, step: &mut Step) {
        self.forget_freed();
        if let Some(tier) = &mut self.tier {
            tier.residencies.begin(self.pool.clock, &mut step.moves);
        }
    }

    /// Rows of blocks that were freed are nobody's.
    pub(super) fn forget_freed(&mut self) {
        if let Some(tier) = &mut self.tier {
            self.pool.take_freed().for_each(|block| tier.residencies.forget(block));
        }
    }

    /// Keeps the computed rows of a request that is preempted, where that is wanted and there is room; whether it does.
    pub(super) fn swap_out(&mut self, key: usize, step: &mut Step) -> bool {
        let computed = self.requests.computed[key] as usize;
        let blocks = &self.requests.tables[key].blocks()[..self.config.blocks_for(computed)];
        let Some(tier) = &mut self.tier else { return false };
        if blocks.is_empty() || blocks.len() > tier.swap.free() {
            return false;
        }
        let swaps = match self.config.preemption {
            Preemption::Recompute => false,
            Preemption::Swap => true,
            Preemption::Auto => {
                // What others use too will be there still.
                let shared = blocks.partition_point(|&block| self.pool.is_shared(block));
                let start = (shared * self.config.block_size).min(computed);
                self.config.cost(start, computed - start) > self.config.swap_cost * computed as f64
            }
        };
        if !swaps {
            return false;
        }
        let mut kept = Vec::with_capacity(blocks.len());
        for &block in blocks {
            let place = tier.swap.take();
            step.swap_outs.push([block as i32, place as i32]);
            kept.push(Kept { place, latent_place: tier.residencies.keep(block, &mut step.moves) });
        }
        tier.swap.keep(key, Record { rows: computed as u32, blocks: kept });
        self.flight.swapped_out.push(key as u32);
        true
    }

    /// Rows that are kept for a request; 0 without any.
    pub(super) fn kept_rows(&self, key: usize) -> usize {
        self.tier.as_ref().and_then(|tier| tier.swap.of(key)).map_or(0, |record| record.rows as usize)
    }

    /// Gives up what is kept for a request.
    pub(super) fn forget_kept(&mut self, key: usize) -> bool {
        self.tier.as_mut().is_some_and(|tier| tier.forget_kept(key))
    }

    /// What was kept for the requests that go on with it is not needed any more.
    pub(super) fn land_swaps(&mut self) {
        for key in std::mem::take(&mut self.flight.swapped_in) {
            self.forget_kept(key as usize);
        }
    }

    /// The step failed: what it moved is lost. Who would have gone on with kept rows begins with those of the cache alone.
    pub(super) fn abandon_swaps(&mut self) {
        for key in std::mem::take(&mut self.flight.swapped_out) {
            self.forget_kept(key as usize);
        }
        self.land_swaps();
    }

    /// Gives the planned blocks their pages and writes the latent caches' tables.
    pub(super) fn plan_pages(&mut self, step: &mut Step) {
        let Some(tier) = &mut self.tier else { return };
        let size = self.config.block_size;
        self.pool.take_freed().for_each(|block| tier.residencies.forget(block));
        for &key in &self.flight.swapped_in {
            let record = tier.swap.of(key as usize).expect("it is kept until the step is done");
            let (cached, blocks) =
                (self.requests.offered[key as usize] as usize, self.requests.tables[key as usize].blocks());
            for (kept, &block) in record.blocks.iter().zip(blocks).skip(cached) {
                tier.residencies.adopt(block, kept.latent_place);
                step.swap_ins.push([kept.place as i32, block as i32]);
            }
        }
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
            if let Some(&most) = blocks.iter().max()
                && tier.owners.len() <= most as usize
            {
                tier.owners.resize(most as usize + 1, 0);
            }
            blocks.iter().for_each(|&block| tier.owners[block as usize] = key as u32);
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
