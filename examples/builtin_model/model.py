"""The built-in model's shape, its first weights, and its checkpoint files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from heedful.config import ModelConfig
from heedful.models import DSAForCausalLM

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 128,
    "hidden_act": "silu",
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 10240,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONTEXT: int = CONFIG["max_position_embeddings"]

# Stay float32 in the checkpoint: small, and the router's and the indexer's decisions hang on them.
_FLOAT32 = ("e_score_correction_bias", "indexer.weights_proj.weight")


def new_model(seed: int = 0) -> DSAForCausalLM:
    """The model with its first weights: normal of 0.02; output projections smaller, as their sum grows with depth."""
    torch.manual_seed(seed)
    config = ModelConfig.from_dict(CONFIG)
    model = DSAForCausalLM(config)
    output_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            nn.init.normal_(parameter, std=output_std if scaled else 0.02)
    return model


def save(model: DSAForCausalLM, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16)."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": True, "temperature": 0.7}
    for name, content in (("config.json", CONFIG), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    state = {
        name: (tensor if name.endswith(_FLOAT32) else tensor.bfloat16()).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone
