//! Rows fetched from the host tier, kept on the device: which of a selection's rows are there, and which must be fetched where.
//!
//! Each layer selects for itself, so each has rows of its own: a fixed number, the least recently used of which makes room. A row is
//! known by its slot and by the life of its block, so one that was fetched for an earlier sequence is never taken for its own.

use rustc_hash::FxHashMap;
use thiserror::Error;

use super::residency::{Residencies, Residency};

/// Layers at most; a number that no model has.
pub const MOST_LAYERS: usize = 4096;

const NONE: u32 = u32::MAX;

/// Why a selection cannot be fetched.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FetchError {
    /// No layer has this number.
    #[error("layer: expected a number below {MOST_LAYERS}, got {0}")]
    Layer(usize),
    /// A slot of a block that holds no rows.
    #[error("slots: slot {0} holds no row")]
    NoRow(i64),
    /// The selection has more rows in the host tier than the device has room for.
    #[error("slots: expected at most {0} rows of the host tier in one call (hot_rows); split the selection")]
    TooMany(u32),
}

/// Where to read a selection's rows, and what to fetch before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchPlan {
    /// Device row of each slot; -1 for -1.
    pub rows: Vec<i64>,
    /// Rows of the host tier to fetch.
    pub sources: Vec<i64>,
    /// Device rows they go to.
    pub targets: Vec<i64>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    slot: i64,
    life: u32,
    /// Neighbours in the order of use.
    older: u32,
    newer: u32,
    /// The last call that needed it.
    call: u64,
}

#[derive(Debug)]
struct Layer {
    places: FxHashMap<i64, u32>,
    rows: Vec<Row>,
    oldest: u32,
    newest: u32,
}

/// The hot rows of all layers.
#[derive(Debug)]
pub struct HotRows {
    layers: Vec<Layer>,
    capacity: u32,
    call: u64,
    /// Rows found hot, and rows fetched, so far.
    pub hits: u64,
    /// Rows fetched so far.
    pub fetched: u64,
}

impl HotRows {
    /// `capacity` rows a layer.
    pub fn new(capacity: u32) -> Self {
        Self { layers: Vec::new(), capacity, call: 0, hits: 0, fetched: 0 }
    }

    /// Forgets every row, as after a fetch that failed.
    pub fn clear(&mut self) {
        self.layers.clear();
    }

    /// Plans the reading of `slots` (block * block_size + offset, -1 for none) in a layer. Rows of pages are read where they are:
    /// page * block_size + offset; hot rows lie behind the pages, from `first` on.
    ///
    /// # Errors
    /// A layer or slot that is none, or more rows to fetch than there is room for: then the layer's hot rows are forgotten.
    pub fn plan(
        &mut self,
        layer: usize,
        slots: &[i64],
        residencies: &Residencies,
        block_size: usize,
        plan: &mut FetchPlan,
    ) -> Result<(), FetchError> {
        if layer >= MOST_LAYERS {
            return Err(FetchError::Layer(layer));
        }
        while self.layers.len() <= layer {
            self.layers.push(Layer {
                places: FxHashMap::default(),
                rows: Vec::new(),
                oldest: NONE,
                newest: NONE,
            });
        }
        plan.rows.clear();
        plan.sources.clear();
        plan.targets.clear();
        self.call += 1;
        let first = (residencies.total() * block_size) as i64;
        for &slot in slots {
            if slot == -1 {
                plan.rows.push(-1);
                continue;
            }
            let block = u32::try_from(slot / block_size as i64).unwrap_or(NONE);
            let offset = slot % block_size as i64;
            let row = match residencies.of(block) {
                _ if slot < 0 => Err(FetchError::NoRow(slot)),
                Residency::Absent => Err(FetchError::NoRow(slot)),
                Residency::Dirty(page) | Residency::Clean(page) => {
                    Ok(i64::from(page) * block_size as i64 + offset)
                }
                Residency::Host => {
                    let place_on_host = residencies.host_place(block).expect("rows on the host have a place");
                    let life = residencies.life(block);
                    self.layers[layer].place(slot, life, self.call, self.capacity).map(|(place, fetched)| {
                        let target = first + i64::from(place);
                        if fetched {
                            self.fetched += 1;
                            plan.sources.push(i64::from(place_on_host) * block_size as i64 + offset);
                            plan.targets.push(target);
                        } else {
                            self.hits += 1;
                        }
                        target
                    })
                }
            };
            match row {
                Ok(row) => plan.rows.push(row),
                Err(error) => {
                    // Rows that were to be fetched for this call never will be.
                    self.layers[layer] =
                        Layer { places: FxHashMap::default(), rows: Vec::new(), oldest: NONE, newest: NONE };
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    /// The place of a row, and whether it must be fetched.
    fn place(&mut self, slot: i64, life: u32, call: u64, capacity: u32) -> Result<(u32, bool), FetchError> {
        if let Some(&place) = self.places.get(&slot) {
            let row = &mut self.rows[place as usize];
            let fetched = row.life != life;
            (row.life, row.call) = (life, call);
            self.unlink(place);
            self.link(place);
            return Ok((place, fetched));
        }
        let row = Row { slot, life, older: NONE, newer: NONE, call };
        let place = if (self.rows.len() as u32) < capacity {
            self.rows.push(row);
            self.rows.len() as u32 - 1
        } else {
            let place = self.oldest;
            if place == NONE || self.rows[place as usize].call == call {
                return Err(FetchError::TooMany(capacity));
            }
            self.unlink(place);
            self.places.remove(&self.rows[place as usize].slot);
            self.rows[place as usize] = row;
            place
        };
        self.places.insert(slot, place);
        self.link(place);
        Ok((place, true))
    }

    /// Makes a row the newest.
    fn link(&mut self, place: u32) {
        let newest = std::mem::replace(&mut self.newest, place);
        (self.rows[place as usize].older, self.rows[place as usize].newer) = (newest, NONE);
        match newest {
            NONE => self.oldest = place,
            newest => self.rows[newest as usize].newer = place,
        }
    }

    fn unlink(&mut self, place: u32) {
        let Row { older, newer, .. } = self.rows[place as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.rows[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.rows[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::residency::Moves;
    use super::*;

    const SIZE: usize = 4;

    /// Blocks 0 to 5 on the host, at the places of their numbers; block 6 in page 0.
    fn residencies() -> Residencies {
        let mut residencies = Residencies::new(2, 1);
        for block in 0..6 {
            assert_eq!(residencies.fill(block), block);
        }
        let mut moves = Moves::default();
        residencies.begin(1, &mut moves);
        residencies.write(6, false, &mut moves);
        residencies.finish(&mut moves);
        residencies.land();
        residencies
    }

    fn plan(hot: &mut HotRows, slots: &[i64]) -> Result<FetchPlan, FetchError> {
        let mut plan = FetchPlan::default();
        hot.plan(0, slots, &residencies(), SIZE, &mut plan)?;
        Ok(plan)
    }

    #[test]
    fn rows_in_pages_are_read_there_and_others_fetched_once() {
        let mut hot = HotRows::new(3);
        // Pages end at row 8; hot rows lie behind.
        let first = plan(&mut hot, &[25, -1, 3, 3, 9]).unwrap();
        assert_eq!(first, FetchPlan { rows: vec![1, -1, 8, 8, 9], sources: vec![3, 9], targets: vec![8, 9] });
        let second = plan(&mut hot, &[9, 3]).unwrap();
        assert_eq!(second, FetchPlan { rows: vec![9, 8], ..FetchPlan::default() });
        assert_eq!((hot.hits, hot.fetched), (3, 2));
    }

    #[test]
    fn the_row_that_was_used_first_makes_room() {
        let mut hot = HotRows::new(3);
        plan(&mut hot, &[0, 1, 2]).unwrap();
        plan(&mut hot, &[0]).unwrap();
        assert_eq!(plan(&mut hot, &[4]).unwrap().targets, [9]);
        assert_eq!(plan(&mut hot, &[0, 2]).unwrap().sources, Vec::<i64>::new());
        assert_eq!(plan(&mut hot, &[1]).unwrap().sources, [1]);
    }

    #[test]
    fn a_row_of_another_life_is_fetched_again() {
        let mut hot = HotRows::new(3);
        let (mut residencies, mut found) = (residencies(), FetchPlan::default());
        hot.plan(0, &[5], &residencies, SIZE, &mut found).unwrap();
        residencies.forget(1);
        residencies.fill(1);
        hot.plan(0, &[5], &residencies, SIZE, &mut found).unwrap();
        assert_eq!((found.sources.len(), hot.fetched), (1, 2));
    }

    #[test]
    fn layers_keep_rows_of_their_own() {
        let mut hot = HotRows::new(3);
        plan(&mut hot, &[0]).unwrap();
        let mut found = FetchPlan::default();
        hot.plan(1, &[0], &residencies(), SIZE, &mut found).unwrap();
        assert_eq!(found.sources, [0]);
    }

    #[test]
    fn what_cannot_be_fetched_is_refused_and_forgets_the_layer() {
        let mut hot = HotRows::new(3);
        assert_eq!(plan(&mut hot, &[0, 1, 2, 3]), Err(FetchError::TooMany(3)));
        // What the refused call would have fetched is not taken for fetched.
        assert_eq!(plan(&mut hot, &[0]).unwrap().sources, [0]);
        for slot in [-2, 28, i64::MAX, i64::MIN] {
            assert_eq!(plan(&mut hot, &[slot]), Err(FetchError::NoRow(slot)));
        }
        let mut found = FetchPlan::default();
        let refused = hot.plan(MOST_LAYERS, &[], &residencies(), SIZE, &mut found);
        assert_eq!(refused, Err(FetchError::Layer(MOST_LAYERS)));
    }
}
