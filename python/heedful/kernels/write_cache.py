"""Rows to their slots of the paged caches, converted on the way: latent rows and index keys.

Rotary embedding, Hadamard rotation and quantisation happen in registers, so a row is read and written once; each is
rounded to the row's dtype, as if it had been written between. Layouts: `heedful.ops.pages`. Slots outside the cache are
skipped.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.hadamard import factor_of, hadamard_reference, transform
from heedful.kernels.index_scores import index_pages
from heedful.kernels.quantize import fp8_codes, int8_codes, quantize_fp8_reference, quantize_int8_reference
from heedful.kernels.rows import PAGE, latent_parts, padded, unit_stride
from heedful.kernels.target import Target

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of each row, [N, R / 2] float32."""

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def read_rotated(
    x, row, stride, cos, sin, angle_row, there, R: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, PADDED] as float32, the first R of their WIDTH numbers turned by their angles and rounded to the
    dtype of x. Pairs are (2i, 2i + 1) if INTERLEAVED, else (i, i + R / 2)."""
    column = tl.arange(0, PADDED)
    at, mask = x + row[:, None] * stride, there[:, None] & (column < WIDTH)[None, :]
    numbers = tl.load(at + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if R > 0:
        if INTERLEAVED:
            other, angle, first = column ^ 1, column // 2, column % 2 == 0
        else:
            first = column < R // 2
            other, angle = tl.where(first, column + R // 2, column - R // 2), column % (R // 2)
        turned = there[:, None] & (column < R)[None, :]
        partner = tl.load(at + tl.where(column < R, other, 0)[None, :], mask=turned, other=0.0).to(tl.float32)
        angles = row[:, None] * angle_row + tl.where(column < R, angle, 0)[None, :]
        c, s = tl.load(cos + angles, mask=turned, other=1.0), tl.load(sin + angles, mask=turned, other=0.0)
        # a cos - b sin of the first of a pair, b cos + a sin of the second
        rotated = numbers * c + partner * tl.where(first[None, :], -s, s)
        numbers = tl.where(turned, rotated.to(x.dtype.element_ty).to(tl.float32), numbers)
    return numbers


@triton.jit
def write_float32(base, offset, x, mask):
    """float32 numbers to a tensor of bytes, at any address (offsets in bytes)."""
    bits = x.to(tl.uint32, bitcast=True)
    for i in tl.static_range(4):
        tl.store(base + offset + i, (bits >> (8 * i)).to(tl.uint8), mask=mask)


@triton.jit
def write_bfloat16(base, offset, x, mask):
    """bfloat16 numbers to a tensor of bytes, at any address (offsets in bytes)."""
    bits = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    for i in tl.static_range(2):
        tl.store(base + offset + i, (bits >> (8 * i)).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _write_latent_kernel(
    latent, k_pe, slots, values, scales, rest, cos, sin, N, num_slots, latent_row, k_pe_row, angle_row, values_row,
    scales_row, rest_row, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, CODED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Some rows: C numbers, or codes in groups of WIDE with scales, and R more that may be turned."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < N, other=-1).to(tl.int64)
    there = (slot >= 0) & (slot < num_slots)
    column = tl.arange(0, CP)
    mask = there[:, None] & (column < C)[None, :]
    numbers = tl.load(latent + row[:, None] * latent_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    to = values + slot[:, None] * values_row + column[None, :]
    if CODED:
        GROUPS: tl.constexpr = CP // WIDE
        codes, scale = fp8_codes(tl.reshape(numbers, [ROWS * GROUPS, WIDE]))
        tl.store(to, tl.reshape(codes, [ROWS, CP]), mask=mask)
        group, scale = tl.arange(0, GROUPS), tl.reshape(scale, [ROWS, GROUPS])
        mask = there[:, None] & (group < (C + 127) // 128)[None, :]
        if BYTES:
            write_float32(scales, slot[:, None] * scales_row + 4 * group[None, :], scale, mask)
        else:
            tl.store(scales + slot[:, None] * scales_row + group[None, :], scale, mask=mask)
    else:
        tl.store(to, numbers.to(values.dtype.element_ty), mask=mask)
    if R > 0:
        TURNED: tl.constexpr = R if ROTATED else 0
        more = read_rotated(k_pe, row, k_pe_row, cos, sin, angle_row, there, TURNED, INTERLEAVED, R, RP)
        column = tl.arange(0, RP)
        mask = there[:, None] & (column < R)[None, :]
        if BYTES:
            write_bfloat16(rest, slot[:, None] * rest_row + 2 * column[None, :], more, mask)
        else:
            tl.store(rest + slot[:, None] * rest_row + column[None, :], more.to(rest.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _write_index_kernel(
    keys, slots, values, scales, cos, sin, N, num_slots, factor, keys_row, angle_row, page_stride, values_row,
    scales_page, DIM: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr,
    HADAMARD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some keys: numbers, or int8 or e4m3 codes (bytes) with a scale each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < N, other=-1).to(tl.int64)
    there = (slot >= 0) & (slot < num_slots)
    page, place = slot // 64, slot % 64
    numbers = read_rotated(keys, row, keys_row, cos, sin, angle_row, there, R, INTERLEAVED, DIM, PADDED)
    if HADAMARD:
        numbers = transform(numbers, factor, ROWS, PADDED, LOG).to(keys.dtype.element_ty).to(tl.float32)
    column = tl.arange(0, PADDED)
    to = values + page[:, None] * page_stride + place[:, None] * values_row + column[None, :]
    mask = there[:, None] & (column < DIM)[None, :]
    if scales is None:
        tl.store(to, numbers.to(values.dtype.element_ty), mask=mask)
    else:
        if values.dtype.element_ty == tl.int8:
            codes, scale = int8_codes(numbers)
        else:
            codes, scale = fp8_codes(numbers)
        tl.store(to, codes, mask=mask)
        tl.store(scales + page * scales_page + place, scale, mask=there)


# -- launchers ---------------------------------------------------------------------------------------------------------


def write_latent_cache(
    latent: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    value_dim: int,
    k_pe: torch.Tensor | None = None,
    rope: Rope | None = None,
    interleaved: bool = True,
) -> None:
    """Writes latent rows to their slots, in the cache's format.

    Args:
        latent: [N, C + R] float32, bfloat16 or float16; [N, C] if `k_pe` is given.
        cache: [num_blocks, 64, C + R] float32, bfloat16 or float16, or uint8 rows of C e4m3 codes, a float32 scale for
            each 128 of them and R bfloat16 numbers. Contiguous.
        slot_mapping: [N] integers, block * 64 + offset; those outside the cache are skipped. A slot may be named once:
            of rows that name the same one, parts of each may be kept.
        value_dim: C.
        k_pe: [N, R], the last R numbers apart.
        rope: cos and sin [N, R / 2] float32, by which the last R numbers are turned before they are written.
        interleaved: whether pairs are (2i, 2i + 1), as in MLA, or (i, i + R / 2).
    """
    plan_latent(latent, cache, slot_mapping, value_dim, k_pe, rope, interleaved).run()


def write_index_cache(
    keys: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    hadamard: bool = False,
    rope: Rope | None = None,
    interleaved: bool = False,
) -> None:
    """Writes index keys to their slots, in the cache's format.

    Args:
        keys: [N, Di] float32, bfloat16 or float16.
        cache: [num_blocks, 64, Di] float32, bfloat16 or float16, or uint8 (e4m3 codes) or int8 of
            [num_blocks, 64 * (Di + 4)] or [num_blocks, 64, Di + 4]: in a page all codes, then 64 float32 scales.
        slot_mapping: as in `write_latent_cache`.
        hadamard: whether keys are rotated by the Hadamard matrix; Di is then a power of two.
        rope: cos and sin [N, R / 2] float32, by which the first R numbers are turned, before that rotation.
        interleaved: whether pairs are (2i, 2i + 1), as in GLM-5, or (i, i + R / 2), as in DeepSeek-V3.2.
    """
    plan_index(keys, cache, slot_mapping, hadamard, rope, interleaved).run()


def _angles(rope: Rope | None) -> dict[str, Any]:
    if rope is None:
        return {"cos": None, "sin": None, "angle_row": 0}
    cos, sin = (part.contiguous() for part in rope)
    return {"cos": cos, "sin": sin, "angle_row": cos.shape[-1]}


def plan_latent(
    latent: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    value_dim: int,
    k_pe: torch.Tensor | None,
    rope: Rope | None,
    interleaved: bool,
) -> Launch:
    """The launch of `write_latent_cache`."""
    C, latent = value_dim, unit_stride(latent)
    k_pe = latent[:, C:] if k_pe is None else unit_stride(k_pe)
    N, R = k_pe.shape
    rows = cache.view(-1, cache.shape[-1])
    coded = cache.dtype == torch.uint8
    scales, rest = latent_parts(rows, C) if coded else (None, rows[:, C:])
    CP = padded(C)
    at_once = max(1, 2048 // CP)
    arguments: dict[str, Any] = {
        "latent": latent,
        "k_pe": k_pe,
        "slots": slot_mapping.contiguous(),
        "values": rows[:, :C],
        "N": N,
        "num_slots": rows.shape[0],
    }
    arguments |= {"scales": scales, "scales_row": 0 if scales is None else scales.stride(0), "rest": rest}
    arguments |= {"latent_row": latent.stride(0), "k_pe_row": k_pe.stride(0), "values_row": rows.stride(0)}
    arguments |= {"rest_row": rest.stride(0), "C": C, "R": R, "CP": CP, "RP": padded(R), "WIDE": min(128, CP)}
    arguments |= {"ROWS": at_once, "ROTATED": rope is not None, "INTERLEAVED": interleaved, "CODED": coded}
    arguments |= {"BYTES": coded and rest.dtype == torch.uint8, **_angles(rope)}
    return Launch(_write_latent_kernel, (-(-N // at_once),), arguments, 4)


def plan_index(
    keys: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hadamard: bool,
    rope: Rope | None,
    interleaved: bool,
) -> Launch:
    """The launch of `write_index_cache`."""
    keys = unit_stride(keys)
    N, DIM = keys.shape
    values, scales = index_pages(cache, DIM)
    values = values.view(torch.uint8) if cache.dtype == torch.uint8 else values
    PADDED = triton.next_power_of_2(DIM)
    at_once = max(1, 2048 // PADDED)
    arguments: dict[str, Any] = {
        "keys": keys,
        "slots": slot_mapping.contiguous(),
        "values": values,
        "scales": scales,
        "N": N,
        "num_slots": len(values) * PAGE,
    }
    arguments |= {"factor": factor_of(DIM), "keys_row": keys.stride(0), "page_stride": values.stride(0)}
    arguments |= {"values_row": values.stride(1), "scales_page": 0 if scales is None else scales.stride(0)}
    arguments |= {"DIM": DIM, "R": 0 if rope is None else 2 * rope[0].shape[-1], "PADDED": PADDED, "ROWS": at_once}
    arguments |= {"LOG": PADDED.bit_length() - 1, "HADAMARD": hadamard, "INTERLEAVED": interleaved, **_angles(rope)}
    return Launch(_write_index_kernel, (-(-N // at_once),), arguments, 4)


# -- references --------------------------------------------------------------------------------------------------------


def rotated_reference(x: torch.Tensor, rope: Rope | None, interleaved: bool) -> torch.Tensor:
    """The first R numbers of rows [N, D] turned by their angles, in float32, rounded to x's dtype."""
    if rope is None:
        return x
    cos, sin = rope
    R = 2 * cos.shape[-1]
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    out, a, b = x.clone(), x[:, first].float(), x[:, second].float()
    out[:, first], out[:, second] = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    return out


def write_latent_cache_reference(
    latent: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    value_dim: int,
    k_pe: torch.Tensor | None = None,
    rope: Rope | None = None,
    interleaved: bool = True,
) -> None:
    """`write_latent_cache` by torch's operators."""
    C = value_dim
    k_pe = latent[:, C:] if k_pe is None else k_pe
    rows = cache.view(-1, cache.shape[-1])
    written = (slot_mapping >= 0) & (slot_mapping < len(rows))
    slots, values = slot_mapping[written].long(), latent[written, :C]
    rest = rotated_reference(k_pe, rope, interleaved)[written]
    if cache.dtype != torch.uint8:
        rows[slots] = torch.cat([values.float().to(cache.dtype), rest.float().to(cache.dtype)], 1)
        return
    codes, scales = quantize_fp8_reference(values)
    parts = codes, scales.contiguous().view(torch.uint8), rest.float().to(torch.bfloat16).contiguous().view(torch.uint8)
    rows[slots] = torch.cat(parts, 1)


def write_index_cache_reference(
    keys: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    hadamard: bool = False,
    rope: Rope | None = None,
    interleaved: bool = False,
) -> None:
    """`write_index_cache` by torch's operators; the Hadamard rotation in float64."""
    keys = rotated_reference(keys, rope, interleaved)
    keys = hadamard_reference(keys).to(keys.dtype) if hadamard else keys
    written = (slot_mapping >= 0) & (slot_mapping < len(cache) * PAGE)
    slots, keys = slot_mapping[written].long(), keys[written]
    values, scales = index_pages(cache, keys.shape[1])
    if scales is None:
        values[slots // PAGE, slots % PAGE] = keys.float().to(cache.dtype)
        return
    if cache.dtype == torch.int8:
        codes, scale = quantize_int8_reference(keys)
    else:
        codes, scale = quantize_fp8_reference(keys, group_size=keys.shape[1])
        values, scale = values.view(torch.uint8), scale[:, 0]
    values[slots // PAGE, slots % PAGE], scales[slots // PAGE, slots % PAGE] = codes, scale


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """Rows of 8192 tokens of DeepSeek-V3.2, bfloat16, everything fused."""

    def empty(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    slots, rope = empty(8192, of=torch.int64), (empty(8192, 32, of=torch.float32), empty(8192, 32, of=torch.float32))
    found = []
    for cache in (empty(4096, PAGE, 576), empty(4096, PAGE, 656, of=torch.uint8)):
        launch = plan_latent(empty(8192, 512), cache, slots, 512, empty(8192, 64), rope, True)
        found.append(Compilation(f"latent, {str(cache.dtype)[6:]}", launch, main=True))
    caches = (empty(4096, PAGE, 128), empty(4096, 64 * 132, of=torch.uint8), empty(4096, 64 * 132, of=torch.int8))
    for cache in caches:
        launch = plan_index(empty(8192, 128), cache, slots, True, rope, False)
        found.append(Compilation(f"index keys, {str(cache.dtype)[6:]}", launch, main=True))
    return found
