"""Arithmetic of PTX that NumPy has not: on arrays of unsigned integers that hold the bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def _e4m3() -> Array:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code & 127 == 127, np.nan, np.where(code & 128, -value, value)).astype(np.float32)


E4M3 = _e4m3()


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    x = x.astype(np.float32, copy=False)
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), near).astype(np.uint16)


def from_f16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_f16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def to_tf32(bits: Array) -> Array:
    """To nearest, ties away from zero."""
    return np.where((bits & 0x7F800000) == 0x7F800000, bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))


def e4m3x2_to_f16x2(bits: Array) -> Array:
    low, high = (E4M3[(bits >> np.uint16(n)) & np.uint16(255)].astype(np.float16).view(np.uint16) for n in (0, 8))
    return pack("u4", low, high)


def fma(a: Array, b: Array, c: Array) -> Array:
    """One rounding, or (once in 2^29) two."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def packed(function: Callable[..., Array], type_: str, *sources: Array) -> Array:
    """An operation on each of two numbers in a register."""
    if type_ == "f32x2":
        pairs = np.broadcast_arrays(*sources)
        a = [np.ascontiguousarray(x).view(np.float32) for x in pairs]
        return np.ascontiguousarray(function(*a)).view(np.uint64)
    from_, to = (from_f16, to_f16) if type_ == "f16x2" else (from_bf16, to_bf16)
    a = [from_(np.ascontiguousarray(x).view(np.uint16)) for x in np.broadcast_arrays(*sources)]
    return to(np.ascontiguousarray(function(*a))).view(np.uint32)


def shift_left(a: Array, n: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), np.zeros(1, a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, np.zeros(1, a.dtype))


def multiply_high(a: Array, b: Array) -> Array:
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype).view(np.uint32)
    product = [int(x) * int(y) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
    return np.array([x & (2**64 - 1) for x in product], np.uint64)


def quotient(a: Array, b: Array) -> Array:
    """Towards zero, as C has it; of a division by zero, all bits."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros(1, a.dtype), a // np.where(b == 0, 1, b).astype(a.dtype))
    whole = np.where(b == 0, 1, b)
    size = np.abs(a.astype(np.int64)) // np.abs(whole.astype(np.int64))
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -size, size)).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def saturate(x: Array, type_: str) -> Array:
    limits = np.iinfo(type_)
    whole = np.where(np.isnan(x), 0.0, np.clip(x.astype(np.float64), float(limits.min), float(limits.max)))
    return whole.astype(type_)


def extract(a: Array, at: Array, count: Array) -> Array:
    """bfe: `count` bits from `at`, the highest of them as the sign of a signed type."""
    bits = a.dtype.itemsize * 8
    up = shift_left(a.view(f"u{a.dtype.itemsize}"), np.asarray(bits - np.minimum(at + count, bits), np.uint32))
    return np.where(
        count == 0, np.zeros(1, a.dtype), shift_right(up.view(a.dtype), np.asarray(bits - count, np.uint32))
    )


def insert(a: Array, b: Array, at: Array, count: Array) -> Array:
    """bfi: b, with the lowest `count` bits of a from `at` on."""
    bits = a.dtype.itemsize * 8
    ones = shift_right(~np.zeros(1, a.dtype), np.asarray(bits - np.minimum(count, bits), np.uint32))
    mask = shift_left(ones, at)
    return (b & ~mask) | (shift_left(a, at) & mask)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b and a, or their sign bits."""
    eight = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(1, np.uint32)
    for i in range(4):
        which = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((eight >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(which & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        result = result | (byte << np.uint32(8 * i))
    return result


def pack(type_: str, *parts: Array) -> Array:
    """A register of its parts, the lowest first."""
    result = parts[0].astype(type_)
    bits = parts[0].dtype.itemsize * 8
    for i, part in enumerate(parts[1:], 1):
        result = result | (part.astype(type_) << np.array(bits * i, type_))
    return result


def unpack(a: Array, count: int, type_: str) -> list[Array]:
    bits = np.dtype(type_).itemsize * 8
    return [(a >> np.array(bits * i, a.dtype)).astype(type_) for i in range(count)]


def reciprocal_root(x: Array) -> Array:
    return (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype)
