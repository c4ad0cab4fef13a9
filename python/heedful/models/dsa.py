"""The DSA language model: `deepseek_v32` and `glm_moe_dsa` are one architecture with different settings.

Parameter names are those of the Hugging Face checkpoints, with routed experts packed.
"""

import torch
from torch import nn

from heedful.config import ModelConfig
from heedful.nn import MLA, MLP, Attention, LightningIndexer, MoE, RMSNorm, RotaryEmbedding, Router
from heedful.nn.rope import Rope


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Args:
        config: the model's configuration.
        layer: the layer's number, which decides its kinds of feed-forward block and of indexer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _feed_forward(config, layer)

    def forward(
        self, x: torch.Tensor, rope: Rope, attention: Attention, shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., D] -> x [..., D] and the selection this layer used."""
        attended, selection = self.self_attn(self.input_layernorm(x), rope, attention, self.layer, shared)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), selection


class DSAModel(nn.Module):
    """Embedding, layers and last norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.qk_rope_head_dim)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """token_ids [...] and positions [...] -> hidden states [..., D]."""
        x = self.embed_tokens(token_ids)
        rope = self.rotary_emb(positions)
        selection: torch.Tensor | None = None
        for layer in self.layers:
            x, selection = layer(x, rope, attention, selection)
        return self.norm(x)


class DSAForCausalLM(nn.Module):
    """The model with its language-model head.

    Args:
        config: the model's configuration.

    Example:
        >>> logits = model(token_ids, positions, FullSequenceAttention())  # doctest: +SKIP
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """token_ids [...] and positions [...] -> logits [..., vocab_size]."""
        return self.lm_head(self.model(token_ids, positions, attention))


def _attention(config: ModelConfig, layer: int) -> MLA:
    indexer = None
    if config.indexer_types[layer] == "full":
        indexer = LightningIndexer(
            hidden_size=config.hidden_size,
            q_lora_rank=config.q_lora_rank,
            n_heads=config.index_n_heads,
            head_dim=config.index_head_dim,
            rope_interleaved=config.indexer_rope_interleave,
        )
    return MLA(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        scale=config.attention_scale,
        indexer=indexer,
        bias=config.attention_bias,
    )


def _feed_forward(config: ModelConfig, layer: int) -> MLP | MoE:
    if config.mlp_layer_types[layer] == "dense":
        return MLP(config.hidden_size, config.intermediate_size)
    return MoE(
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        n_experts=config.n_routed_experts,
        n_shared_experts=config.n_shared_experts,
        router=Router(
            hidden_size=config.hidden_size,
            n_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        ),
    )
