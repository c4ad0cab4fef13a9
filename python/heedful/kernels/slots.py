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
    indices, topk_length, tables, seq_lens, query_start_loc, out, indices_row, table_row, K, num_seqs, reach, blocks,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Some of one query's indices; a table holds pages of `reach` tokens, the cache holds `blocks`."""
    t = tl.program_id(0)
    b = sequence_of_query(t, query_start_loc, num_seqs, 256)
    length = K
    if topk_length is not None:
        length = tl.maximum(tl.minimum(tl.load(topk_length + t), K), 0).to(tl.int32)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    index = tl.load(indices + t.to(tl.int64) * indices_row + at, mask=at < length, other=-1)
    there = (index >= 0) & (index < tl.minimum(tl.load(seq_lens + b), reach))
    page = tl.load(tables + b.to(tl.int64) * table_row + index // 64, mask=there, other=-1)
    known = (page >= 0) & (page < blocks)
    tl.store(out + t.to(tl.int64) * K + at, tl.where(known, page * 64 + index % 64, -1), mask=at < K)


def slots_of(
    indices: torch.Tensor, batch: Batch, num_blocks: int, topk_length: torch.Tensor | None = None
) -> torch.Tensor:
    """Slots of chosen positions.

    Args:
        indices: [N, K] int32, positions in the query's sequence.
        batch: block tables [B, M], sequence lengths [B], starts of their queries [B + 1], int32.
        num_blocks: of the cache.
        topk_length: [N] integers: only the first of a query's indices count.

    Returns:
        int32 [N, K]: -1 for an index that is negative, beyond the sequence or its table, in a block that the cache does
        not have, or that does not count.

    Raises:
        ValueError: queries without a sequence.
    """
    launch = plan_slots(indices, batch, num_blocks, topk_length)
    launch.run()
    slots: torch.Tensor = launch.arguments["out"]
    return slots


def plan_slots(indices: torch.Tensor, batch: Batch, num_blocks: int, topk_length: torch.Tensor | None) -> Launch:
    """The launch of `slots_of`."""
    (N, K), (tables, seq_lens, query_start_loc) = indices.shape, batch
    check_sequences(N, seq_lens)
    indices, tables = unit_stride(indices), unit_stride(tables)
    arguments: dict[str, Any] = {
        "indices": indices,
        "topk_length": None if topk_length is None else topk_length.contiguous(),
    }
    arguments |= {"tables": tables, "seq_lens": seq_lens, "query_start_loc": query_start_loc}
    arguments |= {"out": torch.empty((N, K), dtype=torch.int32, device=indices.device)}
    arguments |= {"indices_row": indices.stride(0), "table_row": tables.stride(0), "K": K}
    arguments |= {"num_seqs": seq_lens.shape[0], "reach": tables.shape[1] * PAGE, "blocks": num_blocks}
    arguments |= {"WIDTH": min(1024, max(32, triton.next_power_of_2(K)))}
    return Launch(_slots_kernel, (N, -(-K // arguments["WIDTH"])), arguments, 4)


def check_sequences(N: int, seq_lens: torch.Tensor) -> None:
    """That N queries have a sequence to belong to.

    Raises:
        ValueError: they have none.
    """
    if N and not len(seq_lens):
        raise ValueError(f"seq_lens: expected at least one sequence for {N} queries, got none")


def slots_reference(
    indices: torch.Tensor, batch: Batch, num_blocks: int, topk_length: torch.Tensor | None = None
) -> torch.Tensor:
    """`slots_of`, a sequence at a time."""
    tables, seq_lens, query_start_loc = batch
    out = torch.full_like(indices, -1)
    starts, place = query_start_loc.tolist(), torch.arange(indices.shape[1], device=indices.device)
    for b, S in enumerate(seq_lens.tolist()):
        part = slice(starts[b], starts[b + 1])
        chosen = indices[part]
        valid = (chosen >= 0) & (chosen < min(S, tables.shape[1] * PAGE))
        if topk_length is not None:
            valid &= place < topk_length[part, None]
        chosen = chosen.where(valid, 0)
        if S and tables.shape[1]:
            block = tables[b][chosen.long() // PAGE]
            valid &= (block >= 0) & (block < num_blocks)
            out[part] = (block * PAGE + chosen % PAGE).where(valid, -1)
    return out


def compilations(target: Target) -> list[Compilation]:
    """2048 positions of each of 64 queries."""
    shapes: Callable[..., torch.Tensor] = lambda *shape: torch.empty(shape, dtype=torch.int32, device="meta")  # noqa: E731
    batch = (shapes(64, 2048), shapes(64), shapes(65))
    return [Compilation("decode, 2048 of each", plan_slots(shapes(64, 2048), batch, 4096, None), main=True)]
