"""How long a step would take: a roofline of a DSA model on a machine.

For a step of N tokens of B sequences; sequence b has n_b of the tokens and is L_b long afterwards; a token at position
p has p + 1 keys:

    weights     bytes  W_always + W_experts (1 - (1 - K_e / E)^N)     experts that N tokens are expected to touch
    products    FLOPs  2 N (parameters active for a token)
    indexer     FLOPs  2 Hi Di layers sum (p + 1)                     bytes  index row x layers x sum_b L_b
    attention   FLOPs  2 H (2 C + R) layers sum min(k, p + 1)         bytes  latent row x layers x sum_b min(L_b, n_b k)
    moves       bytes  latent rows, and index keys of preempted requests, that cross the link to the host (executor.py)

`indexer` counts the layers that own an indexer. A step takes

    overhead + max(bytes / memory bandwidth, FLOPs / compute) + fetched bytes / host link

with the rates that kernels reach, not those of a data sheet; nothing overlaps but reading and computing. It is a model
to compare schedules by, not a forecast of any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from heedful.engine.cache_layout import KVCacheDtype, cache_layout
from heedful.weights import tensor_shapes

if TYPE_CHECKING:
    from heedful.config import ModelConfig


@dataclass(frozen=True)
class Hardware:
    """Rates of a whole machine. The defaults are half of what eight H100 are sold with.

    Args:
        memory_bandwidth: bytes a second from device memory.
        compute: FLOPs a second of matrix products.
        host_bandwidth: bytes a second from host memory.
        step_overhead: seconds that each step takes besides.
    """

    memory_bandwidth: float = 13.4e12
    compute: float = 7.9e15
    host_bandwidth: float = 200e9
    step_overhead: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("memory_bandwidth", "compute", "host_bandwidth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not (math.isfinite(self.step_overhead) and self.step_overhead >= 0):
            raise ValueError(f"step_overhead: expected seconds of 0 or more, got {self.step_overhead}")


@dataclass(frozen=True)
class CostModel:
    """What of a model decides how long a step takes; the formulas stand at the top of this module."""

    hardware: Hardware
    always_bytes: float
    expert_bytes: float
    active_parameters: float
    experts: int
    experts_per_token: int
    layers: int
    index_layers: int
    index_flops: int
    attention_flops: int
    top_k: int
    latent_row: int
    index_row: int

    @classmethod
    def of(
        cls, config: ModelConfig, hardware: Hardware, kv_cache_dtype: KVCacheDtype = "fp8", weight_bytes: float = 1.0
    ) -> CostModel:
        """The cost model of a model on a machine.

        Args:
            config: the model's sizes.
            hardware: the machine's rates.
            kv_cache_dtype: of the caches' rows.
            weight_bytes: bytes of a weight.
        """
        if not (math.isfinite(weight_bytes) and weight_bytes > 0):
            raise ValueError(f"weight_bytes: expected a positive number, got {weight_bytes}")
        experts, others = 0, 0
        for name, shape in tensor_shapes(config).items():
            if ".mlp.experts." in name:
                experts += math.prod(shape)
            elif "embed_tokens" not in name:  # rows are looked up, not read
                others += math.prod(shape)
        layout = cache_layout(config, kv_cache_dtype)
        count = max(config.n_routed_experts, 1)
        return cls(
            hardware=hardware,
            always_bytes=others * weight_bytes,
            expert_bytes=experts * weight_bytes,
            active_parameters=others + experts * config.num_experts_per_tok / count,
            experts=count,
            experts_per_token=min(config.num_experts_per_tok, count),
            layers=config.num_hidden_layers,
            index_layers=config.indexer_types.count("full"),
            index_flops=2 * config.index_n_heads * config.index_head_dim,
            attention_flops=2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim),
            top_k=config.index_topk,
            latent_row=layout.latent_width * layout.itemsize,
            index_row=layout.index_width * layout.itemsize,
        )

    @property
    def latent_bytes(self) -> int:
        """Bytes of a token's latent rows over all layers."""
        return self.latent_row * self.layers

    @property
    def index_bytes(self) -> int:
        """Bytes of a token's index keys over all layers that have them."""
        return self.index_row * self.index_layers

    def seconds(self, query_lens: np.ndarray, seq_lens: np.ndarray, fetched_bytes: float = 0.0) -> float:
        """Seconds that a step takes.

        Args:
            query_lens: tokens of the step that belong to each sequence, int [B].
            seq_lens: tokens of each sequence after the step, int [B].
            fetched_bytes: that come from host memory.
        """
        n, end = query_lens.astype(np.float64), seq_lens.astype(np.float64)
        start = end - n
        tokens = float(n.sum())
        scored = float((n * (start + end + 1) / 2).sum())
        # Positions below k attend to all before them, the others to k.
        few = np.minimum(end, self.top_k) - np.minimum(start, self.top_k)
        low = np.minimum(start, self.top_k)
        attended = float((few * (2 * low + few + 1) / 2 + (n - few) * self.top_k).sum())
        touched = 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens
        latent_rows = float(np.minimum(end, n * self.top_k).sum())
        flops = (
            2 * tokens * self.active_parameters
            + self.index_flops * self.index_layers * scored
            + self.attention_flops * self.layers * attended
        )
        read = (
            self.always_bytes
            + self.expert_bytes * touched
            + self.index_bytes * float(end.sum())
            + self.latent_bytes * latent_rows
        )
        hardware = self.hardware
        busy = max(read / hardware.memory_bandwidth, flops / hardware.compute)
        return hardware.step_overhead + busy + fetched_bytes / hardware.host_bandwidth
