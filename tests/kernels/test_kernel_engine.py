"""The whole engine on the Triton kernels (in the interpreter, or on a GPU) beside the engine on the CPU operators.

A tiny random model and few tokens: prefill in chunks, a ragged batch, decoding, all cache formats, recorded steps.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import oracle
from heedful import LLM, RequestOutput, SamplingParams
from heedful.config import ModelConfig
from heedful.engine.caches import KVCaches
from heedful.engine.paged_attention import PagedAttention, StepLayout
from heedful.engine.placement import Placement
from heedful.engine.runner import ModelRunner
from heedful.engine.tuning import shapes_of, tune
from heedful.kernels import index_top_k, sparse_attention, target, tuning
from heedful.kernels.compilation import Launch
from heedful.models import DSAForCausalLM
from heedful.weights import keep_float32
from stand_in_recorder import StandInRecorder

PARAMS = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=0, logprobs=0)
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 512, "max_num_seqs": 4, "max_batched_tokens": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("glm")
    oracle.save(
        "glm_moe_dsa", directory, num_hidden_layers=2, indexer_types=["full", "shared"], max_position_embeddings=1024
    )
    return directory


def engine(checkpoint: Path, device: torch.device, **options: Any) -> LLM:
    """On the kernels."""
    return LLM(checkpoint, device=str(device), backend="triton", enforce_eager=True, **(OPTIONS | options))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 199, length).tolist() for length in (40, 5)]


def logprobs(outputs: list[RequestOutput]) -> torch.Tensor:
    """Of every prompt token but the first."""
    found = []
    for output in outputs:
        entries = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
        found += [entry[token].logprob for token, entry in entries if entry is not None]
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "attention"),
    [("float32", "sparse"), ("bfloat16", "sparse"), ("fp8", "sparse"), ("float32", "dense")],
)
def test_it_says_what_the_cpu_says(device: torch.device, checkpoint: Path, kv_cache_dtype: Any, attention: Any) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "attention": attention}
    cpu = LLM(checkpoint, device="cpu", backend="cpu", **OPTIONS, **options)
    there = engine(checkpoint, device, **options).generate(prompts(), PARAMS, progress=False)
    here = cpu.generate(prompts(), PARAMS, progress=False)
    if kv_cache_dtype == "float32":
        assert [o.outputs[0].token_ids for o in there] == [o.outputs[0].token_ids for o in here]
        torch.testing.assert_close(logprobs(there), logprobs(here), atol=1e-3, rtol=1e-3)
    else:  # index keys are rounded otherwise (e4m3 against int8), so that near-ties are broken otherwise
        assert (logprobs(there) - logprobs(here)).abs().median() < 0.1


def test_recorded_steps_of_kernels_give_the_same_tokens(device: torch.device, checkpoint: Path) -> None:
    cpu, replayed = LLM(checkpoint, device="cpu", backend="cpu", **OPTIONS), engine(checkpoint, device)
    recorder = StandInRecorder()
    replayed.engine.runner.record_decoding(recorder, max_num_seqs=3, max_model_len=128)
    want = [o.outputs[0].token_ids for o in cpu.generate(prompts(), PARAMS, progress=False)]
    assert [o.outputs[0].token_ids for o in replayed.generate(prompts(), PARAMS, progress=False)] == want
    assert len(recorder.recordings) == 1


@pytest.mark.parametrize(
    "model", ["glm_moe_dsa_every_layer", "deepseek_v32"]
)  # index keys of interleaved and of split pairs
@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "fp8")]
)
def test_keys_that_are_turned_while_they_are_written_are_those_turned_before(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, dtype: Any, kv_cache_dtype: Any
) -> None:
    oracle.save(model, tmp_path, num_hidden_layers=1)
    options: dict[str, Any] = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "kv_cache_tokens": 64}
    caches = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(PagedAttention, "rotates_keys", False)
        llm = engine(tmp_path, device, **options)
        llm.generate(prompts()[:1], SamplingParams(max_tokens=1), progress=False)
        caches.append(
            [cache.view(torch.uint8) for cache in (*llm.caches.latent, *llm.caches.index) if cache is not None]
        )
    for turned, before in zip(*caches, strict=True):
        assert turned.any()
        if triton.knobs.runtime.interpret:
            assert torch.equal(turned, before)
        else:  # a chip may fuse the product and the sum of a rotation
            assert (turned != before).double().mean() < 0.02


def real_size(directory: Path) -> ModelConfig:
    """DeepSeek-V3.2's widths, in a dense and a sparse layer."""
    oracle.save("deepseek_v32", directory, num_hidden_layers=2)
    file = directory / "config.json"
    widths = {"hidden_size": 7168, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    widths |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "index_n_heads": 64, "index_head_dim": 128}
    counts = {"num_attention_heads": 128, "num_key_value_heads": 128, "index_topk": 2048}
    experts = {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    file.write_text(json.dumps(json.loads(file.read_text()) | widths | counts | experts))
    return ModelConfig.from_file(directory)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "fp8"])
def test_no_step_of_real_size_looks_at_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kv_cache_dtype: Any
) -> None:
    """On a card that holds no numbers: what asked for one, and so waited for the device, would raise."""
    config, card, launched = real_size(tmp_path), torch.device("cuda", 0), Counter[str]()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(target, "_of", lambda *place: target.Target.cuda(10 * capability[0]))
    monkeypatch.setattr(Launch, "run", lambda launch: launched.update([launch.kernel.__name__]))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 0)
    tuning.forget()
    with FakeTensorMode(), torch.inference_mode():
        with torch.device(card):
            model = DSAForCausalLM(config)
        for name, weight in list(model.named_parameters()):
            dtype = torch.float32 if keep_float32(name) else torch.bfloat16
            owner, _, attribute = name.rpartition(".")
            weight = torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=card), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, weight)
        runner = ModelRunner(
            model, KVCaches(config, 3000, kv_cache_dtype, Placement(card, "triton")), "sparse", "triton"
        )
        for B, N, context in ((1, 1, 131072), (512, 512, 4096), (1, 8192, 8192), (3, 777, 9984)):

            def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device=card)

            tables = numbers(B, context // 64)
            layout = StepLayout(numbers(N, dtype=torch.int64), numbers(B + 1), numbers(B), tables, context)
            assert runner._compute(numbers(N), numbers(N), layout).shape == (N, 7168)
            assert runner.model.lm_head(numbers(N, 7168, dtype=torch.bfloat16)).shape == (N, 199)
    assert launched["_write_latent_kernel"] == launched["_write_index_kernel"] == launched["_attention_kernel"] == 8
    assert launched["_expert_kernel"] == (8 if capability == (8, 0) else 0)
    tuning.forget()


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "fp8"])
def test_latent_rows_on_the_host_give_the_same_tokens(
    device: torch.device, checkpoint: Path, kv_cache_dtype: Any
) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 1, "max_batched_tokens": 64}
    options |= {"kv_cache_tokens": 1024}
    prompt = np.random.default_rng(1).integers(2, 199, 655).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    found = []
    for tier in ({}, {"device_latent_tokens": 512, "hot_rows": 64}):
        llm = engine(checkpoint, device, **options, **tier)
        runner = llm.engine.runner
        kernels, runner.backend = runner.backend, "cpu" if device.type == "cpu" else "triton"
        llm.generate([prompt[:640]], SamplingParams(max_tokens=1), progress=False)  # rows to reuse, made quickly
        runner.backend = kernels
        found.append([o.outputs[0].token_ids for o in llm.generate([prompt], params, progress=False)])
        stats = llm.engine.scheduler.stats()
        assert (stats["stored_blocks"] > 0, stats["fetched_rows"] > 64, stats["cached_tokens"]) == (
            *2 * [bool(tier)],
            640,
        )
    assert found[0] == found[1]


def test_measured_configurations_are_kept_on_disk(
    device: torch.device, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEEDFUL_CACHE_DIR", str(tmp_path))
    tuning.forget()
    runner = engine(checkpoint, device).engine.runner
    assert list(tune(runner, [(2, 1, 64)])) == [(2, 1, 64)]
    (table,) = (tmp_path / "kernels").glob("*.json")
    assert [name.partition(" ")[0] for name in json.loads(table.read_text())] == ["index_top_k", "sparse_attention"]
    tuning.forget()


def test_measured_are_the_rows_that_attention_reads(
    device: torch.device, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of FP8 pages, a prompt's steps read bfloat16 rows, decoding and short parts of long prompts the codes."""
    runner = engine(checkpoint, device, dtype="bfloat16", kv_cache_dtype="fp8").engine.runner
    read: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(sparse_attention, "warm_up", lambda q, rows, indices: read.append((len(q), rows.dtype)))
    monkeypatch.setattr(index_top_k, "warm_up", lambda *shape: None)
    shapes = [(2, 1, 256), (1, 256, 256), (1, 2, 256)]
    assert list(tune(runner, shapes)) == shapes
    assert read == [(2, torch.uint8), (256, torch.bfloat16), (2, torch.uint8)]


def test_shapes_to_measure_are_those_of_recorded_steps_and_of_a_prompt() -> None:
    assert shapes_of(3, 8192, 10_000) == [
        (1, 1, 4096), (1, 1, 10_000), (2, 1, 4096), (2, 1, 10_000), (3, 1, 4096), (3, 1, 10_000), (1, 8192, 10_000),
    ]  # fmt: skip
    assert shapes_of(1, 8192, 100) == [(1, 1, 100), (1, 100, 100)]


def test_index_keys_are_e4m3_for_the_kernels_and_int8_for_the_cpu(device: torch.device, checkpoint: Path) -> None:
    options: dict[str, Any] = {"kv_cache_dtype": "fp8"}
    for llm, dtype in (
        (engine(checkpoint, device, **options), torch.uint8),
        (LLM(checkpoint, device="cpu", **OPTIONS, **options), torch.int8),
    ):
        assert [cache.dtype for cache in llm.caches.index if cache is not None] == [dtype]
        assert llm.caches.latent[0].dtype == torch.uint8
