"""Sampling: each parameter does what it says, and a draw depends on nothing but its own request."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import SamplingParams
from heedful.engine.sampler import SamplingState, sample, token_logprobs

VOCAB = 50


def state(seed: int = 0, index: int = 0, prompt: tuple[int, ...] = (), **params: object) -> SamplingState:
    return SamplingState(SamplingParams(**params), seed, index, list(prompt))  # type: ignore[arg-type]


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draws(logits: torch.Tensor, count: int, **params: object) -> Counter[int]:
    """How often each token is drawn from one row over many seeds."""
    states = [state(seed=seed, **params) for seed in range(count)]
    return Counter(sample(logits.expand(count, -1), states).tolist())


def test_temperature_zero_takes_the_best_and_the_lowest_id_on_ties() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(logits, [state(temperature=0.0)] * 2).tolist() == [1, 0]


def test_frequencies_follow_the_softmax_of_logits_over_temperature() -> None:
    logits, count = random_logits(1), 20000
    expected = (logits[0] / 1.7).softmax(-1)
    seen = draws(logits, count, temperature=1.7)
    for token_id, probability in enumerate(expected.tolist()):
        sigma = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen[token_id] - count * probability) < 5 * sigma + 1, token_id


@given(seed=st.integers(0, 2**32), k=st.integers(1, VOCAB + 5))
def test_top_k_draws_only_the_k_best(seed: int, k: int) -> None:
    logits = random_logits(1, seed)
    best = set(logits[0].topk(min(k, VOCAB)).indices.tolist())
    assert set(draws(logits, 50, top_k=k, temperature=5.0)) <= best


@given(seed=st.integers(0, 2**32), top_p=st.floats(0.01, 1.0))
def test_top_p_draws_only_the_smallest_set_that_reaches_p(seed: int, top_p: float) -> None:
    logits = random_logits(1, seed)
    probs, order = logits[0].double().softmax(-1).sort(descending=True, stable=True)
    size = int((probs.cumsum(0) - probs < top_p).sum())
    assert set(draws(logits, 50, top_p=top_p)) <= set(order[:size].tolist())


@given(seed=st.integers(0, 2**32), min_p=st.floats(0.0, 1.0))
def test_min_p_drops_what_is_less_likely_than_its_share_of_the_best(seed: int, min_p: float) -> None:
    logits = random_logits(1, seed)
    probs = logits[0].double().softmax(-1)
    allowed = set((probs >= min_p * probs.max() * (1 - 1e-9)).nonzero()[:, 0].tolist())
    assert set(draws(logits, 50, min_p=min_p)) <= allowed


def test_limits_of_one_token_leave_the_best() -> None:
    logits = random_logits(4)
    best = logits.argmax(-1).tolist()
    for params in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}):
        assert sample(logits, [state(**params)] * 4).tolist() == best, params


@settings(max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), others=st.lists(st.integers(0, 2**32), max_size=6), place=st.integers(0, 6))
def test_a_draw_does_not_depend_on_the_rows_beside_it(seed: int, others: list[int], place: int) -> None:
    logits = random_logits(len(others) + 1)
    place = min(place, len(others))
    alone = sample(logits[place : place + 1], [state(seed=seed, top_p=0.9)])
    states = [state(seed=other) for other in others]
    states.insert(place, state(seed=seed, top_p=0.9))
    assert sample(logits, states)[place] == alone[0]


def test_large_seeds_keep_their_bits() -> None:
    seeds = (2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
    assert len({state(seed=seed).uniform() for seed in seeds}) == len(seeds)


def test_the_completions_of_a_request_and_its_places_draw_differently() -> None:
    numbers = set()
    for index in range(4):
        one = state(seed=7, index=index)
        for place in range(4):
            numbers.add(one.uniform())
            one.output_counts[place] += 1
    assert len(numbers) == 16


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, 2.0, -2.0, 2.0, 2.5]])
    chosen = {"temperature": 0.0}

    def best(counts: dict[int, int], prompt: tuple[int, ...] = (), **params: float) -> int:
        one = state(prompt=prompt, **chosen, **params)
        one.output_counts.update(counts)
        return int(sample(logits, [one])[0])

    assert best({4: 1}) == 4
    assert best({4: 1}, presence_penalty=0.4) == 4
    assert best({4: 1}, presence_penalty=0.6) == 0
    assert best({4: 3}, presence_penalty=0.6) == 0
    assert best({4: 1}, frequency_penalty=0.4) == 4
    assert best({4: 2}, frequency_penalty=0.4) == 0
    assert best({}, prompt=(4,), repetition_penalty=1.2) == 4
    assert best({}, prompt=(4,), repetition_penalty=1.3) == 0
    assert best({0: 1, 1: 1, 3: 1}, prompt=(4,), repetition_penalty=2.0) == 4
    assert best({}, prompt=(0, 1, 3, 4), presence_penalty=2.0) == 4  # presence counts the output alone
    assert logits.tolist() == [[2.0, 2.0, -2.0, 2.0, 2.5]]  # the caller's logits are not changed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = random_logits(2)
    logits[1, 3] = bad
    with pytest.raises(FloatingPointError, match="row 1"):
        sample(logits, [state(), state()])


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [3, 5]] = 0.0
    assert set(draws(logits, 200)) == {3, 5}


@given(seed=st.integers(0, 2**32), top=st.integers(0, VOCAB + 3))
def test_logprobs_are_those_of_the_softmax_with_ranks(seed: int, top: int) -> None:
    logits = random_logits(3, seed)
    tokens = np.array([0, 17, VOCAB - 1])
    expected = logits.double().log_softmax(-1)
    for row, entry in enumerate(token_logprobs(logits, tokens, top)):
        own = int(tokens[row])
        assert next(iter(entry)) == own
        assert len(entry) in (min(top, VOCAB), min(top, VOCAB) + 1)
        for token_id, value in entry.items():
            assert value.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
            assert value.rank == int((logits[row] > logits[row, token_id]).sum()) + 1
