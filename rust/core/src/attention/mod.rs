//! Indexer scoring, sparse attention and dense attention on the CPU.
