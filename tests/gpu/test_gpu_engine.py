"""The engine on a GPU: the CPU's tokens, with graphs and without, in batches and chunks; sampling that repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from heedful import LLM, SamplingParams
from heedful.engine.sampler import SamplingState, sample

OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 2048, "max_num_seqs": 6, "max_model_len": 512}
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def checkpoint(gpu: torch.device, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    # Widths that the products of a GPU serve.
    wide = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
    oracle.save(request.param, directory, max_position_embeddings=2048, **wide)
    return directory


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 199, length).tolist() for length in (40, 150, 3, 90)[:count]]


def tokens(llm: LLM, batch: list[list[int]], params: Any = PARAMS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(batch, params, progress=False)]


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of tokens before the first that differs: what follows a near-tie broken the other way is another text."""
    pairs = zip(a, b, strict=True)
    shared = [next((i for i, (x, y) in enumerate(zip(p, q, strict=True)) if x != y), len(p)) for p, q in pairs]
    return sum(shared) / sum(map(len, a))


def prompt_logprobs(llm: LLM) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens but their first."""
    found = []
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    for output in llm.generate(prompts(4), params, progress=False):
        entries = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
        found += [entry[token].logprob for token, entry in entries if entry is not None]
    return torch.tensor(found)


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "fp8"])
def test_tokens_are_the_cpus(gpu: torch.device, checkpoint: Path, kv_cache_dtype: Any) -> None:
    options = {**OPTIONS, "kv_cache_dtype": kv_cache_dtype}
    there, here = LLM(checkpoint, device="cuda", **options), LLM(checkpoint, device="cpu", **options)
    if kv_cache_dtype == "float32":
        assert agreement(tokens(there, prompts(4)), tokens(here, prompts(4))) >= 0.8
    difference = prompt_logprobs(there) - prompt_logprobs(here)
    assert difference.abs().median() < (1e-3 if kv_cache_dtype == "float32" else 0.1)


def test_graphs_give_what_launches_give(gpu: torch.device, checkpoint: Path) -> None:
    replayed = LLM(checkpoint, device="cuda", **OPTIONS)
    launched = LLM(checkpoint, device="cuda", enforce_eager=True, **OPTIONS)
    assert replayed.engine.runner.graphs is not None
    assert launched.engine.runner.graphs is None
    for count in (1, 3, 4):
        assert tokens(replayed, prompts(count)) == tokens(launched, prompts(count))


def test_chunks_and_batches_change_nothing(gpu: torch.device, checkpoint: Path) -> None:
    whole = LLM(checkpoint, device="cuda", **OPTIONS)
    chunked = LLM(checkpoint, device="cuda", max_batched_tokens=64, **OPTIONS)
    alone = [tokens(whole, [prompt])[0] for prompt in prompts(4)]
    assert agreement(tokens(chunked, prompts(4)), alone) >= 0.9


def test_seeded_draws_repeat_and_are_the_cpus(gpu: torch.device, checkpoint: Path) -> None:
    logits = 3 * torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, Any]] = [
        {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}, {"repetition_penalty": 1.3}, {"n": 2},
    ]  # fmt: skip
    states = [SamplingState(SamplingParams(**kind), 11, 0, [1, 2, 3]) for kind in kinds]
    assert sample(logits.to(gpu), states).tolist() == sample(logits, states).tolist()
    llm = LLM(checkpoint, device="cuda", **OPTIONS)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    assert tokens(llm, prompts(3), params) == tokens(llm, prompts(3), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # experts by the kernel, and grouped where torch can
def test_a_step_waits_for_its_tokens_alone(gpu: torch.device, checkpoint: Path, dtype: str) -> None:
    llm = LLM(checkpoint, device="cuda", **{**OPTIONS, "dtype": dtype})
    tokens(llm, prompts(2))
    runner = llm.engine.runner
    llm.engine.add_request("one", np.random.default_rng(1).integers(2, 199, 400).tolist(), PARAMS)
    for _ in range(3):  # a prompt, then decoding
        step = llm.engine.scheduler.schedule()
        assert step is not None
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = runner.logits(runner.run(step), step.sample_rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        llm.engine.scheduler.update(logits.argmax(-1).int().cpu().numpy())


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "fp8"])
def test_latent_rows_on_the_host_change_nothing(gpu: torch.device, checkpoint: Path, kv_cache_dtype: Any) -> None:
    """Two long prompts in fewer pages than they fill, one of which gives way."""
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 3}
    options |= {"max_batched_tokens": 64, "kv_cache_tokens": 24 * 64, "enforce_eager": True}
    rng = np.random.default_rng(0)
    batch = [rng.integers(2, 199, length).tolist() for length in (620, 560, 120)]
    params = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True)
    plain = LLM(checkpoint, device="cuda", **options)
    tiered = LLM(checkpoint, device="cuda", **options, device_latent_tokens=20 * 64, hot_rows=64)
    assert tiered.host_tier is not None
    assert all(memory.is_pinned() for memory in tiered.host_tier.latent)
    # Keys are summed in other parts where a step's queries are read in parts.
    assert agreement(tokens(tiered, batch, params), tokens(plain, batch, params)) >= 0.8
    stats = tiered.engine.scheduler.stats()
    assert min(stats[name] for name in ("stored_blocks", "fetched_rows", "swaps")) > 0


def test_weights_and_caches_are_on_the_device(gpu: torch.device, checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cuda", **{**OPTIONS, "kv_cache_dtype": "fp8"})
    assert all(p.device.type == "cuda" for p in llm.engine.runner.model.parameters())
    assert {cache.dtype for cache in llm.caches.index if cache is not None} == {torch.uint8}


def test_bfloat16_with_grouped_experts(gpu: torch.device, checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cuda", **{**OPTIONS, "dtype": "bfloat16"})
    first, again = tokens(llm, prompts(4)), tokens(llm, prompts(4))
    assert first == again
    assert all(len(text) == PARAMS.max_tokens for text in first)
