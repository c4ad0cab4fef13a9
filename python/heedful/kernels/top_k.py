"""Exact top-k of long rows on the GPU: one pass against a rising threshold.

A program reads its row once, in order. What is above the threshold joins its candidates, in order of position; when
their buffer is full it is cut to the best k, whose last becomes the threshold. So a later equal score never displaces
an earlier one, results do not depend on timing, and of S random scores only some k ln(S / k) are written. Equal rows
cut once, rising ones each CAP - k scores, which is the worst case. The k-th best is found by bisection over integers of
the order of scores (`sortable`). Few long rows are shared by several programs; the same kernel then selects among what
these have kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels import tuning
from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.scoring import check_keys
from heedful.kernels.target import Target

MAX_K = 8192
"""Beyond it the candidates would not fit in a program's registers, and the rows are sorted by torch."""

NEVER: tl.constexpr = tl.constexpr(-(2**31))  # key of -inf, which cannot be selected; NaN comes next
LEAST: tl.constexpr = tl.constexpr(-(2**31) + 2**23)  # key of the least finite number

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def sortable(x):
    """int32 of the order of float32: -0 equals 0, NaN is below every number, -inf is NEVER."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x == 0, 0, key)
    key = tl.where(x == x, key, NEVER + 1)
    return tl.where(x == float("-inf"), NEVER, key)


@triton.jit
def total(chosen):
    """How many entries of a block [G, 4] are chosen."""
    return tl.sum(tl.sum(chosen.to(tl.int32), axis=1), axis=0)


@triton.jit
def ranks(chosen):
    """How many entries of a block [G, 4] are chosen up to each, in order.

    A thread holds fours: it counts within them by itself, and a quarter as much is left to count across threads.
    """
    within = tl.cumsum(chosen.to(tl.int32), axis=1)
    counts = tl.sum(chosen.to(tl.int32), axis=1)
    return within + (tl.cumsum(counts, axis=0) - counts)[:, None]


@triton.jit
def quarters(x, G: tl.constexpr):
    """The four columns of a block [G, 4]."""
    even, odd = tl.split(tl.reshape(x, [G, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def append(x, positions, chosen, pool, fill, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Appends the chosen entries of a block, in order, to the candidates.

    Column by column, because their addresses do not follow each other: for a store of whole fours, the compiler would
    move them to other threads.
    """
    x_0, x_1, x_2, x_3 = quarters(x, BLOCK // 4)
    p_0, p_1, p_2, p_3 = quarters(positions, BLOCK // 4)
    at_0, at_1, at_2, at_3 = quarters(tl.where(chosen, fill + ranks(chosen) - 1, -1), BLOCK // 4)
    _put(pool, at_0, x_0, p_0, CAP)
    _put(pool, at_1, x_1, p_1, CAP)
    _put(pool, at_2, x_2, p_2, CAP)
    _put(pool, at_3, x_3, p_3, CAP)


@triton.jit
def _put(pool, at, x, position, CAP: tl.constexpr):
    """Writes scores and positions to places of a pool, but for negative ones."""
    to = pool + at
    tl.store(to, x, mask=at >= 0)
    tl.store(to + CAP, position.to(tl.float32, bitcast=True), mask=at >= 0)


@triton.jit
def _get(pool, at, fill, CAP: tl.constexpr):
    """Scores at places of a pool below CAP, -inf from `fill` on, and positions.

    Loaded without a mask, because fours are then loaded at once; what lies beyond `fill` is not looked at.
    """
    x, position = tl.load(pool + at), tl.load(pool + at + CAP)
    return tl.where(at < fill, x, float("-inf")), position.to(tl.int32, bitcast=True)


@triton.jit
def offsets_of(BLOCK: tl.constexpr):
    """0, ..., BLOCK - 1 as [BLOCK / 4, 4]."""
    return tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def cut(pool, fill, k, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Cuts more than k candidates to the best k, in place and in order, a BLOCK at a time; gives what later ones must
    exceed."""
    tl.debug_barrier()  # candidates were written by other threads
    offsets = tl.arange(0, CAP)
    keys = sortable(tl.load(pool + offsets, mask=offsets < fill, other=float("-inf")))
    low = tl.min(tl.where(keys == NEVER, 0x7FFFFFFF, keys), axis=0)  # no candidate has a key of NEVER
    high = tl.max(keys, axis=0)
    above = 0  # candidates beyond `high`
    while low < high:  # the largest key that k candidates or more reach, or any that exactly k reach
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count = tl.sum((keys >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
        above = tl.where(count > k, above, tl.where(count == k, 0, count))
    ties = k - above  # so many of the candidates equal to it are kept; all, where exactly k reach it
    kept = 0
    for first in range(0, fill, BLOCK):
        at = first + offsets_of(BLOCK)
        x, position = _get(pool, at, fill, CAP)
        key = sortable(x)
        equal = (key == low) & (at < fill)
        chosen = (key > low) | (equal & (ranks(equal) <= ties))
        tl.debug_barrier()  # all have read before any writes
        append(x, position, chosen, pool, kept, CAP, BLOCK)
        counts = chosen.to(tl.int32) + (equal.to(tl.int32) << 16)  # both in one sum: a block has less than 65,536
        counts = tl.sum(tl.sum(counts, axis=1), axis=0)
        kept += counts & 0xFFFF
        ties -= tl.minimum(counts >> 16, ties)
    number = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(low < LEAST, float("-inf"), number)


@triton.jit
def consume(x, positions, pool, fill, threshold, k, last, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Makes candidates of what exceeds the threshold in a block of scores, in order of position; gives the new fill
    and threshold. CAP >= k + BLOCK. A block behind the last one leaves the best k, if there are as many; it is -inf.

    NaN is above no threshold and below none: it joins the candidates, and leaves them when they are cut.
    """
    chosen = (x <= threshold) == 0
    count = total(chosen)
    if fill + count > tl.where(last, k, CAP):
        threshold = cut(pool, fill, k, CAP, BLOCK // 2)
        fill = k
        chosen = (x <= threshold) == 0
        count = total(chosen)
    if count > 0:
        append(x, positions, chosen, pool, fill, CAP, BLOCK)
        fill += count
    return fill, threshold


@triton.jit
def emit(pool, fill, k, out, out_values, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the positions of the best k, which `consume` has left, in rising order, then -1; scores too, then -inf, if
    `out_values` is there."""
    tl.debug_barrier()  # candidates were written by other threads
    for first in range(0, k, BLOCK):
        at = first + tl.arange(0, BLOCK)
        position = tl.load(pool + at + CAP, mask=at < fill, other=0.0).to(tl.int32, bitcast=True)
        tl.store(out + at, tl.where(at < fill, position, -1), mask=at < k)
        if out_values is not None:
            tl.store(out_values + at, tl.load(pool + at, mask=at < fill, other=float("-inf")), mask=at < k)
    tl.debug_barrier()  # the candidates' places are free again


@triton.jit
def load_block(scores, positions, first, end, BLOCK: tl.constexpr):
    """A block of scores and their positions; -inf from `end` on."""
    s = first + offsets_of(BLOCK)
    if first + BLOCK <= end:  # without a mask, fours are loaded at once
        x = tl.load(scores + s, eviction_policy="evict_first").to(tl.float32)
        at = s if positions is None else tl.load(positions + s)
    else:
        x = tl.load(scores + s, mask=s < end, other=float("-inf")).to(tl.float32)
        at = s if positions is None else tl.load(positions + s, mask=s < end, other=0)
    return x, at


@triton.jit(do_not_specialize=["T"])
def _select_kernel(
    scores, positions, lengths, out, out_values, pool, T, S, k, parts, part, stride, out_stride,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows in turn, each in `parts` parts; positions are those of a row's scores if not given."""
    pool += tl.program_id(0).to(tl.int64) * (2 * CAP)
    for unit in range(tl.program_id(0), T * parts, tl.num_programs(0)):
        row, begin = (unit // parts).to(tl.int64), unit % parts * part
        end = tl.minimum(begin + part, S)
        if lengths is not None:
            end = tl.maximum(tl.minimum(end, tl.load(lengths + row)), 0).to(tl.int32)
        x_row = scores + row * stride
        place_row = positions if positions is None else positions + row * stride
        fill, threshold = 0, float("-inf")
        next_x, next_place = load_block(x_row, place_row, begin, end, BLOCK)
        for first in range(begin, end + BLOCK, BLOCK):
            x, place = next_x, next_place
            next_x, next_place = load_block(x_row, place_row, first + BLOCK, end, BLOCK)  # under way meanwhile
            fill, threshold = consume(x, place, pool, fill, threshold, k, first >= end, CAP, BLOCK)
        to = row * out_stride + unit % parts * k
        emit(pool, fill, k, out + to, None if out_values is None else out_values + to, CAP, BLOCK)


@triton.jit
def _sort_kernel(positions, values, out, k, out_stride, KP: tl.constexpr):
    """Sorts the selection of a row, highest score first and equal ones by position; -1 stays last."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    position = tl.load(positions + row * k + at, mask=at < k, other=-1)
    key = sortable(tl.load(values + row * k + at, mask=at < k, other=float("-inf")))
    # Position p as 2^31 - 1 - p, and no position as 0, which none else is: positions are below 2^31 - 1.
    low = tl.where(position < 0, 0, 0x7FFFFFFF - position)
    entry = tl.sort((key.to(tl.int64) << 32) | low.to(tl.int64), descending=True)
    low = (entry & 0x7FFFFFFF).to(tl.int32)
    tl.store(out + row * out_stride + at, tl.where(low == 0, -1, 0x7FFFFFFF - low), mask=at < k)


# -- launcher ----------------------------------------------------------------------------------------------------------


def top_k(scores: torch.Tensor, k: int, *, lengths: torch.Tensor | None = None, sorted: bool = True) -> torch.Tensor:
    """Positions of the k highest scores of each row; ties go to the lowest position.

    -inf and what lies at or beyond `lengths[t]` is never selected; NaN is below every number.

    Args:
        scores: [T, S] float32, bfloat16 or float16; at most MAX_KEYS of `scoring` in a row.
        k: at least 1; beyond MAX_K the rows are sorted by torch.
        lengths: [T] integers from 0 to S; default S.
        sorted: True: highest first. False: in rising order of position, which is quicker.

    Returns:
        int32 [T, k]; places left over hold -1.
    """
    if k > MAX_K:
        return top_k_reference(scores, k, lengths=lengths, sorted=sorted)
    out = torch.empty((scores.shape[0], k), dtype=torch.int32, device=scores.device)
    for launch in plan(scores, k, lengths, sorted, out, Target.of(scores)):
        launch.run()
    return out


@dataclass(frozen=True)
class Sizes:
    """Scores that are read at a time and candidates of a program (powers of two, CAP >= k + BLOCK, BLOCK >= 8), its
    warps, how many blocks share a multiprocessor, and the registers a thread may have for that."""

    BLOCK: int
    CAP: int
    num_warps: int = 8
    blocks: int = 2
    max_registers: int | None = None


def sizes_for(k: int) -> Sizes:
    """The sizes that are taken unless a table of measurements says otherwise.

    A cut holds all candidates in registers. Blocks wait for each other's threads often, so several share a
    multiprocessor as far as registers allow.
    """
    if k <= 2048:
        return Sizes(2048, 4096, blocks=3, max_registers=80)
    if k <= 6144:
        return Sizes(2048, 8192, max_registers=128)
    return Sizes(2048, 16384, num_warps=16, blocks=1)


def size_candidates(k: int) -> list[Sizes]:
    """What a warm-up tries: the default first."""
    tried = [
        Sizes(2048, 4096),
        Sizes(1024, 4096, blocks=4, max_registers=64),
        Sizes(2048, 4096, num_warps=4, max_registers=128, blocks=4),
        Sizes(2048, 8192, max_registers=128),
        Sizes(4096, 8192, num_warps=16, max_registers=64),
    ]
    return [sizes_for(k), *(sizes for sizes in tried if k + sizes.BLOCK <= sizes.CAP)]


def warm_up(scores: torch.Tensor, k: int) -> Sizes:
    """Measures the candidates on `scores` [T, S], for shapes of its bucket."""
    (T, S), target = scores.shape, Target.of(scores)
    out = torch.empty((T, k), dtype=torch.int32, device=scores.device)
    key = tuning.bucket(T, S, str(k))
    return tuning.measure(
        "top_k", key, target, size_candidates(k), lambda sizes: plan(scores, k, None, False, out, target, sizes)
    )


def plan(
    scores: torch.Tensor,
    k: int,
    lengths: torch.Tensor | None,
    sorted: bool,
    out: torch.Tensor,
    target: Target,
    sizes: Sizes | None = None,
    parts: int | None = None,
) -> list[Launch]:
    """The launches that write the selection to `out` [T, k]: of parts of rows, of rows, in order of score."""
    T, S = scores.shape
    check_keys("scores", S)
    sizes = sizes or tuning.choose("top_k", tuning.bucket(T, S, str(k)), target, lambda: size_candidates(k))
    scores = scores if scores.stride(1) == 1 or S == 1 else scores.contiguous()
    if parts is None:  # a part reads S / parts scores, then one program reads the best k of each part
        parts = min(math.isqrt(S // k), 2 * target.num_sms // max(1, T))
    part = max(1, -(-S // (max(1, parts) * sizes.BLOCK))) * sizes.BLOCK
    parts = max(1, -(-S // part))
    if parts == 1:
        return select(scores, None, lengths, k, sorted, out, sizes, target)
    values, positions = candidates(T, parts * k, scores.device)
    first = _select(scores, None, lengths, k, positions, values, sizes, target, parts, part)
    return [first, *select(values, positions, None, k, sorted, out, sizes, target)]


def candidates(T: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for scores [T, n] and their positions."""
    return torch.empty((T, n), device=device), torch.empty((T, n), dtype=torch.int32, device=device)


def select(
    scores: torch.Tensor,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    k: int,
    sorted: bool,
    out: torch.Tensor,
    sizes: Sizes,
    target: Target,
) -> list[Launch]:
    """The launches that select from whole rows, and sort. Given positions rise along a row, but where scores are -inf;
    they lie as the scores do."""
    part = max(1, scores.shape[1])
    if not sorted:
        return [_select(scores, positions, lengths, k, out, None, sizes, target, 1, part)]
    chosen, at = candidates(len(scores), k, out.device)
    return [_select(scores, positions, lengths, k, at, chosen, sizes, target, 1, part), sort(chosen, at, out)]


def sort(scores: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes selected positions [T, k], which lie one after another, to `out` in order of score."""
    T, k = scores.shape
    KP = triton.next_power_of_2(k)
    arguments = {"positions": positions, "values": scores, "out": out, "k": k, "out_stride": out.stride(0), "KP": KP}
    return Launch(_sort_kernel, (T,), arguments, num_warps=min(max(KP // 256, 1), 16))


def _select(
    scores: torch.Tensor,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    k: int,
    out: torch.Tensor,
    out_values: torch.Tensor | None,
    sizes: Sizes,
    target: Target,
    parts: int,
    part: int,
) -> Launch:
    if k + sizes.BLOCK > sizes.CAP:
        raise ValueError(f"sizes: {sizes} cannot hold a block beside {k} candidates")
    T, S = scores.shape
    programs = min(T * parts, sizes.blocks * target.num_sms)
    lengths = None if lengths is None else lengths.contiguous()
    arguments: dict[str, Any] = {"scores": scores, "positions": positions, "lengths": lengths, "out": out}
    arguments |= {
        "out_values": out_values,
        "pool": torch.empty((programs, 2, sizes.CAP), device=out.device),
        "T": T,
        "S": S,
        "k": k,
        "parts": parts,
        "part": part,
    }
    arguments |= {"stride": scores.stride(0), "out_stride": out.stride(0)}
    arguments |= {"CAP": sizes.CAP, "BLOCK": sizes.BLOCK}
    registers = sizes.max_registers
    if positions is not None:  # there are few rows to merge, so a block need not share
        registers = min(255, 65536 // (32 * sizes.num_warps))
    return Launch(_select_kernel, (programs,), arguments, sizes.num_warps, max_registers=registers)


# -- reference ---------------------------------------------------------------------------------------------------------


def top_k_reference(
    scores: torch.Tensor, k: int, *, lengths: torch.Tensor | None = None, sorted: bool = True
) -> torch.Tensor:
    """`top_k` by torch's stable sort."""
    (T, S), device = scores.shape, scores.device
    at = torch.arange(S, device=device)
    x = scores.float()
    selectable = x != -torch.inf
    if lengths is not None:
        selectable &= at < lengths[:, None]
    # Three stable sorts make one by (selectable, number, value): NaN after numbers, what is never selected last.
    order = torch.where(x.isnan(), -torch.inf, x).argsort(dim=1, descending=True, stable=True)
    for last in (x.isnan(), ~selectable):
        order = order.gather(1, last.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    order = order[:, :k]
    chosen = selectable.gather(1, order)
    if not sorted:
        order = torch.where(chosen, order, S).sort(dim=1).values
        chosen = order < S
    out = torch.full((T, k), -1, dtype=torch.int32, device=device)
    out[:, : order.shape[1]] = torch.where(chosen, order, -1)
    return out


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """2048 of 131072, of many rows and of one; and of a k that is not a power of two."""
    found = []
    for T, k, sorted in ((4096, 2048, True), (1, 2048, False), (64, 4000, False), (64, 8192, True)):
        scores, out = torch.empty((T, 131072), device="meta"), torch.empty((T, k), dtype=torch.int32, device="meta")
        for launch in plan(scores, k, None, sorted, out, target):
            step = "sorting" if launch.kernel is _sort_kernel else "parts" if launch.arguments["parts"] > 1 else "rows"
            step = "merging" if step == "rows" and launch.arguments["positions"] is not None else step
            found.append(Compilation(f"{k} of 131072, {T} rows: {step}", launch, main=k == 2048))
    return found
