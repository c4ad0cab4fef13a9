"""Small random models saved by transformers, and what transformers computes with them.

The settings turn on everything that differs between checkpoints: YaRN, groups of experts, both RoPE layouts of the
indexer, layers that share a selection, dense and MoE layers; index_topk is far below the contexts of the tests.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 24,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": YARN,
    "attn_implementation": "eager",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"n_group": 4, "topk_group": 2},
    "deepseek_v32_plain_rope": {
        "n_group": 2,
        "topk_group": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "glm_moe_dsa": {"n_group": 1, "topk_group": 1, "indexer_types": ["full", "shared", "full", "shared"]},
    "glm_moe_dsa_every_layer": {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
}


def build(name: str, **overrides: Any) -> Any:
    """A random float32 transformers model of one of `CONFIGS`, in evaluation mode."""
    settings = {**COMMON, **CONFIGS[name], **overrides}
    if name.startswith("glm"):
        config, kind = transformers.GlmMoeDsaConfig(**settings), transformers.GlmMoeDsaForCausalLM
    else:
        config, kind = transformers.DeepseekV32Config(**settings), transformers.DeepseekV32ForCausalLM
    torch.manual_seed(1234)
    model = kind(config).float().eval()
    for parameter_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in parameter_name or "e_score_correction_bias" in parameter_name:
            tensor.data += 0.1 * torch.randn_like(tensor)  # not the identity that initialisation leaves
    return model


def save(name: str, directory: Path, **overrides: Any) -> Any:
    """Builds a model and saves it; returns it."""
    model = build(name, **overrides)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """log p(token | tokens before it) of every token but the first: float64 [len - 1, vocab]."""
    logits = model(input_ids=torch.tensor([token_ids])).logits[0]
    return logits[:-1].double().log_softmax(-1)


@torch.no_grad()
def greedy(model: Any, token_ids: list[int], count: int) -> list[int]:
    """The most likely continuation, with transformers' own cache."""
    out = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(token_ids) :].tolist()


@torch.no_grad()
def is_decisive(model: Any, token_ids: list[int], repeats: int = 4) -> bool:
    """Whether no choice on the way (selected key, expert, next token) hangs on rounding.

    A near-tie may be broken either way by a sum in another order, and what follows is then another text. Weights moved
    by some millionths of themselves move every score by more than rounding does; the choices must hold.
    """
    expected = logprobs(model, token_ids)
    generator = torch.Generator().manual_seed(0)
    moved = copy.deepcopy(model)
    for _ in range(repeats):
        for parameter, original in zip(moved.parameters(), model.parameters(), strict=True):
            noise = torch.randn(original.shape, generator=generator)
            parameter.copy_(original * (1 + 4e-6 * noise))
        if not torch.allclose(logprobs(moved, token_ids), expected, rtol=0, atol=1e-3):
            return False
    return True
