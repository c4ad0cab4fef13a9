"""Keys in parts: into how many they are cut where queries are few, and how the parts are put together.

A part is a softmax of its own keys with its logarithm of the sum of exponentials; weighted by 2 ** (lse - largest lse)
and divided by the sum of the weights, parts are the softmax of all keys. Parts lie in float32, logarithms in base 2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.target import Target

MOST = 64  # parts: a program of the merge holds their weights


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    parts, part_lse, out, lse, sink, splits, HEADS: tl.constexpr, DV: tl.constexpr, SP: tl.constexpr, DVP: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """One head of one query; parts without a key (lse -inf) are not read."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SP)
    first = row // HEADS * splits * HEADS + row % HEADS
    logs = tl.load(part_lse + first + every * HEADS, mask=every < splits, other=float("-inf"))
    top = tl.max(logs, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs - base), axis=0)
    columns = tl.arange(0, DVP)
    acc = tl.zeros([DVP], tl.float32)
    for start in range(0, splits, AT_A_TIME):
        part = start + tl.arange(0, AT_A_TIME)
        at = first + part * HEADS
        log = tl.load(part_lse + at, mask=part < splits, other=float("-inf"))
        there = (log != float("-inf"))[:, None] & (columns < DV)[None, :]
        values = tl.load(parts + at[:, None] * DV + columns[None, :], mask=there, other=0.0)
        acc += tl.sum(values * tl.exp2(log - base)[:, None], axis=0)
    tl.store(lse + row, (base + tl.log2(total)) * 0.6931471805599453)
    if sink is not None:
        added = tl.load(sink + row % HEADS) * 1.4426950408889634
        total += tl.where(total == 0.0, 0.0, tl.exp2(added - base))
    acc /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + columns, acc.to(out.dtype.element_ty), mask=columns < DV)


@functools.lru_cache(maxsize=1024)
def choose_splits(programs: int, length: int, tile: int, num_sms: int) -> tuple[int, int]:
    """Into how many parts `length` keys are cut, and keys of a part (a multiple of `tile`).

    One program runs on a multiprocessor at a time. What is weighed, in tiles of keys: the rounds of programs, each as
    long as a part and two tiles to begin and end, and an eighth of a tile a part for the merge.
    """
    tiles = max(1, -(-length // tile))
    best, best_cost = 1, float("inf")
    for splits in range(1, min(MOST, tiles) + 1):
        part = -(-tiles // splits)
        if -(-tiles // part) < splits:  # the last part would be empty
            continue
        rounds = -(-max(1, programs) * splits // num_sms)
        cost = rounds * (part + 2) + (0 if splits == 1 else 2 + splits / 8)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best, -(-tiles // best) * tile


def plan_merge(parts: torch.Tensor, part_lse: torch.Tensor, sink: torch.Tensor | None, dtype: torch.dtype) -> Launch:
    """The launch that puts parts together.

    Args:
        parts: [T, splits, H, Dv] float32; one whose lse is -inf is not read.
        part_lse: [T, splits, H] float32, base 2.
        sink: [H] float32; exp(sink) is added to the denominator.
        dtype: of the output.

    Returns:
        The launch that writes "out" [T, H, Dv] and "lse" [T, H] float32, natural logarithm, without the sink.
    """
    T, splits, H, DV = parts.shape
    out = torch.empty((T, H, DV), dtype=dtype, device=parts.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=parts.device)
    arguments: dict[str, Any] = {
        "parts": parts,
        "part_lse": part_lse,
        "out": out,
        "lse": lse,
        "splits": splits,
        "HEADS": H,
        "DV": DV,
    }
    arguments |= {"sink": None if sink is None else sink.contiguous(), "SP": triton.next_power_of_2(splits)}
    arguments |= {"DVP": triton.next_power_of_2(DV), "AT_A_TIME": 8}
    return Launch(_merge_kernel, (T * H,), arguments, 4)


def merge_reference(
    parts: torch.Tensor, part_lse: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts put together in float64: out and lse."""
    lse = torch.logsumexp(part_lse.double() * 0.6931471805599453, 1)  # [T, H]
    total = lse if sink is None else torch.logaddexp(lse, sink.double().expand_as(lse))
    weights = torch.where(
        part_lse == -torch.inf, 0.0, torch.exp(part_lse.double() * 0.6931471805599453 - total[:, None])
    )
    held = torch.where(part_lse == -torch.inf, 0.0, 1.0)[..., None] != 0
    out = (torch.where(held, parts.double(), 0.0) * weights[..., None]).sum(1)
    return out, lse


def compilations(target: Target) -> list[Compilation]:
    """The merge of a decode of one query with 128 heads."""
    parts = torch.empty((1, 32, 128, 512), device="meta")
    launch = plan_merge(parts, torch.empty((1, 32, 128), device="meta"), None, torch.bfloat16)
    return [Compilation("32 parts, 128 heads, 512", launch, main=True)]
