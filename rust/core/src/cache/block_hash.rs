//! The identity of a cached block: a keyed 128-bit hash of its tokens, its namespace and everything before it.
//!
//! SipHash-1-3 with a secret key: who does not know the key cannot aim at a collision. Tokens are compared on every hit all the
//! same, so a collision costs a miss and never gives a wrong row.

use std::hash::{BuildHasher, Hasher, RandomState};

use siphasher::sip128::{Hasher128, SipHasher13};

/// What the chain of a root's children hangs on.
pub const ROOT_HASH: u128 = 0;

/// Where a block stands in the cache: blocks of different spaces are never the same block.
pub type Space = u128;

/// The space without a salt.
pub const PUBLIC: Space = 0;

/// Hashes blocks with one key.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    keyed: SipHasher13,
}

impl BlockHasher {
    /// The hasher of this seed; `None` draws a key that nobody knows.
    pub fn new(seed: Option<u64>) -> Self {
        let keyed = match seed {
            Some(seed) => SipHasher13::new_with_keys(seed, 0x6865_6564_6675_6c21),
            None => {
                // The standard library's source of keys: drawn from the system, then counted up.
                let drawn = || RandomState::new().build_hasher().finish();
                SipHasher13::new_with_keys(drawn(), drawn())
            }
        };
        Self { keyed }
    }

    /// Hash of a full block of these tokens behind the block whose hash is `parent`.
    pub fn block(&self, parent: u128, space: Space, tokens: &[u32]) -> u128 {
        let mut hasher = self.keyed;
        let mut head = [0; 32];
        head[..16].copy_from_slice(&parent.to_le_bytes());
        head[16..].copy_from_slice(&space.to_le_bytes());
        hasher.write(&head);
        hasher.write(bytemuck::cast_slice(tokens));
        hasher.finish128().as_u128()
    }

    /// The space of a salt, never the public one.
    pub fn space(&self, salt: &str) -> Space {
        self.keyed.hash(salt.as_bytes()).as_u128().max(PUBLIC + 1)
    }
}

/// The namespace of a sequence: a salt, and how much of its start stands in the public space all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// The salt's space.
    pub space: Space,
    /// Tokens at the start that anyone may share.
    pub shared_prefix_len: usize,
}

impl Namespace {
    /// The space of a block whose last slot is `end` - 1.
    pub fn of_block(&self, end: usize) -> Space {
        if end <= self.shared_prefix_len { PUBLIC } else { self.space }
    }
}
