"""Rows to codes of eight bits on the GPU: e4m3fn with a scale for each group, int8 with a scale for each row.

Every step is an exact or correctly rounded operation on float32, so codes and scales are those of the CPU, bit by bit,
on any chip; but the sign of a NaN, which chips do not keep. e4m3fn: Micikevicius et al. 2022.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.target import Target

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def float32_to_e4m3(x):
    """Nearest code, ties to the even one; beyond 448 saturates, NaN stays: uint8."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Round away 20 of 23 bits of the mantissa, and the exponent's bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Subnormal codes are multiples of 2 ** -9, the distance of floats at 2 ** 14: the addition rounds.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2 ** -6
    code = tl.where(magnitude >= 0x43E00000, 0x7E, code)  # 448
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The largest finite magnitude along an axis, at least 1e-4, so that a row of zeros has a scale."""
    size = tl.abs(x)
    finite = tl.where(size < float("inf"), size, 0.0)
    return tl.maximum(tl.max(finite, axis=axis), 1e-4)


@triton.jit
def int8_codes(x):
    """Rows x [ROWS, DIM] of float32: codes int8 and scales [ROWS]; a NaN is told by its row's scale."""
    top = largest(x, 1)
    scale = tl.div_rn(top, tl.zeros_like(top) + 127.0)
    quotient = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
    quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
    rounded = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23: rounds to a whole number, to nearest even
    bad = x != x
    codes = tl.where(bad, 0.0, rounded).to(tl.int8)
    return codes, tl.where(tl.max(bad.to(tl.int32), axis=1) > 0, float("nan"), scale)


@triton.jit
def fp8_codes(x):
    """Groups x [..., DIM] of float32, rank 2: codes uint8 and scales [...]."""
    top = largest(x, 1)
    scale = tl.div_rn(top, tl.zeros_like(top) + 448.0)
    return float32_to_e4m3(tl.div_rn(x, tl.zeros_like(x) + scale[:, None])), scale


@triton.jit(do_not_specialize=["count"])
def _quantize_fp8_kernel(
    x, codes, scales, count, groups, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Some of `count` groups, numbered through the rows, `groups` of each."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, first = place // groups, place % groups * WIDTH
    column, there = tl.arange(0, PADDED), place < count
    at = row[:, None] * DIM + first[:, None] + column[None, :]
    mask = there[:, None] & (column < WIDTH)[None, :] & (first[:, None] + column[None, :] < DIM)
    code, scale = fp8_codes(tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(codes + at, code, mask=mask)
    tl.store(scales + place, scale, mask=there)


@triton.jit(do_not_specialize=["N"])
def _quantize_int8_kernel(x, codes, scales, N, DIM: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    at, mask = row[:, None] * DIM + column[None, :], (row < N)[:, None] & (column < DIM)[None, :]
    code, scale = int8_codes(tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(codes + at, code, mask=mask)
    tl.store(scales + row, scale, mask=row < N)


# -- launchers ---------------------------------------------------------------------------------------------------------


def quantize_fp8(x: torch.Tensor, *, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn codes of groups of the last dimension: scale = max(amax, 1e-4) / 448, amax over finite values.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        group_size: values that share a scale.

    Returns:
        codes uint8 [..., D] and scales float32 [..., ceil(D / group_size)].
    """
    launch = plan_fp8(x.contiguous(), group_size)
    launch.run()
    return launch.arguments["codes"], launch.arguments["scales"]


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of the last dimension: scale = max(amax, 1e-4) / 127, NaN for a row that holds one.

    Args:
        x: [..., D] float32, bfloat16 or float16.

    Returns:
        codes int8 [..., D] from -127 to 127 and scales float32 [...].
    """
    launch = plan_int8(x.contiguous())
    launch.run()
    return launch.arguments["codes"], launch.arguments["scales"]


def plan_fp8(x: torch.Tensor, group_size: int) -> Launch:
    """The launch of `quantize_fp8`; x is contiguous."""
    *lead, D = x.shape
    width = max(1, min(group_size, D))
    N, groups, padded = math.prod(lead), -(-D // width), triton.next_power_of_2(width)
    rows = max(1, 2048 // padded)
    arguments: dict[str, Any] = {
        "x": x,
        "codes": torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        "count": N * groups,
        "groups": groups,
    }
    arguments |= {"scales": torch.empty((*lead, groups), dtype=torch.float32, device=x.device), "DIM": D}
    arguments |= {"WIDTH": width, "ROWS": rows, "PADDED": padded}
    return Launch(_quantize_fp8_kernel, (-(-N * groups // rows),), arguments, 4)


def plan_int8(x: torch.Tensor) -> Launch:
    """The launch of `quantize_int8`; x is contiguous."""
    *lead, D = x.shape
    N, padded = math.prod(lead), triton.next_power_of_2(max(1, D))
    rows = max(1, 2048 // padded)
    arguments: dict[str, Any] = {
        "x": x,
        "codes": torch.empty(x.shape, dtype=torch.int8, device=x.device),
        "N": N,
        "DIM": D,
    }
    arguments |= {"scales": torch.empty(lead, dtype=torch.float32, device=x.device), "ROWS": rows, "PADDED": padded}
    return Launch(_quantize_int8_kernel, (-(-N // rows),), arguments, 4)


# -- reference ---------------------------------------------------------------------------------------------------------


def e4m3_reference(x: torch.Tensor) -> torch.Tensor:
    """Nearest e4m3fn code of float32, saturating, by torch's own conversion: uint8."""
    return torch.where(x.isnan(), x, x.clamp(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_fp8_reference(x: torch.Tensor, *, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` by torch's operators."""
    codes, scales = [], []
    for group in x.float().split(group_size, -1):
        finite = torch.where(group.isfinite(), group.abs(), 0)
        scale = finite.amax(-1).clamp(min=1e-4) / 448
        codes.append(e4m3_reference(group / scale[..., None]))
        scales.append(scale)
    return torch.cat(codes, -1), torch.stack(scales, -1)


def quantize_int8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_int8` by torch's operators."""
    x = x.float()
    scale = torch.where(x.isfinite(), x.abs(), 0).amax(-1).clamp(min=1e-4) / 127
    codes = (x / scale[..., None]).clamp(-127, 127).nan_to_num(0).round().to(torch.int8)
    return codes, torch.where(x.isnan().any(-1), torch.nan, scale)


def compilations(target: Target) -> list[Compilation]:
    """Index queries of 4096 tokens with 64 heads of 128."""
    x = torch.empty((4096, 64, 128), dtype=torch.bfloat16, device="meta")
    return [
        Compilation("FP8, 64 heads of 128, bfloat16", plan_fp8(x, 128), main=True),
        Compilation("int8, 64 heads of 128, bfloat16", plan_int8(x), main=True),
    ]
