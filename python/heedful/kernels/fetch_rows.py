"""Rows of the host tier to rows on the device, as `heedful.Scheduler.plan_fetch` lists them.

Pinned memory has an address on the device, so the kernel gathers from it: what crosses the bus is the rows alone, and
the host waits for nothing. Rows of other memory are gathered on the host first and cross in one piece. Rows are moved
as words, whatever they hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.target import Target

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def _move_kernel(
    host, cache, sources, targets, count, host_rows, cache_rows, WORDS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Some words of some rows; without `sources` row i is moved to targets[i]. Rows outside their tensor are not."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = place < count
    source = place
    if sources is not None:
        source = tl.load(sources + place, mask=there, other=-1)
    target = tl.load(targets + place, mask=there, other=-1)
    there = (source >= 0) & (source < host_rows) & (target >= 0) & (target < cache_rows)
    word = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = there[:, None] & (word < WORDS)[None, :]
    words = tl.load(host + source[:, None] * WORDS + word[None, :], mask=mask)
    tl.store(cache + target[:, None] * WORDS + word[None, :], words, mask=mask)


# -- launcher ----------------------------------------------------------------------------------------------------------


def fetch_rows(host: torch.Tensor, cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copies host[sources[i]] to cache[targets[i]], every i.

    Args:
        host: [rows, width] or [num_blocks, 64, width] of any dtype, contiguous, in the host's memory; pinned for speed.
        cache: the same width and dtype on the device, contiguous; written in place.
        sources: [f] int64 in the host's memory, rows of `host` counted through its blocks.
        targets: [f] int64 in the host's memory, rows of `cache` likewise, no two the same.

    Rows outside their tensor are neither read nor written. On a device the copy is ordered with the current stream; a
    pinned `host` must stay as it is, and be kept, until it is done: its allocator does not know of the kernel.
    """
    host, cache = _rows(host), _rows(cache)
    if not sources.numel() or not host.numel():
        return
    on = cache.device
    if on.type == "cpu" or host.is_pinned():
        plan(host, cache, _there(sources, on), _there(targets, on)).run()
        return
    staged, places = staged_rows(host, sources, targets)
    plan(staged.to(on, non_blocking=True), cache, None, _there(places, on)).run()


def staged_rows(
    host: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, *, pin_memory: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """host[sources[i]] of every i, in memory of their own, and targets, -1 where a source is no row of `host`."""
    valid = (sources >= 0) & (sources < len(host))
    staged = torch.empty((len(sources), host.shape[1]), dtype=host.dtype, pin_memory=pin_memory)
    torch.index_select(host, 0, sources.where(valid, 0), out=staged)
    return staged, targets.where(valid, -1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    if not x.is_contiguous():
        raise ValueError(f"rows: expected a contiguous tensor, got strides {tuple(x.stride())}")
    return x.view(-1, x.shape[-1])


def _there(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers on the device, by way of pinned memory, so that the host does not wait."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def plan(host: torch.Tensor, cache: torch.Tensor, sources: torch.Tensor | None, targets: torch.Tensor) -> Launch:
    """The launch that moves rows [n, width]."""
    size = host.shape[1] * host.dtype.itemsize
    parts = [x.view(torch.uint8) for x in (host, cache)]
    aligned = [x.data_ptr() for x in parts]
    width, dtype = next((w, d) for w, d in _WORDS if all(n % w == 0 for n in (size, *aligned)))
    parts = [x.view(dtype) for x in parts]
    words = size // width
    arguments: dict[str, Any] = {"host": parts[0], "cache": parts[1], "sources": sources, "targets": targets}
    arguments |= {"count": len(targets), "host_rows": len(host), "cache_rows": len(cache), "WORDS": words, "ROWS": 4}
    arguments |= {"WIDTH": min(256, max(32, triton.next_power_of_2(words)))}
    return Launch(_move_kernel, (-(-len(targets) // 4), -(-words // arguments["WIDTH"])), arguments, 4)


# -- reference ---------------------------------------------------------------------------------------------------------


def fetch_rows_reference(host: torch.Tensor, cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """`fetch_rows` by torch's indexing."""
    _rows(cache)[targets.to(cache.device)] = _rows(host)[sources].to(cache.device)


def compilations(target: Target) -> list[Compilation]:
    """4096 rows of 656 bytes."""
    host, cache = (torch.empty((n, 656), dtype=torch.uint8, device="meta") for n in (1 << 20, 1 << 16))
    numbers = torch.empty(4096, dtype=torch.int64, device="meta")
    return [Compilation("rows of 656 bytes", plan(host, cache, numbers, numbers), main=True)]
