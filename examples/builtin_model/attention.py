"""Attention of the two stages that train the indexer, over whole sequences [1, T, ...], chunk of queries by chunk.

No [T, T] matrix is ever whole. The indexer's loss is backpropagated while the layer runs, into the indexer's own
parameters and nowhere else: its input counts as a constant, and the language-model loss never reaches it.
Both losses: KL(p || softmax(I)), p the main attention summed over heads and L1-normalised (DeepSeek-V3.2 report,
section 2.1).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import heedful
from heedful.nn import MLA, IndexProjection, LatentProjection

CHUNK = 512


class WarmUpAttention:
    """Dense attention; the indexer learns its distribution over all earlier tokens.

    Args:
        chunks: chunks of queries that the indexer learns from in a pass, chosen at random; the loss costs more than
            the model's own forward pass.

    Attributes:
        losses: KL a query of each layer of the last forward pass.
    """

    def __init__(self, chunks: int = 4) -> None:
        self.chunks = chunks
        self.losses: list[float] = []

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer == 0:
            self.losses.clear()
        with torch.no_grad():
            query, key, value = expanded(mla, projection)  # [H, T, ...]
            heads = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=mla.scale)
        assert index is not None
        leaves = index_leaves(index)
        tokens, total = key.shape[1], 0.0
        starts = range(0, tokens, CHUNK)
        chosen = torch.randperm(len(starts))[: self.chunks].tolist()
        queries = sum(min(CHUNK, tokens - starts[i]) for i in chosen)
        for start in (starts[i] for i in chosen):
            stop = min(start + CHUNK, tokens)
            future = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
            with torch.no_grad():
                logits = (query[:, start:stop] @ key[:, :stop].mT).mul_(mla.scale).masked_fill_(future, float("-inf"))
                target = logits.softmax(-1).mean(0)
            scores = index_scores(leaves, start, stop).masked_fill(future, float("-inf"))
            loss = kl(target, scores) / queries
            loss.backward()
            total += float(loss.detach())
        accumulate(mla, index, leaves)
        self.losses.append(total)
        return heads.transpose(1, 2), None


class SparseStageAttention:
    """Attention over the selected tokens; the indexer learns its distribution over them.

    Args:
        index_topk: K, tokens a query reads.

    Attributes:
        losses: KL a token of each layer of the last forward pass.
    """

    def __init__(self, index_topk: int) -> None:
        self.index_topk = index_topk
        self.losses: list[float] = []

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer == 0:
            self.losses.clear()
        assert index is not None
        leaves = index_leaves(index)
        selection = heedful.index_top_k(
            leaves.query.detach(), leaves.key.detach(), leaves.weights.detach(), self.index_topk
        )
        query = mla.absorb_query(projection)[0]  # [T, H, C + R]
        rows = torch.cat((projection.latent, projection.k_pe), dim=-1)[0]  # [T, C + R]
        attended, total = [], 0.0
        for start in range(0, len(rows), CHUNK):
            part = slice(start, min(start + CHUNK, len(rows)))
            chosen = selection[part]
            if torch.is_grad_enabled():
                out, target = checkpoint(attend, query[part], rows, chosen, mla, use_reentrant=False)
                loss = kl(target.detach(), selected_scores(leaves, part, chosen)) / len(rows)
                loss.backward()
                total += float(loss.detach())
            else:
                out, _ = attend(query[part], rows, chosen, mla)
            attended.append(out)
        if torch.is_grad_enabled():
            accumulate(mla, index, leaves)
        self.losses.append(total)
        return mla.expand_value(torch.cat(attended))[None], selection[None]


def expanded(mla: MLA, projection: LatentProjection) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one sequence, each [H, T, ...] (the MHA form)."""
    key, value = mla.expand_key_value(projection.latent, projection.k_pe)
    query = torch.cat((projection.q_nope, projection.q_pe), dim=-1)
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    return query, key, value


def attend(
    query: torch.Tensor, rows: torch.Tensor, selection: torch.Tensor, mla: MLA
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over its selected rows.

    Args:
        query: [t, H, C + R].
        rows: [T, C + R].
        selection: [t, K] int32, -1 where there is none.
        mla: gives the scale and C.

    Returns:
        Attended latent rows [t, H, C] and the probabilities' mean over heads [t, K].
    """
    keys = gather(rows, selection)  # [t, K, C + R]
    logits = (query @ keys.mT * mla.scale).masked_fill((selection < 0)[:, None], float("-inf"))
    probabilities = logits.softmax(-1)
    return probabilities @ keys[..., : mla.kv_lora_rank], probabilities.mean(1)


def gather(rows: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
    """rows [T, w], selection [t, K] -> [t, K, w]; row 0 stands for -1."""
    picked = rows.index_select(0, selection.clamp(min=0).flatten().long())
    return picked.view(*selection.shape, -1)


def index_leaves(index: IndexProjection) -> IndexProjection:
    """The indexer's projections of one sequence, cut off from what made them."""
    return IndexProjection(*(part[0].detach().requires_grad_() for part in index))


def index_scores(index: IndexProjection, start: int, stop: int) -> torch.Tensor:
    """I[t, s] of the queries from start to stop against the keys before stop: [t, s]."""
    dots = index.query[start:stop].transpose(0, 1) @ index.key[:stop].T  # [Hi, t, s]
    return torch.einsum("hts,th->ts", dots.relu(), index.weights[start:stop])


def selected_scores(index: IndexProjection, part: slice, selection: torch.Tensor) -> torch.Tensor:
    """I of a chunk's queries against their own selection alone: [t, K], -inf where there is none."""
    dots = index.query[part] @ gather(index.key, selection).mT  # [t, Hi, K]
    scores = (dots.relu() * index.weights[part][..., None]).sum(1)
    return scores.masked_fill(selection < 0, float("-inf"))


def kl(target: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(target || softmax(scores)); where the target is 0 a score of -inf counts nothing."""
    log_q = scores.log_softmax(-1).masked_fill(scores == float("-inf"), 0.0)
    return (torch.xlogy(target, target) - target * log_q).sum()


def accumulate(mla: MLA, index: IndexProjection, leaves: IndexProjection) -> None:
    """Carries the leaves' gradients into the indexer's parameters, and no further."""
    assert mla.indexer is not None
    parameters = list(mla.indexer.parameters())
    outputs, gradients = list(index), [leaf.grad[None] for leaf in leaves if leaf.grad is not None]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(outputs, parameters, gradients, retain_graph=True), strict=True
    ):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
