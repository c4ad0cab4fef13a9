"""Multi-head latent attention (MLA): the cache holds one small row a token, shared by all heads.

Two forms give the same result. MHA: keys and values are expanded for each head from the latent row. MQA
(absorbed): the key expansion is moved into the query and the value expansion behind the attention, so that
heads read the latent rows themselves; sparse attention uses this one. DeepSeek-V2 report, section 2.1;
DeepSeek-V3.2 report, appendix A.
"""

from typing import NamedTuple

import torch
from torch import nn

from heedful.nn.attention import Attention
from heedful.nn.indexer import LightningIndexer
from heedful.nn.norm import RMSNorm
from heedful.nn.rope import Rope, apply_rope


class LatentProjection(NamedTuple):
    """What MLA makes of a set of tokens before any attention."""

    q_nope: torch.Tensor
    """[..., H, nope]."""
    q_pe: torch.Tensor
    """[..., H, R], after RoPE."""
    latent: torch.Tensor
    """[..., C], after its norm."""
    k_pe: torch.Tensor
    """[..., R], shared by the heads; after RoPE, unless `rope` is there."""
    compressed_query: torch.Tensor
    """[..., q_lora_rank], after its norm: the indexer reads it too."""
    rope: Rope | None = None
    """cos and sin by which k_pe, and the layer's index key, are still to be turned."""


class MLA(nn.Module):
    """Multi-head latent attention, with a lightning indexer on layers that select for themselves.

    Args:
        hidden_size: D.
        num_heads: H.
        q_lora_rank: width of the compressed query.
        kv_lora_rank: C, width of the latent row.
        qk_nope_head_dim: width of a head's part without position.
        qk_rope_head_dim: R, width of the rotated part.
        v_head_dim: width of a head's value.
        scale: factor on the logits, YaRN's m^2 included.
        indexer: the layer's indexer; None where an earlier layer's selection is shared.
        bias: biases on q_a_proj, kv_a_proj_with_mqa and o_proj.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        scale: float,
        indexer: LightningIndexer | None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.scale = scale
        self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias)
        self.q_a_layernorm = RMSNorm(q_lora_rank)
        self.q_b_proj = nn.Linear(q_lora_rank, num_heads * (qk_nope_head_dim + qk_rope_head_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.indexer = indexer

    def forward(
        self, x: torch.Tensor, rope: Rope, attention: Attention, layer: int, shared: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One attention block.

        Args:
            x: [..., D], normalised.
            rope: cos and sin [..., R / 2] of the tokens' positions.
            attention: what holds the keys and attends.
            layer: the layer's number, by which `attention` finds its cache.
            shared: the selection of the nearest earlier layer with an indexer, used where this layer has none.

        Returns:
            The block's output [..., D] and the selection it used (None when attention was dense).
        """
        rotate_keys = not getattr(attention, "rotates_keys", False)
        projection = self.project(x, rope, rotate_keys=rotate_keys)
        index = None
        if self.indexer is not None:
            index = self.indexer(x, projection.compressed_query, rope, rotate_key=rotate_keys)
        heads, selection = attention(layer, self, projection, index, shared)
        return self.o_proj(heads.flatten(-2)), selection

    def project(self, x: torch.Tensor, rope: Rope, *, rotate_keys: bool = True) -> LatentProjection:
        """x [..., D] -> queries of each head and the token's latent row; without `rotate_keys` k_pe before RoPE."""
        compressed_query = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_b_proj(compressed_query).unflatten(-1, (self.num_heads, -1))
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        if rotate_keys:
            k_pe = apply_rope(k_pe.unsqueeze(-2), rope, interleaved=True).squeeze(-2)
        return LatentProjection(
            q_nope=q_nope,
            q_pe=apply_rope(q_pe, rope, interleaved=True),
            latent=self.kv_a_layernorm(latent),
            k_pe=k_pe,
            compressed_query=compressed_query,
            rope=None if rotate_keys else rope,
        )

    def absorb_query(self, projection: LatentProjection) -> torch.Tensor:
        """Queries that meet latent rows directly: [..., H, C + R]."""
        key_up, _ = self._up_projections()
        return torch.cat((torch.einsum("...hn,hnc->...hc", projection.q_nope, key_up), projection.q_pe), dim=-1)

    def expand_value(self, attended: torch.Tensor) -> torch.Tensor:
        """Attended latent rows [..., H, C] -> values of each head [..., H, v]."""
        _, value_up = self._up_projections()
        return torch.einsum("...hc,hvc->...hv", attended, value_up)

    def expand_key_value(self, latent: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent rows [..., C] and k_pe [..., R] -> keys [..., H, nope + R] and values [..., H, v] (the MHA form)."""
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_pe = k_pe.unsqueeze(-2).expand(*k_pe.shape[:-1], self.num_heads, -1)
        return torch.cat((k_nope, k_pe), dim=-1), value

    def _up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """kv_b_proj's weight as [H, nope, C] and [H, v, C]."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        key_up, value_up = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return key_up, value_up
