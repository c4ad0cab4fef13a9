use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::Found;
use super::super::block_hash::{BlockHasher, Namespace};
use super::super::eviction::{EvictionPolicy, Evictor};
use super::super::prefix_index::PrefixIndex;
use super::super::residency::Moves;
use super::*;

const SIZE: usize = 4;
const WIDTHS: [usize; 2] = [6, 3];

/// A file of its own for each test, gone when it ends.
struct File(PathBuf);

impl File {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("heedful-snapshot-{}-{number}", std::process::id())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // A test that failed before it wrote has none.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn pool(blocks: u32) -> BlockPool {
    let index = PrefixIndex::new(SIZE, BlockHasher::new(Some(1)), None, 8);
    BlockPool::with_cache(blocks, index, Evictor::new(EvictionPolicy::Lru, blocks))
}

const PUBLIC_SPACE: Namespace = Namespace { space: PUBLIC, shared_prefix_len: 0 };

/// Caches a sequence; its blocks.
fn cache(pool: &mut BlockPool, tokens: &[u32]) -> Vec<u32> {
    let mut table = BlockTable::default();
    assert!(pool.grow(&mut table, tokens.len().div_ceil(SIZE)));
    for (place, piece) in tokens.chunks(SIZE).enumerate() {
        pool.cache_block(&mut table, place, PUBLIC_SPACE, piece);
    }
    let blocks = table.blocks().to_vec();
    pool.release(&mut table);
    blocks
}

/// Rows of a part, other bytes at each place.
fn rows(blocks: usize, part: usize) -> Vec<u8> {
    (0..blocks * WIDTHS[part]).map(|place| (place * 7 + part * 101 + place / 50) as u8).collect()
}

fn row(bytes: &[u8], part: usize, at: u32) -> &[u8] {
    &bytes[at as usize * WIDTHS[part]..][..WIDTHS[part]]
}

fn find(pool: &BlockPool, tokens: &[u32]) -> Vec<u32> {
    let mut found = Found::default();
    pool.find(PUBLIC_SPACE, tokens, &mut found);
    found.full
}

fn part<B>(number: usize, bytes: B) -> Part<'static, B> {
    Part { name: ["latent", "index"][number], width: WIDTHS[number], bytes, host: None }
}

const TOKENS: [u32; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

#[test]
fn blocks_come_back_with_their_rows_in_every_part() {
    let (file, mut before) = (File::new(), pool(8));
    let blocks = cache(&mut before, &TOKENS);
    let saved = [rows(8, 0), rows(8, 1)];
    let parts = [part(0, &saved[0][..]), part(1, &saved[1][..])];
    assert_eq!(write(&before, None, &file.0, "m", &parts).unwrap(), 3);

    let mut after = pool(5);
    cache(&mut after, &[0]);
    after.clear_idle();
    let mut read_back = [vec![0; 5 * 6], vec![0; 5 * 3]];
    let [latent, keys] = &mut read_back;
    let count = read(&mut after, None, &file.0, "m", &mut [part(0, &mut latent[..]), part(1, &mut keys[..])]);
    assert_eq!(count.unwrap(), 3);
    let found = find(&after, &TOKENS);
    assert_eq!(found.len(), 2);
    for (&new, &old) in found.iter().zip(&blocks) {
        for part in 0..2 {
            assert_eq!(row(&read_back[part], part, new), row(&saved[part], part, old));
        }
    }
    assert_eq!(after.check(std::iter::empty()), Ok(()));
}

#[test]
fn with_a_host_tier_rows_are_taken_from_where_they_are_and_put_on_the_host() {
    let (file, mut before) = (File::new(), pool(8));
    let blocks = cache(&mut before, &TOKENS);
    // Two pages for three blocks: the first one's rows are on the host alone, the last one's on the device alone.
    let (mut residencies, mut moves) = (Residencies::new(2, 1), Moves::default());
    for (step, &block) in (1..).zip(&blocks) {
        residencies.begin(step, &mut moves);
        residencies.write(block, false, &mut moves);
        residencies.finish(&mut moves);
        residencies.land();
    }
    assert_eq!(residencies.of(blocks[0]), Residency::Host);
    assert!(matches!(residencies.of(blocks[2]), Residency::Dirty(_)));
    let (pages, host, keys) = (rows(2, 0), rows(8, 0), rows(8, 1));
    let parts = [Part { host: Some(&host[..]), ..part(0, &pages[..]) }, part(1, &keys[..])];
    assert_eq!(write(&before, Some((2, 8, &residencies)), &file.0, "m", &parts).unwrap(), 3);

    // Back into a pool with a tier: all on the host.
    let (mut after, mut homes) = (pool(8), Residencies::new(2, 1));
    let (mut new_pages, mut new_host, mut new_keys) = (vec![0; 12], vec![0; 48], vec![0; 24]);
    let mut parts =
        [Part { host: Some(&mut new_host[..]), ..part(0, &mut new_pages[..]) }, part(1, &mut new_keys[..])];
    assert_eq!(read(&mut after, Some((2, 8, &mut homes)), &file.0, "m", &mut parts).unwrap(), 3);
    assert!(new_pages.iter().all(|&byte| byte == 0));
    // And into one without: the file is the same.
    let (mut plain, mut flat, mut flat_keys) = (pool(8), vec![0; 48], vec![0; 24]);
    let mut parts = [part(0, &mut flat[..]), part(1, &mut flat_keys[..])];
    assert_eq!(read(&mut plain, None, &file.0, "m", &mut parts).unwrap(), 3);
    for (place, &old) in blocks[..2].iter().enumerate() {
        let expected = match residencies.of(old) {
            Residency::Dirty(page) => row(&pages, 0, page),
            _ => row(&host, 0, residencies.host_place(old).unwrap()),
        };
        let new = find(&after, &TOKENS)[place];
        assert_eq!(homes.of(new), Residency::Host);
        assert_eq!(row(&new_host, 0, homes.host_place(new).unwrap()), expected);
        assert_eq!(row(&new_keys, 1, new), row(&keys, 1, old));
        assert_eq!(row(&flat, 0, find(&plain, &TOKENS)[place]), expected);
    }
}

#[test]
fn a_file_that_is_damaged_anywhere_leaves_the_cache_empty() {
    let (file, mut before) = (File::new(), pool(8));
    cache(&mut before, &TOKENS);
    let saved = [rows(8, 0), rows(8, 1)];
    let parts = [part(0, &saved[0][..]), part(1, &saved[1][..])];
    write(&before, None, &file.0, "m", &parts).unwrap();
    let good = std::fs::read(&file.0).unwrap();
    for place in 0..good.len() {
        for bad in [good[..place].to_vec(), [&good[..place], &[good[place] ^ 1], &good[place + 1..]].concat()]
        {
            std::fs::write(&file.0, bad).unwrap();
            let (mut after, mut latent, mut keys) = (pool(8), vec![0; 48], vec![0; 24]);
            let read =
                read(&mut after, None, &file.0, "m", &mut [part(0, &mut latent[..]), part(1, &mut keys[..])]);
            assert!(read.is_err(), "byte {place}");
            assert_eq!((after.idle(), after.free()), (0, 8), "byte {place}");
        }
    }
}

#[test]
fn what_does_not_belong_together_is_refused_by_name() {
    let (file, before) = (File::new(), pool(8));
    let (latent, keys) = (rows(8, 0), rows(8, 1));
    let refused = |tier: Tier<&Residencies>, parts: &[Part<&[u8]>]| {
        write(&before, tier, &file.0, "m", parts).unwrap_err().to_string()
    };
    let residencies = Residencies::new(2, 1);
    let both = Part { host: Some(&latent[..]), ..part(0, &latent[..]) };
    assert_eq!(refused(None, &[]), "parts: expected 1 to 4096 caches, got 0");
    assert_eq!(refused(None, &[both]), "parts: expected one array for \"latent\": there is no host tier");
    assert_eq!(
        refused(Some((2, 8, &residencies)), &[part(0, &latent[..])]),
        "parts: expected a host tier's places beside the pages of each latent cache"
    );
    assert_eq!(
        refused(Some((2, 9, &residencies)), &[both]),
        "parts: expected rows of 9 places of the host tier, \"latent\" has 48 bytes, 6 a block"
    );
    assert_eq!(
        refused(None, &[part(1, &keys[1..])]),
        "parts: expected rows of 8 blocks, \"index\" has 23 bytes, 3 a block"
    );
    assert!(!file.0.exists());
}
