"""How wide a cached token is: rows of the latent cache and of the index-key cache, by cache dtype.

Arithmetic alone, without torch, so that `heedful inspect` can plan memory anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heedful.config import ModelConfig

BLOCK_SIZE = 64
"""Tokens in a block."""

FP8_GROUP = 128
"""e4m3 values that share a scale at most."""

KVCacheDtype = Literal["float32", "bfloat16", "fp8"]
KV_CACHE_DTYPES: tuple[KVCacheDtype, ...] = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True)
class CacheLayout:
    """Shapes of a block's rows.

    Args:
        kv_cache_dtype: "float32", "bfloat16" or "fp8": latent rows in e4m3 with a scale for each 128 values, their
            rotated part in bf16; index keys in bytes with a scale each: int8 on a CPU, which multiplies them as they
            lie, e4m3 on a GPU.
        kv_lora_rank: C.
        qk_rope_head_dim: R.
        index_head_dim: Di.
    """

    kv_cache_dtype: KVCacheDtype
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the cache tensors."""
        return {"float32": 4, "bfloat16": 2, "fp8": 1}[self.kv_cache_dtype]

    @property
    def latent_width(self) -> int:
        """Elements of a latent row: bytes for fp8 (656 for C = 512, R = 64)."""
        if self.kv_cache_dtype == "fp8":
            return self.kv_lora_rank + 4 * -(-self.kv_lora_rank // FP8_GROUP) + 2 * self.qk_rope_head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def index_width(self) -> int:
        """Elements of an index key: bytes for fp8 (132 for Di = 128: 128 codes and a scale)."""
        return self.index_head_dim + 4 if self.kv_cache_dtype == "fp8" else self.index_head_dim


def supported_cache_dtypes(config: ModelConfig) -> tuple[KVCacheDtype, ...]:
    """Formats a model's rows can have: FP8 rotates index keys by a Hadamard matrix and gives each a single scale."""
    width = config.index_head_dim
    fp8 = width <= FP8_GROUP and width & (width - 1) == 0
    return tuple(dtype for dtype in KV_CACHE_DTYPES if fp8 or dtype != "fp8")


def cache_layout(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> CacheLayout:
    """The layout of a model's cache rows."""
    return CacheLayout(kv_cache_dtype, config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim)


def latent_bytes_per_token(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> int:
    """Bytes of one token's latent rows, over all layers."""
    layout = cache_layout(config, kv_cache_dtype)
    return layout.latent_width * layout.itemsize * config.num_hidden_layers


def index_bytes_per_token(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> int:
    """Bytes of one token's index keys, over the layers that select for themselves."""
    layout = cache_layout(config, kv_cache_dtype)
    return layout.index_width * layout.itemsize * config.indexer_types.count("full")


def bytes_per_token(config: ModelConfig, kv_cache_dtype: KVCacheDtype) -> int:
    """Bytes one token takes over both caches and all layers."""
    return latent_bytes_per_token(config, kv_cache_dtype) + index_bytes_per_token(config, kv_cache_dtype)
