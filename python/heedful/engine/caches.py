"""The two caches of a DSA model: latent rows of every layer, index keys of the layers that select for themselves.

One block identity serves both: block b holds the same 64 tokens in every tensor here. Which tokens those are is the
scheduler's business; how a row is laid out is that of `cache_layout` and `heedful.ops`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from heedful.config import ModelConfig
from heedful.engine.cache_layout import BLOCK_SIZE, KVCacheDtype, cache_layout
from heedful.engine.placement import Backend, Placement, to_device

_LATENTS: dict[KVCacheDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.uint8,
}
TABLE_WIDTH = 16
"""Columns of block tables come in so many: Triton compiles a kernel apart for strides that 16 divides."""

_INDEX_CODES = {"cpu": torch.int8, "triton": torch.uint8}
"""Bytes of index keys by what multiplies them: int8, or e4m3 codes."""


class KVCaches:
    """Cache tensors of all layers, on one device.

    Args:
        config: the model's configuration.
        num_blocks: blocks of 64 tokens.
        kv_cache_dtype: format of the rows.
        placement: where the tensors live, and what reads them.
        latent_blocks: blocks of latent rows, where a host tier has others (`heedful.engine.host_tier`); None for one
            for each block.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        kv_cache_dtype: KVCacheDtype,
        placement: Placement,
        latent_blocks: int | None = None,
    ) -> None:
        self.layout = cache_layout(config, kv_cache_dtype)
        self.num_blocks = num_blocks
        latent = _LATENTS[kv_cache_dtype]
        index = _INDEX_CODES[placement.backend] if kv_cache_dtype == "fp8" else latent
        rows = (num_blocks if latent_blocks is None else latent_blocks, BLOCK_SIZE, self.layout.latent_width)
        keys = (num_blocks, BLOCK_SIZE, self.layout.index_width)
        self.latent = [zeros(rows, latent, placement.device) for _ in range(config.num_hidden_layers)]
        self.index = [zeros(keys, index, placement.device) if kind == "full" else None for kind in config.indexer_types]

    def copy_blocks(self, copies: np.ndarray, latent_copies: np.ndarray) -> None:
        """Copies blocks of index keys and of latent rows, all sources before any target is written.

        Args:
            copies: int32 [c, 2] of (source, target), of index keys.
            latent_copies: the same of latent rows; without a host tier these are the same blocks.
        """
        for caches, moves in ((self.index, copies), (self.latent, latent_copies)):
            if not len(moves):
                continue
            sources, targets = move_places(moves, self.latent[0].device)
            for cache in caches:
                if cache is not None:
                    cache[targets] = cache[sources]

    @property
    def latent_bytes(self) -> int:
        """Bytes of the latent rows of all layers."""
        return sum(cache.nbytes for cache in self.latent)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index keys of all layers."""
        return sum(cache.nbytes for cache in self.index if cache is not None)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A cache that holds nothing yet."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return view_of(untouched_bytes(shape, dtype), shape, dtype)


def untouched_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Zeros in the host's memory: pages the system gives when they are first written, which torch's are not."""
    return np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)


def view_of(memory: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Bytes as a tensor, which keeps them alive."""
    return torch.from_numpy(memory).view(dtype).view(shape)


def move_places(moves: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [c, 2] of (source, target) -> int64 [c] sources and targets on the device."""
    sources, targets = to_device(torch.from_numpy(moves.astype(np.int64).T.copy()), device)
    return sources, targets


def table_tensor(tables: np.ndarray, device: torch.device, backend: Backend) -> torch.Tensor:
    """Block tables [B, M] on the device; for kernels with columns of -1 up to a width of one kind."""
    M = tables.shape[1]
    width = -(-M // TABLE_WIDTH) * TABLE_WIDTH
    if backend == "triton" and width > M:
        tables = np.pad(tables, ((0, 0), (0, width - M)), constant_values=-1)
    return to_device(torch.from_numpy(tables), device)
