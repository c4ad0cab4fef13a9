"""From a checkpoint directory to a model ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from heedful.config import ModelConfig
from heedful.models.dsa import DSAForCausalLM
from heedful.nn import RotaryEmbedding
from heedful.weights import Checkpoint, read_state


def load_model(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> DSAForCausalLM:
    """Loads a checkpoint's weights.

    Tensors are read one at a time into their place; memory never holds the weights twice.

    Args:
        path: directory with safetensors files.
        config: the checkpoint's configuration.
        dtype: of weights and activations; norms, biases and the indexer's head weights stay float32.
        device: where the model goes.

    Returns:
        The model in evaluation mode, its parameters without gradients.

    Raises:
        ValueError: a file is damaged, or a tensor is missing, unknown, misshaped or not finite; the message names it.
        FileNotFoundError: a file is missing.
    """
    state = read_state(Checkpoint(path), config, dtype, device)
    # From here on the configuration's sizes are those of tensors that are there.
    with torch.device("meta"):
        model = DSAForCausalLM(config)
    # Not part of the checkpoint, so it must not stay on the meta device.
    model.model.rotary_emb = RotaryEmbedding(config.rope, config.qk_rope_head_dim).to(device)
    for name, tensor in state:
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if attribute in owner._buffers:
            setattr(owner, attribute, tensor)
        else:
            setattr(owner, attribute, torch.nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()
