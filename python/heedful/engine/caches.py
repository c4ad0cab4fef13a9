"""The two caches of a DSA model: latent rows of every layer, index keys of the layers that select for themselves.

One block identity serves both: block b holds the same 64 tokens in every tensor here. Which tokens those are is the
scheduler's business; how a row is laid out is that of `heedful.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from heedful.config import ModelConfig

BLOCK_SIZE = 64
"""Tokens in a block."""

KVCacheDtype = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True)
class CacheLayout:
    """Shapes of a block's rows.

    Args:
        kv_cache_dtype: "float32", "bfloat16" or "fp8" (e4m3 with a scale for each 128 values, rotated part in bf16).
        kv_lora_rank: C.
        qk_rope_head_dim: R.
        index_head_dim: Di.
    """

    kv_cache_dtype: KVCacheDtype
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type of the cache tensors."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}[self.kv_cache_dtype]

    @property
    def latent_width(self) -> int:
        """Elements of a latent row: bytes for fp8 (656 for C = 512, R = 64)."""
        if self.kv_cache_dtype == "fp8":
            return self.kv_lora_rank + 4 * -(-self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def index_width(self) -> int:
        """Elements of an index key: bytes for fp8 (132 for Di = 128)."""
        return self.index_head_dim + 4 if self.kv_cache_dtype == "fp8" else self.index_head_dim


class KVCaches:
    """Cache tensors of all layers, on one device.

    Args:
        config: the model's configuration.
        num_blocks: blocks of 64 tokens.
        kv_cache_dtype: format of the rows.
        device: where the tensors live.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, kv_cache_dtype: KVCacheDtype, device: torch.device
    ) -> None:
        self.layout = cache_layout(config, kv_cache_dtype)
        self.num_blocks = num_blocks

        def blocks(width: int) -> torch.Tensor:
            shape, dtype = (num_blocks, BLOCK_SIZE, width), self.layout.torch_dtype
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # NumPy's zeros are pages the system gives when they are first written; torch would touch them all now.
            return torch.from_numpy(np.zeros((*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).view(shape)

        self.latent = [blocks(self.layout.latent_width) for _ in range(config.num_hidden_layers)]
        self.index = [blocks(self.layout.index_width) if kind == "full" else None for kind in config.indexer_types]

    @property
    def latent_bytes(self) -> int:
        """Bytes of the latent rows of all layers."""
        return sum(cache.nbytes for cache in self.latent)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index keys of all layers."""
        return sum(cache.nbytes for cache in self.index if cache is not None)


def cache_layout(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> CacheLayout:
    """The layout of a model's cache rows."""
    return CacheLayout(kv_cache_dtype, config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim)


def bytes_per_token(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> int:
    """Bytes one token takes over both caches and all layers."""
    layout = cache_layout(config, kv_cache_dtype)
    width = layout.latent_width * config.num_hidden_layers
    width += layout.index_width * config.indexer_types.count("full")
    return width * layout.torch_dtype.itemsize
