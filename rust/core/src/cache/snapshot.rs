//! The prefix cache in a file: which blocks hold which tokens, and their rows in every cache.
//!
//! A file is a head, then one record a block, parents before children. A record holds a block's tokens and its rows in each part;
//! its sum covers all of them and its place, so a block comes back with its rows in every cache or not at all. Everything is
//! little-endian. A file of another model, layout or block size is refused by what differs, a damaged one by its sum; the cache is
//! then empty, as it was before.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use super::block_hash::{PUBLIC, Space};
use super::block_pool::{BlockPool, BlockTable};
use super::residency::{Residencies, Residency};

const MAGIC: &[u8; 8] = b"hdflblk2";
const NO_PARENT: u32 = u32::MAX;

/// Bytes of the model's name, and of a part's, at most; parts at most.
const MOST_NAME: usize = 4096;
const MOST_PARTS: usize = 4096;

/// Why a snapshot was not written or not taken.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a snapshot of something else.
    #[error("{what}: expected {expected}, the snapshot has {got}")]
    Foreign {
        /// What differs.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What the file says.
        got: String,
    },
    /// It is not what was written.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// An argument is wrong.
    #[error("{name}: expected {expected}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// What it must be.
        expected: String,
    },
    /// Something is cached already.
    #[error("restore: the prefix cache is not empty")]
    NotEmpty,
    /// Nothing is ever cached.
    #[error("prefix caching is off (enable_prefix_caching)")]
    NoCache,
}

/// A cache's memory: `B` is `&[u8]` to be read and `&mut [u8]` to be filled.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a, B> {
    /// Its name.
    pub name: &'a str,
    /// Bytes of a block.
    pub width: usize,
    /// All blocks one after the other; of a latent cache with a host tier, all pages.
    pub bytes: B,
    /// Of a latent cache with a host tier: the host tier's places.
    pub host: Option<B>,
}

/// How many pages and places latent caches have with a host tier, and where which block's rows are.
pub type Tier<R> = Option<(usize, usize, R)>;

type Result<T> = std::result::Result<T, SnapshotError>;

/// Writes the cached blocks of `pool` to a file, which appears whole or not at all; how many.
pub fn write(
    pool: &BlockPool,
    tier: Tier<&Residencies>,
    path: &Path,
    model: &str,
    parts: &[Part<&[u8]>],
) -> Result<usize> {
    let index = pool.index().ok_or(SnapshotError::NoCache)?;
    let sizes = tier.map(|(pages, places, _)| (pages, places));
    let head = head(pool, sizes, model, parts)?;
    let partial = path.with_extension("partial");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    let blocks = index.blocks();
    let written = (|| {
        file.write_all(&head)?;
        let mut sum = Xxh3::new();
        for bytes in [&(blocks.len() as u64).to_le_bytes()[..], &index.hasher().space(KEY_NAME).to_le_bytes()]
        {
            sum.update(bytes);
            file.write_all(bytes)?;
        }
        file.write_all(&sum.digest128().to_le_bytes())?;
        let mut places =
            vec![NO_PARENT; pool.total().min(blocks.iter().max().map_or(0, |&b| b as usize + 1))];
        for (place, &block) in blocks.iter().enumerate() {
            places[block as usize] = place as u32;
            let mut sum = Xxh3::with_seed(place as u64);
            let mut put = |bytes: &[u8]| {
                sum.update(bytes);
                file.write_all(bytes)
            };
            let parent = index.parent(block).map_or(NO_PARENT, |parent| places[parent as usize]);
            let tokens = index.tokens(block);
            put(&parent.to_le_bytes())?;
            put(&index.space(block).to_le_bytes())?;
            put(&(tokens.len() as u32).to_le_bytes())?;
            for token in tokens {
                put(&token.to_le_bytes())?;
            }
            for part in parts {
                let (bytes, at) = match (part.host, tier) {
                    (Some(host), Some((_, _, residencies))) => match residencies.of(block) {
                        // A page that was stored may be read by a step still, but its place is filled.
                        Residency::Dirty(page) => (part.bytes, page),
                        _ => (host, residencies.host_place(block).expect("rows are somewhere")),
                    },
                    _ => (part.bytes, block),
                };
                put(&bytes[at as usize * part.width..][..part.width])?;
            }
            file.write_all(&sum.digest128().to_le_bytes())?;
        }
        file.flush()?;
        file.get_ref().sync_all()?;
        std::fs::rename(&partial, path)
    })();
    if let Err(error) = written {
        // What is left of it is of no use; that it cannot be removed adds nothing to the error.
        let _ = std::fs::remove_file(&partial);
        return Err(error.into());
    }
    Ok(blocks.len())
}

/// Fills an empty cache from a file; how many blocks came back. Those that the pool has no room for stay out, salted ones where
/// salts are hashed with another key, and parts of blocks whose rows another one holds too.
pub fn read(
    pool: &mut BlockPool,
    tier: Tier<&mut Residencies>,
    path: &Path,
    model: &str,
    parts: &mut [Part<&mut [u8]>],
) -> Result<usize> {
    let index = pool.index().ok_or(SnapshotError::NoCache)?;
    if !index.is_empty() {
        return Err(SnapshotError::NotEmpty);
    }
    let sizes = tier.as_ref().map(|&(pages, places, _)| (pages, places));
    let head = head(pool, sizes, model, parts)?;
    let residencies = tier.map(|(_, _, residencies)| residencies);
    let file = File::open(path)?;
    let mut left = file.metadata()?.len();
    let mut file = BufReader::with_capacity(1 << 20, file);
    check_head(&mut file, &head, pool, model)?;
    left = left.saturating_sub(head.len() as u64);
    let mut restored = BlockTable::default();
    let outcome = read_blocks(pool, residencies, &mut file, left, parts, &mut restored);
    let count = restored.len();
    pool.release(&mut restored);
    if outcome.is_err() {
        pool.clear_idle();
    }
    outcome.map(|()| count)
}

/// The salt that stands for the key of the hashes.
const KEY_NAME: &str = "the key of this snapshot's salts";

fn read_blocks(
    pool: &mut BlockPool,
    mut residencies: Option<&mut Residencies>,
    file: &mut impl Read,
    left: u64,
    parts: &mut [Part<&mut [u8]>],
    restored: &mut BlockTable,
) -> Result<()> {
    let (size, key) = {
        let index = pool.index().ok_or(SnapshotError::NoCache)?;
        (index.block_size(), index.hasher().space(KEY_NAME))
    };
    let mut sum = Xxh3::new();
    let count = u64::from_le_bytes(summed(file, &mut sum)?);
    let same_key = u128::from_le_bytes(summed(file, &mut sum)?) == key;
    if sum.digest128() != u128::from_le_bytes(take(file)?) {
        return Err(SnapshotError::Damaged("the sum of its head differs"));
    }
    if count > left / 40 {
        return Err(SnapshotError::Damaged("it ends early"));
    }
    // Where each record's block is now, if it is.
    let mut places: Vec<Option<u32>> = Vec::with_capacity(count as usize);
    let mut rows: Vec<Vec<u8>> = parts.iter().map(|part| vec![0; part.width]).collect();
    let mut tokens: Vec<u32> = Vec::with_capacity(size);
    for place in 0..count {
        let mut sum = Xxh3::with_seed(place);
        let parent = u32::from_le_bytes(summed(file, &mut sum)?);
        let space: Space = u128::from_le_bytes(summed(file, &mut sum)?);
        let filled = u32::from_le_bytes(summed(file, &mut sum)?) as usize;
        if filled == 0 || filled > size {
            return Err(SnapshotError::Damaged("a block has another number of tokens"));
        }
        tokens.clear();
        for _ in 0..filled {
            tokens.push(u32::from_le_bytes(summed(file, &mut sum)?));
        }
        for row in &mut rows {
            read_exact(file, row)?;
            sum.update(row);
        }
        if sum.digest128() != u128::from_le_bytes(take(file)?) {
            return Err(SnapshotError::Damaged("a block's sum differs"));
        }
        let parent = match parent {
            NO_PARENT => Some(None),
            parent => match places.get(parent as usize) {
                None => return Err(SnapshotError::Damaged("a block comes before its parent")),
                Some(found) => found.map(Some),
            },
        };
        let wanted = parent.filter(|_| space == PUBLIC || same_key);
        let block = wanted.and_then(|parent| pool.adopt(parent, space, &tokens, restored));
        places.push(block);
        if let Some(block) = block {
            let place = residencies.as_mut().map(|residencies| {
                // The block may have been given back for a record before this one.
                pool.take_freed().for_each(|block| residencies.forget(block));
                residencies.fill(block)
            });
            for (part, row) in parts.iter_mut().zip(&rows) {
                let (bytes, at) = match (&mut part.host, place) {
                    (Some(host), Some(place)) => (host, place),
                    _ => (&mut part.bytes, block),
                };
                bytes[at as usize * row.len()..][..row.len()].copy_from_slice(row);
            }
        }
    }
    if file.read(&mut [0])? != 0 {
        return Err(SnapshotError::Damaged("it goes on behind its end"));
    }
    Ok(())
}

/// What stands before the blocks: what the rows are of.
fn head<B: std::ops::Deref<Target = [u8]>>(
    pool: &BlockPool,
    tier: Option<(usize, usize)>,
    model: &str,
    parts: &[Part<B>],
) -> Result<Vec<u8>> {
    let argument = |name, expected: String| Err(SnapshotError::Argument { name, expected });
    if model.len() > MOST_NAME {
        return argument("model", format!("a name of at most {MOST_NAME} bytes, got {}", model.len()));
    }
    let block_size = pool.index().ok_or(SnapshotError::NoCache)?.block_size();
    let mut head = MAGIC.to_vec();
    head.extend((block_size as u32).to_le_bytes());
    head.extend((model.len() as u32).to_le_bytes());
    head.extend(model.as_bytes());
    if tier.is_some() && parts.iter().all(|part| part.host.is_none()) {
        return argument("parts", "a host tier's places beside the pages of each latent cache".into());
    }
    let mut listed = Vec::new();
    for part in parts {
        let (name, width) = (part.name, part.width);
        let (total, places) = match (&part.host, tier) {
            (None, _) => (pool.total(), 0),
            (Some(_), Some(sizes)) => sizes,
            (Some(_), None) => {
                return argument("parts", format!("one array for {name:?}: there is no host tier"));
            }
        };
        let sizes =
            [("blocks", Some(&part.bytes), total), ("places of the host tier", part.host.as_ref(), places)];
        for (what, bytes, least) in sizes {
            let bytes = bytes.map_or(0, |bytes| bytes.len());
            if width == 0 || bytes / width < least || name.len() > MOST_NAME {
                let expected = format!("rows of {least} {what}, {name:?} has {bytes} bytes, {width} a block");
                return argument("parts", expected);
            }
        }
        listed.extend((name.len() as u32).to_le_bytes());
        listed.extend(name.as_bytes());
        listed.extend((width as u64).to_le_bytes());
    }
    if parts.is_empty() || parts.len() > MOST_PARTS {
        return argument("parts", format!("1 to {MOST_PARTS} caches, got {}", parts.len()));
    }
    head.extend((parts.len() as u32).to_le_bytes());
    head.extend(listed);
    let sum = xxhash_rust::xxh3::xxh3_128(&head);
    head.extend(sum.to_le_bytes());
    Ok(head)
}

/// Compares a file's head with the one that it must have, and says what differs.
fn check_head(file: &mut impl Read, head: &[u8], pool: &BlockPool, model: &str) -> Result<()> {
    let foreign = |what, expected: String, got: String| Err(SnapshotError::Foreign { what, expected, got });
    let mut got = vec![0; 16];
    read_exact(file, &mut got)?;
    if got[..8] != *MAGIC {
        return Err(SnapshotError::Damaged("it is no snapshot of a prefix cache"));
    }
    let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let size = pool.index().map_or(0, |index| index.block_size());
    if number(&got[8..]) as usize != size {
        return foreign("block_size", size.to_string(), number(&got[8..]).to_string());
    }
    let len = number(&got[12..]) as usize;
    if len > MOST_NAME {
        return Err(SnapshotError::Damaged("its head is too long"));
    }
    let mut name = vec![0; len];
    read_exact(file, &mut name)?;
    if name != model.as_bytes() {
        return foreign("model", format!("{model:?}"), format!("{:?}", String::from_utf8_lossy(&name)));
    }
    let mut rest = vec![0; head.len() - 16 - len];
    read_exact(file, &mut rest)?;
    if rest != head[16 + len..] {
        return foreign("parts", "these caches, of these bytes a block".into(), "others".into());
    }
    Ok(())
}

fn take<const N: usize>(file: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    read_exact(file, &mut bytes)?;
    Ok(bytes)
}

fn summed<const N: usize>(file: &mut impl Read, sum: &mut Xxh3) -> Result<[u8; N]> {
    let bytes = take(file)?;
    sum.update(&bytes);
    Ok(bytes)
}

fn read_exact(file: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    file.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => SnapshotError::Damaged("it ends early"),
        _ => error.into(),
    })
}

#[cfg(test)]
mod tests;
