"""Sparse and dense attention. Formulas: `heedful.ops.reference`; DeepSeek-V3.2-Exp report, section 2.

| operator | arguments | result |
|---|---|---|
| sparse_attention | q [T, H, Dk], kv [S, (Hkv,) Dk], indices int32 [T, K] | out [T, H, Dv], lse [T, H] |
| dense_attention | q, kv; causal | the same |
| hadamard | x [..., D] | the same shape and dtype |

Sums are float32. Where the CPU multiplies bfloat16 (AVX-512 BF16), attention of bfloat16 queries over bfloat16 or FP8
rows rounds probabilities, and FP8 values times their scale, to bfloat16; every other combination computes in float32.
Results do not depend on the number of threads or on the other queries. CUDA tensors are computed by the Triton kernels
of `heedful.kernels`, which round probabilities to the dtype of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from heedful import _core
from heedful._arrays import FLOATS, A, Arguments, View, finite, integer
from heedful.ops import reference
from heedful.ops.pages import Batch, paged_arguments, storage


def sparse_attention(
    q: A,
    kv: A,
    indices: A,
    *,
    scale: float,
    value_dim: int | None = None,
    v: A | None = None,
    sink: A | None = None,
    topk_length: Any = None,
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
        topk_length: [T] integers: a query reads the first topk_length of its indices; default all.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        out [T, H, Dv] in q's dtype; lse float32 [T, H], the natural logarithm of the sum of exp(scale q . k).
        A query with no valid index has out = 0 and lse = -inf.

    Raises:
        ValueError: an argument of another shape, dtype or value; it is named.
    """
    return _contiguous(Arguments(backend), q, kv, indices, None, scale, value_dim, v, sink, topk_length)


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
    block_tables: Any = None,
    seq_lens: Any = None,
    query_start_loc: Any = None,
    sink: A | None = None,
    topk_length: Any = None,
    backend: str = "auto",
) -> tuple[A, A]:
    """`sparse_attention` of a ragged batch whose latent rows lie in pages.

    Args:
        q: [N, H, C + R], the queries of B sequences in a row; those of a sequence are its last tokens.
        indices: [N, K] int32, positions in the query's own sequence; any below 0 or >= seq_len is skipped. Without
            block_tables, seq_lens and query_start_loc they are slots of the cache, block * 64 + offset.
        scale: factor of the logits.
        value_dim: C; a key is the whole row, its value the first C numbers.
        cache: [num_blocks, 64, C + R] float32 or bfloat16, or uint8 with rows of C e4m3 codes, a float32
            scale for each 128 of them, and R bfloat16 values (656 bytes for C = 512, R = 64).
        block_tables: [B, M] int32; entries beyond a sequence's pages are not read.
        seq_lens: [B] int32, keys of each sequence including this step's tokens.
        query_start_loc: [B + 1] int32, first row of each sequence in q, then N.
        sink: [H] float32.
        topk_length: [N] integers, as for `sparse_attention`.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        out [N, H, C] in q's dtype, lse float32 [N, H].

    Raises:
        ValueError: an argument of another shape, dtype or value, a needed block outside the
            cache; it is named.
    """
    batch = (block_tables, seq_lens, query_start_loc)
    if block_tables is None and any(part is not None for part in batch):
        raise ValueError("block_tables: expected int32 [B, M] with seq_lens and query_start_loc, got None")
    return _paged(Arguments(backend), q, indices, scale, value_dim, cache, batch, sink, topk_length)


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
        backend: "auto", "cpu", "triton" or "reference".

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
    if call.triton:
        from heedful.kernels import hadamard as kernel

        with call.launching():
            return call.give(kernel.hadamard(view.data), view.dtype)
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
    topk_length: Any = None,
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
    lengths = None if topk_length is None else call.integers("topk_length", topk_length, "T", np.int32)
    scale = finite("scale", scale)
    if call.triton:
        _check_heads(query, keys)
        return _launch_contiguous(call, query, keys, chosen, positions, scale, width, values, sinks, lengths)
    chosen = _shortened(chosen, lengths)
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
    topk_length: Any = None,
) -> tuple[Any, Any]:
    query = call.take("q", q, FLOATS, "N, H, Dk")
    width = _width(value_dim, call.size("Dk"))
    pages = storage(call, cache, call.size("Dk"), width)
    chosen = None if indices is None else call.take("indices", indices, ("int32",), "N, K")
    tables = _every_slot(call, pages) if batch[0] is None else paged_arguments(call, pages, *batch)
    sinks = None if sink is None else call.take("sink", sink, ("float32",), "H")
    lengths = None if topk_length is None else call.integers("topk_length", topk_length, "N", np.int32)
    scale = finite("scale", scale)
    if call.triton:
        return _launch_paged(call, query, chosen, pages, tables, scale, width, sinks, lengths)
    chosen = _shortened(chosen, lengths)
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


def _launch_contiguous(
    call: Arguments,
    query: View,
    keys: View,
    chosen: View | None,
    positions: Any,
    scale: float,
    width: int,
    values: View | None,
    sinks: View | None,
    lengths: Any,
) -> tuple[Any, Any]:
    from heedful.kernels import sparse_attention as kernel

    with call.launching():
        return kernel.sparse_attention(
            query.data,
            keys.data,
            _data(chosen),
            scale=scale,
            value_dim=width,
            v=_data(values),
            sink=_data(sinks),
            topk_length=lengths,
            q_positions=positions,
        )


def _launch_paged(
    call: Arguments,
    query: View,
    chosen: View | None,
    pages: View,
    tables: Batch,
    scale: float,
    width: int,
    sinks: View | None,
    lengths: Any,
) -> tuple[Any, Any]:
    from heedful.kernels import sparse_attention as kernel

    block_tables, seq_lens, query_start_loc = tables
    with call.launching():
        return kernel.sparse_attention_paged(
            query.data,
            _data(chosen),
            scale=scale,
            value_dim=width,
            cache=pages.data,
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            sink=_data(sinks),
            topk_length=lengths,
        )


def _check_heads(query: View, keys: View) -> None:
    """That key heads divide the query's; the core checks it by itself."""
    H, Hkv = query.shape[1], keys.shape[1] if len(keys.shape) == 3 else 1
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"kv: expected a number of heads that divides {H}, got {Hkv}")


def _every_slot(call: Arguments, pages: View) -> Batch:
    """A batch in which positions are slots: each of its sequences is the whole cache, and takes as many queries."""
    if call.triton:
        return None, None, None
    blocks, N = len(pages.data), call.size("N")
    if not blocks:
        raise ValueError("cache: expected at least one block, got none")
    most = 64 * blocks  # queries of a sequence
    B = max(1, -(-N // most))
    starts = np.minimum(np.arange(B + 1, dtype=np.int64) * most, N).astype(np.int32)
    return np.tile(np.arange(blocks, dtype=np.int32), (B, 1)), np.full(B, most, np.int32), starts


def _shortened(chosen: View | None, lengths: Any) -> View | None:
    """The indices with -1 behind each row's length."""
    if chosen is None or lengths is None:
        return chosen
    kept = np.arange(chosen.shape[1]) < lengths[:, None]
    return View(np.where(kept, chosen.data, np.int32(-1)), chosen.dtype)


def _outputs(query: View, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    T, H, _ = query.shape
    return np.empty((T, H, width), query.data.dtype), np.empty((T, H), np.float32)


def _one_head(view: View) -> View:
    return View(view.data[:, None], view.dtype)


def _float64(view: View | None) -> Any:
    return None if view is None else view.float64()


def _data(view: View | None) -> Any:
    return None if view is None else view.data


def _width(value_dim: Any, dim: int) -> int:
    return dim if value_dim is None else integer("value_dim", value_dim, 1, dim)
