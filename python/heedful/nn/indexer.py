"""The lightning indexer: small heads that score every earlier token for every query.

I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]), with one key head shared by all indexer heads (DeepSeek-V3.2
report, section 2).
"""

from typing import NamedTuple

import torch
from torch import nn

from heedful.nn.rope import Rope, apply_rope


class IndexProjection(NamedTuple):
    """What the indexer makes of a set of tokens."""

    query: torch.Tensor
    """[..., Hi, Di], after RoPE."""
    key: torch.Tensor
    """[..., Di], after RoPE (unless asked for before it): what the index-key cache holds."""
    weights: torch.Tensor
    """[..., Hi] float32, already times Hi^-1/2 * Di^-1/2."""


class LightningIndexer(nn.Module):
    """Projects tokens to index queries, one index key and head weights.

    Args:
        hidden_size: D.
        q_lora_rank: width of the compressed query.
        n_heads: Hi.
        head_dim: Di.
        rope_interleaved: the layout of the indexer's RoPE: False for DeepSeek-V3.2, True for GLM-5.
    """

    def __init__(
        self, *, hidden_size: int, q_lora_rank: int, n_heads: int, head_dim: int, rope_interleaved: bool
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.rope_interleaved = rope_interleaved
        self.wq_b = nn.Linear(q_lora_rank, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, n_heads, bias=False)

    def forward(
        self, x: torch.Tensor, compressed_query: torch.Tensor, rope: Rope, *, rotate_key: bool = True
    ) -> IndexProjection:
        """x [..., D], compressed_query [..., q_lora_rank] (after its norm) -> the three projections.

        Without `rotate_key` the key comes before RoPE.
        """
        query = self.wq_b(compressed_query).unflatten(-1, (self.n_heads, self.head_dim))
        key = self.wk(x)
        norm = self.k_norm
        key = nn.functional.layer_norm(
            key.float(), (self.head_dim,), norm.weight.float(), norm.bias.float(), norm.eps
        ).to(x.dtype)
        query = apply_rope(query, rope, interleaved=self.rope_interleaved)
        if rotate_key:
            key = apply_rope(key.unsqueeze(-2), rope, interleaved=self.rope_interleaved).squeeze(-2)
        scale = self.n_heads**-0.5 * self.head_dim**-0.5
        weights = nn.functional.linear(x.float(), self.weights_proj.weight.float()) * scale
        return IndexProjection(query, key, weights)
