"""`config.json` of a DSA checkpoint, read and checked before anything is allocated.

One flat, frozen `ModelConfig` serves `deepseek_v32` and `glm_moe_dsa`; every spelling that checkpoints of the two
families use is resolved here, so nothing below asks again. Missing keys take the defaults of the transformers
classes. Standard library alone.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_CONFIG_BYTES = 4 * 2**20
"""A larger config.json is refused unread: parsed, JSON takes up to 30 times its size."""

_MAX_SIZE = 2**31 - 1  # no size of a model comes near; products of two fit in 64 bits
_MAX_LAYERS = 10_000
_MAX_EXPERTS = 65_536  # their tensors are listed one by one
_MAX_NUMBER = 1e12  # so that no product or logarithm of settings leaves float32's range
_MAX_NAMED = 10  # unknown keys named in one warning

_DEFAULTS: dict[str, dict[str, int | float]] = {
    "deepseek_v32": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
    },
    "glm_moe_dsa": {
        "vocab_size": 154880,
        "hidden_size": 6144,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "q_lora_rank": 2048,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 2048,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
    },
}

# Values that a key may only have; any other names a model that this one is not.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "mlp_bias": (False,),
    "rope_interleave": (True,),
    "ep_size": (1,),
    "partial_rotary_factor": (1,),
}

# Keys that change nothing here.
# fmt: off
_IGNORED = frozenset(
    (
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha",
        "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype", "head_dim", "id2label",
        "index_share_for_mtp_iteration", "initializer_range", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "label2id", "layer_types", "model_type", "moe_router_dtype",
        "num_key_value_heads", "output_attentions", "output_hidden_states", "output_router_logits",
        "pretraining_tp", "problem_type", "qk_head_dim", "return_dict", "router_aux_loss_coef", "sep_token_id",
        "seq_aux", "tie_encoder_decoder", "torch_dtype", "transformers_version", "use_bfloat16", "use_cache",
    )
)
# fmt: on


_YARN_KEYS = frozenset(
    (
        *("attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim"),
        *("original_max_position_embeddings", "truncate"),
    )
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Args:
        theta: base of the frequencies.
        type: "default" or "yarn"; what follows is read for "yarn" alone.
        factor: how far the context is stretched.
        original_max_position_embeddings: the context before stretching.
        beta_fast: rotations over the original context above which a frequency is kept.
        beta_slow: rotations below which it is stretched whole.
        mscale: numerator's coefficient of the attention factor.
        mscale_all_dim: denominator's, and that of the softmax scale.
        attention_factor: multiplies cos and sin; None derives it from the three before.
        truncate: round the ramp's ends to whole dimensions.
    """

    theta: float
    type: Literal["default", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A DSA model's sizes and settings, by the names of its config.json."""

    model_type: Literal["deepseek_v32", "glm_moe_dsa"]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    """Layers of the multi-token-prediction head, behind the model's own in the files and not run."""
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_layer_types: tuple[str, ...]
    """ "dense" or "sparse" (MoE) for each layer."""
    indexer_types: tuple[str, ...]
    """ "full" or "shared" for each layer; a shared one uses the selection of the nearest earlier full one."""
    indexer_rope_interleave: bool
    """RoPE layout of the indexer: interleaved pairs for GLM-5, half-split ones for DeepSeek-V3.2."""
    rope: RopeConfig
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    """Weights' dtype as the file states it, "bfloat16" when it does not."""
    weight_block_size: tuple[int, int] | None
    """Rows and columns that share a scale in an FP8 checkpoint; None for other checkpoints."""

    @property
    def attention_scale(self) -> float:
        """Factor on the attention logits: (nope + R)^-1/2, times m^2 when YaRN is on with mscale_all_dim."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        rope = self.rope
        if rope.type == "yarn" and rope.mscale_all_dim and rope.factor > 1:
            scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
        return scale

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Reads a config.json.

        Args:
            path: the file, or the checkpoint's directory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a configuration that can be served; the message names the key.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        if file.exists() and not file.is_file():
            raise ValueError(f"config.json: expected a file, {file} is none")
        size = file.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"config.json: expected at most {MAX_CONFIG_BYTES} bytes, got {size}")
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config.json: expected JSON: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Checks the contents of a config.json; errors as for `from_file`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"config.json: expected an object, got {type(values).__name__}")
        if not all(isinstance(key, str) for key in values):
            raise ValueError("config.json: expected keys that are strings")
        return _Reader(values).config()


class _Reader:
    """Reads keys once each, so that what is left over at the end is unknown."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.read: set[str] = set()
        model_type = values.get("model_type")
        if not isinstance(model_type, str) or model_type not in _DEFAULTS:
            raise _error("model_type", f"one of {', '.join(_DEFAULTS)}", model_type)
        self.model_type: Literal["deepseek_v32", "glm_moe_dsa"] = model_type  # type: ignore[assignment]  # just checked
        self.defaults = _DEFAULTS[model_type]

    def config(self) -> ModelConfig:
        for key, allowed in _FIXED.items():
            value = self.get(key)
            if value is not None and (value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool)):
                raise _error(key, " or ".join(repr(v) for v in allowed), value)
        sizes = {key: self.size(key, int(default)) for key, default in self.defaults.items() if key != "rms_norm_eps"}
        for alias in ("num_experts", "num_local_experts"):
            if self.get(alias) is not None:
                sizes["n_routed_experts"] = self.size(alias, 0)
        layers = sizes["num_hidden_layers"]
        for key, most in (("num_hidden_layers", _MAX_LAYERS), ("n_routed_experts", _MAX_EXPERTS)):
            if sizes[key] > most:
                raise _error(key, f"at most {most}", sizes[key])
        config = ModelConfig(
            model_type=self.model_type,
            **sizes,
            num_nextn_predict_layers=self.count("num_nextn_predict_layers", 1),
            routed_scaling_factor=self.number("routed_scaling_factor", 2.5),
            norm_topk_prob=self.boolean("norm_topk_prob", True),
            rms_norm_eps=self.number("rms_norm_eps", self.defaults["rms_norm_eps"]),
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            attention_bias=self.boolean("attention_bias", False),
            mlp_layer_types=self.mlp_layer_types(layers),
            indexer_types=self.indexer_types(layers),
            indexer_rope_interleave=self.boolean("indexer_rope_interleave", self.model_type == "glm_moe_dsa"),
            rope=self.rope(),
            bos_token_id=self.token_id("bos_token_id", 0),
            eos_token_ids=self.eos_token_ids(),
            pad_token_id=self.token_id("pad_token_id", None),
            dtype=self.dtype(),
            weight_block_size=self.weight_block_size(),
        )
        _check_consistent(config)
        if unknown := sorted(set(self.values) - self.read - _IGNORED):
            rest = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
            names = ", ".join(reprlib.repr(key) for key in unknown[:_MAX_NAMED])
            warnings.warn(f"config.json: unknown keys are ignored: {names}{rest}", stacklevel=4)
        return config

    def get(self, key: str) -> Any:
        self.read.add(key)
        return self.values.get(key)

    def size(self, key: str, default: int) -> int:
        value = self.get(key)
        if value is None and key not in self.values:
            return default
        return _positive_int(key, value)

    def count(self, key: str, default: int) -> int:
        value = self.get(key)
        return default if value is None else _count(key, value)

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        return default if value is None else _positive_number(key, value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _error(key, "true or false", value)
        return value

    def token_id(self, key: str, default: int | None) -> int | None:
        value = self.get(key)
        if value is None:
            return default if key not in self.values else None
        return _count(key, value)

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.get("eos_token_id")
        if value is None:
            return () if "eos_token_id" in self.values else (1,)
        values = value if isinstance(value, list) else [value]
        return tuple(_count("eos_token_id", v) for v in values)

    def mlp_layer_types(self, layers: int) -> tuple[str, ...]:
        dense, types = self.count("first_k_dense_replace", 3), self.get("mlp_layer_types")
        if types is not None:
            return _layer_types("mlp_layer_types", types, layers, ("dense", "sparse"))
        return tuple("dense" if layer < dense else "sparse" for layer in range(layers))

    def indexer_types(self, layers: int) -> tuple[str, ...]:
        types, pattern = self.get("indexer_types"), self.get("index_topk_pattern")
        freq, offset = self.get("index_topk_freq"), self.get("index_skip_topk_offset")
        if self.model_type == "deepseek_v32":
            every = "an indexer on every layer of a deepseek_v32 model"
            if types is not None and "shared" in _layer_types("indexer_types", types, layers, ("full", "shared")):
                raise _error("indexer_types", every, types)
            if pattern is not None and pattern not in ("F" * layers, ["full"] * layers):
                raise _error("index_topk_pattern", every, pattern)
            if freq is not None and freq != 1:
                raise _error("index_topk_freq", every, freq)
            return ("full",) * layers
        if types is not None:
            return _layer_types("indexer_types", types, layers, ("full", "shared"))
        if pattern is not None:
            if isinstance(pattern, str):
                names = {"F": "full", "S": "shared"}
                if unknown := set(pattern) - set(names):
                    raise _error("index_topk_pattern", "a string of F and S", sorted(unknown))
                pattern = [names[letter] for letter in pattern]
            return _layer_types("index_topk_pattern", pattern, layers, ("full", "shared"))
        freq = 1 if freq is None else _positive_int("index_topk_freq", freq)
        offset = 2 if offset is None else offset
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise _error("index_skip_topk_offset", "an integer", offset)
        return tuple("full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(layers))

    def rope(self) -> RopeConfig:
        """`rope_parameters` of newer checkpoints, or `rope_scaling` beside `rope_theta` of older ones.

        Where both are there, `rope_scaling` counts, as in transformers.
        """
        new, old, theta = self.get("rope_parameters"), self.get("rope_scaling"), self.get("rope_theta")
        for key, values in (("rope_parameters", new), ("rope_scaling", old)):
            if values is not None and not isinstance(values, Mapping):
                raise _error(key, "an object", values)
        key, values = ("rope_scaling", old) if old else ("rope_parameters", new or {})
        rope = {name: value for name, value in values.items() if value is not None}
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        theta_key = f"{key}.rope_theta" if "rope_theta" in rope else "rope_theta"
        theta = _positive_number(theta_key, rope.pop("rope_theta", 10000.0 if theta is None else theta))
        if theta <= 1:
            raise _error(theta_key, "a number above 1", theta)
        partial = rope.pop("partial_rotary_factor", 1.0)
        if partial != 1 or isinstance(partial, bool):
            raise _error(f"{key}.partial_rotary_factor", "1", partial)
        if rope_type not in ("default", "yarn"):
            raise _error(f"{key}.rope_type", "default or yarn", rope_type)
        if unknown := sorted(set(rope) - _YARN_KEYS):
            raise ValueError(f"config.json: {key}: unknown setting {reprlib.repr(unknown[0])}")
        if rope_type == "default":
            return RopeConfig(theta)
        truncate = rope.pop("truncate", True)
        if not isinstance(truncate, bool):
            raise _error(f"{key}.truncate", "true or false", truncate)
        context = self.size("max_position_embeddings", int(self.defaults["max_position_embeddings"]))
        original = _positive_int(
            f"{key}.original_max_position_embeddings", rope.pop("original_max_position_embeddings", context)
        )
        factor = _positive_number(f"{key}.factor", rope.pop("factor", context / original))
        if factor < 1:
            raise _error(f"{key}.factor", "at least 1", factor)
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
        numbers = {name: _number(f"{key}.{name}", rope.pop(name)) for name in names if name in rope}
        for name, value in numbers.items():
            if value != 0 or not name.startswith("mscale"):
                _positive_number(f"{key}.{name}", value)
        fast, slow = numbers.get("beta_fast", RopeConfig.beta_fast), numbers.get("beta_slow", RopeConfig.beta_slow)
        if fast < slow:
            raise _error(f"{key}.beta_fast", f"at least beta_slow {slow}", fast)
        return RopeConfig(
            theta=theta,
            type="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            truncate=truncate,
            **numbers,
        )

    def dtype(self) -> str:
        value = self.get("dtype")
        value = self.get("torch_dtype") if value is None else value
        if value is None:
            return "bfloat16"
        name = value.removeprefix("torch.") if isinstance(value, str) else None
        if name not in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
            raise _error("dtype", "float32, bfloat16, float16 or float8_e4m3fn", value)
        return name

    def weight_block_size(self) -> tuple[int, int] | None:
        values = self.get("quantization_config")
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise _error("quantization_config", "an object", values)
        if values.get("quant_method") != "fp8":
            raise _error("quantization_config.quant_method", "fp8", values.get("quant_method"))
        if values.get("fmt", "e4m3") != "e4m3":
            raise _error("quantization_config.fmt", "e4m3", values["fmt"])
        size = values.get("weight_block_size", [128, 128])
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise _error("quantization_config.weight_block_size", "two sizes", size)
        rows, columns = (_positive_int("quantization_config.weight_block_size", part) for part in size)
        return rows, columns


def _check_consistent(config: ModelConfig) -> None:
    """Values that are fine alone and wrong together."""
    if config.qk_rope_head_dim % 2:
        raise _error("qk_rope_head_dim", "an even number", config.qk_rope_head_dim)
    if config.qk_rope_head_dim > config.index_head_dim:
        raise _error("index_head_dim", f"at least qk_rope_head_dim {config.qk_rope_head_dim}", config.index_head_dim)
    if config.indexer_types[0] != "full":
        raise _error("indexer_types", "'full' for layer 0, which has no earlier selection to share", "shared")
    for key, ids in (
        ("eos_token_id", config.eos_token_ids),
        ("bos_token_id", (config.bos_token_id,)),
        ("pad_token_id", (config.pad_token_id,)),
    ):
        if above := [token_id for token_id in ids if token_id is not None and token_id >= config.vocab_size]:
            raise _error(key, f"an id below vocab_size {config.vocab_size}", above[0])
    if "sparse" not in config.mlp_layer_types:
        return
    if config.n_routed_experts % config.n_group:
        raise _error("n_routed_experts", f"a multiple of n_group {config.n_group}", config.n_routed_experts)
    if config.topk_group < config.n_group and config.n_routed_experts < 2 * config.n_group:
        raise _error("n_routed_experts", "at least 2 a group, whose two best rank the groups", config.n_routed_experts)
    if config.topk_group > config.n_group:
        raise _error("topk_group", f"at most n_group {config.n_group}", config.topk_group)
    reachable = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise _error(
            "num_experts_per_tok", f"at most the {reachable} experts of topk_group groups", config.num_experts_per_tok
        )


def _layer_types(key: str, value: object, layers: int, names: tuple[str, str]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or any(name not in names for name in value):
        raise _error(key, f"a list of {' and '.join(names)}", value)
    if len(value) != layers:
        raise _error(key, f"{layers} entries, one a layer", f"{len(value)} entries")
    return tuple(value)


def _positive_int(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_SIZE:
        raise _error(key, f"a positive integer of at most {_MAX_SIZE}", value)
    return value


def _count(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_SIZE:
        raise _error(key, f"an integer from 0 to {_MAX_SIZE}", value)
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise _error(key, "a finite number", value)
    return float(value)


def _positive_number(key: str, value: object) -> float:
    number = _number(key, value)
    if not 1 / _MAX_NUMBER <= number <= _MAX_NUMBER:
        raise _error(key, f"a number from {1 / _MAX_NUMBER:g} to {_MAX_NUMBER:g}", value)
    return number


def _error(key: str, expected: str, got: object) -> ValueError:
    # Values may be nested or long without end: reprlib shows their beginning.
    return ValueError(f"config.json: {key}: expected {expected}, got {reprlib.repr(got)}")
