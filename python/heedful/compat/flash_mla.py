"""FlashMLA's functions over heedful's operators: any head count and width, any GPU that Triton serves, and the CPU.

Names, shapes and conventions are those of FlashMLA's README and interface (releases since September 2025): slots of the
cache as indices, rows of 656 bytes, outputs for queries without a key. What differs: nothing here is bound to 64 or 128
heads, to 576/512, to a multiple of a block for top-k or to FP8 for sparse decoding, and the metadata is empty, because
nothing has to be planned ahead. `out` is that of the builds which let callers bring their own output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heedful import ops
from heedful._arrays import FLOATS, Arguments, finite, integer
from heedful.compat.tensors import expect_tensors

__all__ = ["FlashMLASchedMeta", "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"]

PAGE = 64
"""Tokens of a page of heedful's caches."""

_MAX_LOGITS_BYTES = 64 * 2**20
"""Gathered rows held at a time while the largest logits are computed."""


#: Rows of other models' caches, by their bytes: their scales lie at the end of a page, or are of another kind.
_OTHER_ROWS = {584: "those of DeepSeek-V4", 528: "those of DeepSeek-V4.1", 288: "those in FP4", 352: "those in NVFP4"}


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns. Its fields are FlashMLA's and stay as they are: nothing is planned ahead."""

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: Any = None
    num_splits: Any = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """The metadata of a step, with `num_splits`: (an empty object, None), whatever the arguments."""
    return FlashMLASchedMeta(), None


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    indexer_topk: int = 0,
    *,
    out: torch.Tensor | None = None,
    log_base: float = 2.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Sparse attention of a prefill.

    Args:
        q: [s_q, h_q, d_qk] bfloat16 (here also float16 and float32).
        kv: [s_kv, h_kv, d_qk], with one head: h_kv = 1.
        indices: [s_q, h_kv, topk] int32; -1 and numbers >= s_kv are skipped.
        sm_scale: factor of the logits.
        d_v: values are the first d_v numbers of a row.
        attn_sink: [h_q] float32, added to the denominator as exp(attn_sink).
        topk_length: [s_q] int32: only the first of each query's indices count.
        indexer_topk: when positive, the lse over the first indexer_topk indices alone is returned as well; it costs
            a second pass over those.
        out: [s_q, h_q, d_v] in q's dtype, which the result is written to.
        log_base: of max_logits and lse: 2 as the README documents; math.e for releases of 2026, whose reference takes
            the natural logarithm.
        backend: as for `heedful.ops`.

    Returns:
        out [s_q, h_q, d_v] in q's dtype; max_logits and lse float32 [s_q, h_q]; with `indexer_topk` also lse_indexer,
        of lse's shape. A query without a key has out 0, max_logits -inf and lse +inf.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    if not (isinstance(log_base, (int, float)) and 1 < log_base < math.inf):
        raise ValueError(f"log_base: expected 2 or math.e, got {log_base!r}")
    expect_tensors(q=q, kv=kv, indices=indices, attn_sink=attn_sink, topk_length=topk_length, out=out)
    call = Arguments(backend)
    query = call.take("q", q, FLOATS, "s_q, h_q, d_qk")
    keys = call.take("kv", kv, FLOATS, "s_kv, 1, d_qk")
    call.take("indices", indices, ("int32",), "s_q, 1, topk")
    sink = None if attn_sink is None else call.take("attn_sink", attn_sink, ("float32",), "h_q").data
    lengths = None if topk_length is None else call.integers("topk_length", topk_length, "s_q", np.int32)
    width, chosen = integer("d_v", d_v, 1, call.size("d_qk")), indices[:, 0]
    first = integer("indexer_topk", indexer_topk, 0, call.size("topk"))
    sm_scale = finite("sm_scale", sm_scale)
    target = _target(call, out, (*q.shape[:2], width), q.dtype)
    rows = kv[:, 0]
    common: dict[str, Any] = {"scale": sm_scale, "value_dim": width}
    if call.triton:
        from heedful.kernels import sparse_attention as kernel

        max_logits = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        with call.launching():
            result, lse = kernel.sparse_attention(
                query.data, keys.data[:, 0], chosen, sink=sink, topk_length=lengths, max_logits=max_logits, **common
            )
    else:
        result, lse = ops.sparse_attention(
            q, rows, chosen, sink=attn_sink, topk_length=topk_length, backend=backend, **common
        )
        max_logits = _max_logits(q, rows, chosen, lengths, sm_scale)
    units = 1.0 / math.log(log_base)
    found = [_into(target, result), max_logits * units, _without_keys(lse) * units]
    if first:
        _, lse = ops.sparse_attention(q, rows, chosen[:, :first], topk_length=topk_length, backend=backend, **common)
        found.append(_without_keys(lse) * units)
    return tuple(found)


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a decoding step over a paged cache: sparse where `indices` are given, else dense.

    Args:
        q: [b, s_q, h_q, d] bfloat16 (here also float16 and float32).
        k_cache: [num_blocks, page, 1, d] bfloat16 (here also float32), or with `is_fp8_kvcache` rows of bytes:
            head_dim_v e4m3 codes, a float32 scale for each 128 of them and the rest in bfloat16, [num_blocks, page, 1,
            656] for 576/512. Sparse: any page, and blocks may lie apart; dense: contiguous, page a multiple of 64.
        block_table: [b, max_blocks] int32; unused when sparse.
        cache_seqlens: [b] int32; unused when sparse.
        head_dim_v: values are the first head_dim_v numbers of a row.
        tile_scheduler_metadata, num_splits: of `get_mla_metadata`; not looked at.
        softmax_scale: factor of the logits; default d ** -0.5.
        causal: queries are the last tokens of their sequences; dense alone.
        indices: [b, s_q, topk] int32: slots block * page + offset; those outside the cache are skipped.
        attn_sink: [h_q] float32, added to the denominator as exp(attn_sink).
        extra_k_cache: a second cache of the same rows, whose page may be another; its chosen rows are attended to as
            well. The two are computed apart and put together, each rounded to q's dtype.
        extra_indices_in_kvcache: [b, s_q, extra_topk] int32: slots of the second cache.
        topk_length, extra_topk_length: [b] int32: only the first of the indices count.
        out: [b, s_q, h_q, head_dim_v] in q's dtype, which the result is written to.
        backend: as for `heedful.ops`.

    Returns:
        out [b, s_q, h_q, head_dim_v] in q's dtype, lse float32 [b, h_q, s_q], the natural logarithm; +inf where a query
        has no key, with out 0.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    expect_tensors(q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens, indices=indices, out=out)
    expect_tensors(attn_sink=attn_sink, topk_length=topk_length, extra_topk_length=extra_topk_length)
    expect_tensors(extra_k_cache=extra_k_cache, extra_indices_in_kvcache=extra_indices_in_kvcache)
    call = Arguments(backend)
    call.take("q", q, FLOATS, "b, s_q, h_q, d")
    width = integer("head_dim_v", head_dim_v, 1, call.size("d"))
    cache = _one_head_cache(call, "k_cache", k_cache, is_fp8_kvcache, width)
    target = _target(call, out, (*q.shape[:3], width), q.dtype)
    if attn_sink is not None:
        call.take("attn_sink", attn_sink, ("float32",), "h_q")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else finite("softmax_scale", softmax_scale)
    common: dict[str, Any] = {"scale": scale, "value_dim": width, "backend": backend}
    extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
    if indices is None:
        _check_dense(topk_length, *extra)
        result, lse = _dense(call, q, cache, block_table, cache_seqlens, causal, attn_sink, common)
    else:
        if causal:
            raise ValueError("causal: expected False with indices, got True")
        chosen = _selection(call, cache, "indices", indices, "topk", "topk_length", topk_length)
        flat = q.flatten(0, 1)
        if extra_k_cache is None:
            _check_no_extra(extra_indices_in_kvcache, extra_topk_length)
            result, lse = ops.sparse_attention_paged(flat, **chosen, sink=attn_sink, **common)
        else:
            cache = _one_head_cache(call, "extra_k_cache", extra_k_cache, is_fp8_kvcache, width)
            names = "extra_indices_in_kvcache", extra_indices_in_kvcache, "extra_topk", "extra_topk_length"
            second = _selection(call, cache, *names, extra_topk_length)
            parts = [ops.sparse_attention_paged(flat, **part, **common) for part in (chosen, second)]
            result, lse = _together(parts, attn_sink, q.dtype)
    shape = q.shape[:2]
    lse = _without_keys(lse).unflatten(0, shape).transpose(1, 2).contiguous()
    return _into(target, result.unflatten(0, shape)), lse


def _one_head_cache(call: Arguments, name: str, cache: torch.Tensor, fp8: bool, width: int) -> torch.Tensor:
    """The cache as [num_blocks, page, numbers or bytes]."""
    d = call.size("d")
    if fp8 and isinstance(cache, torch.Tensor) and cache.dtype in (torch.float8_e4m3fn, torch.int8):
        cache = cache.view(torch.uint8)
    row = width + 4 * -(-width // 128) + 2 * (d - width) if fp8 else d
    found = cache.shape[-1] if isinstance(cache, torch.Tensor) and cache.ndim == 4 else row
    # 528 bytes are a row of 512/512 here as well, but FlashMLA's callers mean the other by them.
    if fp8 and found in _OTHER_ROWS and (found != row or d == 512):
        kind = _OTHER_ROWS[found]
        raise ValueError(f"{name}: expected rows of V3.2's form, got rows of {found} bytes: {kind} are not served")
    dtypes = ("uint8",) if fp8 else ("bfloat16", "float32")
    prefix = name.removesuffix("k_cache")
    # Blocks may lie apart: checking all of them would copy them.
    looked_at = cache[:1] if isinstance(cache, torch.Tensor) and not cache.is_contiguous() else cache
    call.take(name, looked_at, dtypes, f"{prefix}num_blocks, {prefix}page, 1, {row}")
    return cache[:, :, 0]


def _selection(
    call: Arguments, cache: torch.Tensor, name: str, indices: Any, letter: str, lengths_name: str, lengths: Any
) -> dict[str, Any]:
    """Arguments of `ops.sparse_attention_paged` for slots of a cache of any page."""
    call.take(name, indices, ("int32",), f"b, s_q, {letter}")
    if lengths is not None:
        call.integers(lengths_name, lengths, "b", np.int32)
        lengths = lengths.repeat_interleave(indices.shape[1])
    pages, slots = pages_of_slots(cache, indices.flatten(0, 1))
    return {"cache": pages, "indices": slots, "topk_length": lengths}


def pages_of_slots(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of any page as one of pages of 64 tokens, with its slots.

    Args:
        cache: [num_blocks, page, width]; blocks may lie apart in memory.
        slots: [N, K] int32: block * page + offset; those outside the cache are skipped by who reads them.

    Returns:
        The same memory as [any, 64, width] and int32 [N, K]; or, where the memory cannot be seen so, a copy of the
        chosen rows.
    """
    blocks, page, width = cache.shape
    if page == PAGE and cache.is_contiguous():
        return cache, slots
    last = blocks * page
    inside = (slots >= 0) & (slots < last)
    apart = cache.stride(0) // max(1, width)  # rows from a block to the next
    rows = (blocks - 1) * apart + page
    adjacent = page == 1 or cache.stride(1) == width
    if last and cache.stride(2) == 1 and adjacent and apart * width == cache.stride(0) and rows % PAGE == 0:
        found = slots // page * apart + slots % page if apart != page else slots
        return cache.as_strided((rows // PAGE, PAGE, width), (PAGE * width, width, 1)), found.where(inside, -1)
    N, K = slots.shape
    copied = cache.new_zeros(max(1, -(-N * K // PAGE)) * PAGE, width)
    if last:
        at = slots.flatten().clamp(0, last - 1).long()
        copied[: N * K] = cache[at // page, at % page]
    found = torch.arange(N * K, dtype=torch.int32, device=slots.device).view(N, K)
    return copied.view(-1, PAGE, width), found.where(inside, -1)


def _together(
    parts: list[tuple[torch.Tensor, torch.Tensor]], sink: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two selections from attention over each: out [N, H, Dv] and lse [N, H]."""
    (first, one), (second, other) = parts
    lse = torch.logaddexp(one, other)
    total = lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))
    total = total.masked_fill(total == -math.inf, 0.0)  # no key at all: weights exp(-inf)
    out = first.float() * (one - total).exp()[..., None] + second.float() * (other - total).exp()[..., None]
    return out.to(dtype), lse


def _dense(
    call: Arguments,
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    causal: bool,
    sink: torch.Tensor | None,
    common: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    b, s_q = q.shape[:2]
    if block_table is None or cache_seqlens is None:
        missing = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{missing}: expected int32 for dense attention, got None")
    call.take("block_table", block_table, ("int32",), "b, max_blocks")
    call.integers("cache_seqlens", cache_seqlens, "b", np.int32)
    page, width = cache.shape[1:]
    if page == 0 or page % PAGE or not cache.is_contiguous():
        how = f"page {page}, strides {tuple(cache.stride())}"
        raise ValueError(f"k_cache: expected contiguous pages of a multiple of 64 for dense attention, got {how}")
    if page != PAGE:
        several = torch.arange(page // PAGE, dtype=torch.int32, device=q.device)
        block_table = (block_table[..., None] * (page // PAGE) + several).flatten(1)
        cache = cache.view(-1, PAGE, width)
    if not causal and s_q > 1:
        # Each query sees the whole sequence: it is the last token of a sequence of its own.
        block_table, cache_seqlens = (part.repeat_interleave(s_q, 0) for part in (block_table, cache_seqlens))
        b, s_q = b * s_q, 1
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device) * s_q
    batch: dict[str, Any] = {"block_tables": block_table, "seq_lens": cache_seqlens, "query_start_loc": starts}
    return ops.dense_attention_paged(q.flatten(0, 1), cache=cache, sink=sink, **batch, **common)


def _check_dense(*values: Any) -> None:
    names = "topk_length", "extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"
    for name, value in zip(names, values, strict=True):
        if value is not None:
            raise ValueError(f"{name}: expected None without indices, got {type(value).__name__}")


def _check_no_extra(*values: Any) -> None:
    for name, value in zip(("extra_indices_in_kvcache", "extra_topk_length"), values, strict=True):
        if value is not None:
            raise ValueError(f"{name}: expected None without extra_k_cache, got {type(value).__name__}")


def _target(call: Arguments, out: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """The caller's output, checked before anything is computed."""
    if out is not None:
        call.take("out", out, (str(dtype).removeprefix("torch."),), ", ".join(map(str, shape)))
    return out


def _into(target: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if target is None else target.copy_(result)


def _without_keys(lse: torch.Tensor) -> torch.Tensor:
    """FlashMLA's mark of a query without a key."""
    return lse.masked_fill(lse == -math.inf, math.inf)


def _max_logits(
    q: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor, lengths: np.ndarray | None, scale: float
) -> torch.Tensor:
    """max over the chosen keys of scale q . k: float32 [T, H]; -inf without one.

    The CPU's operator does not return it and engines do not read it; it is computed anew, some queries at a time.
    """
    T, K = chosen.shape
    largest = torch.full(q.shape[:2], -math.inf, dtype=torch.float32)
    if K == 0 or len(rows) == 0:
        return largest
    valid = (chosen >= 0) & (chosen < len(rows))
    if lengths is not None:
        valid &= torch.arange(K) < torch.from_numpy(lengths)[:, None]
    at_a_time = max(1, _MAX_LOGITS_BYTES // (K * (rows.shape[1] + q.shape[1]) * 4))
    with torch.no_grad():
        for first in range(0, T, at_a_time):
            part = slice(first, first + at_a_time)
            keys = rows[chosen[part].where(valid[part], 0).long()]
            logits = torch.einsum("thd,tkd->thk", q[part].float(), keys.float()) * scale
            largest[part] = logits.masked_fill(~valid[part, None], -math.inf).amax(-1)
    return largest
