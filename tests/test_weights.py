"""Checkpoint files: every form they come in gives the same model, and a damaged or hostile one is named and refused."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import oracle
from heedful import LLM, SamplingParams
from heedful.config import ModelConfig
from heedful.models import DSAForCausalLM, load_model
from heedful.nn import FullSequenceAttention
from heedful.safetensors_header import MAX_HEADER_BYTES, read_header
from heedful.weights import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    WEIGHTS_FILE,
    Checkpoint,
    dequantize_blocks,
    keep_float32,
    tensor_shapes,
)

State = dict[str, torch.Tensor]

TINY: dict[str, Any] = {
    **{key: oracle.COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "rope_parameters")},
    "model_type": "glm_moe_dsa",
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "indexer_types": ["full", "shared"],
    "max_position_embeddings": 512,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 6]}}
CPU = torch.device("cpu")
LAYER = "model.layers.1."


def state_of(config: ModelConfig, seed: int = 0) -> State:
    """Random weights, experts packed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}


def unpacked(state: State) -> State:
    """The same weights with a tensor for each expert's projection, as published files have them."""
    result: State = {}
    for name, tensor in state.items():
        prefix, found, kind = name.rpartition(".experts.")
        if not found or kind not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down_proj": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for projection, part in parts.items():
                result[f"{prefix}.experts.{number}.{projection}.weight"] = part.contiguous()
    return result


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and any(part in name for part in ("_proj", "wq_b", "wk")) and "weights_proj" not in name


def quantized(state: State, block: tuple[int, int], seed: int = 1) -> State:
    """Projections in FP8 with random block scales, as published FP8 files have them."""
    generator = torch.Generator().manual_seed(seed)
    result: State = {}
    for name, tensor in state.items():
        if not is_quantized(name, tensor):
            result[name] = tensor
            continue
        blocks = [-(-size // step) for size, step in zip(tensor.shape, block, strict=True)]
        result[name] = tensor.to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = torch.rand(blocks, generator=generator) + 0.1
    return result


def dequantized(state: State, block: tuple[int, int]) -> State:
    """What an FP8 state means: every value times the scale of its block, in float64."""
    result: State = {}
    for name, tensor in state.items():
        if f"{name}_scale_inv" not in state:
            if not name.endswith("_scale_inv"):
                result[name] = tensor
            continue
        scale = torch.kron(state[f"{name}_scale_inv"].double(), torch.ones(block, dtype=torch.float64))
        result[name] = tensor.double() * scale[: tensor.shape[0], : tensor.shape[1]]
    return result


def write(directory: Path, config: dict[str, Any], state: State, shards: int = 0) -> Path:
    """A checkpoint directory; with shards, a file for each and an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(state, directory / WEIGHTS_FILE)
        return directory
    weight_map = {}
    for number in range(shards):
        part = dict(list(state.items())[number::shards])
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> DSAForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(directory, ModelConfig.from_file(directory), dtype, CPU)


def assert_holds(model: DSAForCausalLM, expected: State, dtype: torch.dtype = torch.float32) -> None:
    actual = model.state_dict()
    assert set(actual) - {"lm_head.weight"} == set(expected) - {"lm_head.weight"}
    for name, tensor in expected.items():
        wanted = tensor.to(torch.float32 if keep_float32(name) else dtype)
        torch.testing.assert_close(actual[name], wanted, rtol=1e-6, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(TINY)


@pytest.fixture(scope="module")
def state(config: ModelConfig) -> State:
    return state_of(config)


# What checkpoints look like.


@pytest.mark.parametrize("shards", [0, 1, 3], ids=["single_file", "one_shard", "three_shards"])
@pytest.mark.parametrize("form", [dict, unpacked], ids=["packed", "per_expert"])
def test_every_layout_of_files_gives_the_same_model(form: Any, shards: int, state: State, tmp_path: Path) -> None:
    assert_holds(load(write(tmp_path, TINY, form(state), shards)), state)


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_dtype_is_converted_once(
    stored: torch.dtype, wanted: torch.dtype, state: State, tmp_path: Path
) -> None:
    written = {name: tensor.to(stored) for name, tensor in unpacked(state).items()}
    model = load(write(tmp_path, TINY, written), wanted)
    assert_holds(model, {name: tensor.to(stored) for name, tensor in state.items()}, wanted)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if keep_float32(name) else wanted), name


def test_what_must_stay_float32_is_what_the_model_computes_in_float32(config: ModelConfig) -> None:
    kept = {name.removeprefix("model.layers.1.") for name in tensor_shapes(config) if keep_float32(name)}
    kept = {name for name in kept if not name.startswith("model.layers")}
    assert kept == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.kv_a_layernorm.weight",
        "mlp.gate.e_score_correction_bias",
        "model.norm.weight",
    }
    assert keep_float32("model.layers.0.self_attn.indexer.weights_proj.weight")
    assert keep_float32("model.layers.0.self_attn.indexer.k_norm.bias")


@pytest.mark.parametrize("shards", [0, 2], ids=["single_file", "two_shards"])
def test_fp8_blocks_are_dequantised(shards: int, state: State, tmp_path: Path) -> None:
    """Scales may lie in another shard than their weights."""
    written = quantized(unpacked(state), (8, 6))
    assert sum(name.endswith("_scale_inv") for name in written) == 30
    model = load(write(tmp_path, {**TINY, **FP8}, written, shards))
    assert unpacked(model.state_dict()).keys() == unpacked(state).keys()
    for name, expected in dequantized(written, (8, 6)).items():
        torch.testing.assert_close(unpacked(model.state_dict())[name], expected.float(), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.none() | st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=st.integers(0, 99),
)
def test_dequantised_blocks_equal_a_float64_product(
    rows: int, columns: int, block: tuple[int, int] | None, seed: int
) -> None:
    height, width = block or (128, 128)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // height), -(-columns // width), generator=generator)
    spread = np.kron(scale.double().numpy(), np.ones((height, width)))[:rows, :columns]
    expected = weight.double().numpy() * spread
    np.testing.assert_allclose(dequantize_blocks(weight, scale, block).double().numpy(), expected, rtol=1e-7)


def test_blocks_of_128_are_assumed_where_the_configuration_says_nothing(state: State, tmp_path: Path) -> None:
    written = quantized(unpacked(state), (128, 128))
    model = load(write(tmp_path, TINY, written))
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(model.state_dict()[name].double(), dequantized(written, (128, 128))[name])


def test_what_the_model_does_not_use_is_skipped(state: State, tmp_path: Path) -> None:
    """The MTP layer behind the last, its own embedding and head, and RoPE's buffers."""
    extra = {
        "model.layers.2.eh_proj.weight": torch.randn(4, 8).to(torch.float8_e4m3fn),
        "model.layers.2.eh_proj.weight_scale_inv": torch.ones(1, 1),
        "model.layers.2.embed_tokens.weight": torch.full((2, 2), torch.nan),
        "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(3, dtype=torch.int64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    assert_holds(load(write(tmp_path / "one", TINY, {**state, **extra})), state)
    two = {**extra, "model.layers.3.enorm.weight": torch.ones(20)}
    assert_holds(load(write(tmp_path / "two", {**TINY, "num_nextn_predict_layers": 2}, {**state, **two})), state)
    with pytest.raises(ValueError, match=r"unknown tensors: 'model\.layers\.3\.enorm\.weight'"):
        load(write(tmp_path / "one", TINY, {**state, **two}))


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings_are_one_tensor(head_in_file: bool, state: State, tmp_path: Path) -> None:
    tied = {name: t for name, t in state.items() if head_in_file or name != "lm_head.weight"}
    model = load(write(tmp_path, {**TINY, "tie_word_embeddings": True}, tied))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_holds(model, {name: t for name, t in state.items() if name != "lm_head.weight"})


def test_attention_biases_are_read(tmp_path: Path) -> None:
    values = {**TINY, "attention_bias": True}
    biased = state_of(ModelConfig.from_dict(values))
    assert sum(name.endswith("_proj.bias") or name.endswith("mqa.bias") for name in biased) == 6
    assert_holds(load(write(tmp_path, values, biased)), biased)


def test_shared_layers_have_no_indexer(config: ModelConfig, state: State, tmp_path: Path) -> None:
    assert not [name for name in tensor_shapes(config) if name.startswith(f"{LAYER}self_attn.indexer")]
    model = load(write(tmp_path, TINY, state))
    assert [layer.self_attn.indexer is None for layer in model.model.layers] == [False, True]
    stray = {f"{LAYER}self_attn.indexer.wk.weight": torch.zeros(8, 20)}
    with pytest.raises(ValueError, match=r"unknown tensors: 'model\.layers\.1\.self_attn\.indexer\.wk\.weight'"):
        load(write(tmp_path, TINY, {**state, **stray}))


def test_names_and_shapes_are_those_of_the_model(config: ModelConfig) -> None:
    for values in (config, dataclasses.replace(config, attention_bias=True)):
        actual = {name: tuple(tensor.shape) for name, tensor in DSAForCausalLM(values).state_dict().items()}
        assert tensor_shapes(values) == actual


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_an_fp8_checkpoint_of_shards_gives_the_logits_of_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    theirs = oracle.save(name, tmp_path)
    block = (24, 20)
    written = quantized(unpacked(load_file(tmp_path / WEIGHTS_FILE)), block)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    mtp = {"model.layers.4.enorm.weight": torch.ones(64)}
    ours = load(write(tmp_path / "fp8", values, {**written, **mtp}, shards=3))

    exact = {key: tensor.float() for key, tensor in dequantized(written, block).items()}
    write(tmp_path / "exact", {**values, "quantization_config": None}, exact)
    reference = type(theirs).from_pretrained(tmp_path / "exact", attn_implementation="eager", dtype=torch.float32)
    ids = torch.randint(0, 199, (1, 60), generator=torch.Generator().manual_seed(0))
    logits = ours(ids, torch.arange(60)[None], FullSequenceAttention("sparse", index_topk=24))
    torch.testing.assert_close(logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, theirs(ids).logits, rtol=0.05, atol=0.05)


# What is wrong with a set of tensors.


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Fails when Python takes more than `size` bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def added(**tensors: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def poked(name: str, value: float) -> Callable[[State], State]:
    def poke(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.flatten()[-1:].copy_(torch.tensor(value))
        return tensor

    return changed(name, poke)


O_PROJ, SCALE = f"{LAYER}self_attn.o_proj.weight", f"{LAYER}self_attn.o_proj.weight_scale_inv"
EXPERT = f"{LAYER}mlp.experts.2.up_proj.weight"

WRONG_TENSORS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without(O_PROJ), rf"^missing tensors: '{O_PROJ}'$"),
    "missing_several": (
        without("model.norm.weight", "lm_head.weight"),
        r"^missing tensors: 'model\.norm\.weight', 'lm_head\.weight'$",
    ),
    "missing_bias": (without(f"{LAYER}mlp.gate.e_score_correction_bias"), r"^missing tensors: .*correction_bias'$"),
    "missing_expert": (without(EXPERT), rf"^missing tensors: '{EXPERT}'$"),
    "missing_indexer": (without("model.layers.0.self_attn.indexer.k_norm.bias"), r"k_norm\.bias"),
    "missing_all": (lambda state: {"x": torch.ones(1)}, r"^missing tensors: 'model\.embed_.* and \d+ more$"),
    "extra": (added(model__extra=torch.ones(3)), r"^unknown tensors: 'model\.extra'$"),
    "extra_layer": (added(model__layers__7__mlp__gate__weight=torch.ones(3)), r"^unknown tensors: 'model\.layers\.7\."),
    "extra_bias": (
        added(model__layers__0__self_attn__o_proj__bias=torch.ones(20)),
        r"^unknown tensors: .*o_proj\.bias",
    ),
    "extra_expert": (added(model__layers__1__mlp__experts__4__up_proj__weight=torch.ones(6, 20)), r"experts\.4\.up"),
    "extra_packed": (added(model__layers__1__mlp__experts__down_proj=torch.ones(4, 20, 6)), r"experts\.0\.down_proj"),
    "endless_layer_number": (
        lambda s: {**s, "model.layers." + "9" * 5000 + ".x": torch.ones(1)},
        r"^unknown tensors: ",
    ),
    "misshaped": (
        changed(O_PROJ, lambda t: t.T.contiguous()),
        rf"^model\.safetensors: tensor '{O_PROJ}': expected shape \[20, 10\], got \[10, 20\]$",
    ),
    "misshaped_rank": (
        changed("model.norm.weight", lambda t: t[None]),
        r"'model\.norm\.weight': expected shape \[20\]",
    ),
    "misshaped_expert": (changed(EXPERT, lambda t: t[:-1].contiguous()), rf"'{EXPERT}': expected shape \[6, 20\]"),
    "misshaped_empty": (changed(EXPERT, lambda t: t[:0]), rf"'{EXPERT}': expected shape \[6, 20\], got \[0, 20\]"),
    "integers": (changed(O_PROJ, lambda t: t.to(torch.int32)), rf"'{O_PROJ}': expected dtype F32, .*, got 'I32'"),
    "float64": (changed(O_PROJ, lambda t: t.double()), rf"'{O_PROJ}': expected dtype F32, .*, got 'F64'"),
    "e5m2": (changed(O_PROJ, lambda t: t.to(torch.float8_e5m2)), rf"'{O_PROJ}': expected dtype F32, .*, got 'F8_E5M2'"),
    "fp8_norm": (
        changed("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        r"'model\.norm\.weight': expected dtype F32, F16, BF16, got 'F8_E4M3'",
    ),
    "scale_without_fp8": (lambda s: {**s, SCALE: torch.ones(3, 2)}, rf"^unknown tensors: '{SCALE}'$"),
    "nan": (poked(O_PROJ, float("nan")), rf"^model\.safetensors: tensor '{O_PROJ}': expected finite numbers"),
    "infinity": (
        poked("lm_head.weight", float("-inf")),
        r"^model\.safetensors: tensor 'lm_head\.weight': expected finite",
    ),
    "nan_expert": (poked(EXPERT, float("nan")), rf"'{EXPERT}': expected finite numbers"),
    "nan_bias": (poked(f"{LAYER}mlp.gate.e_score_correction_bias", float("nan")), r"correction_bias': expected finite"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_wrong_set_of_tensors_is_refused_by_name(
    change: Callable[[State], State], message: str, state: State, tmp_path: Path
) -> None:
    write(tmp_path, TINY, change(unpacked(state)))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 1000


WRONG_SCALES: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without(SCALE), rf"^missing tensors: '{SCALE}', the scale of an FP8 tensor$"),
    "misshaped": (
        changed(SCALE, lambda t: t.T.contiguous()),
        rf"^model\.safetensors: tensor '{SCALE}': expected shape \[3, 2\], got \[2, 3\]$",
    ),
    "one_for_all": (changed(SCALE, lambda t: t[:1, :1].clone()), rf"'{SCALE}': expected shape \[3, 2\], got \[1, 1\]"),
    "one_a_row": (changed(SCALE, lambda t: torch.ones(20)), rf"'{SCALE}': expected shape \[3, 2\], got \[20\]"),
    "integers": (changed(SCALE, lambda t: t.to(torch.int32)), rf"'{SCALE}': expected dtype F32, .*, got 'I32'"),
    "fp8": (changed(SCALE, lambda t: t.to(torch.float8_e4m3fn)), rf"'{SCALE}': expected dtype F32, .*, got 'F8_E4M3'"),
    "nan": (poked(SCALE, float("nan")), rf"tensor '{SCALE}': expected finite numbers"),
    "infinity": (poked(SCALE, float("inf")), rf"tensor '{SCALE}': expected finite numbers"),
    "overflow": (
        lambda s: {**s, O_PROJ: torch.full((20, 10), 448.0).to(torch.float8_e4m3fn), SCALE: torch.full((3, 2), 3e38)},
        rf"tensor '{O_PROJ}': expected finite numbers",
    ),
    "nan_code": (
        changed(O_PROJ, lambda t: torch.full(t.shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        rf"tensor '{O_PROJ}': expected finite numbers",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_a_wrong_fp8_scale_is_refused_by_name(
    change: Callable[[State], State], message: str, state: State, tmp_path: Path
) -> None:
    write(tmp_path, {**TINY, **FP8}, change(quantized(unpacked(state), (8, 6))))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_number_that_the_wanted_dtype_cannot_hold_is_refused(state: State, tmp_path: Path) -> None:
    write(tmp_path, TINY, poked(O_PROJ, 3.4e38)(state))
    load(tmp_path)
    with pytest.raises(ValueError, match=rf"'{O_PROJ}': expected finite numbers in torch\.bfloat16"):
        load(tmp_path, torch.bfloat16)


def test_names_from_a_file_are_shown_without_control_characters(state: State, tmp_path: Path) -> None:
    write(tmp_path, TINY, {**state, "\x1b[31mred\n" + "x" * 5000: torch.ones(1)})
    with pytest.raises(ValueError, match=r"unknown tensors: '\\x1b\[31mred\\n") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 300


def test_sizes_are_compared_with_the_files_before_anything_is_made(state: State, tmp_path: Path) -> None:
    """A configuration may claim a model of any size; what is in the files is small."""
    write(tmp_path, {**TINY, "qk_rope_head_dim": 2**31 - 2, "index_head_dim": 2**31 - 1}, state)
    with at_most(2**20), pytest.raises(ValueError, match=r"q_b_proj\.weight': expected shape"):
        load(tmp_path)
    huge = {**TINY, "num_hidden_layers": 10_000, "indexer_types": None, "n_routed_experts": 65_536}
    write(tmp_path, huge, state)
    with pytest.raises(ValueError, match=r"^missing tensors: "):
        load(tmp_path)


# What is wrong with an index.


def shards_of(state: State, directory: Path) -> dict[str, Any]:
    write(directory, TINY, state, shards=2)
    return json.loads((directory / INDEX_FILE).read_text())


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBED = "model.embed_tokens.weight"  # in the first shard

WRONG_INDEXES: dict[str, tuple[Any, str]] = {
    "missing_shard": ({EMBED: "model-00003-of-00002.safetensors"}, rf"'{EMBED}': no file model-00003"),
    "parent": ({EMBED: "../x.safetensors"}, rf"'{EMBED}': expected a safetensors file name, got '\.\./x\.safetensors'"),
    "absolute": ({EMBED: "/x.safetensors"}, rf"'{EMBED}': expected a safetensors file name"),
    "folder": ({EMBED: "sub/x.safetensors"}, rf"'{EMBED}': expected a safetensors file name"),
    "backslash": ({EMBED: "..\\x.safetensors"}, rf"'{EMBED}': expected a safetensors file name"),
    "nul": ({EMBED: "x\0.safetensors"}, rf"'{EMBED}': expected a safetensors file name"),
    "line_end": ({EMBED: FIRST + "\n"}, rf"'{EMBED}': expected a safetensors file name"),
    "pickle": ({EMBED: "pytorch_model.bin"}, rf"'{EMBED}': expected a safetensors file name"),
    "number": ({EMBED: 1}, rf"'{EMBED}': expected a safetensors file name, got 1"),
    "nested": ({EMBED: [FIRST]}, rf"'{EMBED}': expected a safetensors file name"),
    "wrong_shard": ({EMBED: SECOND}, rf"tensor '{EMBED}' is not in {SECOND}"),
    "unknown_tensor": ({"model.none.weight": FIRST}, rf"tensor 'model\.none\.weight' is not in {FIRST}"),
    "stray_tensor": ({EMBED: None}, rf"^{FIRST}: tensors the index does not put there: '{EMBED}'$"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_INDEXES.values(), ids=WRONG_INDEXES)
def test_a_wrong_index_is_refused(change: dict[str, Any], message: str, state: State, tmp_path: Path) -> None:
    index = shards_of(state, tmp_path)
    index["weight_map"].update(change)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="truncated"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no_map"),
        pytest.param(b'{"weight_map": {}}', id="empty_map"),
        pytest.param(b'{"weight_map": ["a"]}', id="map_is_a_list"),
        pytest.param(b'{"weight_map": null}', id="map_is_null"),
        pytest.param(b"[" * 100_000, id="deeply_nested"),
        pytest.param(b"\xff\xff", id="not_text"),
    ],
)
def test_a_damaged_index_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{INDEX_FILE}: "):
        Checkpoint(tmp_path)


def test_a_huge_index_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(ValueError, match=f"at most {MAX_INDEX_BYTES} bytes"):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"neither {WEIGHTS_FILE} nor {INDEX_FILE}"):
        Checkpoint(tmp_path)
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(FileNotFoundError, match=f"neither {WEIGHTS_FILE} nor {INDEX_FILE}"):
        Checkpoint(tmp_path)


# What is wrong with a header.

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def raw(header: Any, data: bytes = bytes(32), length: int | None = None) -> bytes:
    """A safetensors file, byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = raw(HEADER)


def entry(**changes: Any) -> bytes:
    """The good file with a changed entry for tensor b."""
    changed_entry = {key: value for key, value in {**HEADER["b"], **changes}.items() if value != "absent"}
    return raw({**HEADER, "b": changed_entry})


def test_a_good_header_tells_where_tensors_are(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(GOOD)
    header = read_header(file)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in header.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    file.write_bytes(raw({"empty": {"dtype": "F64", "shape": [0, 2**40], "data_offsets": [0, 0]}}, b""))
    assert read_header(file)["empty"].nbytes == 0


B = r"tensor 'b': "
WRONG_HEADERS: dict[str, tuple[bytes, str]] = {
    **{f"cut_to_{n}": (GOOD[:n], "expected 8 bytes of header length") for n in (0, 1, 7)},
    **{f"cut_to_{n}": (GOOD[:n], "header length: expected at most") for n in (8, 20, len(GOOD) - 33)},
    "cut_by_1": (GOOD[:-1], rf"{B}data_offsets: expected at most 31, got \[24, 32\]"),
    "cut_by_all_data": (GOOD[:-32], "tensor 'a': data_offsets: expected at most 0"),
    "one_byte_more": (GOOD + b"\0", "expected 32 bytes of data, got 33"),
    "length_past_the_end": (raw(HEADER, length=10_000), "header length: expected at most"),
    "length_2_63": (raw(HEADER, length=2**63), f"header length: .*, got {2**63}"),
    "length_2_64": (raw(HEADER, length=2**64 - 1), f"header length: .*, got {2**64 - 1}"),
    "length_0": (raw(HEADER, length=0), "header: expected JSON"),
    "length_short": (raw(HEADER, length=40), "header: expected JSON"),
    "not_json": (raw(b"this is not JSON"), "header: expected JSON"),
    "not_utf_8": (raw(b'{"\xff": 1}'), "header: expected JSON"),
    "utf_16": (raw(json.dumps(HEADER).encode("utf-16")), "header: expected JSON"),
    "list": (raw([HEADER]), "header: expected an object, got list"),
    "number": (raw(7), "header: expected an object, got int"),
    "null": (raw(None), "header: expected an object, got NoneType"),
    "nested": (raw(b"[" * 100_000 + b"]" * 100_000), "header: expected JSON"),
    "nested_objects": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "header: expected JSON"),
    "twice": (raw(b'{"a": {}, "a": {}}'), "header: .*'a' is there twice"),
    "key_twice": (raw(b'{"a": {"dtype": "F32", "dtype": "U8"}}'), "header: .*'dtype' is there twice"),
    "metadata_list": (raw({**HEADER, "__metadata__": []}), "__metadata__: expected an object of strings"),
    "metadata_numbers": (raw({**HEADER, "__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
    "entry_list": (raw({**HEADER, "b": [1]}), rf"{B}entry: expected an object, got \[1\]"),
    "entry_null": (raw({**HEADER, "b": None}), f"{B}entry: expected an object, got None"),
    "dtype_absent": (entry(dtype="absent"), f"{B}dtype: expected one of .*, got None"),
    "dtype_unknown": (entry(dtype="F17"), f"{B}dtype: expected one of .*, got 'F17'"),
    "dtype_case": (entry(dtype="bf16"), f"{B}dtype: expected one of .*, got 'bf16'"),
    "dtype_list": (entry(dtype=["BF16"]), f"{B}dtype: expected one of"),
    "dtype_wider": (entry(dtype="F32"), rf"{B}data_offsets: expected 16 bytes for F32 \[4\], got \[24, 32\]"),
    "dtype_narrower": (entry(dtype="U8"), rf"{B}data_offsets: expected 4 bytes for U8 \[4\]"),
    "shape_absent": (entry(shape="absent"), f"{B}shape: expected a list"),
    "shape_negative": (entry(shape=[-4]), rf"{B}shape: expected a list .*, got \[-4\]"),
    "shape_two_negatives": (entry(shape=[-2, -2]), f"{B}shape: expected a list"),
    "shape_float": (entry(shape=[4.0]), f"{B}shape: expected a list"),
    "shape_bool": (entry(shape=[True, 4]), f"{B}shape: expected a list"),
    "shape_text": (entry(shape="4"), f"{B}shape: expected a list"),
    "shape_nested": (entry(shape=[[4]]), f"{B}shape: expected a list"),
    "shape_object": (entry(shape={"0": 4}), f"{B}shape: expected a list"),
    "shape_past_64_bits": (entry(shape=[2**63]), f"{B}shape: expected a list"),
    "shape_endless_integer": (entry(shape=[10**4000]), f"{B}shape: expected a list"),
    "shape_product_wraps_to_4": (entry(shape=[2**62, 4, 4]), f"{B}data_offsets: expected {2**67} bytes"),
    "shape_product_wraps_to_0": (entry(shape=[2**32, 2**32]), f"{B}data_offsets: expected {2**65} bytes"),
    "shape_of_65_dimensions": (entry(shape=[1] * 64 + [4]), f"{B}shape: expected a list of at most 64"),
    "offsets_absent": (entry(data_offsets="absent"), f"{B}data_offsets: expected .start, end."),
    "offsets_null": (entry(data_offsets=None), f"{B}data_offsets: expected .start, end."),
    "offsets_one": (entry(data_offsets=[24]), f"{B}data_offsets: expected .start, end."),
    "offsets_three": (entry(data_offsets=[24, 32, 40]), f"{B}data_offsets: expected .start, end."),
    "offsets_reversed": (entry(data_offsets=[32, 24]), f"{B}data_offsets: expected .start, end."),
    "offsets_negative": (entry(data_offsets=[-8, 0]), f"{B}data_offsets: expected .start, end."),
    "offsets_float": (entry(data_offsets=[24.0, 32.0]), f"{B}data_offsets: expected .start, end."),
    "offsets_bool": (entry(data_offsets=[False, True]), f"{B}data_offsets: expected .start, end."),
    "offsets_text": (entry(data_offsets="24"), f"{B}data_offsets: expected .start, end."),
    "offsets_past_the_end": (entry(data_offsets=[32, 40]), rf"{B}data_offsets: expected at most 32, got \[32, 40\]"),
    "offsets_overlap": (entry(data_offsets=[20, 28]), f"{B}data_offsets: expected to start at 24, got 20"),
    "offsets_same": (entry(data_offsets=[0, 8]), "tensor 'a': data_offsets: expected to start at 8, got 0"),
    "gap_at_the_start": (raw({"b": HEADER["b"]}), f"{B}data_offsets: expected to start at 0, got 24"),
    "gap_between": (
        raw({**HEADER, "b": {**HEADER["b"], "data_offsets": [28, 36]}}, bytes(36)),
        f"{B}data_offsets: expected to start at 24, got 28",
    ),
    "gap_at_the_end": (raw({"a": HEADER["a"]}), "expected 24 bytes of data, got 32"),
    "terabytes": (
        entry(shape=[2**41], data_offsets=[24, 24 + 2**42]),
        rf"{B}data_offsets: expected at most 32, got \[24, {24 + 2**42}\]",
    ),
    "control_characters": (raw({"\x1b[31m": 1}, b""), r"tensor '\\x1b\[31m': entry: expected an object"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_a_hostile_header_is_refused_without_taking_memory(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with (
        at_most(max(2**18, 20 * len(content))),
        pytest.raises(ValueError, match=rf"^x\.safetensors: {message}") as caught,
    ):
        read_header(file)
    assert len(str(caught.value)) < 400


def test_a_header_longer_than_the_format_allows_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(2 * MAX_HEADER_BYTES)  # a hole: it takes no disk
    with pytest.raises(ValueError, match=f"header length: expected at most {MAX_HEADER_BYTES} bytes"):
        read_header(file)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory, state: State) -> tuple[Path, bytes]:
    directory = write(tmp_path_factory.mktemp("small"), TINY, state)
    return directory, (directory / WEIGHTS_FILE).read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_loads_or_is_refused(small_file: tuple[Path, bytes], data: st.DataObject) -> None:
    """Bytes are changed in the header above all; whatever loads is whole and finite."""
    directory, good = small_file
    header_end = 8 + int.from_bytes(good[:8], "little")
    place = st.integers(0, header_end) | st.integers(0, len(good) - 1)
    damage = st.tuples(place, st.integers(0, 255))
    content = bytearray(good)
    for at, byte in data.draw(st.lists(damage, min_size=1, max_size=4)):
        content[at] = byte
    end = data.draw(st.none() | st.integers(0, len(good)))
    (directory / WEIGHTS_FILE).write_bytes(bytes(content[:end]))
    try:
        model = load(directory)
    except ValueError:
        return
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("damage", ["config.json", WEIGHTS_FILE, "values"])
def test_a_failed_load_leaves_the_process_as_it_was(damage: str, tmp_path: Path) -> None:
    oracle.save("glm_moe_dsa", tmp_path / "good")
    oracle.save("glm_moe_dsa", tmp_path / "bad")
    options: dict[str, Any] = {"kv_cache_tokens": 256, "max_batched_tokens": 64}
    params = SamplingParams(temperature=0.0, max_tokens=4)

    def tokens() -> Iterator[list[int]]:
        llm = LLM(tmp_path / "good", **options)
        yield llm.generate([[5, 6, 7]], params, progress=False)[0].outputs[0].token_ids

    before = next(tokens())
    if damage == "values":
        state = load_file(tmp_path / "bad" / WEIGHTS_FILE)
        state["model.norm.weight"][0] = torch.nan
        save_file(state, tmp_path / "bad" / WEIGHTS_FILE)
    else:
        content = (tmp_path / "bad" / damage).read_bytes()
        (tmp_path / "bad" / damage).write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(ValueError, match=damage if damage != "values" else r"model\.norm\.weight"):
            LLM(tmp_path / "bad", **options)
    assert next(tokens()) == before
