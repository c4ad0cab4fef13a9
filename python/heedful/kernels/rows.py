"""Rows of keys and values: where they lie, and how a kernel reads some of them.

A row is read in two parts, its first C numbers and the R behind them, because matrix units want powers of two and 576
is 512 + 64. The first part may be e4m3 codes with a float32 scale for each 128 of them (the 656-byte rows of FP8
latent caches); it is multiplied by its scales on the way. Addresses are in 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.e4m3 import e4m3_to_float16

PAGE = 64  # tokens of a page
GROUP = 128  # codes that share a scale
SMALLEST = 16  # of a matrix product's dimensions

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def read_bfloat16(base, offset, mask):
    """bfloat16 numbers of a tensor of bytes, at any address (offsets in bytes)."""
    low = tl.load(base + offset, mask=mask, other=0).to(tl.uint16)
    high = tl.load(base + offset + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.bfloat16, bitcast=True)


@triton.jit
def read_float32(base, offset, mask):
    """float32 numbers of a tensor of bytes, at any address (offsets in bytes)."""
    low = tl.load(base + offset, mask=mask, other=0).to(tl.uint32)
    low |= tl.load(base + offset + 1, mask=mask, other=0).to(tl.uint32) << 8
    high = tl.load(base + offset + 2, mask=mask, other=0).to(tl.uint32)
    high |= tl.load(base + offset + 3, mask=mask, other=0).to(tl.uint32) << 8
    return (low | (high << 16)).to(tl.float32, bitcast=True)


@triton.jit
def read_part(base, row, stride, there, WIDTH: tl.constexpr, PADDED: tl.constexpr, BYTES: tl.constexpr):
    """The first WIDTH numbers of rows [BK], as [BK, PADDED]: zeros beyond the width and where `there` is false.

    With BYTES they are bfloat16 in a tensor of bytes, whose stride is in bytes. A stride that is known to the compiler
    saves it three of four instructions of an address, and lets it read 16 bytes at once where that is a multiple of 8.
    """
    columns = tl.arange(0, PADDED)
    at = row * stride
    mask = there[:, None]
    if WIDTH != PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    if BYTES:
        numbers = read_bfloat16(base, at[:, None] + 2 * columns[None, :], mask)
    else:
        numbers = tl.load(base + at[:, None] + columns[None, :], mask=mask, other=0.0)
    return numbers


@triton.jit
def times_scales(
    codes, scales, row, stride, there, WIDTH: tl.constexpr, PADDED: tl.constexpr, BK: tl.constexpr, BYTES: tl.constexpr
):
    """e4m3 codes [BK, PADDED] of rows times the scales of their groups: float32 [BK, PADDED]."""
    if codes.dtype == tl.uint8:
        numbers = e4m3_to_float16(codes).to(tl.float32)
    else:
        numbers = codes.to(tl.float32)
    WIDE: tl.constexpr = 128 if PADDED > 128 else PADDED
    GROUPS: tl.constexpr = PADDED // WIDE
    groups = tl.arange(0, GROUPS)
    mask = there[:, None] & (groups < (WIDTH + 127) // 128)[None, :]
    if BYTES:
        scale = read_float32(scales, row[:, None] * stride + 4 * groups[None, :], mask)
    else:
        scale = tl.load(scales + row[:, None] * stride + groups[None, :], mask=mask, other=0.0)
    numbers = tl.reshape(numbers, [BK, GROUPS, WIDE]) * tl.expand_dims(scale, 2)
    return tl.reshape(numbers, [BK, PADDED])


# -- host --------------------------------------------------------------------------------------------------------------


def padded(width: int) -> int:
    """The power of two that a dimension of a product is padded to; 0 stays 0."""
    return max(SMALLEST, triton.next_power_of_2(width)) if width else 0


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, with the last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows of keys and values, by the arguments of the kernels that read them.

    Attributes:
        arguments: pointers and strides.
        dtype: of the numbers; torch.uint8 for e4m3 codes with scales.
        heads: Hkv, rows that a key has.
        C, R: widths of the two parts of a key.
        DV: width of a value.
        apart: whether values are rows of their own; otherwise a value is the first part.
        bytes: whether scales and the second part of coded rows are not aligned to their size.
        S: rows; at most this many keys are visible to a query.
    """

    arguments: dict[str, Any]
    dtype: torch.dtype
    heads: int
    C: int
    R: int
    DV: int
    apart: bool
    bytes: bool
    S: int

    @staticmethod
    def contiguous(kv: torch.Tensor, value_dim: int, v: torch.Tensor | None) -> Rows:
        """Of kv [S, Dk] or [S, Hkv, Dk], and v likewise."""
        kv = unit_stride(kv if kv.ndim == 3 else kv[:, None])
        S, heads, dim = kv.shape
        arguments = {"kc": kv, "kc_row": kv.stride(0), "kc_head": kv.stride(1), "ks": None, "ks_row": 0, "v": None}
        if v is None:
            C, value, v_row, v_head = value_dim, value_dim, 0, 0
        else:
            v = unit_stride(v if v.ndim == 3 else v[:, None])
            # Parts that are padded least: 192 = 128 + 64.
            C = 1 << (dim.bit_length() - 1)
            C = dim if padded(dim) == padded(C) + padded(dim - C) else C
            arguments["v"], value, v_row, v_head = v, v.shape[-1], v.stride(0), v.stride(1)
        arguments |= {"kr": None, "kr_row": 0, "v_row": v_row, "v_head": v_head}
        return Rows(arguments, kv.dtype, heads, C, dim - C, value, v is not None, False, S)

    @staticmethod
    def pages(cache: torch.Tensor, dim: int, value_dim: int) -> Rows:
        """Of the latent rows of a cache [num_blocks, 64, width], by their slots."""
        if not cache.is_contiguous():
            raise ValueError(f"cache: expected a contiguous tensor, got strides {tuple(cache.stride())}")
        rows, C, R = cache.view(-1, cache.shape[-1]), value_dim, dim - value_dim
        arguments = {"kc": rows, "kr": None, "ks": None, "v": None, "kc_row": rows.stride(0), "kr_row": 0, "ks_row": 0}
        arguments |= {"kc_head": 0, "v_row": 0, "v_head": 0}
        at_bytes = False
        if cache.dtype == torch.uint8:
            scales, rope = latent_parts(rows, C)
            at_bytes = scales.dtype == torch.uint8
            arguments |= {"kc": rows[:, :C], "ks": scales, "ks_row": scales.stride(0)}
            arguments |= {"kr": rope, "kr_row": rope.stride(0)}
        return Rows(arguments, cache.dtype, 1, C, R, C, False, at_bytes, rows.shape[0])


def latent_parts(rows: torch.Tensor, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [n, ceil(C / 128)] float32 and rotary values [n, R] bfloat16 in rows of bytes; views as bytes if either
    would not be aligned to its size."""
    end = C + 4 * -(-C // GROUP)
    scales, rope = rows[:, C:end], rows[:, end:]
    if C % 4 or rows.shape[1] % 4 or rows.data_ptr() % 4:
        return scales, rope
    return scales.view(torch.float32), rope.view(torch.bfloat16)


# -- reference ---------------------------------------------------------------------------------------------------------


def latent_rows_reference(cache: torch.Tensor, value_dim: int) -> torch.Tensor:
    """Every row of a latent cache as numbers [num_blocks * 64, C + R]: its own, or float64 of codes times scales."""
    rows = cache.view(-1, cache.shape[-1])
    if cache.dtype != torch.uint8:
        return rows
    end = value_dim + 4 * -(-value_dim // GROUP)
    codes = rows[:, :value_dim].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, value_dim:end].contiguous().view(torch.float32).double()
    rope = rows[:, end:].contiguous().view(torch.bfloat16).double()
    return torch.cat([codes * scales.repeat_interleave(GROUP, 1)[:, :value_dim], rope], 1)
