"""FlashMLA's functions over heedful's operators: any head count and width, any GPU that Triton serves, and the CPU.

Names, shapes and conventions are those of FlashMLA's README and interface (releases since September 2025): slots of the
cache as indices, rows of 656 bytes, outputs for queries without a key. What differs: nothing here is bound to 64 or 128
heads, to 576/512, to a multiple of a block for top-k or to FP8 for sparse decoding, and the metadata is empty, because
nothing has to be planned ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heedful import ops
from heedful._arrays import FLOATS, Arguments, finite, integer

__all__ = ["FlashMLASchedMeta", "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata"]

_MAX_LOGITS_BYTES = 64 * 2**20
"""Gathered rows held at a time while the largest logits are computed."""


@dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns: it holds nothing."""


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
    *,
    log_base: float = 2.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse attention of a prefill.

    Args:
        q: [s_q, h_q, d_qk] bfloat16 (here also float16 and float32).
        kv: [s_kv, h_kv, d_qk], with one head: h_kv = 1.
        indices: [s_q, h_kv, topk] int32; -1 and numbers >= s_kv are skipped.
        sm_scale: factor of the logits.
        d_v: values are the first d_v numbers of a row.
        attn_sink: [h_q] float32, added to the denominator as exp(attn_sink).
        topk_length: [s_q] int32: only the first of each query's indices count.
        log_base: of max_logits and lse: 2 as the README documents; math.e for releases of 2026, whose reference takes
            the natural logarithm.
        backend: as for `heedful.ops`.

    Returns:
        out [s_q, h_q, d_v] in q's dtype; max_logits and lse float32 [s_q, h_q]. A query without a key has out 0,
        max_logits -inf and lse +inf.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    if not (isinstance(log_base, (int, float)) and 1 < log_base < math.inf):
        raise ValueError(f"log_base: expected 2 or math.e, got {log_base!r}")
    call = Arguments(backend)
    query = call.take("q", q, FLOATS, "s_q, h_q, d_qk")
    keys = call.take("kv", kv, FLOATS, "s_kv, 1, d_qk")
    call.take("indices", indices, ("int32",), "s_q, 1, topk")
    sink = None if attn_sink is None else call.take("attn_sink", attn_sink, ("float32",), "h_q").data
    lengths = None if topk_length is None else call.integers("topk_length", topk_length, "s_q", np.int32)
    width, chosen = integer("d_v", d_v, 1, call.size("d_qk")), indices[:, 0]
    sm_scale = finite("sm_scale", sm_scale)
    if call.triton:
        from heedful.kernels import sparse_attention as kernel

        max_logits = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        with call.launching():
            out, lse = kernel.sparse_attention(
                query.data,
                keys.data[:, 0],
                chosen,
                scale=sm_scale,
                value_dim=width,
                sink=sink,
                topk_length=lengths,
                max_logits=max_logits,
            )
    else:
        rows = kv[:, 0]
        out, lse = ops.sparse_attention(
            q, rows, chosen, scale=sm_scale, value_dim=width, sink=attn_sink, topk_length=topk_length, backend=backend
        )
        max_logits = _max_logits(q, rows, chosen, lengths, sm_scale)
    units = 1.0 / math.log(log_base)
    return out, max_logits * units, _without_keys(lse) * units


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
    extra_k_cache: None = None,
    extra_indices_in_kvcache: None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a decoding step over a paged cache: sparse where `indices` are given, else dense.

    Args:
        q: [b, s_q, h_q, d] bfloat16 (here also float16 and float32).
        k_cache: [num_blocks, 64, 1, d] bfloat16 (here also float32), or with `is_fp8_kvcache` rows of bytes: head_dim_v
            e4m3 codes, a float32 scale for each 128 of them and the rest in bfloat16, [num_blocks, 64, 1, 656] for
            576/512.
        block_table: [b, max_blocks] int32; unused when sparse.
        cache_seqlens: [b] int32; unused when sparse.
        head_dim_v: values are the first head_dim_v numbers of a row.
        tile_scheduler_metadata, num_splits: of `get_mla_metadata`; not looked at.
        softmax_scale: factor of the logits; default d ** -0.5.
        causal: queries are the last tokens of their sequences; dense alone.
        indices: [b, s_q, topk] int32: slots block * 64 + offset; -1 is skipped.
        attn_sink: [h_q] float32, added to the denominator as exp(attn_sink).
        topk_length: [b] int32: only the first of the indices count.
        extra_k_cache, extra_indices_in_kvcache, extra_topk_length: None; a second cache is not served.
        backend: as for `heedful.ops`.

    Returns:
        out [b, s_q, h_q, head_dim_v] in q's dtype, lse float32 [b, h_q, s_q], the natural logarithm; +inf where a query
        has no key, with out 0.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    for name, value in (
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices_in_kvcache),
        ("extra_topk_length", extra_topk_length),
    ):
        if value is not None:
            raise ValueError(f"{name}: expected None (a second cache is not served), got {type(value).__name__}")
    call = Arguments(backend)
    call.take("q", q, FLOATS, "b, s_q, h_q, d")
    b, s_q, _, d = q.shape
    cache = _one_head_cache(call, k_cache, is_fp8_kvcache)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    flat = q.flatten(0, 1)
    common: dict[str, Any] = {"scale": scale, "value_dim": head_dim_v, "cache": cache, "sink": attn_sink}
    common["backend"] = backend
    if indices is not None:
        if causal:
            raise ValueError("causal: expected False with indices, got True")
        call.take("indices", indices, ("int32",), "b, s_q, topk")
        lengths = None
        if topk_length is not None:
            call.integers("topk_length", topk_length, "b", np.int32)
            lengths = topk_length.repeat_interleave(s_q)
        out, lse = ops.sparse_attention_paged(flat, indices.flatten(0, 1), topk_length=lengths, **common)
    else:
        if topk_length is not None:
            raise ValueError("topk_length: expected None without indices, got a tensor")
        if block_table is None or cache_seqlens is None:
            missing = "block_table" if block_table is None else "cache_seqlens"
            raise ValueError(f"{missing}: expected int32 for dense attention, got None")
        if not causal and s_q > 1:
            # Each query sees the whole sequence: it is the last token of a sequence of its own.
            block_table, cache_seqlens = (part.repeat_interleave(s_q, 0) for part in (block_table, cache_seqlens))
            b, s_q = b * s_q, 1
        starts = torch.arange(0, b * s_q + 1, s_q, dtype=torch.int32, device=q.device)
        out, lse = ops.dense_attention_paged(
            flat, block_tables=block_table, seq_lens=cache_seqlens, query_start_loc=starts, **common
        )
    shape = q.shape[:2]
    return out.unflatten(0, shape), _without_keys(lse).unflatten(0, shape).transpose(1, 2).contiguous()


def _one_head_cache(call: Arguments, k_cache: torch.Tensor, fp8: bool) -> torch.Tensor:
    if fp8 and isinstance(k_cache, torch.Tensor) and k_cache.dtype in (torch.float8_e4m3fn, torch.int8):
        k_cache = k_cache.view(torch.uint8)
    dtypes = ("uint8",) if fp8 else ("bfloat16", "float32")
    call.take("k_cache", k_cache, dtypes, "num_blocks, 64, 1, width")
    return k_cache[:, :, 0]


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
