"""The orthonormal Walsh-Hadamard transform on the GPU: it spreads outliers over a row before that is quantised, and
leaves exact products of two transformed rows unchanged.

Sums are taken in the order of the CPU's, so both give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.target import Target

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def transform(x, factor, ROWS: tl.constexpr, DIM: tl.constexpr, LOG: tl.constexpr):
    """Rows x [ROWS, DIM], DIM = 2 ** LOG, of float32 times the matrix of signs in Sylvester's order times `factor`."""
    for i in tl.static_range(LOG):  # neighbours at a distance of 2 ** i become their sum and their difference
        pairs = tl.permute(tl.reshape(x, [ROWS, DIM >> (i + 1), 2, 1 << i]), [0, 1, 3, 2])
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, DIM])
    return x * factor


@triton.jit(do_not_specialize=["N"])
def _hadamard_kernel(x, out, N, factor, ROWS: tl.constexpr, DIM: tl.constexpr, LOG: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, mask = row[:, None] * DIM + tl.arange(0, DIM)[None, :], (row < N)[:, None]
    numbers = transform(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), factor, ROWS, DIM, LOG)
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=mask)


# -- launcher ----------------------------------------------------------------------------------------------------------


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x H / sqrt(D) over the last dimension.

    Args:
        x: [..., D] float32, bfloat16 or float16, D a power of two. Sums are float32.

    Returns:
        The same shape and dtype.
    """
    launch = plan(x.contiguous())
    launch.run()
    out: torch.Tensor = launch.arguments["out"]
    return out


def factor_of(dim: int) -> float:
    """1 / sqrt(D) in float32 arithmetic."""
    return float(np.float32(1) / np.sqrt(np.float32(dim)))


def plan(x: torch.Tensor) -> Launch:
    """The launch of `hadamard`; x is contiguous."""
    *lead, D = x.shape
    N, rows = math.prod(lead), max(1, 2048 // D)
    arguments: dict[str, Any] = {
        "x": x,
        "out": torch.empty_like(x),
        "N": N,
        "factor": factor_of(D),
        "ROWS": rows,
        "DIM": D,
    }
    return Launch(_hadamard_kernel, (-(-N // rows),), {**arguments, "LOG": D.bit_length() - 1}, 4)


# -- reference ---------------------------------------------------------------------------------------------------------


def hadamard_reference(x: torch.Tensor) -> torch.Tensor:
    """`hadamard` in float64, by the definition H[i, j] = (-1) ** popcount(i & j)."""
    D = x.shape[-1]
    matrix = torch.ones((1, 1), dtype=torch.float64, device=x.device)
    while len(matrix) < D:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x.double() @ matrix / math.sqrt(D)


def compilations(target: Target) -> list[Compilation]:
    """Index queries of 4096 tokens with 64 heads of 128."""
    x = torch.empty((4096, 64, 128), dtype=torch.bfloat16, device="meta")
    return [Compilation("64 heads of 128, bfloat16", plan(x), main=True)]
