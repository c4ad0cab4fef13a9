"""The engine against transformers on random models: the same log-probabilities, the same greedy tokens.

The exact path: float32 weights and caches. Each way a request can be computed (alone, in a ragged batch, in chunks,
anew after a preemption) must give what transformers gives for the prompt alone.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from heedful import LLM, RequestOutput, SamplingParams

NEW_TOKENS = 64
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0, ignore_eos=True)


@dataclass(frozen=True)
class Expected:
    """A prompt and what transformers makes of it."""

    prompt: list[int]
    tokens: list[int]
    """The greedy continuation."""
    logprobs: torch.Tensor
    """Of prompt and continuation."""


class Checkpoint:
    """A random model, saved."""

    def __init__(self, name: str, directory: Path, **overrides: Any) -> None:
        self.directory = directory
        self.model = oracle.save(name, directory, **overrides)
        self._expected: dict[int, Expected] = {}

    def engine(self, **options: Any) -> LLM:
        fixed = {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "float32"}
        return LLM(self.directory, **{"kv_cache_tokens": 2048, **fixed, **options})

    def expected(self, length: int) -> Expected:
        """The first random prompt of this length on whose way no choice hangs on rounding."""
        if length not in self._expected:
            seeds = map(random.Random, itertools.count())
            prompts = (seed.choices(range(2, oracle.COMMON["vocab_size"]), k=length) for seed in seeds)
            texts = ((prompt, oracle.greedy(self.model, prompt, NEW_TOKENS)) for prompt in prompts)
            prompt, tokens = next(text for text in texts if oracle.is_decisive(self.model, text[0] + text[1]))
            self._expected[length] = Expected(prompt, tokens, oracle.logprobs(self.model, prompt + tokens))
        return self._expected[length]


@pytest.fixture(scope="module", params=sorted(oracle.CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(expected: Expected, output: RequestOutput) -> None:
    completion = output.outputs[0]
    assert completion.token_ids == expected.tokens
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert completion.logprobs is not None
    entries = output.prompt_logprobs[1:] + completion.logprobs
    assert len(entries) == len(expected.logprobs)
    for place, (token_id, entry) in enumerate(zip((expected.prompt + expected.tokens)[1:], entries, strict=True)):
        assert entry is not None
        assert entry[token_id].logprob == pytest.approx(float(expected.logprobs[place, token_id]), rel=1e-4), place


def test_one_request(checkpoint: Checkpoint) -> None:
    expected = checkpoint.expected(150)
    (output,) = checkpoint.engine().generate(expected.prompt, PARAMS, progress=False)
    assert_same(expected, output)
    assert output.outputs[0].finish_reason == "length"


RAGGED = (37, 150, 1, 64, 65, 128)
"""Lengths of the prompts of a batch."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="in one step"),
        pytest.param({"max_batched_tokens": 16}, id="in chunks of 16 tokens"),
        pytest.param({"kv_cache_tokens": 448}, id="after forced preemptions"),
    ],
)
def test_ragged_batch(checkpoint: Checkpoint, options: dict[str, int]) -> None:
    batch = [checkpoint.expected(length) for length in RAGGED]
    outputs = checkpoint.engine(**options).generate([expected.prompt for expected in batch], PARAMS, progress=False)
    assert (sum(output.metrics.preemptions for output in outputs) > 0) == ("kv_cache_tokens" in options)
    for expected, output in zip(batch, outputs, strict=True):
        assert_same(expected, output)


def test_dense_attention_equals_transformers_with_an_index_topk_no_context_reaches(tmp_path: Path) -> None:
    checkpoint = Checkpoint("deepseek_v32", tmp_path, index_topk=500)
    expected = checkpoint.expected(150)
    (output,) = checkpoint.engine(attention="dense").generate(expected.prompt, PARAMS, progress=False)
    assert_same(expected, output)
    assert output.metrics.share_of_keys_read == 1.0
