"""Positions of a ragged batch to slots of the cache: slot = block * 64 + offset.

Done once before attention, so that its programs, which are many a query, gather rows by one number a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.rows import PAGE, unit_stride
from heedful.kernels.target import Target

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Block tables [B, M], sequence lengths [B] and starts of their queries [B + 1], int32."""


@triton.jit
def sequence_of_query(t, query_start_loc, num_seqs, WIDTH: tl.constexpr):
    """The sequence of row t of a ragged batch: the last one that starts at or before it."""
    found = 0
    for first in range(0, num_seqs, WIDTH):
        b = first + tl.arange(0, WIDTH)
        start = tl.load(query_start_loc + b, mask=b < num_seqs, other=2147483647)
        found += tl.sum((start <= t).to(tl.int32), axis=0)
    return tl.maximum(found - 1, 0)


@triton.jit(do_not_specialize=["num_seqs"])
def _slots_kernel(
    indices, topk_length, tables, seq_lens, query_start_loc, out, indices_row, table_row, K, num_seqs,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Some of one query's indices."""
    t = tl.program_id(0)
    b = sequence_of_query(t, query_start_loc, num_seqs, 256)
    length = K
    if topk_length is not None:
        length = tl.minimum(tl.load(topk_length + t).to(tl.int32), K)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    index = tl.load(indices + t.to(tl.int64) * indices_row + at, mask=at < length, other=-1)
    there = (index >= 0) & (index < tl.load(seq_lens + b))
    page = tl.load(tables + b.to(tl.int64) * table_row + index // 64, mask=there, other=0)
    tl.store(out + t.to(tl.int64) * K + at, tl.where(there, page * 64 + index % 64, -1), mask=at < K)


def slots_of(indices: torch.Tensor, batch: Batch, topk_length: torch.Tensor | None = None) -> torch.Tensor:
    """Slots of chosen positions.

    Args:
        indices: [N, K] int32, positions in the query's sequence.
        batch: block tables [B, M], sequence lengths [B], starts of their queries [B + 1], int32.
        topk_length: [N] integers: only the first of a query's indices count.

    Returns:
        int32 [N, K]: -1 for an index that is negative, beyond the sequence or does not count.
    """
    launch = plan_slots(indices, batch, topk_length)
    launch.run()
    slots: torch.Tensor = launch.arguments["out"]
    return slots


def plan_slots(indices: torch.Tensor, batch: Batch, topk_length: torch.Tensor | None) -> Launch:
    """The launch of `slots_of`."""
    (N, K), (tables, seq_lens, query_start_loc) = indices.shape, batch
    indices, tables = unit_stride(indices), unit_stride(tables)
    arguments: dict[str, Any] = {
        "indices": indices,
        "topk_length": None if topk_length is None else topk_length.contiguous(),
    }
    arguments |= {"tables": tables, "seq_lens": seq_lens, "query_start_loc": query_start_loc}
    arguments |= {"out": torch.empty((N, K), dtype=torch.int32, device=indices.device)}
    arguments |= {"indices_row": indices.stride(0), "table_row": tables.stride(0), "K": K}
    arguments |= {"num_seqs": seq_lens.shape[0], "WIDTH": min(1024, max(32, triton.next_power_of_2(K)))}
    return Launch(_slots_kernel, (N, -(-K // arguments["WIDTH"])), arguments, 4)


def slots_reference(indices: torch.Tensor, batch: Batch, topk_length: torch.Tensor | None = None) -> torch.Tensor:
    """`slots_of`, a sequence at a time."""
    tables, seq_lens, query_start_loc = batch
    out = torch.full_like(indices, -1)
    starts, place = query_start_loc.tolist(), torch.arange(indices.shape[1], device=indices.device)
    for b, S in enumerate(seq_lens.tolist()):
        part = slice(starts[b], starts[b + 1])
        chosen = indices[part]
        valid = (chosen >= 0) & (chosen < S)
        if topk_length is not None:
            valid &= place < topk_length[part, None]
        chosen = chosen.where(valid, 0)
        if S:
            out[part] = (tables[b][chosen.long() // PAGE] * PAGE + chosen % PAGE).where(valid, -1)
    return out


def compilations(target: Target) -> list[Compilation]:
    """2048 positions of each of 64 queries."""
    shapes: Callable[..., torch.Tensor] = lambda *shape: torch.empty(shape, dtype=torch.int32, device="meta")  # noqa: E731
    batch = (shapes(64, 2048), shapes(64), shapes(65))
    return [Compilation("decode, 2048 of each", plan_slots(shapes(64, 2048), batch, None), main=True)]
