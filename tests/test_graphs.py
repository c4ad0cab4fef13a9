"""Recorded decoding steps, with a recorder that needs no GPU: buckets, fixed places, filled-up rows, equal tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from heedful import LLM, SamplingParams
from heedful.engine.graphs import DecodeGraphs, buckets
from heedful.engine.paged_attention import StepLayout
from stand_in_recorder import StandInRecorder

CPU = torch.device("cpu")


@dataclass
class Seen:
    """The arrays of one computation, copied, and where they were."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    layout: StepLayout
    addresses: tuple[int, ...]


class Probe:
    """A computation that remembers its arguments; a row's result is its token."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        arrays = (token_ids, positions, *(getattr(layout, name) for name in StepLayout.__slots__[:4]))
        copies = {name: getattr(layout, name).clone() for name in StepLayout.__slots__[:4]}
        copy = StepLayout(**copies, max_seq_len=layout.max_seq_len)
        assert all(array.is_contiguous() for array in arrays)
        addresses = tuple(array.data_ptr() for array in arrays)
        self.seen.append(Seen(token_ids.clone(), positions.clone(), copy, addresses))
        return token_ids.float()[:, None]


def decoding(seq_lens: list[int], *, first_slot: int = 1000, width: int | None = None) -> Any:
    """A decoding step of sequences of these lengths, as the scheduler gives it."""
    B, blocks = len(seq_lens), max(1, *(-(-n // 64) for n in seq_lens))
    lens = np.array(seq_lens, np.int32)
    return SimpleNamespace(
        token_ids=np.arange(10, 10 + B, dtype=np.int32),
        positions=lens - 1,
        seq_lens=lens,
        slot_mapping=np.arange(first_slot, first_slot + B, dtype=np.int64),
        block_tables=np.arange(B * (width or blocks), dtype=np.int32).reshape(B, -1),
        query_start_loc=np.arange(B + 1, dtype=np.int32),
    )


def graphs(probe: Probe, max_num_seqs: int = 6, max_model_len: int = 20_000) -> tuple[DecodeGraphs, StandInRecorder]:
    recorder = StandInRecorder()
    return DecodeGraphs(
        probe, recorder, max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=CPU
    ), recorder  # fmt: skip


@given(first=st.integers(1, 5000), last=st.integers(1, 200_000), factor=st.integers(2, 4))
def test_buckets_rise_to_the_last_and_waste_less_than_their_factor(first: int, last: int, factor: int) -> None:
    sizes = buckets(first, last, factor)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == last
    assert all(b <= factor * a for a, b in itertools.pairwise(sizes))
    assert sizes[0] == min(first, last)


def test_a_step_takes_the_smallest_bucket_that_holds_it() -> None:
    them, _ = graphs(Probe())
    assert them.batches == [1, 2, 4, 6]
    assert them.contexts == [4096, 16384, 20032]  # whole blocks
    assert them.bucket(decoding([5])) == (1, 4096)
    assert them.bucket(decoding([5, 4096, 7])) == (4, 4096)
    assert them.bucket(decoding([5, 4097, 7, 1, 1])) == (6, 16384)
    assert them.bucket(decoding([20_000])) == (1, 20032)
    assert them.bucket(decoding([1] * 7)) is None
    prefill = decoding([5, 9])
    prefill.token_ids = np.arange(9, dtype=np.int32)
    assert them.bucket(prefill) is None
    assert them.run(prefill) is None


@settings(deadline=None)
@given(steps=st.lists(st.lists(st.integers(1, 9000), min_size=1, max_size=6), min_size=1, max_size=6))
def test_each_replay_sees_its_step_and_rows_that_write_nothing(steps: list[list[int]]) -> None:
    probe = Probe()
    them, recorder = graphs(probe)
    wanted = set()
    for number, lens in enumerate(steps):
        step = decoding(lens, first_slot=64 * number)
        result = them.run(step)
        assert result is not None
        batch, context = them.bucket(step) or (0, 0)
        wanted.add((batch, context))
        seen, B = probe.seen[-1], len(lens)
        assert result[:, 0].tolist() == step.token_ids.tolist()
        assert (len(seen.token_ids), seen.layout.max_seq_len) == (batch, context)
        assert seen.layout.block_tables.shape == (batch, context // 64)
        assert seen.token_ids[:B].tolist() == step.token_ids.tolist()
        assert seen.positions[:B].tolist() == step.positions.tolist()
        assert seen.layout.seq_lens.tolist() == lens + [1] * (batch - B)
        assert seen.layout.slot_mapping.tolist() == step.slot_mapping.tolist() + [-1] * (batch - B)
        assert seen.layout.query_start_loc.tolist() == list(range(batch + 1))
        assert (seen.layout.block_tables[:B, : step.block_tables.shape[1]] == torch.from_numpy(step.block_tables)).all()
        assert (seen.layout.block_tables[B:, 0] == 0).all()
    assert len(recorder.recordings) == len(wanted)
    places: dict[tuple[int, int], tuple[int, ...]] = {}
    for seen in probe.seen:
        bucket = (len(seen.token_ids), seen.layout.max_seq_len)
        assert places.setdefault(bucket, seen.addresses) == seen.addresses


def test_block_tables_wider_than_the_bucket_are_cut() -> None:
    probe = Probe()
    them, _ = graphs(probe)
    step = decoding([70, 3], width=200)
    assert them.run(step) is not None
    assert (probe.seen[-1].layout.block_tables.numpy() == step.block_tables[:, :64]).all()


def test_warming_up_records_every_bucket_once_and_writes_nothing() -> None:
    probe = Probe()
    them, recorder = graphs(probe, max_num_seqs=4, max_model_len=8000)
    assert list(them.warm_up()) == [(4, 8000), (4, 4096), (2, 8000), (2, 4096), (1, 8000), (1, 4096)]
    assert all((seen.layout.slot_mapping == -1).all() for seen in probe.seen)
    assert len(recorder.recordings) == 6
    them.run(decoding([100, 200]))
    assert len(recorder.recordings) == 6


def test_warming_up_a_runner_writes_no_row(tmp_path: Path) -> None:
    oracle.save("glm_moe_dsa", tmp_path)
    llm = LLM(tmp_path, device="cpu", kv_cache_tokens=256)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), progress=False)
    before = [cache.clone() for cache in (*llm.caches.latent, *llm.caches.index) if cache is not None]
    llm.engine.runner.warm_up(100)
    after = [cache for cache in (*llm.caches.latent, *llm.caches.index) if cache is not None]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "fp8"])
def test_an_engine_that_replays_gives_the_tokens_of_one_that_does_not(tmp_path: Path, kv_cache_dtype: Any) -> None:
    oracle.save("glm_moe_dsa", tmp_path)
    options: dict[str, Any] = {"device": "cpu", "kv_cache_tokens": 1024, "kv_cache_dtype": kv_cache_dtype}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 199, length).tolist() for length in (40, 90, 3)]
    params = [SamplingParams(temperature=t, seed=5, max_tokens=8, ignore_eos=True) for t in (0.0, 1.0, 0.7)]
    plain, replayed = LLM(tmp_path, **options), LLM(tmp_path, **options)
    recorder = StandInRecorder()
    replayed.engine.runner.record_decoding(recorder, max_num_seqs=2, max_model_len=512)
    before = [cache.clone() for cache in replayed.caches.latent]
    for _ in replayed.engine.runner.graphs.warm_up():  # type: ignore[union-attr]
        pass
    for cache, then in zip(replayed.caches.latent, before, strict=True):
        assert torch.equal(cache, then)
    for batch in (prompts[:1], prompts[:2], prompts):  # the last does not fit a bucket
        kept = params[: len(batch)]
        want = [o.outputs[0].token_ids for o in plain.generate(batch, kept, progress=False)]
        assert [o.outputs[0].token_ids for o in replayed.generate(batch, kept, progress=False)] == want
    assert len(recorder.recordings) == 2
