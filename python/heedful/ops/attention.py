"""Sparse and dense attention. Formulas: `heedful.ops.reference`; DeepSeek-V3.2-Exp report, section 2.

| operator | arguments | result |
|---|---|---|
| sparse_attention | q [T, H, Dk], kv [S, (Hkv,) Dk], indices int32 [T, K] | out [T, H, Dv], lse [T, H] |
| dense_attention | q, kv; causal | the same |
| hadamard | x [..., D] | the same shape and dtype |

Sums are float32. Where the CPU multiplies bfloat16 (AVX-512 BF16), attention of bfloat16 queries over bfloat16 or FP8
rows rounds probabilities, and FP8 values times their scale, to bfloat16; every other combination computes in float32.
Results do not depend on the number of threads or on the other queries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from heedful import _core
from heedful._arrays import FLOATS, A, Arguments, View, integer
from heedful.ops import reference
from heedful.ops.pages import paged_arguments, storage


def sparse_attention(
    q: A,
    kv: A,
    indices: A,
    *,
    scale: float,
    value_dim: int | None = None,
    v: A | None = None,
    sink: A | None = None,
    backend: str = "auto",
) -> tuple[A, A]:
    """Attention of each query over its chosen keys alone.

    Args:
        q: [T, H, Dk] float32, bfloat16 or float16.
        kv: [S, Dk], one row a key for all heads, or [S, Hkv, Dk] where head h reads key head h // (H / Hkv).
        indices: [T, K] int32; negative ones and those >= S are skipped. A key named twice counts twice.
        scale: factor of the logits q . k.
        value_dim: Dv, when values are the first Dv numbers of kv; default Dk.
        v: values apart from the keys, [S, Dv] or [S, Hkv, Dv].
        sink: [H] float32; exp(sink) is added to the denominator (not to lse).
        backend: "auto", "cpu" or "reference".

    Returns:
        out [T, H, Dv] in q's dtype; lse float32 [T, H], the natural logarithm of the sum of exp(scale q . k).
        A query with no valid index has out = 0 and lse = -inf.

    Raises:
        ValueError: an argument of another shape, dtype or value; it is named.
    """
    return _contiguous(Arguments(backend), q, kv, indices, None, scale, value_dim, v, sink)


def dense_attention(
    q: A,
    kv: A,
    *,
    scale: float,
    q_positions: Any = None,
    value_dim: int | None = None,
    v: A | None = None,
    sink: A | None = None,
    backend: str = "auto",
) -> tuple[A, A]:
    """Causal attention of each query over the keys up to its position: the baseline of `sparse_attention`.

    Args:
        q_positions: [T] integers; default S - T + arange(T). The others are those of `sparse_attention`.

    Returns:
        As `sparse_attention`.

    Raises:
        ValueError: an argument of another shape, dtype or value; it is named.
    """
    return _contiguous(Arguments(backend), q, kv, None, q_positions, scale, value_dim, v, sink)


def sparse_attention_paged(
    q: A,
    indices: A,
    *,
    scale: float,
    value_dim: int,
    cache: A,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any,
    sink: A | None = None,
    backend: str = "auto",
) -> tuple[A, A]:
    """`sparse_attention` of a ragged batch whose latent rows lie in pages.

    Args:
        q: [N, H, C + R], the queries of B sequences in a row; those of a sequence are its last tokens.
        indices: [N, K] int32, positions in the query's own sequence; any below 0 or >= seq_len is skipped.
        scale: factor of the logits.
        value_dim: C; a key is the whole row, its value the first C numbers.
        cache: [num_blocks, 64, C + R] float32 or bfloat16, or uint8 with rows of C e4m3 codes, a float32
            scale for each 128 of them, and R bfloat16 values (656 bytes for C = 512, R = 64).
        block_tables: [B, M] int32; entries beyond a sequence's pages are not read.
        seq_lens: [B] int32, keys of each sequence including this step's tokens.
        query_start_loc: [B + 1] int32, first row of each sequence in q, then N.
        sink: [H] float32.
        backend: "auto", "cpu" or "reference".

    Returns:
        out [N, H, C] in q's dtype, lse float32 [N, H].

    Raises:
        ValueError: an argument of another shape, dtype or value, a needed block outside the
            cache; it is named.
    """
    batch = (block_tables, seq_lens, query_start_loc)
    return _paged(Arguments(backend), q, indices, scale, value_dim, cache, batch, sink)


def dense_attention_paged(
    q: A,
    *,
    scale: float,
    value_dim: int,
    cache: A,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any,
    sink: A | None = None,
    backend: str = "auto",
) -> tuple[A, A]:
    """`dense_attention` of a ragged batch over pages; otherwise as `sparse_attention_paged`."""
    batch = (block_tables, seq_lens, query_start_loc)
    return _paged(Arguments(backend), q, None, scale, value_dim, cache, batch, sink)


def hadamard(x: A, *, backend: str = "auto") -> A:
    """Orthonormal Walsh-Hadamard transform of the last dimension (its own inverse); used before FP8.

    Args:
        x: [..., D] float32, bfloat16 or float16, D a power of two.
        backend: "auto", "cpu" or "reference".

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: another dtype, or a D that is not a power of two.
    """
    call = Arguments(backend)
    view = call.take("x", x, FLOATS, "...")
    D = view.shape[-1] if view.shape else 0
    if D < 1 or D & (D - 1):
        raise ValueError(f"x: expected a last dimension that is a power of two, got shape {list(view.shape)}")
    if call.reference:
        return call.give(reference.hadamard(view.float64()), view.dtype)
    out = np.empty_like(view.data)
    _core.hadamard(view.data, D, out)
    return call.give(out, view.dtype)


def _contiguous(
    call: Arguments,
    q: Any,
    kv: Any,
    indices: Any,
    q_positions: Any,
    scale: float,
    value_dim: Any,
    v: Any,
    sink: Any,
) -> tuple[Any, Any]:
    query = call.take("q", q, FLOATS, "T, H, Dk")
    grouped = getattr(kv, "ndim", 2) == 3
    keys = call.take("kv", kv, FLOATS, "S, Hkv, Dk" if grouped else "S, Dk")
    values = None if v is None else call.take("v", v, FLOATS, "S, Hkv, Dv" if grouped else "S, Dv")
    if values is not None and value_dim is not None:
        raise ValueError("value_dim: expected None when v is given, which has its own last dimension")
    width = values.shape[-1] if values is not None else _width(value_dim, call.size("Dk"))
    chosen = None if indices is None else call.take("indices", indices, ("int32",), "T, K")
    positions = None if q_positions is None else call.integers("q_positions", q_positions, "T", np.int64)
    sinks = None if sink is None else call.take("sink", sink, ("float32",), "H")
    scale = _scale(scale)
    # One shared row a key is one key head.
    if not grouped:
        keys, values = _one_head(keys), None if values is None else _one_head(values)
    if call.reference:
        k, v, s = keys.float64(), _float64(values), _float64(sinks)
        if chosen is None:
            out, lse = reference.dense_attention(query.float64(), k, scale, positions, width, v, s)
        else:
            out, lse = reference.sparse_attention(query.float64(), k, chosen.data, scale, width, v, s)
        return call.give(out, query.dtype), call.give(lse, "float32")
    out, lse = _outputs(query, width)
    _core.attention(
        query.data, keys.data, _data(values), _data(chosen), positions, scale, width, _data(sinks), out, lse
    )
    return call.give(out, query.dtype), call.give(lse, "float32")


def _paged(
    call: Arguments,
    q: Any,
    indices: Any,
    scale: float,
    value_dim: Any,
    cache: Any,
    batch: tuple[Any, Any, Any],
    sink: Any,
) -> tuple[Any, Any]:
    query = call.take("q", q, FLOATS, "N, H, Dk")
    width = _width(value_dim, call.size("Dk"))
    pages = storage(call, cache, call.size("Dk"), width)
    chosen = None if indices is None else call.take("indices", indices, ("int32",), "N, K")
    tables = paged_arguments(call, pages, *batch)
    sinks = None if sink is None else call.take("sink", sink, ("float32",), "H")
    scale = _scale(scale)
    out, lse = _outputs(query, width)
    if not call.reference:
        _core.attention_paged(query.data, _data(chosen), pages.data, *tables, scale, width, _data(sinks), out, lse)
        return call.give(out, query.dtype), call.give(lse, "float32")
    wide, s = np.zeros(out.shape), _float64(sinks)
    numbers = pages.float64() if pages.dtype != "uint8" else pages.data
    for rows, slots in reference.sequences(*tables):
        kv = reference.read_latent_cache(numbers, slots, width)[:, None]
        part = query.float64()[rows]
        if chosen is None:
            wide[rows], lse[rows] = reference.dense_attention(part, kv, scale, None, width, None, s)
        else:
            wide[rows], lse[rows] = reference.sparse_attention(part, kv, chosen.data[rows], scale, width, None, s)
    return call.give(wide, query.dtype), call.give(lse, "float32")


def _outputs(query: View, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    T, H, _ = query.shape
    return np.empty((T, H, width), query.data.dtype), np.empty((T, H), np.float32)


def _one_head(view: View) -> View:
    return View(view.data[:, None], view.dtype)


def _float64(view: View | None) -> Any:
    return None if view is None else view.float64()


def _data(view: View | None) -> Any:
    return None if view is None else view.data


def _scale(scale: Any) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise ValueError(f"scale: expected a finite number, got {scale!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"scale: expected a finite number, got {value}")
    return value


def _width(value_dim: Any, dim: int) -> int:
    return dim if value_dim is None else integer("value_dim", value_dim, 1, dim)
