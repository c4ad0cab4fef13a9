"""DeepGEMM's scoring functions over heedful's operators: any head count, any GPU that Triton serves, and the CPU.

Names, shapes and conventions are those of DeepGEMM (releases since September 2025). What differs: columns that are
outside a query's range are always -inf, whatever `clean_logits` says, and the schedule metadata is not looked at.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from heedful import ops
from heedful._arrays import Arguments, integer

__all__ = ["fp8_mqa_logits", "fp8_paged_mqa_logits", "get_num_sms", "get_paged_mqa_logits_metadata"]

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
        weights: [seq_len, heads] float32.
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
    call = Arguments(backend)
    query = call.take("q", q, _NUMBERS, "seq_len, heads, dim")
    keys = call.take("kv[0]", kv[0], _NUMBERS, "seq_len_kv, dim")
    scales = kv[1]
    if isinstance(scales, torch.Tensor) and scales.shape == (keys.shape[0], 1):
        scales = scales.squeeze(1)
    scale = call.take("kv[1]", scales, ("float32",), "seq_len_kv")
    weight = call.take("weights", weights, ("float32",), "seq_len, heads")
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
                weight.data,
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


def get_paged_mqa_logits_metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int) -> torch.Tensor:
    """The schedule of `fp8_paged_mqa_logits`, which needs none: int32 [num_sms + 1, 2] of zeros."""
    shape = (integer("num_sms", num_sms, 1) + 1, 2)
    return torch.zeros(shape, dtype=torch.int32, device=context_lens.device)


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: Any,
    max_context_len: int,
    clean_logits: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Index scores of a decoding step over pages of FP8 keys.

    Args:
        q: [batch, next_n, heads, dim] float8_e4m3fn (here also wider).
        kv_cache: [num_blocks, 64, 1, dim + 4] bytes; in a page all codes come first, then the float32 scales.
        weights: [batch * next_n, heads] float32.
        context_lens: [batch] int32, keys of each sequence, whose last tokens the queries are; or [batch, next_n], the
            keys that each query sees.
        block_tables: [batch, max_blocks] int32.
        schedule_metadata: of `get_paged_mqa_logits_metadata`; not looked at.
        max_context_len: columns of the result.
        clean_logits: accepted; columns that a query does not see are -inf in either case.
        backend: as for `heedful.ops`.

    Returns:
        float32 [batch * next_n, max_context_len].

    Raises:
        ValueError: an argument of another shape, dtype, device or value; it is named.
    """
    call = Arguments(backend)
    call.take("q", q, _NUMBERS, "batch, next_n, heads, dim")
    batch, next_n, _, dim = q.shape
    if isinstance(kv_cache, torch.Tensor) and kv_cache.dtype == torch.float8_e4m3fn:
        kv_cache = kv_cache.view(torch.uint8)
    call.take("kv_cache", kv_cache, ("uint8",), f"num_blocks, 64, 1, {dim + 4}", in_place=True)
    each = isinstance(context_lens, torch.Tensor) and context_lens.ndim == 2
    call.integers("context_lens", context_lens, "batch, next_n" if each else "batch", np.int32)
    if each:
        # A query is the last token of a sequence of its own.
        block_tables, context_lens = block_tables.repeat_interleave(next_n, 0), context_lens.flatten()
        batch, next_n = batch * next_n, 1
    short = None
    if q.device.type == "cpu" and bool((context_lens < next_n).any()):
        # Rows that only fill up a batch: more queries than keys are refused where that can be seen, so they get any.
        short = (context_lens < next_n).repeat_interleave(next_n)
        ends = (context_lens[:, None] - next_n + 1 + torch.arange(next_n)).flatten()
        block_tables = block_tables.where((context_lens >= next_n)[:, None], 0)
        context_lens = context_lens.clamp_min(next_n)
    starts = torch.arange(0, batch * next_n + 1, next_n, dtype=torch.int32, device=q.device)
    logits = ops.index_scores_paged(
        q.flatten(0, 1),
        weights,
        cache=kv_cache[:, :, 0],
        block_tables=block_tables,
        seq_lens=context_lens,
        query_start_loc=starts,
        max_seq_len=max_context_len,
        backend=backend,
    )
    if short is not None:
        logits[short] = logits[short].masked_fill(torch.arange(max_context_len) >= ends[short, None], -math.inf)
    return logits


def _from_start(logits: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """Each row shifted so that column 0 is its range's first key: [T, width]."""
    S = logits.shape[1]
    columns = starts.long().clamp_min(0)[:, None] + torch.arange(width, device=logits.device)
    inside = columns < S
    if S == 0:
        return logits.new_full((len(logits), width), -math.inf)
    return logits.gather(1, columns.clamp_max(S - 1)).masked_fill_(~inside, -math.inf)
