"""DeepGEMM's scoring functions over heedful's operators: any head count, any GPU that Triton serves, and the CPU.

Names, shapes and conventions are those of DeepGEMM (releases since September 2025, and those of 2026 that also have
`fp8_fp4_mqa_logits`, whose q is a pair). What differs: columns that are outside a query's range are always -inf,
whatever `clean_logits` says, the schedule metadata is not looked at, and codes of four bits are refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from heedful import ops
from heedful._arrays import FLOATS, Arguments, integer
from heedful.compat.tensors import expect_tensors

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
]

PAGE = 64
"""Tokens of a page of heedful's caches."""

_NUMBERS = ("float8_e4m3fn", "bfloat16", "float16", "float32", "int8")


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Index scores of a prefill: relu(q . k) weighed and summed over heads, times the key's scale.

    Args:
        q: [seq_len, heads, dim] float8_e4m3fn (here also wider); its scales belong in `weights`.
        kv: keys [seq_len_kv, dim] float8_e4m3fn (here also wider) and their scales [seq_len_kv] float32.
        weights: [seq_len, heads] float32 (also bfloat16 and float16).
        cu_seq_len_k_start: [seq_len] int32, first key of each query's range.
        cu_seq_len_k_end: [seq_len] int32, one past its last.
        clean_logits: accepted; columns outside the range are -inf in either case.
        max_seqlen_k: when positive, the width of the result, whose column 0 is then each range's first key.
        backend: as for `heedful.ops`.

    Returns:
        float32 [seq_len, seq_len_kv], or [seq_len, max_seqlen_k].

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        raise ValueError(f"kv: expected keys and their scales, got {type(kv).__name__}")
    expect_tensors(**{"q": q, "kv[0]": kv[0], "kv[1]": kv[1], "weights": weights})
    expect_tensors(cu_seq_len_k_start=cu_seq_len_k_start, cu_seq_len_k_end=cu_seq_len_k_end)
    call = Arguments(backend)
    query = call.take("q", q, _NUMBERS, "seq_len, heads, dim")
    keys = call.take("kv[0]", kv[0], _NUMBERS, "seq_len_kv, dim")
    scales = kv[1]
    if isinstance(scales, torch.Tensor) and scales.shape == (keys.shape[0], 1):
        scales = scales.squeeze(1)
    scale = call.take("kv[1]", scales, ("float32",), "seq_len_kv")
    weights = _as_float32(call, weights, "seq_len, heads")
    starts = call.integers("cu_seq_len_k_start", cu_seq_len_k_start, "seq_len", np.int32)
    ends = call.integers("cu_seq_len_k_end", cu_seq_len_k_end, "seq_len", np.int32)
    width = integer("max_seqlen_k", max_seqlen_k, 0)
    if call.triton:
        from heedful.kernels import index_scores as kernel

        S = keys.shape[0]
        with call.launching():
            logits = kernel.index_scores(
                query.data,
                keys.data,
                weights,
                starts=starts.clamp(0, S),
                ends=ends.clamp(0, S),
                k_scale=scale.data,
            )
    else:
        last = torch.from_numpy(np.maximum(ends.astype(np.int64), 0) - 1)
        logits = ops.index_scores(q, kv[0], weights, q_positions=last, k_scale=scales, backend=backend)
        place = torch.arange(logits.shape[1])
        logits.masked_fill_(place < torch.from_numpy(starts)[:, None], -math.inf)
    return _from_start(logits, cu_seq_len_k_start, width) if width else logits


def get_num_sms() -> int:
    """Multiprocessors of the current GPU; 1 without one."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: torch.Tensor | None = None
) -> torch.Tensor:
    """The schedule of `fp8_paged_mqa_logits`, which needs none: int32 [num_sms + 1, 2] of zeros."""
    shape = (integer("num_sms", num_sms, 1) + 1, 2)
    return torch.zeros(shape, dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Index scores of a decoding step over pages of FP8 keys.

    Args:
        q: [batch, next_n, heads, dim] float8_e4m3fn (here also wider).
        kv_cache: [num_blocks, block_kv, 1, dim + 4] bytes; in a page all codes come first, then the float32 scales.
            Pages of 64 that lie together are read in place. Others, and blocks that lie apart, are copied to such pages
            at each call, as far as `block_table` names them.
        weights: [batch * next_n, heads] float32 (also bfloat16 and float16).
        context_lens: [batch] int32, keys of each sequence, whose last tokens the queries are; or [batch, next_n], the
            keys that each query sees.
        block_table: [batch, max_blocks] int32.
        schedule_meta: of `get_paged_mqa_logits_metadata`; not looked at.
        max_context_len: columns of the result.
        clean_logits: accepted; columns that a query does not see are -inf in either case.
        indices: [batch] int32, which rows are tokens of one request; a hint that is not looked at.
        backend: as for `heedful.ops`.

    Returns:
        float32 [batch * next_n, max_context_len].

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    expect_tensors(q=q, kv_cache=kv_cache, weights=weights, context_lens=context_lens, block_table=block_table)
    expect_tensors(indices=indices)
    call = Arguments(backend)
    call.take("q", q, _NUMBERS, "batch, next_n, heads, dim")
    batch, next_n, _, dim = q.shape
    if kv_cache is not None and kv_cache.dtype == torch.float8_e4m3fn:
        kv_cache = kv_cache.view(torch.uint8)
    # Blocks may lie apart: checking all of them would copy them.
    looked_at = kv_cache[:1] if kv_cache is not None and not kv_cache.is_contiguous() else kv_cache
    call.take("kv_cache", looked_at, ("uint8",), f"num_blocks, block_kv, 1, {dim + 4}")
    call.sizes["batch * next_n"] = batch * next_n
    weights = _as_float32(call, weights, "batch * next_n, heads")
    call.take("block_table", block_table, ("int32",), "batch, max_blocks")
    if indices is not None:
        call.take("indices", indices, ("int32",), "batch")
    each = isinstance(context_lens, torch.Tensor) and context_lens.ndim == 2
    call.integers("context_lens", context_lens, "batch, next_n" if each else "batch", np.int32)
    on_cpu = q.device.type == "cpu"
    columns = integer(
        "max_context_len", max_context_len, int(context_lens.max()) if on_cpu and context_lens.numel() else 0
    )
    pages = kv_cache[:, :, 0]
    blocks, size, width = pages.shape
    if blocks * size * block_table.numel() == 0:
        pages = pages if size == PAGE else pages.new_zeros(1, PAGE, width)
    elif size != PAGE or not pages.is_contiguous():
        missing = _missing(block_table, blocks, size, context_lens if each else context_lens[:, None])
        _check_blocks(block_table, blocks, missing)
        pages, block_table = _pages_of_64(pages, block_table, missing)
    # Sequences of fewer keys than queries are refused by the operator where that can be seen.
    if each or (on_cpu and bool((context_lens < next_n).any())):
        # A query is the last token of a sequence of its own.
        if not each:
            context_lens = context_lens[:, None] - next_n + 1 + torch.arange(next_n, dtype=context_lens.dtype)
        block_table, context_lens = block_table.repeat_interleave(next_n, 0), context_lens.flatten()
        batch, next_n = batch * next_n, 1
    blind = None
    if on_cpu and bool((context_lens < 1).any()):
        blind = context_lens < 1  # such rows fill up a batch: they get any key
        block_table, context_lens = block_table.where(~blind[:, None], 0), context_lens.clamp_min(1)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * next_n
    logits = ops.index_scores_paged(
        q.flatten(0, 1),
        weights,
        cache=pages,
        block_tables=block_table,
        seq_lens=context_lens,
        query_start_loc=starts,
        max_seq_len=columns,
        backend=backend,
    )
    if blind is not None:
        logits[blind] = -math.inf
    return logits


def fp8_fp4_mqa_logits(
    q: tuple[torch.Tensor, None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: Any = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`fp8_mqa_logits` with q a pair (codes, None) and scores in `logits_dtype` (float32 or bfloat16).

    Scales of q, which come with codes of four bits, are refused: ValueError. `schedule_meta` is not looked at.
    """
    codes, dtype = _without_scales(q), _logits_dtype(logits_dtype)
    ranges = cu_seq_len_k_start, cu_seq_len_k_end
    return fp8_mqa_logits(codes, kv, weights, *ranges, clean_logits, max_seqlen_k, backend=backend).to(dtype)


def fp8_fp4_paged_mqa_logits(
    q: tuple[torch.Tensor, None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`fp8_paged_mqa_logits` with q a pair (codes, None) and scores in `logits_dtype` (float32 or bfloat16).

    Scales of q, which come with codes of four bits, are refused: ValueError.
    """
    codes, dtype = _without_scales(q), _logits_dtype(logits_dtype)
    rest = context_lens, block_table, schedule_meta, max_context_len, clean_logits, indices
    return fp8_paged_mqa_logits(codes, kv_cache, weights, *rest, backend=backend).to(dtype)


def _without_scales(q: Any) -> torch.Tensor:
    """The codes of a pair (codes, None)."""
    if not isinstance(q, (tuple, list)) or len(q) != 2:
        raise ValueError(f"q: expected a pair of codes and None, got {type(q).__name__}")
    codes, scales = q
    if scales is not None:
        raise ValueError(f"q[1]: expected None (codes of four bits are not served), got {type(scales).__name__}")
    return codes


def _logits_dtype(dtype: Any) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    return dtype


def _as_float32(call: Arguments, weights: Any, shape: str) -> torch.Tensor:
    call.take("weights", weights, FLOATS, shape)
    return weights.float()


def _missing(block_table: torch.Tensor, blocks: int, size: int, context_lens: torch.Tensor) -> torch.Tensor:
    """Which blocks of sequences are none of the cache's: bool [batch, max_blocks].

    Args:
        block_table: [batch, max_blocks].
        blocks: of the cache.
        size: keys of a block.
        context_lens: [batch, any], keys of each sequence, of which the most count.
    """
    places = torch.arange(block_table.shape[1], device=block_table.device)
    used = (places * size < context_lens[..., None]).any(1)
    return used & ((block_table < 0) | (block_table >= blocks))


def _check_blocks(block_table: torch.Tensor, blocks: int, missing: torch.Tensor) -> None:
    """Raises ValueError for the first missing block, where that can be seen without waiting."""
    if missing.device.type == "cpu" and bool(missing.any()):
        b, place = missing.nonzero()[0].tolist()
        found = f"{int(block_table[b, place])} in entry {place} of sequence {b}"
        raise ValueError(f"block_table: expected a block from 0 to {blocks} - 1, got {found}")


def _pages_of_64(
    cache: torch.Tensor, block_table: torch.Tensor, missing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy as pages [any, 64, dim + 4] of the keys that a table names, and the table of those.

    Args:
        cache: [num_blocks, block_kv, dim + 4] bytes: codes of block_kv rows, then their scales; blocks may lie apart.
        block_table: [batch, max_blocks].
        missing: [batch, max_blocks], blocks without keys: a page that one of them is in is -1 in the result.
    """
    blocks, size, width = cache.shape
    (batch, most), dim = block_table.shape, width - 4
    rows = cache[block_table.flatten().clamp(0, blocks - 1).long()].flatten(1)  # [batch * most, size * width]
    codes = rows[:, : size * dim].reshape(batch, most * size, dim)
    scales = rows[:, size * dim :].reshape(batch, most * size, 4)
    pages = -(-most * size // PAGE)
    beyond = pages * PAGE - most * size
    codes, scales = (F.pad(part, (0, 0, 0, beyond)).view(batch * pages, -1) for part in (codes, scales))
    table = torch.arange(batch * pages, dtype=torch.int32, device=cache.device).view(batch, pages)
    unseen = F.pad(missing.repeat_interleave(size, 1), (0, beyond)).view(batch, pages, PAGE).any(-1)
    return torch.cat([codes, scales], 1).view(-1, PAGE, width), table.masked_fill(unseen, -1)


def _from_start(logits: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """Each row shifted so that column 0 is its range's first key: [T, width]."""
    S = logits.shape[1]
    columns = starts.long().clamp_min(0)[:, None] + torch.arange(width, device=logits.device)
    inside = columns < S
    if S == 0:
        return logits.new_full((len(logits), width), -math.inf)
    return logits.gather(1, columns.clamp_max(S - 1)).masked_fill_(~inside, -math.inf)
