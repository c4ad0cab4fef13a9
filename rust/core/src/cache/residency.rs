//! Where the latent rows of each block are: in a page on the device, in the host tier, or both.
//!
//! Index keys stay on the device under the block's own number; latent rows, five sixths of a block's bytes, need a page only while they
//! are written. The device's pages are a cache of the host tier that is written back late: as long as pages are left nothing moves, so
//! the tier costs nothing until there is more to hold than the device can. A step writes rows of at most `most_written` blocks, and
//! after each plan that many pages can be had for the next one, so pages cannot run out once a request is admitted.
//!
//! What moves in a step counts when the step is done. A step that fails leaves the old copy as the valid one.
//!
//! A block has a place in the host tier from its first store on. Places are counted: rows that are kept for a preempted request
//! use the place beside the block, and stay when the block is free or written anew.

const NONE: u32 = u32::MAX;

/// Where a block's rows can be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// Nowhere: the block holds no rows.
    #[default]
    Absent,
    /// In a device page alone.
    Dirty(u32),
    /// In a device page and in the host tier.
    Clean(u32),
    /// In the host tier alone.
    Host,
}

/// What a plan moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// (page, place in the host tier): first of all.
    pub stores: Vec<[i32; 2]>,
    /// (place in the host tier, page): after the stores.
    pub loads: Vec<[i32; 2]>,
    /// (source page, target page): after the loads.
    pub copies: Vec<[i32; 2]>,
}

impl Moves {
    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.stores.clear();
        self.loads.clear();
        self.copies.clear();
    }
}

/// What moved so far, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MoveCounts {
    /// Pages written to the host tier.
    pub stored_blocks: u64,
    /// Pages read from the host tier.
    pub loaded_blocks: u64,
    /// Pages given up because the host tier has their rows.
    pub dropped_pages: u64,
}

/// Residency of all blocks of a pool.
#[derive(Debug)]
pub struct Residencies {
    /// By block; grows with the blocks in use.
    blocks: Vec<Residency>,
    /// Lives of a block so far: rows fetched in an earlier one are not its own.
    lives: Vec<u32>,
    /// The place of each block in the host tier; `NONE` before its first store.
    places: Vec<u32>,
    /// Blocks and kept rows that use a place, by place; grows with the places in use.
    place_users: Vec<u32>,
    free_places: Vec<u32>,
    /// The block in each page; `NONE` when it is free. Grows with the pages in use.
    pages: Vec<u32>,
    /// The last step that wrote, read or loaded a page.
    used: Vec<u64>,
    /// The last step that stored a page.
    stored_in: Vec<u64>,
    free: Vec<u32>,
    total: u32,
    most_written: usize,
    clean: usize,
    /// Where the search for the next page to drop, and for the next one to store, goes on.
    drop_hand: u32,
    store_hand: u32,
    /// The step that is planned.
    step: u64,
    /// Blocks whose rows are written, and stored, in the step in flight.
    written: Vec<u32>,
    /// With the life that is stored: a block whose rows are kept may be given away in the same step.
    stored: Vec<(u32, u32)>,
    loaded: Vec<u32>,
    counts: MoveCounts,
}

impl Residencies {
    /// `total` pages on the device; a step writes to `most_written` blocks at most, which is at most half of the pages.
    pub fn new(total: u32, most_written: usize) -> Self {
        debug_assert!(2 * most_written <= total as usize);
        Self {
            blocks: Vec::new(),
            lives: Vec::new(),
            places: Vec::new(),
            place_users: Vec::new(),
            free_places: Vec::new(),
            pages: Vec::new(),
            used: Vec::new(),
            stored_in: Vec::new(),
            free: Vec::new(),
            total,
            most_written,
            clean: 0,
            drop_hand: 0,
            store_hand: 0,
            step: 0,
            written: Vec::new(),
            stored: Vec::new(),
            loaded: Vec::new(),
            counts: MoveCounts::default(),
        }
    }

    /// Pages on the device.
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Pages that hold nothing.
    pub fn free(&self) -> usize {
        self.free.len() + self.total() - self.pages.len()
    }

    /// Pages whose rows the host tier has too, so that they can be had.
    pub fn clean(&self) -> usize {
        self.clean
    }

    /// What moved so far.
    pub fn counts(&self) -> MoveCounts {
        self.counts
    }

    /// Where a block's rows are.
    #[inline]
    pub fn of(&self, block: u32) -> Residency {
        self.blocks.get(block as usize).copied().unwrap_or_default()
    }

    /// A number that no earlier sequence in this block had.
    pub fn life(&self, block: u32) -> u32 {
        self.lives.get(block as usize).copied().unwrap_or_default()
    }

    /// The place of a block's rows in the host tier, if it has one. Only that of a clean block or one on the host is filled.
    #[inline]
    pub fn host_place(&self, block: u32) -> Option<u32> {
        self.places.get(block as usize).copied().filter(|&place| place != NONE)
    }

    /// The device page of a block's rows.
    #[inline]
    pub fn page(&self, block: u32) -> Option<u32> {
        match self.of(block) {
            Residency::Dirty(page) | Residency::Clean(page) => Some(page),
            Residency::Absent | Residency::Host => None,
        }
    }

    /// A block is free: its rows are nobody's.
    pub fn forget(&mut self, block: u32) {
        let Some(residency) = self.blocks.get_mut(block as usize) else { return };
        let was = std::mem::take(residency);
        self.lives[block as usize] = self.lives[block as usize].wrapping_add(1);
        self.leave_place(block);
        if let Residency::Dirty(page) | Residency::Clean(page) = was {
            self.clean -= usize::from(was == Residency::Clean(page));
            self.pages[page as usize] = NONE;
            self.free.push(page);
        }
    }

    /// Begins a plan.
    pub fn begin(&mut self, step: u64, moves: &mut Moves) {
        self.step = step;
        moves.clear();
        self.written.clear();
        self.stored.clear();
        self.loaded.clear();
    }

    /// A block is written in this step: it gets a page. `kept` says whether rows that it holds already must be in it.
    pub fn write(&mut self, block: u32, kept: bool, moves: &mut Moves) {
        let (page, loaded) = self.place(block);
        if loaded && kept {
            moves.loads.push([self.places[block as usize] as i32, page as i32]);
            self.loaded.push(block);
            self.counts.loaded_blocks += 1;
        }
        self.written.push(block);
    }

    /// A block's rows are copied into another one's page, which `write` gave it.
    pub fn copy(&mut self, source: u32, target: u32, moves: &mut Moves) {
        let page = self.page(target).expect("a target is written") as i32;
        match self.page(source) {
            Some(from) => {
                self.used[from as usize] = self.step;
                moves.copies.push([from as i32, page]);
            }
            None => {
                moves.loads.push([self.places[source as usize] as i32, page]);
                self.counts.loaded_blocks += 1;
            }
        }
    }

    /// Keeps the rows of a block, as they are before this step, in the host tier: the place, which stays until `let_go`. Comes before
    /// the step's writes.
    pub fn keep(&mut self, block: u32, moves: &mut Moves) -> u32 {
        if let Residency::Dirty(page) = self.of(block)
            && self.stored_in[page as usize] < self.step
        {
            self.store(block, page, moves);
        }
        let place = self.places[block as usize];
        self.place_users[place as usize] += 1;
        place
    }

    /// Ends the use of a place that `keep` gave.
    pub fn let_go(&mut self, place: u32) {
        let users = &mut self.place_users[place as usize];
        *users -= 1;
        if *users == 0 {
            self.free_places.push(place);
        }
    }

    /// A block that holds nothing gets the rows that are kept in a place.
    pub fn adopt(&mut self, block: u32, place: u32) {
        self.make_room(block);
        debug_assert!(self.of(block) == Residency::Absent && self.places[block as usize] == NONE);
        self.blocks[block as usize] = Residency::Host;
        self.places[block as usize] = place;
        self.place_users[place as usize] += 1;
    }

    /// A block that holds nothing gets rows that somebody puts into the host tier: their place.
    pub fn fill(&mut self, block: u32) -> u32 {
        self.make_room(block);
        debug_assert_eq!(self.of(block), Residency::Absent);
        self.blocks[block as usize] = Residency::Host;
        self.own_place(block)
    }

    /// Ends a plan: stores as many pages as the next step may need.
    pub fn finish(&mut self, moves: &mut Moves) {
        let rewritten =
            self.written.iter().filter(|&&block| matches!(self.of(block), Residency::Clean(_))).count();
        let kept = self.stored.iter().filter(|&&(block, life)| {
            let page = self.page(block).filter(|_| self.life(block) == life);
            page.is_some_and(|page| self.used[page as usize] < self.step)
        });
        let mut wanted =
            self.most_written.saturating_sub(self.free() + self.clean - rewritten + kept.count());
        for _ in 0..self.pages.len() {
            if wanted == 0 {
                break;
            }
            let page = self.store_hand;
            self.store_hand = (page + 1) % self.pages.len() as u32;
            let block = self.pages[page as usize];
            if block != NONE
                && self.used[page as usize] < self.step
                && self.stored_in[page as usize] < self.step
                && self.blocks[block as usize] == Residency::Dirty(page)
            {
                self.store(block, page, moves);
                wanted -= 1;
            }
        }
        debug_assert_eq!(wanted, 0, "the pages that are not written suffice");
    }

    /// The step is done: what it moved and wrote counts.
    pub fn land(&mut self) {
        for (block, life) in self.stored.drain(..) {
            let residency = &mut self.blocks[block as usize];
            if self.lives[block as usize] != life {
                continue;
            }
            if let Residency::Dirty(page) = *residency {
                *residency = Residency::Clean(page);
                self.clean += 1;
                self.counts.stored_blocks += 1;
            }
        }
        let mut written = std::mem::take(&mut self.written);
        for block in written.drain(..) {
            let residency = &mut self.blocks[block as usize];
            if let Residency::Clean(page) = *residency {
                *residency = Residency::Dirty(page);
                self.clean -= 1;
                if self.place_users[self.places[block as usize] as usize] > 1 {
                    self.leave_place(block); // the rows that are kept there must not be stored over
                }
            }
        }
        self.written = written;
        self.loaded.clear();
    }

    /// The step failed: nothing of it counts.
    pub fn abandon(&mut self) {
        self.stored.clear();
        self.written.clear();
        for block in std::mem::take(&mut self.loaded) {
            // The page was never filled; the host tier's rows are valid still.
            if let Residency::Clean(page) = self.of(block) {
                self.drop_page(block, page);
            }
        }
    }

    /// Checks pages, places and blocks against each other; `kept` are the places that `keep` gave and nobody let go.
    pub fn check(&self, kept: impl Iterator<Item = u32>) -> Result<(), String> {
        let mut users = vec![0; self.place_users.len()];
        let places = self.places.iter().copied().filter(|&place| place != NONE);
        places.chain(kept).for_each(|place| users[place as usize] += 1);
        if users != self.place_users {
            return Err("users of places in the host tier are counted wrongly".into());
        }
        if users.iter().filter(|&&users| users == 0).count() != self.free_places.len() {
            return Err("a place in the host tier is lost".into());
        }
        let mut held = 0;
        let mut clean = 0;
        for (block, &residency) in self.blocks.iter().enumerate() {
            if matches!(residency, Residency::Clean(_) | Residency::Host) && self.places[block] == NONE {
                return Err(format!("block {block} has no place in the host tier"));
            }
            if let Residency::Dirty(page) | Residency::Clean(page) = residency {
                held += 1;
                clean += usize::from(residency == Residency::Clean(page));
                if self.pages.get(page as usize) != Some(&(block as u32)) {
                    return Err(format!("page {page} is not block {block}'s"));
                }
            }
        }
        if held + self.free() != self.total() || clean != self.clean {
            return Err(format!("{held} pages are held, {clean} of them clean, and counted otherwise"));
        }
        match self.free.iter().find(|&&page| self.pages[page as usize] != NONE) {
            Some(page) => Err(format!("page {page} is free and held")),
            None => Ok(()),
        }
    }

    /// The page of a block that is written, and whether it was got for rows that the host tier has.
    fn place(&mut self, block: u32) -> (u32, bool) {
        self.make_room(block);
        if let Some(page) = self.page(block) {
            self.used[page as usize] = self.step;
            return (page, false);
        }
        let page = self.take_page();
        self.pages[page as usize] = block;
        self.used[page as usize] = self.step;
        let on_host = self.blocks[block as usize] == Residency::Host;
        self.blocks[block as usize] = if on_host { Residency::Clean(page) } else { Residency::Dirty(page) };
        self.clean += usize::from(on_host);
        (page, on_host)
    }

    fn make_room(&mut self, block: u32) {
        if self.blocks.len() <= block as usize {
            self.blocks.resize(block as usize + 1, Residency::Absent);
            self.lives.resize(block as usize + 1, 0);
            self.places.resize(block as usize + 1, NONE);
        }
    }

    /// Stores a dirty page in this step.
    fn store(&mut self, block: u32, page: u32, moves: &mut Moves) {
        let place = self.own_place(block);
        moves.stores.push([page as i32, place as i32]);
        self.stored.push((block, self.lives[block as usize]));
        self.stored_in[page as usize] = self.step;
    }

    /// The place of a block, a new one where it has none.
    fn own_place(&mut self, block: u32) -> u32 {
        if let Some(place) = self.host_place(block) {
            return place;
        }
        let place = self.free_places.pop().unwrap_or_else(|| {
            self.place_users.push(0);
            self.place_users.len() as u32 - 1
        });
        self.place_users[place as usize] = 1;
        self.places[block as usize] = place;
        place
    }

    fn leave_place(&mut self, block: u32) {
        let place = std::mem::replace(&mut self.places[block as usize], NONE);
        if place != NONE {
            self.let_go(place);
        }
    }

    fn take_page(&mut self) -> u32 {
        if let Some(page) = self.free.pop() {
            return page;
        }
        if self.pages.len() < self.total() {
            self.pages.push(NONE);
            self.used.push(0);
            self.stored_in.push(0);
            return self.pages.len() as u32 - 1;
        }
        for _ in 0..self.pages.len() {
            let page = self.drop_hand;
            self.drop_hand = (page + 1) % self.pages.len() as u32;
            let block = self.pages[page as usize];
            if self.used[page as usize] < self.step && self.of(block) == Residency::Clean(page) {
                self.drop_page(block, page);
                return self.free.pop().expect("one was dropped");
            }
        }
        unreachable!("the last plan left clean pages for this one")
    }

    /// Gives a page up whose rows the host tier has.
    fn drop_page(&mut self, block: u32, page: u32) {
        self.blocks[block as usize] = Residency::Host;
        self.pages[page as usize] = NONE;
        self.free.push(page);
        self.clean -= 1;
        self.counts.dropped_pages += 1;
    }
}

#[cfg(test)]
mod tests;
