"""The engine against transformers on random models: the same log-probabilities, the same greedy tokens.

The exact path: float32 weights and caches. Each way a request can be computed (alone, in a ragged batch, in chunks,
anew after a preemption) must give what transformers gives for the prompt alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import oracle
from heedful import LLM, RequestOutput, SamplingParams

NEW_TOKENS = 64
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module", params=sorted(oracle.CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    return oracle.save(request.param, directory), directory


def engine(directory: Path, **options: Any) -> LLM:
    return LLM(
        directory, device="cpu", dtype="float32", kv_cache_dtype="float32", **{"kv_cache_tokens": 2048, **options}
    )


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, oracle.COMMON["vocab_size"]), k=length)


def assert_same(model: Any, output: RequestOutput) -> None:
    ids, completion = output.prompt_token_ids, output.outputs[0]
    assert completion.token_ids == oracle.greedy(model, ids, NEW_TOKENS)
    everything = ids + completion.token_ids
    expected = oracle.logprobs(model, everything)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert completion.logprobs is not None
    entries = output.prompt_logprobs[1:] + completion.logprobs
    assert len(entries) == len(everything) - 1
    for place, (token_id, entry) in enumerate(zip(everything[1:], entries, strict=True)):
        assert entry is not None
        assert entry[token_id].logprob == pytest.approx(float(expected[place, token_id]), rel=1e-4), place


def test_one_request(checkpoint: tuple[Any, Path]) -> None:
    model, directory = checkpoint
    (output,) = engine(directory).generate(prompt(150, 0), PARAMS, progress=False)
    assert_same(model, output)
    assert output.outputs[0].finish_reason == "length"


RAGGED = [prompt(length, seed) for seed, length in enumerate([37, 150, 1, 64, 65, 128])]


def test_ragged_batch(checkpoint: tuple[Any, Path]) -> None:
    model, directory = checkpoint
    for output in engine(directory).generate(RAGGED, PARAMS, progress=False):
        assert_same(model, output)


def test_chunked_prefill_under_a_budget_of_16_tokens(checkpoint: tuple[Any, Path]) -> None:
    model, directory = checkpoint
    for output in engine(directory, max_batched_tokens=16).generate(RAGGED, PARAMS, progress=False):
        assert_same(model, output)


def test_after_a_forced_preemption(checkpoint: tuple[Any, Path]) -> None:
    model, directory = checkpoint
    outputs = engine(directory, kv_cache_tokens=448).generate(RAGGED, PARAMS, progress=False)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    for output in outputs:
        assert_same(model, output)


def test_dense_attention_equals_transformers_with_an_index_topk_no_context_reaches(tmp_path: Path) -> None:
    model = oracle.save("deepseek_v32", tmp_path, index_topk=500)
    (output,) = engine(tmp_path, attention="dense").generate(prompt(150, 0), PARAMS, progress=False)
    assert_same(model, output)
    assert output.metrics.share_of_keys_read == 1.0
