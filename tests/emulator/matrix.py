"""Matrix instructions: which thread holds which element, and where wgmma finds its operands in shared memory.

Layouts are those of the PTX manual. A fragment is a list of registers, each an array over threads; W is the number of
warps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .numbers import E4M3, from_bf16, from_f16

Array = np.ndarray[Any, Any]
_SIZES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "s8": 1, "u8": 1}


def decoded(bits: Array, type_: str) -> Array:
    """Elements as numbers that are multiplied here: float32, or int32 of bytes."""
    if type_ == "bf16":
        return from_bf16(bits)
    if type_ == "f16":
        return from_f16(bits)
    if type_ == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if type_ == "e4m3":
        return E4M3[bits]
    if type_ in ("s8", "u8"):
        return bits.view("i1" if type_ == "s8" else "u1").astype(np.int32)
    raise NotImplementedError(f"matrices of {type_}")


def stacked(registers: list[Array], threads: int) -> Array:
    """[registers, threads]."""
    found = np.empty((len(registers), threads), registers[0].dtype)
    for row, register in zip(found, registers, strict=True):
        row[:] = register
    return found


def rows_fragment(registers: list[Array], type_: str, threads: int) -> Array:
    """A of m16n8kK, [W, 16, K]: register i holds row g + 8 (i & 1) and the half i >> 1 of K."""
    view = stacked(registers, threads).view(f"u{_SIZES[type_]}")
    split = view.reshape(-1, 2, threads // 32, 8, 4, 4 // _SIZES[type_])  # half of K, half of rows, W, g, t, element
    return decoded(np.ascontiguousarray(split.transpose(2, 1, 3, 0, 4, 5)), type_).reshape(threads // 32, 16, -1)


def columns_fragment(registers: list[Array], type_: str, threads: int) -> Array:
    """B of m16n8kK, [W, K, 8]."""
    view = stacked(registers, threads).view(f"u{_SIZES[type_]}")
    split = view.reshape(-1, threads // 32, 8, 4, 4 // _SIZES[type_])  # half of K, W, g, t, element
    return decoded(np.ascontiguousarray(split.transpose(1, 0, 3, 4, 2)), type_).reshape(threads // 32, -1, 8)


def sums(registers: list[Array], type_: str, threads: int) -> Array:
    """C of 8-column tiles, [W, 16, N]: of each tile, register 2 h + e holds row g + 8 h, column 2 t + e."""
    view = stacked(registers, threads).view(np.float32 if type_ == "f32" else np.int32)
    split = view.reshape(-1, 2, 2, threads // 32, 8, 4)  # tile, h, e, W, g, t
    return split.transpose(3, 1, 4, 0, 5, 2).reshape(threads // 32, 16, -1)


def spread(c: Array) -> list[Array]:
    """The registers of C [W, 16, N]."""
    warps, _, columns = c.shape
    split = c.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(split).view(np.uint32).reshape(columns // 2, warps * 32))


def product(a: Array, b: Array, c: Array | None) -> Array:
    """a b + c; a sum of floats is taken in float64 and rounded once."""
    if a.dtype == np.int32:
        d = np.matmul(a, b)
        return d if c is None else d + c
    d = np.matmul(a.astype(np.float64), b.astype(np.float64))
    return (d if c is None else d + c).astype(np.float32)


def multiply(a: list[Array], b: list[Array], c: list[Array], types: tuple[str, str, str], threads: int) -> list[Array]:
    """mma.sync of all warps."""
    d_type, a_type, b_type = types
    rows, columns = rows_fragment(a, a_type, threads), columns_fragment(b, b_type, threads)
    return spread(product(rows, columns, sums(c, d_type, threads)))


def operand_addresses(descriptor: int, rows: int, k: int, size: int, flipped: bool) -> Array:
    """Shared-memory addresses [rows, k] of an operand's elements, `size` bytes each.

    `rows` are those of A or the columns of B. Not flipped, k is what lies together; flipped, rows are.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]  # bits of the 16-byte chunk's number that are exchanged
    if (descriptor >> 49) & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    span = 16 << swizzle  # bytes that lie together
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :] * size
    if not flipped:
        if swizzle:  # the k of an instruction are within one span
            at = row // 8 * stride + row % 8 * span + column
        else:
            at = row // 8 * stride + row % 8 * 16 + column // 16 * leading + column % 16
    else:
        row, column = row * size, np.arange(k)[None, :]
        if swizzle:
            at = row // span * leading + row % span + column % 8 * span + column // 8 * stride
        else:
            at = row // 16 * stride + row % 16 + column % 8 * 16 + column // 8 * leading
    at = start + at
    return at ^ (((at >> 7) & ((1 << swizzle) - 1)) << 4)
