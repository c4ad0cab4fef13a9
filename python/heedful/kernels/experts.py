"""The routed experts of a mixture: down(silu(gate(x)) * up(x)) of each token's experts, in two products.

Rows are sorted by expert, and each program multiplies a tile of one expert's rows. Which tile is whose a program finds
from the experts' counts, which stay on the device: nothing waits for it, so a CUDA graph can hold this, and an
expert without rows is not read. The grid is the most tiles that so many rows can make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.rows import unit_stride
from heedful.kernels.target import Target

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["E"])
def _expert_kernel(
    x, weight, counts, order, out, x_row, expert_stride, up_stride, N, K, E, TOP_K: tl.constexpr, GATED: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of x W^T of an expert: BM of its rows, BN of its N columns.

    GATED: rows of x are tokens, those of W gates above ups, and silu(gate) * up is written in sorted order. Otherwise
    rows of x are in sorted order, and results go to the places that `order` names.
    """
    tile = tl.program_id(0)
    lane = tl.arange(0, EP)
    rows = tl.load(counts + lane, mask=lane < E, other=0)
    tiles = (rows + BM - 1) // BM
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32) * (lane < E).to(tl.int32), axis=0)
    if expert < E:
        before = lane < expert
        start = tl.sum(tl.where(before, rows, 0), axis=0)
        within = (tile - tl.sum(tl.where(before, tiles, 0), axis=0)) * BM + tl.arange(0, BM)
        there = within < tl.sum(tl.where(lane == expert, rows, 0), axis=0)
        row = (start + within).to(tl.int64)
        place = tl.load(order + row, mask=there, other=0)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = column < N
        part = tl.arange(0, BK)
        from_x = x + (place // TOP_K if GATED else row)[:, None] * x_row + part[None, :]
        from_w = weight + expert.to(tl.int64) * expert_stride + column.to(tl.int64)[:, None] * K + part[None, :]
        acc = tl.zeros([BM, BN], tl.float32)
        if GATED:
            ups = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, K, BK, num_stages=STAGES):
            x_mask, w_mask = there[:, None], inside[:, None]
            if not EVEN:
                x_mask = x_mask & (first + part < K)[None, :]
                w_mask = w_mask & (first + part < K)[None, :]
            a = tl.load(from_x + first, mask=x_mask, other=0.0).to(DOT)
            b = tl.load(from_w + first, mask=w_mask, other=0.0).to(DOT)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
            if GATED:
                up = tl.load(from_w + first + up_stride, mask=w_mask, other=0.0).to(DOT)
                ups = tl.dot(a, tl.trans(up), ups, input_precision="ieee")
        if GATED:
            acc = acc * ups / (1.0 + tl.exp(-acc))
        to = out + (row if GATED else place)[:, None] * N + column[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


# -- launcher ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program: BM rows, BN columns, BK numbers of each at a time."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    stages: int


def experts(x: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What each token's experts make of it.

    Args:
        x: [N, D] float32, bfloat16 or float16.
        chosen: [N, top_k] int64, experts of each token.
        gate_up: [E, 2 I, D] of x's dtype, gates above ups. Contiguous.
        down: [E, D, I] likewise.

    Returns:
        [N, top_k, D] of x's dtype. Sums are float32, and silu(gate) * up is rounded once.
    """
    if not chosen.numel():
        return x.new_empty((*chosen.shape, x.shape[1]))
    ranks = chosen.flatten()
    order = ranks.argsort(stable=True)
    counts = torch.zeros(len(gate_up), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ranks, torch.ones_like(ranks, dtype=torch.int32))
    launches = plan(x, order, counts, gate_up, down, chosen.shape[1], Target.of(x))
    for launch in launches:
        launch.run()
    out: torch.Tensor = launches[-1].arguments["out"]
    return out.view(*chosen.shape, -1)


def tiles_for(rows: int, num_experts: int, dtype: torch.dtype, gated: bool) -> Tiles:
    """As many rows as an expert has on average, up to what fills registers; gates and ups share a program's columns."""
    BM = min(128, max(16, triton.next_power_of_2(-(-rows // num_experts))))
    if dtype == torch.float32:
        return Tiles(min(BM, 64), 32 if gated else 64, 16 if gated else 32, 4, 2)
    return Tiles(BM, 64 if gated else 128, 64, 8 if BM == 128 else 4, 3)


def plan(
    x: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    target: Target,
) -> list[Launch]:
    """The two launches of `experts`; the last writes `out` [N * top_k, D]."""
    x = unit_stride(x)
    hidden = torch.empty((len(order), down.shape[2]), dtype=x.dtype, device=x.device)
    out = torch.empty((len(order), down.shape[1]), dtype=x.dtype, device=x.device)
    shared = order, counts, top_k, target
    return [_plan_product(x, gate_up, hidden, True, *shared), _plan_product(hidden, down, out, False, *shared)]


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _plan_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    gated: bool,
    order: torch.Tensor,
    counts: torch.Tensor,
    top_k: int,
    target: Target,
) -> Launch:
    E, _, K = weight.shape
    rows, N = out.shape
    tiles = tiles_for(rows, E, x.dtype, gated)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "counts": counts, "order": order, "out": out}
    arguments |= {"x_row": x.stride(0), "expert_stride": weight.stride(0), "up_stride": N * K}
    arguments |= {"N": N, "K": K, "E": E, "TOP_K": top_k}
    arguments |= {"GATED": gated, "EP": triton.next_power_of_2(E), "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK}
    arguments |= {"EVEN": K % tiles.BK == 0, "STAGES": tiles.stages}
    arguments |= {"DOT": tl.float32 if target.interpreted else _TYPES[x.dtype]}
    # Each expert with rows may leave one tile unfilled.
    most = min(rows, E) + rows // tiles.BM
    return Launch(_expert_kernel, (most, -(-N // tiles.BN)), arguments, tiles.num_warps, tiles.stages)


# -- reference ---------------------------------------------------------------------------------------------------------


def experts_reference(x: torch.Tensor, chosen: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`experts` in float64, a token's expert at a time."""
    out = torch.empty((*chosen.shape, x.shape[1]), dtype=torch.float64, device=x.device)
    for token, place in torch.ones_like(chosen).nonzero().tolist():
        expert = chosen[token, place]
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        out[token, place] = down[expert].double() @ (F.silu(gate) * up)
    return out


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """DeepSeek-V3.2's 256 experts of 2048, 8 a token: a prompt of 4096 tokens, decoding of 64 and of 1."""
    found = []
    for name, N, dtype in (
        ("4096 tokens", 4096, torch.bfloat16),
        ("64 tokens", 64, torch.bfloat16),
        ("1 token", 1, torch.bfloat16),
        ("4096 tokens", 4096, torch.float32),
    ):
        shapes = (N, 7168), (256, 4096, 7168), (256, 7168, 2048)
        x, gate_up, down = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        order = torch.empty(8 * N, dtype=torch.int64, device="meta")
        counts = torch.empty(256, dtype=torch.int32, device="meta")
        for part, launch in zip(("gate, up", "down"), plan(x, order, counts, gate_up, down, 8, target), strict=True):
            label = f"{part}, {name}, {str(dtype)[6:]}"
            found.append(Compilation(label, launch, True, launch.arguments["BM"] >= 64 and dtype != torch.float32))
    return found
