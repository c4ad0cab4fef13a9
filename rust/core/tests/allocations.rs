//! Scoring and selection allocate nothing once an arena has seen a call like it.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use heedful_core::attention::batch::PagedBatch;
use heedful_core::attention::index::{IndexArena, IndexQueries, Indexer};
use heedful_core::cache::layout::index_page_bytes;
use heedful_core::cache::pages::{Cache, Layout as PageLayout, Pages};
use heedful_core::elements::Elements;
use heedful_core::simd::Level;
use heedful_core::threads::Arena;
use heedful_core::topk::{Scores, Selector, top_k};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's own condition.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's own condition.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_call_like_an_earlier_one_allocates_nothing() {
    let (heads, dim, blocks) = (64, 128, 320);
    let keys = 64 * blocks;
    let bytes = |count: usize, seed: usize| -> Vec<i8> {
        (0..count).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50) as i8).collect()
    };
    let (q, k) = (bytes(40 * heads * dim, 1), bytes(keys * dim, 2));
    let (weights, scales) = (vec![1.0; 40 * heads], vec![0.5; keys]);
    let pages = bytes(blocks * index_page_bytes(dim), 3);
    let codes: Vec<u8> = pages.iter().map(|&x| (x & 0x77) as u8).collect();
    let table: Vec<i32> = (0..blocks as i32).collect();
    let row: Vec<f32> = k.iter().take(keys).map(|&x| f32::from(x)).collect();
    let (index_arena, arena) = (IndexArena::new(), Arena::<Selector>::new());
    let (mut scores, mut chosen) = (vec![0.0; 40 * keys], vec![0; 40 * 2048]);
    let mut calls = |count: usize| {
        let index = IndexQueries {
            values: Elements::I8(&q[..count * heads * dim]),
            weights: &weights[..count * heads],
            count,
            heads,
            dim,
        };
        let lens = [keys as i32];
        let starts = [0, count as i32];
        let batch = PagedBatch { block_tables: &table, seq_lens: &lens, query_start_loc: &starts };
        let cache = |pages| Cache::new(pages, PageLayout::Index(dim), blocks).unwrap();
        for indexer in [
            Indexer::contiguous(Level::best(), index, Elements::I8(&k), keys, Some(&scales), None).unwrap(),
            Indexer::paged(Level::best(), index, cache(Pages::Int8(&pages)), batch).unwrap(),
            Indexer::paged(Level::best(), index, cache(Pages::Fp8(&codes)), batch).unwrap(),
        ] {
            indexer.scores(keys, &mut scores[..count * keys], &index_arena).unwrap();
            indexer.top_k(2048, true, &mut chosen[..count * 2048], &index_arena).unwrap();
            indexer.top_k(2048, false, &mut chosen[..count * 2048], &index_arena).unwrap();
        }
        for sorted in [true, false] {
            let rows = Scores { values: Elements::F32(&row), rows: 1, columns: keys, lengths: None };
            top_k(Level::best(), rows, 2048, sorted, &mut chosen[..2048], &arena).unwrap();
        }
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        for count in [1, 40] {
            (0..4).for_each(|_| calls(count)); // every piece of memory has been used for everything
            let before = COUNT.load(Ordering::Relaxed);
            calls(count);
            assert_eq!(COUNT.load(Ordering::Relaxed) - before, 0, "{count} queries");
        }
    });
}
