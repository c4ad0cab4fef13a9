"""config.json: what real checkpoints write is read to what transformers makes of it, and nothing else is let in."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from heedful.config import MAX_CONFIG_BYTES, ModelConfig, RopeConfig
from heedful.nn import RotaryEmbedding

# The published files, key for key.
DEEPSEEK_V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
YARN = RopeConfig(10000.0, "yarn", 40.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0)

GLM_5: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "pretraining_tp": 1,
    "q_lora_rank": 2048,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.2.dev0",
    "use_cache": True,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
# GLM-5.2: the selection is made on 21 of the 78 layers.
SHARING = {"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None}
SHARED_TYPES = tuple("full" if i < 3 or i % 4 == 2 else "shared" for i in range(78))

SMALL: dict[str, Any] = {**oracle.COMMON, **oracle.CONFIGS["deepseek_v32"], "model_type": "deepseek_v32"}
del SMALL["attn_implementation"]


def read(values: dict[str, Any], **changes: Any) -> ModelConfig:
    """Reads a configuration and lets no warning pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_dict({**values, **changes})


def short(value: object) -> str:
    """A table row's name."""
    return str(value)[:60]


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    ("values", "theirs"),
    [
        pytest.param(DEEPSEEK_V32, transformers.DeepseekV32Config, id="deepseek_v32"),
        pytest.param(GLM_5, transformers.GlmMoeDsaConfig, id="glm_5"),
        pytest.param({**GLM_5, **SHARING}, transformers.GlmMoeDsaConfig, id="glm_5_sharing"),
        pytest.param({"model_type": "deepseek_v32"}, transformers.DeepseekV32Config, id="deepseek_v32_defaults"),
        pytest.param({"model_type": "glm_moe_dsa"}, transformers.GlmMoeDsaConfig, id="glm_moe_dsa_defaults"),
    ],
)
def test_every_value_is_the_one_transformers_reads(values: dict[str, Any], theirs: Any) -> None:
    ours, reference = read(values), theirs(**json.loads(json.dumps(values)))
    names = set(vars(ours)) & set(reference.to_dict())
    assert len(names) >= 30
    for name in names - {"dtype"}:
        value = getattr(ours, name)
        assert (list(value) if isinstance(value, tuple) else value) == getattr(reference, name), name
    ids = reference.eos_token_id
    assert ours.eos_token_ids == tuple(ids if isinstance(ids, list) else [ids])
    assert ours.rope.theta == reference.rope_parameters["rope_theta"]
    assert ours.rope.type == reference.rope_parameters["rope_type"]
    assert ours.rope.factor == reference.rope_parameters.get("factor", 1.0)


@pytest.mark.parametrize("name", sorted(oracle.CONFIGS))
def test_what_transformers_saves_reads_without_a_warning(name: str, tmp_path: Path) -> None:
    oracle.build(name).config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_file(tmp_path)
    assert (config.hidden_size, config.index_topk) == (64, 24)


def test_deepseek_v32_is_read() -> None:
    config = read(DEEPSEEK_V32)
    assert config.rope == YARN
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 58
    assert config.indexer_types == ("full",) * 61
    assert config.indexer_rope_interleave is False
    assert (config.dtype, config.weight_block_size) == ("bfloat16", (128, 128))
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (1,), None)
    assert config.num_nextn_predict_layers == 1


def test_glm_5_is_read() -> None:
    config = read(GLM_5)
    assert config.rope == RopeConfig(1e6)
    assert config.indexer_types == ("full",) * 78
    assert config.indexer_rope_interleave is True
    assert (config.dtype, config.weight_block_size) == ("bfloat16", None)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (154820, 154827, 154829), 154820)
    assert config.attention_scale == 256**-0.5


def test_later_glm_keys_that_change_nothing_here_pass_in_silence() -> None:
    later = {"head_dim": 192, "index_share_for_mtp_iteration": True, "moe_router_dtype": "float32"}
    assert read(GLM_5, **later) == read(GLM_5)


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param({"indexer_types": list(SHARED_TYPES)}, id="indexer_types"),
        pytest.param({"index_topk_pattern": "".join(t[0].upper() for t in SHARED_TYPES)}, id="letters"),
        pytest.param({"index_topk_pattern": list(SHARED_TYPES)}, id="pattern_of_names"),
        pytest.param(SHARING, id="freq_and_offset"),
        pytest.param({**SHARING, "index_topk_pattern": "F" * 78, "indexer_types": list(SHARED_TYPES)}, id="types_win"),
    ],
)
def test_each_spelling_of_shared_selections(spelling: dict[str, Any]) -> None:
    assert read(GLM_5, **spelling).indexer_types == SHARED_TYPES


ROPE_BASE = without(DEEPSEEK_V32, "rope_scaling", "rope_theta")
YARN_VALUES = without(DEEPSEEK_V32["rope_scaling"], "type")


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        pytest.param({}, RopeConfig(10000.0), id="nothing"),
        pytest.param({"rope_theta": 5e5}, RopeConfig(5e5), id="theta_alone"),
        pytest.param({"rope_scaling": None, "rope_theta": 5e5}, RopeConfig(5e5), id="null_scaling"),
        pytest.param({"rope_scaling": {**YARN_VALUES, "type": "yarn"}, "rope_theta": 10000}, YARN, id="old"),
        pytest.param({"rope_scaling": {**YARN_VALUES, "rope_type": "yarn"}}, YARN, id="old_without_theta"),
        pytest.param({"rope_parameters": {**YARN_VALUES, "rope_type": "yarn", "rope_theta": 1e4}}, YARN, id="new"),
        pytest.param({"rope_parameters": {**YARN_VALUES, "rope_type": "yarn"}, "rope_theta": 1e4}, YARN, id="mixed"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {**YARN_VALUES, "type": "yarn"}},
            YARN,
            id="both",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096}},
            RopeConfig(10000.0, "yarn", 40.0, 4096),
            id="factor_from_the_lengths",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.5, "truncate": False}},
            RopeConfig(10000.0, "yarn", 2.0, 163840, attention_factor=1.5, truncate=False),
            id="rarer_settings",
        ),
    ],
)
def test_each_spelling_of_rope(spelling: dict[str, Any], expected: RopeConfig) -> None:
    assert read(ROPE_BASE, **spelling).rope == expected


def test_attention_scale_carries_yarn_s_factor_twice() -> None:
    m = 0.1 * math.log(40) + 1
    assert read(DEEPSEEK_V32).attention_scale == pytest.approx(192**-0.5 * m * m, rel=1e-15)
    plain = {**DEEPSEEK_V32["rope_scaling"], "mscale_all_dim": 0}
    assert read(DEEPSEEK_V32, rope_scaling=plain).attention_scale == 192**-0.5


@pytest.mark.parametrize("name", sorted(oracle.CONFIGS))
def test_rope_frequencies_and_scale_are_transformers_own(name: str) -> None:
    model = oracle.build(name)
    config = ModelConfig.from_dict(model.config.to_dict())
    ours, theirs = RotaryEmbedding(config.rope, config.qk_rope_head_dim), model.model.rotary_emb
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert config.attention_scale == pytest.approx(model.model.layers[0].self_attn.scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "attribute", "expected"),
    [
        ({"num_experts": 16}, "n_routed_experts", 16),
        ({"num_local_experts": 16}, "n_routed_experts", 16),
        ({"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]}, "mlp_layer_types", ("sparse", "dense") * 2),
        ({"first_k_dense_replace": 0}, "mlp_layer_types", ("sparse",) * 4),
        ({"first_k_dense_replace": 99}, "mlp_layer_types", ("dense",) * 4),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"eos_token_id": [3, 5]}, "eos_token_ids", (3, 5)),
        ({"bos_token_id": None}, "bos_token_id", None),
        ({"dtype": None, "torch_dtype": None}, "dtype", "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size", (128, 128)),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}},
            "weight_block_size",
            (64, 32),
        ),
        ({"indexer_rope_interleave": True}, "indexer_rope_interleave", True),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers", 0),
    ],
    ids=short,
)
def test_rarer_keys_are_read(change: dict[str, Any], attribute: str, expected: object) -> None:
    assert getattr(read(SMALL, **change), attribute) == expected


def test_unknown_keys_are_named_in_one_short_warning() -> None:
    names = {f"unknown_{i:04}" + "x" * 1000: i for i in range(1000)}
    with pytest.warns(UserWarning, match=r"unknown keys are ignored: .*'unknown_0000.* and 991 more") as caught:
        ModelConfig.from_dict({**SMALL, **names, "escape\x1b[31m": 1})
    assert len(caught) == 1
    message = str(caught[0].message)
    assert len(message) < 600
    assert "\x1b" not in message


SIZES = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk"),
    *("intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    *("n_group", "topk_group", "max_position_embeddings"),
]
NO_SIZE = [0, -1, 2**31, 10**30, True, None, 8.0, math.nan, math.inf, "64", [64], {"size": 64}]
NUMBERS = ["rms_norm_eps", "routed_scaling_factor", "rope_theta"]
NO_NUMBER = [0, -1.5, math.nan, math.inf, -math.inf, 1e300, 10**400, 1e-300, True, "1", [1.0], {}]
BOOLEANS = ["norm_topk_prob", "tie_word_embeddings", "attention_bias", "indexer_rope_interleave"]
NO_BOOLEAN = [0, 1, "true", [], {}, 0.5]
FIXED = {
    "hidden_act": ["gelu", 1, ["silu"]],
    "scoring_func": ["softmax", None.__class__.__name__],
    "topk_method": ["greedy"],
    "moe_layer_freq": [2, True, [1]],
    "mlp_bias": [True, 0],
    "rope_interleave": [False, 1],
    "ep_size": [8],
    "partial_rotary_factor": [0.5, True],
}
COUNTS = ["bos_token_id", "pad_token_id", "first_k_dense_replace", "num_nextn_predict_layers"]
NO_COUNT = [-1, True, 1.0, "1", [1], 2**31]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in SIZES for value in NO_SIZE),
        *((key, value) for key in NUMBERS for value in NO_NUMBER),
        *((key, value) for key in BOOLEANS for value in NO_BOOLEAN),
        *((key, value) for key, values in FIXED.items() for value in values),
        *((key, value) for key in COUNTS for value in NO_COUNT),
    ],
    ids=short,
)
def test_a_bad_value_is_refused_by_its_key(key: str, value: object) -> None:
    values = without(SMALL, "rope_parameters")
    with pytest.raises(ValueError, match=rf"^config\.json: {key}: expected .+, got ") as caught:
        read(values, **{key: value})
    assert len(str(caught.value)) < 300


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {**changes, **{key: oracle.YARN[key] for key in oracle.YARN if key not in changes}}}


def fp8(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], **changes}}


NESTED: Any = None
for _ in range(500):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        # Values that are fine alone and wrong together.
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"qk_rope_head_dim": 34}, "index_head_dim"),
        ({"n_group": 3}, "n_routed_experts"),
        ({"n_group": 8, "topk_group": 4}, "n_routed_experts"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers"),
        ({"n_routed_experts": 65_540}, "n_routed_experts"),
        ({"num_experts": 7}, "n_routed_experts"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_local_experts": "8"}, "num_local_experts"),
        ({"eos_token_id": 199}, "eos_token_id"),
        ({"eos_token_id": [1, 10**6]}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"eos_token_id": [[1]]}, "eos_token_id"),
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"bos_token_id": 199}, "bos_token_id"),
        ({"pad_token_id": 199}, "pad_token_id"),
        # The kinds of layers.
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense"] * 3 + ["moe"]}, "mlp_layer_types"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types"),
        ({"mlp_layer_types": {"0": "dense"}}, "mlp_layer_types"),
        ({"mlp_layer_types": [NESTED] * 4}, "mlp_layer_types"),
        ({"indexer_types": ["full", "shared"] * 2}, "indexer_types"),
        ({"index_topk_pattern": "FFFS"}, "index_topk_pattern"),
        ({"index_topk_freq": 2}, "index_topk_freq"),
        # RoPE.
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": "yarn"}, "rope_parameters"),
        ({"rope_scaling": 40}, "rope_scaling"),
        (yarn(rope_type="longrope"), "rope_parameters.rope_type"),
        (yarn(rope_type=[]), "rope_parameters.rope_type"),
        (yarn(rope_theta=1.0), "rope_parameters.rope_theta"),
        (yarn(rope_theta=math.nan), "rope_parameters.rope_theta"),
        (yarn(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor"),
        (yarn(factor=0.5), "rope_parameters.factor"),
        (yarn(factor=math.inf), "rope_parameters.factor"),
        (yarn(factor="40"), "rope_parameters.factor"),
        (yarn(original_max_position_embeddings=0), "rope_parameters.original_max_position_embeddings"),
        (yarn(original_max_position_embeddings=True), "rope_parameters.original_max_position_embeddings"),
        (yarn(beta_fast=0), "rope_parameters.beta_fast"),
        (yarn(beta_fast=1e-320), "rope_parameters.beta_fast"),
        (yarn(beta_fast=1e308), "rope_parameters.beta_fast"),
        (yarn(beta_fast=1, beta_slow=2), "rope_parameters.beta_fast"),
        (yarn(beta_slow=-1), "rope_parameters.beta_slow"),
        (yarn(mscale=1e300), "rope_parameters.mscale"),
        (yarn(mscale=-1), "rope_parameters.mscale"),
        (yarn(mscale_all_dim=1e300), "rope_parameters.mscale_all_dim"),
        (yarn(attention_factor=0), "rope_parameters.attention_factor"),
        (yarn(truncate=1), "rope_parameters.truncate"),
        (yarn(long_factor=[1.0]), "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters"),
        ({"rope_parameters": None, "rope_theta": 0.5}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": 1}, "rope_theta"),
        # dtype and quantisation.
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": 16}, "dtype"),
        ({"dtype": NESTED}, "dtype"),
        ({"torch_dtype": "float64"}, "dtype"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"quantization_config": {}}, "quantization_config.quant_method"),
        (fp8(quant_method="compressed-tensors"), "quantization_config.quant_method"),
        (fp8(quant_method="awq"), "quantization_config.quant_method"),
        (fp8(fmt="e5m2"), "quantization_config.fmt"),
        (fp8(weight_block_size=None), "quantization_config.weight_block_size"),
        (fp8(weight_block_size=[128]), "quantization_config.weight_block_size"),
        (fp8(weight_block_size=[128, 0]), "quantization_config.weight_block_size"),
        (fp8(weight_block_size=[128.0, 128]), "quantization_config.weight_block_size"),
        # The family.
        ({"model_type": None}, "model_type"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": "deepseek_v3"}, "model_type"),
        ({"model_type": ["deepseek_v32"]}, "model_type"),
        ({"model_type": 32}, "model_type"),
    ],
    ids=short,
)
def test_a_setting_that_cannot_be_served_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {key}: ") as caught:
        read(SMALL, **change)
    assert len(str(caught.value)) < 300


GLM_SMALL = {**SMALL, "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"indexer_types": ["shared", "full", "full", "full"]}, "indexer_types"),
        ({"indexer_types": ["full"] * 3}, "indexer_types"),
        ({"indexer_types": ["full", "none", "full", "full"]}, "indexer_types"),
        ({"indexer_types": "full"}, "indexer_types"),
        ({"index_topk_pattern": "SFFF"}, "indexer_types"),
        ({"index_topk_pattern": "FSF"}, "index_topk_pattern"),
        ({"index_topk_pattern": "FSXF"}, "index_topk_pattern"),
        ({"index_topk_pattern": 1}, "index_topk_pattern"),
        ({"index_topk_freq": 0}, "index_topk_freq"),
        ({"index_topk_freq": True}, "index_topk_freq"),
        ({"index_topk_freq": 2.0}, "index_topk_freq"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": "3"}, "index_skip_topk_offset"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": -1}, "indexer_types"),
    ],
    ids=short,
)
def test_a_wrong_pattern_of_shared_selections_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {key}: "):
        read(GLM_SMALL, **change)


GOOD = json.dumps(SMALL).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[: len(GOOD) // 2], id="truncated"),
        pytest.param(GOOD + b"}", id="trailing"),
        pytest.param(b"[" * 100_000, id="deeply_nested_open"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deeply_nested"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deeply_nested_objects"),
        pytest.param(b"[1, 2]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"deepseek_v32"', id="string"),
        pytest.param(b"NaN", id="nan"),
        pytest.param(b"{}", id="no_keys"),
        pytest.param(b"\xff\xfe\x00", id="not_text"),
        pytest.param(GOOD.replace(b"199", b"9" * 5000), id="endless_integer"),
        pytest.param(GOOD.replace(b"199", b"1e999"), id="infinite_number"),
        pytest.param(b" " * (MAX_CONFIG_BYTES + 1), id="too_large"),
    ],
)
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^config\.json: "):
        ModelConfig.from_file(tmp_path)


def test_a_missing_file_and_a_directory_in_its_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        ModelConfig.from_file(tmp_path / "nothing" / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="expected a file"):
        ModelConfig.from_file(tmp_path)


def test_keys_that_are_no_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="keys that are strings"):
        ModelConfig.from_dict({**SMALL, 1: 2})  # type: ignore[dict-item]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.integers(),
    st.floats(),
    st.floats(0, 50),
    st.text(max_size=8),
    st.sampled_from(["yarn", "default", "full", "shared", "dense", "sparse", "FSFS", "fp8", "bfloat16", "glm_moe_dsa"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = [
    *(
        (key,)
        for key in {**DEEPSEEK_V32, **GLM_5, **SHARING, "indexer_types": 0, "mlp_layer_types": 0, "num_experts": 0}
    ),
    *(("rope_parameters", key) for key in (*oracle.YARN, "type", "truncate", "attention_factor", "other")),
    *(("rope_scaling", key) for key in DEEPSEEK_V32["rope_scaling"]),
    *(("quantization_config", key) for key in DEEPSEEK_V32["quantization_config"]),
]


def assert_loads_or_is_refused(content: bytes, directory: Path) -> None:
    (directory / "config.json").write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = ModelConfig.from_file(directory)
    except ValueError as error:
        message = str(error)
        assert message.startswith("config.json: ") and len(message) < 500, message  # noqa: PT018
        return
    assert len(config.mlp_layer_types) == len(config.indexer_types) == config.num_hidden_layers
    assert math.isfinite(config.attention_scale)
    assert config.attention_scale > 0
    embedding = RotaryEmbedding(config.rope, min(config.qk_rope_head_dim, 64))
    assert embedding.inv_freq.isfinite().all()
    assert math.isfinite(embedding.attention_factor)


@settings(max_examples=400, deadline=None)
@given(
    base=st.sampled_from([SMALL, GLM_SMALL]),
    changes=st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=4),
    removed=st.lists(st.sampled_from(sorted(SMALL)), max_size=2),
)
def test_any_change_of_values_loads_or_is_refused(
    base: dict[str, Any],
    changes: list[tuple[tuple[str, ...], Any]],
    removed: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    values = json.loads(json.dumps(without(base, *removed)))
    for path, value in changes:
        place = values
        for key in path[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[path[-1]] = value
    assert_loads_or_is_refused(json.dumps(values).encode(), tmp_path_factory.getbasetemp())


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=3)), max_size=4),
    end=st.none() | st.integers(0, len(GOOD)),
)
def test_any_change_of_bytes_loads_or_is_refused(
    edits: list[tuple[int, bytes]], end: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(GOOD)
    for at, replacement in edits:
        content[at : at + 1] = replacement
    assert_loads_or_is_refused(bytes(content[:end]), tmp_path_factory.getbasetemp())
