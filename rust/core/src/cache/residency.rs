//! Where the latent rows of each block are: in a page on the device, in the host tier, or both.
//!
//! Index keys stay on the device under the block's own number; latent rows, five sixths of a block's bytes, need a page only while they
//! are written. The device's pages are a cache of the host tier that is written back late: as long as pages are left nothing moves, so
//! the tier costs nothing until there is more to hold than the device can. A step writes rows of at most `most_written` blocks, and
//! after each plan that many pages can be had for the next one, so pages cannot run out once a request is admitted.
//!
//! What moves in a step counts when the step is done. A step that fails leaves the old copy as the valid one.

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
    /// (page, block of the host tier): first of all.
    pub stores: Vec<[i32; 2]>,
    /// (block of the host tier, page): after the stores.
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
    /// The block in each page; `NONE` when it is free. Grows with the pages in use.
    pages: Vec<u32>,
    /// The last step that wrote, read or loaded a page.
    used: Vec<u64>,
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
    stored: Vec<u32>,
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
            pages: Vec::new(),
            used: Vec::new(),
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
            moves.loads.push([block as i32, page as i32]);
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
                moves.loads.push([source as i32, page]);
                self.counts.loaded_blocks += 1;
            }
        }
    }

    /// Ends a plan: stores as many pages as the next step may need.
    pub fn finish(&mut self, moves: &mut Moves) {
        let rewritten =
            self.written.iter().filter(|&&block| matches!(self.of(block), Residency::Clean(_))).count();
        let mut wanted = self.most_written.saturating_sub(self.free() + self.clean - rewritten);
        for _ in 0..self.pages.len() {
            if wanted == 0 {
                break;
            }
            let page = self.store_hand;
            self.store_hand = (page + 1) % self.pages.len() as u32;
            let block = self.pages[page as usize];
            if block != NONE
                && self.used[page as usize] < self.step
                && self.blocks[block as usize] == Residency::Dirty(page)
            {
                moves.stores.push([page as i32, block as i32]);
                self.stored.push(block);
                wanted -= 1;
            }
        }
        debug_assert_eq!(wanted, 0, "the pages that are not written suffice");
    }

    /// The step is done: what it moved and wrote counts.
    pub fn land(&mut self) {
        for block in self.stored.drain(..) {
            let residency = &mut self.blocks[block as usize];
            if let Residency::Dirty(page) = *residency {
                *residency = Residency::Clean(page);
                self.clean += 1;
                self.counts.stored_blocks += 1;
            }
        }
        for block in self.written.drain(..) {
            let residency = &mut self.blocks[block as usize];
            if let Residency::Clean(page) = *residency {
                *residency = Residency::Dirty(page);
                self.clean -= 1;
            }
        }
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

    /// Checks pages and blocks against each other.
    pub fn check(&self) -> Result<(), String> {
        let mut held = 0;
        let mut clean = 0;
        for (block, &residency) in self.blocks.iter().enumerate() {
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
        if self.blocks.len() <= block as usize {
            self.blocks.resize(block as usize + 1, Residency::Absent);
            self.lives.resize(block as usize + 1, 0);
        }
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

    fn take_page(&mut self) -> u32 {
        if let Some(page) = self.free.pop() {
            return page;
        }
        if self.pages.len() < self.total() {
            self.pages.push(NONE);
            self.used.push(0);
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
