"""The host's part of the caches: latent rows of blocks without a page on the device, and rows of preempted requests.

What is where is the scheduler's business: each step lists the blocks to move before its tokens are computed, and
`Scheduler.plan_fetch` the rows that a layer's selection needs (`heedful.engine.fetches`). This file holds the memory
and carries the moves out. On a GPU it is pinned, so that kernels read and write it, in the order of the stream and
without the host waiting.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from heedful import SchedulerConfig, Step
from heedful.engine.caches import KVCaches, move_places, untouched_bytes, view_of
from heedful.engine.placement import Placement


class HostTier:
    """Rows in the host's memory, of all layers.

    Args:
        caches: the device's part: `latent` of num_latent_blocks pages and hot rows behind them.
        config: a scheduler's limits with `num_latent_blocks`: how many places there are.
        placement: where the caches are, and what moves the rows.

    Raises:
        MemoryError: the memory cannot be pinned.
    """

    def __init__(self, caches: KVCaches, config: SchedulerConfig, placement: Placement) -> None:
        assert config.num_latent_blocks is not None
        self.caches = caches
        self.pages = config.num_latent_blocks
        self.hot_rows = config.hot_rows
        self.backend = placement.backend
        self.device = placement.device

        def places(count: int, cache: torch.Tensor) -> torch.Tensor:
            shape = (count, *cache.shape[1:])
            memory = untouched_bytes(shape, cache.dtype)
            if placement.is_gpu:
                _pin(memory)
            return view_of(memory, shape, cache.dtype)

        self.latent = [places(config.host_blocks, cache) for cache in caches.latent]
        """Of each layer [host_blocks, 64, width]."""
        self.index = [None if cache is None else places(config.swap_blocks, cache) for cache in caches.index]
        """Index keys of preempted requests, of each layer that has any [swap_blocks, 64, width]."""

    @property
    def bytes(self) -> int:
        """Bytes of the host's memory."""
        return sum(memory.nbytes for memory in (*self.latent, *self.index) if memory is not None)

    def move(self, step: Step) -> None:
        """Carries out what a step moves between device and host, before anything else of it."""
        for moves, sources, targets in (
            (step.swap_outs, self.caches.index, self.index),
            (step.swap_ins, self.index, self.caches.index),
            (step.stores, self.caches.latent, self.latent),
            (step.loads, self.latent, self.caches.latent),
        ):
            if not len(moves):
                continue
            places = move_places(moves, self.device)
            for source, target in zip(sources, targets, strict=True):
                if source is not None and target is not None:
                    self._move(source.flatten(1), target.flatten(1), *places)

    def fetch(self, layer: int, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies rows of the host to rows of a layer's cache on the device: int64 [f] each, on the device."""
        self._move(self.latent[layer].flatten(0, 1), self.caches.latent[layer].flatten(0, 1), sources, targets)

    def warm_up(self) -> None:
        """Compiles what moves rows, by moving some that hold nothing."""
        place = torch.zeros(1, dtype=torch.int64, device=self.device)
        hot = place + self.pages * self.latent[0].shape[1]
        for device, host in zip((*self.caches.latent, *self.caches.index), (*self.latent, *self.index), strict=True):
            if device is not None and host is not None and len(host):
                self._move(device.flatten(1), host.flatten(1), place, place)
                self._move(host.flatten(1), device.flatten(1), place, place)
        for layer in range(len(self.latent)):
            self.fetch(layer, place, hot)

    def _move(self, source: torch.Tensor, target: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies source[sources[i]] to target[targets[i]]: rows of one width in two tensors."""
        if self.backend == "cpu":
            target[targets] = source[sources]
            return
        from heedful.kernels import fetch_rows

        fetch_rows.plan(source, target, sources, targets).run()


def _pin(memory: np.ndarray) -> None:
    """Pins memory where it is, until it goes: what torch pins by itself it rounds up to a power of two."""
    if not memory.nbytes:
        return
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    error = runtime.cudaHostRegister(address, memory.nbytes, 0)
    if int(error):
        raise MemoryError(
            f"kv_cache_tokens: {memory.nbytes} bytes of the host's memory cannot be pinned (CUDA error {int(error)}); "
            "lower it, or raise the limit on locked memory (ulimit -l)"
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, address)
