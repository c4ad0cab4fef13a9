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

const MAGIC: &[u8; 8] = b"hdflblk1";
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
    /// Latent rows are in two places.
    #[error("snapshots with a host tier are not supported (num_latent_blocks)")]
    HostTier,
}

/// A cache's memory: a name, the bytes of a block, and all blocks one after the other.
pub type Part<'a> = (&'a str, usize, &'a [u8]);

/// The same, to be filled.
pub type PartMut<'a> = (&'a str, usize, &'a mut [u8]);

type Result<T> = std::result::Result<T, SnapshotError>;

/// Writes the cached blocks of `pool` to a file, which appears whole or not at all; how many.
pub fn write(pool: &BlockPool, path: &Path, model: &str, parts: &[Part]) -> Result<usize> {
    let index = pool.index().ok_or(SnapshotError::NoCache)?;
    let head = head(pool, model, parts.iter().map(|(name, width, bytes)| (*name, *width, bytes.len())))?;
    let partial = path.with_extension("partial");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    let blocks = index.blocks();
    let written = (|| {
        file.write_all(&head)?;
        file.write_all(&(blocks.len() as u64).to_le_bytes())?;
        file.write_all(&index.hasher().space(KEY_NAME).to_le_bytes())?;
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
            for (_, width, bytes) in parts {
                put(&bytes[block as usize * width..][..*width])?;
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
pub fn read(pool: &mut BlockPool, path: &Path, model: &str, parts: &mut [PartMut]) -> Result<usize> {
    let index = pool.index().ok_or(SnapshotError::NoCache)?;
    if !index.is_empty() {
        return Err(SnapshotError::NotEmpty);
    }
    let head = head(pool, model, parts.iter().map(|(name, width, bytes)| (*name, *width, bytes.len())))?;
    let file = File::open(path)?;
    let mut left = file.metadata()?.len();
    let mut file = BufReader::with_capacity(1 << 20, file);
    check_head(&mut file, &head, pool, model)?;
    left = left.saturating_sub(head.len() as u64);
    let mut restored = BlockTable::default();
    let outcome = read_blocks(pool, &mut file, left, parts, &mut restored);
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
    file: &mut impl Read,
    left: u64,
    parts: &mut [PartMut],
    restored: &mut BlockTable,
) -> Result<()> {
    let (size, key) = {
        let index = pool.index().ok_or(SnapshotError::NoCache)?;
        (index.block_size(), index.hasher().space(KEY_NAME))
    };
    let count = u64::from_le_bytes(take(file)?);
    let same_key = u128::from_le_bytes(take(file)?) == key;
    if count > left / 40 {
        return Err(SnapshotError::Damaged("it ends early"));
    }
    // Where each record's block is now, if it is.
    let mut places: Vec<Option<u32>> = Vec::with_capacity(count as usize);
    let mut rows: Vec<Vec<u8>> = parts.iter().map(|(_, width, _)| vec![0; *width]).collect();
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
            for ((_, _, bytes), row) in parts.iter_mut().zip(&rows) {
                bytes[block as usize * row.len()..][..row.len()].copy_from_slice(row);
            }
        }
    }
    if file.read(&mut [0])? != 0 {
        return Err(SnapshotError::Damaged("it goes on behind its end"));
    }
    Ok(())
}

/// What stands before the blocks: what the rows are of.
fn head<'a>(
    pool: &BlockPool,
    model: &str,
    parts: impl Iterator<Item = (&'a str, usize, usize)>,
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
    let mut count = 0u32;
    let mut listed = Vec::new();
    for (name, width, bytes) in parts {
        let total = pool.total();
        if width == 0 || bytes / width < total || name.len() > MOST_NAME {
            return argument(
                "parts",
                format!("rows of {total} blocks, {name:?} has {bytes} bytes, {width} a block"),
            );
        }
        count += 1;
        listed.extend((name.len() as u32).to_le_bytes());
        listed.extend(name.as_bytes());
        listed.extend((width as u64).to_le_bytes());
    }
    if count == 0 || count as usize > MOST_PARTS {
        return argument("parts", format!("1 to {MOST_PARTS} caches, got {count}"));
    }
    head.extend(count.to_le_bytes());
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
