"""Pages of the caches: writing and reading rows, and the codecs.

A page holds 64 tokens; slot = block * 64 + offset. Rows of an FP8 latent cache hold codes, float32 scales,
then bfloat16 rotary values; pages of an FP8 or int8 index cache hold 64 rows of codes, then 64 float32 scales.

| cache | float32 or bfloat16 | FP8 (uint8), int8 (index keys alone) |
|---|---|---|
| latent | [num_blocks, 64, C + R] | [num_blocks, 64, C + 4 ceil(C / 128) + 2 R] |
| index key | [num_blocks, 64, Di] | [num_blocks, 64 * (Di + 4)] or [num_blocks, 64, Di + 4] |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from heedful import _core
from heedful._arrays import FLOATS, A, Arguments, View, integer
from heedful.ops import reference

#: Block tables [B, M], sequence lengths [B] and starts of their queries [B + 1], int32; tensors in Triton's calls.
Batch = tuple[Any, Any, Any]

_STORAGE = ("float32", "bfloat16", "uint8")
_INDEX_STORAGE = (*_STORAGE, "int8")


def write_latent_cache(latent: A, cache: A, slot_mapping: Any, *, value_dim: int, backend: str = "auto") -> None:
    """Writes latent rows to their slots, in the cache's format.

    Args:
        latent: [N, C + R] float32, bfloat16 or float16.
        cache: see the table above; written in place, so it must be C-contiguous.
        slot_mapping: [N] integers; -1 skips the row. A slot may be named once.
        value_dim: C.
        backend: "auto", "cpu" or "triton".

    Raises:
        ValueError: an argument of another shape, dtype or value, a slot outside the cache; then
            nothing is written. On a CUDA device, where slots are not looked at, those outside it are skipped.
    """
    call = _writing(backend)
    rows = call.take("latent", latent, FLOATS, "N, Dk")
    width = integer("value_dim", value_dim, 1, call.size("Dk"))
    pages = storage(call, cache, call.size("Dk"), width)
    slots = call.integers("slot_mapping", slot_mapping, "N", np.int64)
    if call.triton:
        from heedful.kernels import write_cache as kernel

        _check_slots(call, slots, pages)
        with call.launching():
            kernel.write_latent_cache(rows.data, pages.data, slots, value_dim=width)
        return
    _core.write_cache(rows.data, pages.data, slots, width)


def write_index_cache(keys: A, cache: A, slot_mapping: Any, *, hadamard: bool = False, backend: str = "auto") -> None:
    """Writes index keys [N, Di] to their slots, in the cache's format; otherwise as `write_latent_cache`.

    With `hadamard` the keys are rotated first (`heedful.ops.hadamard`); Di is then a power of two.
    """
    call = _writing(backend)
    rows = call.take("keys", keys, FLOATS, "N, Di")
    Di = call.size("Di")
    if hadamard and Di & (Di - 1):
        raise ValueError(f"keys: expected a Di that is a power of two for hadamard=True, got {Di}")
    pages = storage(call, cache, Di, None)
    slots = call.integers("slot_mapping", slot_mapping, "N", np.int64)
    if call.triton:
        from heedful.kernels import write_cache as kernel

        _check_slots(call, slots, pages)
        with call.launching():
            kernel.write_index_cache(rows.data, page_rows(pages), slots, hadamard=bool(hadamard))
        return
    written = rows.data
    if hadamard:
        written = np.empty_like(rows.data)
        _core.hadamard(rows.data, Di, written)
    _core.write_cache(written, pages.data, slots, None)


def read_latent_cache(cache: A, slots: Any, *, value_dim: int, rope_dim: int) -> A:
    """The latent rows in `slots` [N] as float32 [N, C + R], scales applied.

    Raises:
        ValueError: a cache without the widths C = `value_dim` and R = `rope_dim`, a slot outside it.
    """
    width = integer("value_dim", value_dim, 1)
    return _read(cache, slots, width + integer("rope_dim", rope_dim, 0), width)


def read_index_cache(cache: A, slots: Any, *, dim: int) -> A:
    """The index keys in `slots` [N] as float32 [N, Di], Di = `dim`, scales applied.

    Raises:
        ValueError: a cache whose keys have another width, a slot outside it.
    """
    return _read(cache, slots, integer("dim", dim, 1), None)


def quantize_fp8(x: A, *, group_size: int = 128, backend: str = "auto") -> tuple[A, A]:
    """FP8 e4m3fn codes of groups of the last dimension: scale = max(amax, 1e-4) / 448, codes = x / scale.

    Rounds to nearest even. amax is taken over the finite values: infinities saturate, NaN stays NaN.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        group_size: values that share a scale.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        codes uint8 [..., D] and scales float32 [..., ceil(D / group_size)].

    Raises:
        ValueError: an argument of another dtype or value.
    """
    call = Arguments(backend)
    view = call.take("x", x, FLOATS, "...")
    group = integer("group_size", group_size, 1)
    if view.data.ndim == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    *lead, D = view.shape
    if call.triton:
        from heedful.kernels import quantize as kernel

        with call.launching():
            found = kernel.quantize_fp8(view.data, group_size=group)
        return call.give(found[0], "uint8"), call.give(found[1], "float32")
    if call.reference:
        codes, scales = reference.quantize_fp8(view.float64(), group)
    else:
        codes, scales = np.empty(view.shape, np.uint8), np.empty((*lead, -(-D // group)), np.float32)
        _core.quantize_fp8(view.data, D, group, codes, scales)
    return call.give(codes, "uint8"), call.give(scales, "float32")


def quantize_int8(x: A, *, backend: str = "auto") -> tuple[A, A]:
    """int8 codes of the last dimension with one scale: scale = max(amax, 1e-4) / 127, codes = round(x / scale).

    For index queries and keys after the Hadamard rotation: `index_scores` multiplies bytes fastest. The scale of
    a key is its `k_scale`; that of a query's head belongs in `weights`. Rounds to nearest even; infinities
    saturate, and a NaN is told by its row's scale, which is NaN.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        codes int8 [..., D] from -127 to 127 and scales float32 [...].

    Raises:
        ValueError: an argument of another dtype or value.
    """
    call = Arguments(backend)
    view = call.take("x", x, FLOATS, "...")
    if view.data.ndim == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if call.triton:
        from heedful.kernels import quantize as kernel

        with call.launching():
            found = kernel.quantize_int8(view.data)
        return call.give(found[0], "int8"), call.give(found[1], "float32")
    if call.reference:
        codes, scales = reference.quantize_int8(view.float64())
    else:
        codes, scales = np.empty(view.shape, np.int8), np.empty(view.shape[:-1], np.float32)
        _core.quantize_int8(view.data, view.shape[-1], codes, scales)
    return call.give(codes, "int8"), call.give(scales, "float32")


def dequantize_fp8(codes: A, scales: A, *, group_size: int = 128, backend: str = "auto") -> A:
    """Codes (uint8 or float8_e4m3fn [..., D]) times their scales (float32 [..., ceil(D / group_size)]).

    Returns float32 [..., D].

    Raises:
        ValueError: an argument of another shape or dtype.
    """
    call = Arguments(backend)
    code = call.take("codes", codes, ("uint8", "float8_e4m3fn"), "...")
    scale = call.take("scales", scales, ("float32",), "...")
    group = integer("group_size", group_size, 1)
    *lead, D = code.shape or (0,)
    if not code.shape or scale.shape != (*lead, -(-D // group)):
        expected = [*lead, -(-D // group)]
        raise ValueError(f"scales: expected float32 {expected} for codes {list(code.shape)}, got {list(scale.shape)}")
    if call.triton:
        import torch

        values = code.data.view(torch.float8_e4m3fn).float()
        return values * scale.data.repeat_interleave(group, dim=-1)[..., :D]
    if call.reference:
        return call.give(reference.dequantize_fp8(code.data, scale.data, group), "float32")
    out = np.empty(code.shape, np.float32)
    _core.dequantize_fp8(code.data, scale.data, D, group, out)
    return call.give(out, "float32")


def storage(call: Arguments, cache: Any, dim: int, value_dim: int | None) -> View:
    """Views a cache in place: latent rows of `dim` numbers if there is a `value_dim`, else index keys."""
    dtype = str(getattr(cache, "dtype", "")).removeprefix("torch.")
    dtypes = _STORAGE if value_dim is not None else _INDEX_STORAGE
    if dtype not in ("uint8", "int8"):
        return call.take("cache", cache, dtypes, f"num_blocks, 64, {dim}", in_place=True)
    if value_dim is not None:
        row = value_dim + 4 * -(-value_dim // 128) + 2 * (dim - value_dim)
        return call.take("cache", cache, dtypes, f"num_blocks, 64, {row}", in_place=True)
    flat = getattr(cache, "ndim", 3) == 2
    shape = f"num_blocks, {64 * (dim + 4)}" if flat else f"num_blocks, 64, {dim + 4}"
    return call.take("cache", cache, dtypes, shape, in_place=True)


def paged_arguments(call: Arguments, pages: View, block_tables: Any, seq_lens: Any, query_start_loc: Any) -> Batch:
    """Views a ragged batch and checks it against the N queries and the pages.

    Raises ValueError for lengths that contradict each other and for a needed block outside the cache; on a CUDA device
    these are the caller's to keep right, because looking at them would wait for it.
    """
    tables = call.integers("block_tables", block_tables, "B, M", np.int32)
    lens = call.integers("seq_lens", seq_lens, "B", np.int32)
    call.sizes["B+1"] = call.size("B") + 1
    starts = call.integers("query_start_loc", query_start_loc, "B+1", np.int32)
    host = (tables, lens, starts)
    if call.triton:
        host = tuple(call.host(part) for part in host)
    if host[0] is not None:
        _core.check_batch(call.size("N"), len(pages.data), *host)
    return tables, lens, starts


def page_rows(pages: View) -> Any:
    """A cache as the kernels take it: pages of an index cache's codes are one row each."""
    return pages.data.flatten(1) if pages.dtype in ("uint8", "int8") else pages.data


def _writing(backend: str) -> Arguments:
    if backend == "reference":
        raise ValueError("backend: expected auto, cpu or triton (a cache's format has one writer), got 'reference'")
    return Arguments(backend)


def _check_slots(call: Arguments, slots: Any, pages: View) -> None:
    """Slots of a Triton call that are in the host's memory, as the CPU path checks them."""
    host, size = call.host(slots), 64 * len(pages.data)
    if host is not None and len(host) and not -1 <= host.min() <= host.max() < size:
        bad = host.min() if host.min() < -1 else host.max()
        raise ValueError(f"slot_mapping: expected slots from -1 to {size - 1}, got {bad}")


def _read(cache: Any, slots: Any, dim: int, value_dim: int | None) -> Any:
    call = Arguments("cpu")
    pages = storage(call, cache, dim, value_dim)
    where = call.integers("slots", slots, "N", np.int64)
    out = np.empty((len(where), dim), np.float32)
    _core.read_cache(pages.data, where, value_dim, out)
    return call.give(out, "float32")
