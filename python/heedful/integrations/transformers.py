"""Sparse attention inside Hugging Face transformers (5.10 or newer): `deepseek_v32` and `glm_moe_dsa`.

    import heedful.integrations.transformers  # registers the name
    model.set_attn_implementation("heedful")  # or from_pretrained(..., attn_implementation="heedful")

transformers' own implementations expand every cached latent row to keys and values of each head, at every step, and
mask what the indexer did not choose. Here an attention layer hands over its latent rows as they are cached; queries and
values go through the two halves of `kv_b_proj` instead (the absorbed form, `heedful.nn.mla`), and only chosen rows are
read: in Rust on a CPU, in Triton on a GPU.

What falls back to torch's attention over every key, with the same selection as a mask: calls that need gradients,
autocast, dropout while training, and devices that heedful has no kernels for (with a warning). Where `kv_b_proj` is
more than a plain linear layer (quantised, with an adapter, offloaded) keys and values are expanded as in transformers,
and the chosen ones of each head are read. The indexer itself stays that of transformers, with its scores of [queries,
index heads, keys] in memory.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from heedful import ops

NAME = "heedful"
"""The name of the attention implementation."""

_DEVICES = ("cpu", "cuda")
_ATTENTIONS = (
    ("transformers.models.deepseek_v32.modeling_deepseek_v32", "DeepseekV32Attention"),
    ("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa", "GlmMoeDsaAttention"),
)


def register() -> None:
    """Makes "heedful" an attention implementation of transformers; importing this module has done it already."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, _whole_mask)
    for module, name in _ATTENTIONS:
        attention = getattr(importlib.import_module(module), name)
        if hasattr(attention, "expand_kv") and not hasattr(attention.expand_kv, "__wrapped__"):
            attention.expand_kv = _latents_for_heedful(attention.expand_kv)


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
        chosen = attention_mask.expand(query.shape[0], -1, -1, -1)[:, 0].gather(-1, indices.long())
        chosen = chosen if chosen.dtype == torch.bool else chosen > torch.finfo(chosen.dtype).min
        indices = indices.where(chosen, -1)
    latents = _hands_over_latents(module)
    if _must_fall_back(query, key, value, dropout):
        if latents:
            key, value = type(module).expand_kv.__wrapped__(module, value, key[..., value.shape[-1] :])
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


def _must_fall_back(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    if query.device.type not in _DEVICES:
        _warn_of_device(query.device.type)
        return True
    gradients = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return gradients or dropout > 0.0 or torch.is_autocast_enabled(query.device.type)


@functools.cache
def _warn_of_device(kind: str) -> None:
    warnings.warn(f"heedful has no kernels for {kind}: attention is torch's, with a mask", stacklevel=2)


def _latents_for_heedful(expand_kv: Callable[..., Any]) -> Callable[..., Any]:
    """`expand_kv` of an attention layer, which hands the latents over unexpanded when heedful attends."""

    @functools.wraps(expand_kv)
    def unexpanded(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config._attn_implementation == NAME and _hands_over_latents(self):
            return torch.cat((kv_nope, k_rot), dim=-1), kv_nope
        return expand_kv(self, kv_nope, k_rot)

    return unexpanded


def _hands_over_latents(module: Any) -> bool:
    """Whether a layer's latents come unexpanded: its class does that, and kv_b_proj is nothing but its weight."""
    up = getattr(module, "kv_b_proj", None)
    if type(up) is not torch.nn.Linear or up.bias is not None or hasattr(up, "_hf_hook"):
        return False
    wide = up.weight.is_floating_point() and up.weight.itemsize > 1
    return wide and hasattr(getattr(module, "expand_kv", None), "__wrapped__")


def _whole_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The bool mask of "sdpa", which is never left out: the indexer needs it."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


register()
