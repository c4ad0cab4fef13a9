"""The two caches of a DSA model: latent rows of every layer, index keys of the layers that select for themselves.

One block identity serves both: block b holds the same 64 tokens in every tensor here. Which tokens those are is the
scheduler's business; how a row is laid out is that of `cache_layout` and `heedful.ops`.
"""

from __future__ import annotations

import numpy as np
import torch

from heedful.config import ModelConfig
from heedful.engine.cache_layout import BLOCK_SIZE, KVCacheDtype, cache_layout
from heedful.engine.placement import Placement, to_device

_LATENTS: dict[KVCacheDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.uint8,
}
_INDEX_CODES = {"cpu": torch.int8, "triton": torch.uint8}
"""Bytes of index keys by what multiplies them: int8, or e4m3 codes."""


class KVCaches:
    """Cache tensors of all layers, on one device.

    Args:
        config: the model's configuration.
        num_blocks: blocks of 64 tokens.
        kv_cache_dtype: format of the rows.
        placement: where the tensors live, and what reads them.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, kv_cache_dtype: KVCacheDtype, placement: Placement
    ) -> None:
        device = placement.device
        self.layout = cache_layout(config, kv_cache_dtype)
        self.num_blocks = num_blocks

        def blocks(width: int, dtype: torch.dtype) -> torch.Tensor:
            shape = (num_blocks, BLOCK_SIZE, width)
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # NumPy's zeros are pages the system gives when they are first written; torch would touch them all now.
            return torch.from_numpy(np.zeros((*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).view(shape)

        latent = _LATENTS[kv_cache_dtype]
        index = _INDEX_CODES[placement.backend] if kv_cache_dtype == "fp8" else latent
        layers = config.num_hidden_layers
        self.latent = [blocks(self.layout.latent_width, latent) for _ in range(layers)]
        self.index = [
            blocks(self.layout.index_width, index) if kind == "full" else None for kind in config.indexer_types
        ]

    def copy_blocks(self, copies: np.ndarray) -> None:
        """Copies blocks in every cache, all sources before any target is written: int32 [c, 2] of (source, target)."""
        sources, targets = to_device(torch.from_numpy(copies.astype(np.int64).T.copy()), self.latent[0].device)
        for cache in (*self.latent, *self.index):
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
