"""What stands between an MLA layer's projections and its output: the holder of the keys.

`Attention` is the one place where inference over pages and work on full sequences differ.
`FullSequenceAttention` is the plain form: no cache, all tokens at once, autograd through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from heedful.nn.indexer import IndexProjection
    from heedful.nn.mla import MLA, LatentProjection


class Attention(Protocol):
    """Stores a layer's new keys, selects, and attends.

    One that has a true attribute `rotates_keys` gets `k_pe` and the index key before RoPE, with the angles
    (`LatentProjection.rope`), and turns them itself: a kernel that writes keys to a cache turns them on the way.
    """

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values of each head [..., H, v], and the selection used [..., K] int32 (None when dense)."""


class FullSequenceAttention:
    """Causal attention of whole sequences [B, T, ...], in the MHA form, differentiable.

    Args:
        mode: "dense" reads every earlier token; "sparse" the index_topk highest-scored ones. The selection has no
            gradient: the indexer learns from a loss of its own.
        index_topk: K, tokens a query reads in sparse mode.
    """

    def __init__(self, mode: Literal["dense", "sparse"] = "dense", *, index_topk: int | None = None) -> None:
        if mode == "sparse" and index_topk is None:
            raise ValueError("index_topk: expected a positive integer for mode 'sparse', got None")
        self.mode = mode
        self.index_topk = index_topk

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key, value = mla.expand_key_value(projection.latent, projection.k_pe)
        query = torch.cat((projection.q_nope, projection.q_pe), dim=-1)
        query, key, value = (part.transpose(-2, -3) for part in (query, key, value))  # [B, H, T, ...]
        if self.mode == "dense":
            heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=mla.scale)
            return heads.transpose(-2, -3), None
        selection = shared if index is None else select(index_scores(index), self.index_topk or 0)
        if selection is None:
            raise ValueError(f"layer {layer} has no indexer and no earlier layer's selection to share")
        mask = selection_mask(selection, query.shape[-2]).unsqueeze(-3)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=mla.scale)
        return heads.transpose(-2, -3), selection


def index_scores(index: IndexProjection) -> torch.Tensor:
    """I[t, s] of full sequences: [B, T, T] float32, -inf where s > t. Differentiable."""
    dots = torch.einsum("...thd,...sd->...ths", index.query.float(), index.key.float())
    scores = torch.einsum("...ths,...th->...ts", dots.relu(), index.weights)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf"))


def select(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k highest of each row [..., T, S] -> int32 [..., T, min(k, S)]; lowest position first on ties, -1 pads."""
    top = scores.detach().sort(dim=-1, descending=True, stable=True)
    k = min(k, scores.shape[-1])
    return top.indices[..., :k].masked_fill(top.values[..., :k] == float("-inf"), -1).int()


def selection_mask(selection: torch.Tensor, keys: int) -> torch.Tensor:
    """Selection [..., T, K] -> bool [..., T, keys], true where a key is selected."""
    mask = torch.zeros(*selection.shape[:-1], keys + 1, dtype=torch.bool, device=selection.device)
    mask.scatter_(-1, selection.long().where(selection >= 0, keys), True)  # -1 goes to a column of its own
    return mask[..., :keys]
