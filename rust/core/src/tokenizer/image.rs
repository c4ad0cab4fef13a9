//! The compiled form of a tokenizer: its flat tables in one block of memory, the same in a process and in a cache file.
//!
//! ```text
//! magic, version, byte order │ checksum of all behind it │ offset and length of each section │ sections, 64-byte aligned
//! ```
//!
//! A file is mapped, not read. What it says is checked before it is used: sizes, the checksum, and that the tables fit
//! each other; indices inside the tables are checked on access.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use memmap2::Mmap;
use self_cell::self_cell;
use xxhash_rust::xxh3::xxh3_64;

use crate::tokenizer::bpe::Bpe;
use crate::tokenizer::error::{Result, TokenizerError, invalid};
use crate::tokenizer::file::open;
use crate::tokenizer::key::{Filter, Hasher};
use crate::tokenizer::merges::{Merges, MergesTables};
use crate::tokenizer::vocabulary::{Vocabulary, VocabularyTables};

const MAGIC: [u8; 8] = *b"heedful\0";
/// Rises with every change of the tables or of how they are used.
const VERSION: u32 = 1;
/// Reads differently on a machine of the other byte order.
const BYTE_ORDER: u32 = 0x0102_0304;

/// What lies where.
#[derive(Clone, Copy)]
enum Section {
    Settings,
    Seeds,
    Bytes,
    Starts,
    Kinds,
    Slots,
    SlotFilter,
    Lengths,
    Long,
    LongSlots,
    Characters,
    Pairs,
    PairFilter,
    Parts,
    ByteIds,
    Crossings,
}

const SECTIONS: usize = Section::Crossings as usize + 1;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    byte_order: u32,
    checksum: u64,
    len: u64,
    sections: [[u64; 2]; SECTIONS],
}

/// Where the checksum begins.
const CHECKED_FROM: usize = 24;

/// A cache line: what sections are aligned to.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The block.
pub enum Image {
    /// In memory.
    Owned(Owned),
    /// A mapped file.
    Mapped(Mmap),
}

/// Memory and the number of bytes used.
pub struct Owned {
    lines: Vec<Line>,
    len: usize,
}

impl Image {
    /// Lays out tables and settings, which are JSON.
    pub fn new(settings: &[u8], vocabulary: &VocabularyTables, merges: &MergesTables) -> Self {
        let seeds = [vocabulary.seed, merges.seed];
        let mut parts: [&[u8]; SECTIONS] = [&[]; SECTIONS];
        let mut put = |section: Section, bytes| parts[section as usize] = bytes;
        put(Section::Settings, settings);
        put(Section::Seeds, bytemuck::cast_slice(&seeds));
        put(Section::Bytes, &vocabulary.bytes);
        put(Section::Starts, bytemuck::cast_slice(&vocabulary.starts));
        put(Section::Kinds, &vocabulary.kinds);
        put(Section::Slots, bytemuck::cast_slice(&vocabulary.slots));
        put(Section::SlotFilter, bytemuck::cast_slice(&vocabulary.filter));
        put(Section::Lengths, bytemuck::cast_slice(&vocabulary.lengths));
        put(Section::Long, bytemuck::cast_slice(&vocabulary.long));
        put(Section::LongSlots, bytemuck::cast_slice(&vocabulary.long_slots));
        put(Section::Characters, bytemuck::cast_slice(&vocabulary.characters));
        put(Section::Pairs, bytemuck::cast_slice(&merges.pairs));
        put(Section::PairFilter, bytemuck::cast_slice(&merges.filter));
        put(Section::Parts, bytemuck::cast_slice(&merges.parts));
        put(Section::ByteIds, bytemuck::cast_slice(&merges.byte_ids));
        put(Section::Crossings, bytemuck::cast_slice(&merges.crossings));
        let aligned = |len: usize| len.next_multiple_of(size_of::<Line>());
        let mut end = aligned(size_of::<Header>());
        let sections = parts.map(|part| {
            let start = end;
            end = aligned(start + part.len());
            [start as u64, part.len() as u64]
        });
        let mut lines = vec![Line::zeroed(); end / size_of::<Line>()];
        let block: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        for (part, [start, len]) in parts.iter().zip(sections) {
            block[start as usize..][..len as usize].copy_from_slice(part);
        }
        let mut header = Header {
            magic: MAGIC,
            version: VERSION,
            byte_order: BYTE_ORDER,
            checksum: 0,
            len: end as u64,
            sections,
        };
        block[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(&header));
        header.checksum = xxh3_64(&block[CHECKED_FROM..]);
        block[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(&header));
        Self::Owned(Owned { lines, len: end })
    }

    /// Maps a file.
    pub fn map(path: &Path) -> Result<Self> {
        let (file, _) = open(path)?;
        // SAFETY: the mapping is read-only and private. Another process that shortens or rewrites the file while it is mapped
        // breaks the promise that memory does not change; `save` therefore replaces files and never rewrites them.
        let map = unsafe { Mmap::map(&file) }
            .map_err(|source| TokenizerError::Io { path: path.display().to_string(), source })?;
        Ok(Self::Mapped(map))
    }

    /// Copies bytes that a file or a pickle held.
    pub fn copy(bytes: &[u8]) -> Self {
        let mut lines = vec![Line::zeroed(); bytes.len().div_ceil(size_of::<Line>())];
        bytemuck::cast_slice_mut(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Self::Owned(Owned { lines, len: bytes.len() })
    }

    /// The whole block: the contents of a cache file.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Owned(owned) => &bytemuck::cast_slice(&owned.lines)[..owned.len],
            Self::Mapped(map) => map,
        }
    }

    /// Writes the block to a file, which is there whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let shown = path.display().to_string();
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let unfinished = path.with_file_name(name);
        let write = || {
            let mut file = File::options().write(true).create_new(true).open(&unfinished)?;
            file.write_all(self.bytes())?;
            file.sync_all()?;
            std::fs::rename(&unfinished, path)
        };
        write().map_err(|source| {
            // What is left of the attempt is of no use; that it cannot be removed is not the news.
            let _ = std::fs::remove_file(&unfinished);
            TokenizerError::Io { path: shown, source }
        })
    }

    fn header(&self, place: &str) -> Result<Header> {
        let bytes = self.bytes();
        let refuse = |expected: &str, got: String| Err(invalid(place, expected, got));
        let Some(header) = bytes.get(..size_of::<Header>()) else {
            return refuse("a tokenizer cache file", format!("{} bytes", bytes.len()));
        };
        let header: Header = bytemuck::pod_read_unaligned(header);
        if header.magic != MAGIC {
            return refuse("a tokenizer cache file", "another kind of file".into());
        }
        if (header.version, header.byte_order) != (VERSION, BYTE_ORDER) {
            return refuse(
                "a cache file of this version and byte order",
                format!("version {}", header.version),
            );
        }
        if header.len != bytes.len() as u64 {
            return refuse("a whole file", format!("{} bytes of {}", bytes.len(), header.len));
        }
        Ok(header)
    }

    /// The header of a block that is undamaged.
    fn checked_header(&self, place: &str) -> Result<Header> {
        let header = self.header(place)?;
        if xxh3_64(&self.bytes()[CHECKED_FROM..]) == header.checksum {
            return Ok(header);
        }
        Err(invalid(place, "an undamaged file", "another checksum"))
    }

    fn section<T: AnyBitPattern + NoUninit>(
        &self,
        header: &Header,
        section: Section,
        place: &str,
    ) -> Result<&[T]> {
        let [start, len] = header.sections[section as usize];
        let range = start as usize..(start as usize).saturating_add(len as usize);
        self.bytes().get(range).and_then(|bytes| bytemuck::try_cast_slice(bytes).ok()).ok_or_else(|| {
            invalid(place, "sections inside the file", format!("section {} of {len} bytes", section as usize))
        })
    }

    /// The tables, if they fit each other.
    fn bpe(&self, place: &str) -> Result<Bpe<'_>> {
        let header = self.checked_header(place)?;
        let seeds: &[u64] = self.section(&header, Section::Seeds, place)?;
        let &[vocabulary_seed, merges_seed] = seeds else {
            return Err(invalid(place, "two seeds", seeds.len().to_string()));
        };
        let vocabulary = Vocabulary {
            bytes: self.section(&header, Section::Bytes, place)?,
            starts: self.section(&header, Section::Starts, place)?,
            kinds: self.section(&header, Section::Kinds, place)?,
            slots: self.section(&header, Section::Slots, place)?,
            filter: Filter(self.section(&header, Section::SlotFilter, place)?),
            lengths: self.section(&header, Section::Lengths, place)?,
            long: self.section(&header, Section::Long, place)?,
            long_slots: self.section(&header, Section::LongSlots, place)?,
            characters: self.section(&header, Section::Characters, place)?,
            hasher: Hasher::new(vocabulary_seed),
        };
        let merges = Merges {
            pairs: self.section(&header, Section::Pairs, place)?,
            filter: Filter(self.section(&header, Section::PairFilter, place)?),
            parts: self.section(&header, Section::Parts, place)?,
            byte_ids: self.section(&header, Section::ByteIds, place)?,
            crossings: self.section(&header, Section::Crossings, place)?,
            hasher: Hasher::new(merges_seed),
        };
        if !(vocabulary.fits() && merges.fit(vocabulary.len())) {
            return Err(invalid(place, "tables that fit each other", "others"));
        }
        Ok(Bpe { vocabulary, merges })
    }
}

self_cell!(
    struct Cell {
        owner: Image,
        #[covariant]
        dependent: Bpe,
    }
);

/// An image and the tables in it.
pub struct Compiled(Cell);

impl Compiled {
    /// Checks an image; `place` names it in errors.
    pub fn new(image: Image, place: &str) -> Result<Self> {
        Cell::try_new(image, |image| image.bpe(place)).map(Self)
    }

    /// The model.
    #[inline]
    pub fn bpe(&self) -> &Bpe<'_> {
        self.0.borrow_dependent()
    }

    /// The settings, which are JSON.
    pub fn settings(&self, place: &str) -> Result<&[u8]> {
        let image = self.image();
        image.section(&image.header(place)?, Section::Settings, place)
    }

    /// The block of memory.
    pub fn image(&self) -> &Image {
        self.0.borrow_owner()
    }
}
