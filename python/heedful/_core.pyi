"""Types of the compiled module `heedful._core` (checked against it in tests/test_stubs.py)."""

from typing import Any

import numpy as np

__version__: str

# Operators (rust/python/src/ops). bfloat16 crosses as uint16, FP8 as uint8; `out` and `lse` are written.

_Array = np.ndarray[Any, Any]

def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def simd_level() -> str: ...
def top_k(scores: _Array, lengths: _Array | None, out: _Array) -> None: ...
def index(
    q: _Array,
    k: _Array,
    weights: _Array,
    q_positions: _Array | None,
    k_scale: _Array | None,
    selected: bool,
    out: _Array,
) -> None: ...
def check_batch(
    queries: int, blocks: int, block_tables: _Array, seq_lens: _Array, query_start_loc: _Array
) -> None: ...
def index_paged(
    q: _Array,
    weights: _Array,
    cache: _Array,
    block_tables: _Array,
    seq_lens: _Array,
    query_start_loc: _Array,
    selected: bool,
    out: _Array,
) -> None: ...
def attention(
    q: _Array,
    kv: _Array,
    v: _Array | None,
    indices: _Array | None,
    q_positions: _Array | None,
    scale: float,
    value_dim: int,
    sink: _Array | None,
    out: _Array,
    lse: _Array,
) -> None: ...
def attention_paged(
    q: _Array,
    indices: _Array | None,
    cache: _Array,
    block_tables: _Array,
    seq_lens: _Array,
    query_start_loc: _Array,
    scale: float,
    value_dim: int,
    sink: _Array | None,
    out: _Array,
    lse: _Array,
) -> None: ...
def hadamard(x: _Array, dim: int, out: _Array) -> None: ...
def write_cache(rows: _Array, cache: _Array, slot_mapping: _Array, value_dim: int | None) -> None: ...
def read_cache(cache: _Array, slots: _Array, value_dim: int | None, out: _Array) -> None: ...
def quantize_fp8(x: _Array, dim: int, group: int, codes: _Array, scales: _Array) -> None: ...
def dequantize_fp8(codes: _Array, scales: _Array, dim: int, group: int, out: _Array) -> None: ...
