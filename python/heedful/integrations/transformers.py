"""Sparse attention inside Hugging Face transformers (5.17 or newer): `deepseek_v32` and `glm_moe_dsa`.

    import heedful.integrations.transformers  # registers the name
    model.set_attn_implementation("heedful")  # or from_pretrained(..., attn_implementation="heedful")

transformers' own implementations expand every cached latent row to keys and values of each head, at every step, and
mask what the indexer did not choose. Here an attention layer hands over its latent rows as they are cached; queries and
values go through the two halves of `kv_b_proj` instead (the absorbed form, `heedful.nn.mla`), and only chosen rows are
read. The indexer scores and selects some queries at a time, and never holds [queries, index heads, keys]. Operators are
those of `heedful.ops`: Rust on a CPU, Triton on a GPU.

What falls back to torch's attention over every key, with the same selection as a mask: calls that need gradients,
autocast, dropout while training, and devices that heedful has no kernels for (with a warning). Where `kv_b_proj` is
more than a plain linear layer (quantised, with an adapter, offloaded) keys and values are expanded as in transformers,
and the chosen ones of each head are read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from heedful import ops

NAME = "heedful"
"""The name of the attention implementation."""

_DEVICES = ("cpu", "cuda")
_MODELS = (
    # Module, prefix of its classes, and its function that rotates the indexer's queries and keys.
    ("transformers.models.deepseek_v32.modeling_deepseek_v32", "DeepseekV32", "apply_rotary_pos_emb"),
    ("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa", "GlmMoeDsa", "apply_rotary_pos_emb_interleave"),
)
_OURS = "_heedful_original"
"""The attribute of a wrapped method that holds the method it stands for."""

_SCORES_BYTES = 256 * 2**20
"""Scores held at a time while keys are selected."""


def register() -> None:
    """Makes "heedful" an attention implementation of transformers; importing this module has done it already.

    Raises:
        ImportError: a release of transformers that lacks the models.
    """
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, _whole_mask)
    for name, prefix, rotate in _MODELS:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            found = f"transformers {transformers.__version__} has no {error.name}"
            raise ImportError(f"heedful.integrations.transformers: expected 5.17 or newer, but {found}") from None
        attention, indexer = getattr(module, f"{prefix}Attention"), getattr(module, f"{prefix}Indexer")
        if hasattr(attention, "expand_kv") and not hasattr(attention.expand_kv, _OURS):
            attention.expand_kv = _latents_for_heedful(attention.expand_kv)
        if hasattr(module, rotate) and not hasattr(indexer.forward, _OURS):
            indexer.forward = _selection_for_heedful(indexer.forward, getattr(module, rotate))


def sparse_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each query over the keys its indexer chose; transformers calls it.

    Args:
        module: the attention layer.
        query: [B, H, S, qk_head_dim].
        key: [B, 1, T, C + R] latent rows, or [B, H, T, qk_head_dim] where the layer has expanded them.
        value: [B, 1, T, C] or [B, H, T, v_head_dim].
        attention_mask: bool [B, 1, S, T], true where a query may look.
        scaling: factor of the logits.
        dropout: of the probabilities.
        indices: int32 [B, S, K].

    Returns:
        [B, S, H, v_head_dim] and None: weights are not kept.

    Raises:
        ValueError: the model has no lightning indexer, so there are no indices.
    """
    if indices is None:
        raise ValueError(
            f"attn_implementation={NAME!r}: expected a model with a lightning indexer (deepseek_v32, glm_moe_dsa), "
            f"{type(module).__name__} hands over no indices"
        )
    if attention_mask is not None:
        chosen = _visible(attention_mask)[:, 0].expand(len(query), -1, -1).gather(-1, indices.clamp_min(0).long())
        indices = indices.where(chosen, -1)
    latents = _hands_over_latents(module)
    if _must_fall_back(query, key, value) or dropout > 0.0:
        if latents:
            key, value = getattr(type(module).expand_kv, _OURS)(module, value, key[..., value.shape[-1] :])
        return _masked_attention(query, key, value, indices, scaling, dropout), None
    if latents:
        return _absorbed(module, query, key, indices, scaling), None
    B, H, S, _ = query.shape
    out, _ = ops.sparse_attention(
        query.transpose(1, 2).reshape(B * S, H, -1),
        key.transpose(1, 2).flatten(0, 1),
        _flat(indices, key.shape[2]),
        scale=scaling,
        v=value.transpose(1, 2).flatten(0, 1),
    )
    return out.view(B, S, H, -1), None


def _absorbed(
    module: Any, query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Queries taken into the latent space, attention over rows, values taken out of it: [B, S, H, v]."""
    B, H, S, _ = query.shape
    nope, C = module.qk_nope_head_dim, module.kv_lora_rank
    key_up, value_up = _up_projections(module)
    q_nope, q_pe = query.split([nope, query.shape[-1] - nope], dim=-1)
    latent = torch.einsum("bhsn,hnc->bshc", q_nope, key_up)
    rows = torch.cat((latent, q_pe.transpose(1, 2)), dim=-1).flatten(0, 1)
    out, _ = ops.sparse_attention(
        rows, key[:, 0].reshape(-1, key.shape[-1]), _flat(indices, key.shape[2]), scale=scaling, value_dim=C
    )
    return torch.einsum("bshc,hvc->bshv", out.view(B, S, H, C), value_up)


def _up_projections(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_b_proj's weight as [H, nope, C] and [H, v, C]."""
    weight = module.kv_b_proj.weight.unflatten(0, (-1, module.qk_nope_head_dim + module.v_head_dim))
    key_up, value_up = weight.split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
    return key_up, value_up


def _flat(indices: torch.Tensor, T: int) -> torch.Tensor:
    """Indices [B, S, K] into each sequence's T keys -> [B * S, K] into the keys of all sequences one after another."""
    first = torch.arange(len(indices), dtype=torch.int32, device=indices.device)[:, None, None] * T
    return (indices + first).where(indices >= 0, -1).flatten(0, 1)


def _masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """The fallback: every key expanded, and what was not chosen masked. Differentiable; [B, S, H, v]."""
    mask = torch.zeros(*indices.shape[:2], key.shape[2] + 1, dtype=torch.bool, device=query.device)
    mask.scatter_(-1, indices.long().where(indices >= 0, key.shape[2]), True)  # -1 goes to a column of its own
    mask = mask[..., : key.shape[2]].unsqueeze(1)
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    # A query that may look nowhere (padding) has no softmax.
    return heads.masked_fill(~mask.any(-1, keepdim=True), 0).transpose(1, 2).contiguous()


def _must_fall_back(*tensors: torch.Tensor) -> bool:
    kind = tensors[0].device.type
    if kind not in _DEVICES:
        _warn_of_device(kind)
        return True
    return torch.is_autocast_enabled(kind) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bool, true where a query may look; masks that are added hold 0 there."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


@functools.cache
def _warn_of_device(kind: str) -> None:
    warnings.warn(f"heedful has no kernels for {kind}: attention is torch's, with a mask", stacklevel=2)


def _latents_for_heedful(expand_kv: Callable[..., Any]) -> Callable[..., Any]:
    """`expand_kv` of an attention layer, which hands the latents over unexpanded when heedful attends."""

    def unexpanded(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config._attn_implementation == NAME and _hands_over_latents(self):
            return torch.cat((kv_nope, k_rot), dim=-1), kv_nope
        return expand_kv(self, kv_nope, k_rot)

    return _instead_of(expand_kv, unexpanded)


def _selection_for_heedful(forward: Callable[..., Any], rotate: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an indexer, which scores and selects by heedful's operators when heedful attends."""

    parameters = inspect.signature(forward)

    @torch.no_grad()
    def select(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "cache" in parameters.parameters and "past_key_values" in kwargs:  # its former name
            kwargs["cache"] = kwargs.pop("past_key_values")
        given = parameters.bind(self, *args, **kwargs).arguments
        hidden_states, q_resid = given["hidden_states"], given["q_resid"]
        if self.config._attn_implementation != NAME or _must_fall_back(hidden_states):
            return forward(self, *args, **kwargs)
        position_embeddings, attention_mask = given["position_embeddings"], given["attention_mask"]
        cache = given.get("cache", given.get("past_key_values"))
        R = self.qk_rope_head_dim
        query = self.wq_b(q_resid).unflatten(-1, (self.n_heads, self.head_dim))
        key = self.k_norm(self.wk(hidden_states)).unsqueeze(2)
        turned = rotate(query[..., :R], key[..., :R], *position_embeddings, unsqueeze_dim=2)
        query, key = (torch.cat((part, rest[..., R:]), dim=-1) for part, rest in zip(turned, (query, key), strict=True))
        key = key.squeeze(2)
        if cache is not None:
            key = cache.update_indexer(key, self.layer_idx)
        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float()
        # A positive factor may stand outside relu.
        weights = weights * (self.n_heads**-0.5 * self.softmax_scale)
        mask = _visible(attention_mask).expand(len(query), -1, -1)
        return torch.stack([_select(*parts, self.index_topk) for parts in zip(query, key, weights, mask, strict=True)])

    return _instead_of(forward, select)


def _select(
    query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, index_topk: int
) -> torch.Tensor:
    """A sequence's selection: query [S, Hi, Di], key [T, Di], weights [S, Hi], mask [S, T] -> int32 [S, K], -1 pads."""
    S, T = mask.shape
    at_a_time = max(1, _SCORES_BYTES // (4 * T))
    last = torch.full((S,), T - 1, dtype=torch.int64, device=query.device)  # the mask tells who sees what
    chosen = []
    for first in range(0, S, at_a_time):
        rows = slice(first, first + at_a_time)
        scores = ops.index_scores(query[rows], key, weights[rows], q_positions=last[rows])
        chosen.append(ops.top_k(scores.masked_fill_(~mask[rows], -torch.inf), min(index_topk, T), sorted=False))
    return torch.cat(chosen)


def _instead_of(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = functools.wraps(original)(ours)
    setattr(wrapped, _OURS, original)
    return wrapped


def _hands_over_latents(module: Any) -> bool:
    """Whether a layer's latents come unexpanded: its class does that, and kv_b_proj is nothing but its weight."""
    up = getattr(module, "kv_b_proj", None)
    if type(up) is not torch.nn.Linear or up.bias is not None or hasattr(up, "_hf_hook"):
        return False
    wide = up.weight.is_floating_point() and up.weight.itemsize > 1
    return wide and hasattr(getattr(module, "expand_kv", None), _OURS)


def _whole_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The bool mask of "sdpa", which is never left out: the indexer needs it."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


register()
