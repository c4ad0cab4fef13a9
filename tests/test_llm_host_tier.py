"""`LLM` with latent rows in the host's memory says what it says with all of them on the device, token by token."""

from __future__ import annotations

import gc
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from heedful import LLM, RequestOutput, SamplingParams, SchedulerConfig
from heedful.engine import cache_sizes, fetches, placement
from heedful.engine.cache_layout import index_bytes_per_token, latent_bytes_per_token
from heedful.engine.fetches import StepRows
from heedful.engine.host_tier import HostTier
from heedful.engine.placement import Placement

SMALL: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_num_seqs": 3, "max_batched_tokens": 64}
POOL = 24 * 64
"""Tokens of the pool: fewer than three long requests grow to."""
PAGES = 20 * 64
"""As few as these limits allow."""
MODELS = ["glm_moe_dsa", "deepseek_v32"]  # the first has layers that share a selection


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        oracle.save(name, found[name], max_position_embeddings=2048)
    return found


def pair(path: Path, pool: int = POOL, hot_rows: int = 24, **options: Any) -> tuple[LLM, LLM]:
    """Without a tier, and with one that keeps as few rows on the device as may be."""
    options = {**SMALL, "kv_cache_tokens": pool, **options}
    return LLM(path, **options), LLM(path, **options, device_latent_tokens=PAGES, hot_rows=hot_rows)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 199, length).tolist() for length in lengths]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def answers(llm: LLM, batch: list[list[int]], params: Any) -> list[RequestOutput]:
    outputs = llm.generate(batch, params, progress=False)
    scheduler = llm.engine.scheduler
    scheduler.check_invariants()
    assert scheduler.stats()["used_blocks"] == 0
    return outputs


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "fp8")]
)
def test_long_prompts_in_chunks_and_batches_that_are_preempted(
    checkpoints: dict[str, Path], model: str, dtype: Any, kv_cache_dtype: Any
) -> None:
    plain, tiered = pair(checkpoints[model], dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    batch = prompts(620, 560, 120, 300)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"temperature": 0.0, "prompt_logprobs": 1}, {"top_p": 0.8}]
    params = [SamplingParams(seed=3, max_tokens=160, ignore_eos=True, **kind) for kind in kinds]
    outputs, want = answers(tiered, batch, params), answers(plain, batch, params)
    assert tokens(outputs) == tokens(want)
    assert [output.prompt_logprobs for output in outputs] == [output.prompt_logprobs for output in want]
    stats = tiered.engine.scheduler.stats()
    assert min(stats[name] for name in ("stored_blocks", "dropped_pages", "fetched_rows", "hot_row_hits")) > 0
    assert sum(output.metrics.swaps for output in outputs) == stats["swaps"] > 0
    assert stats["restored_tokens"] > 0
    # Rows that are kept are not computed anew.
    computed = sum(output.metrics.computed_tokens for output in outputs)
    assert computed <= sum(map(len, batch)) + 4 * 159 + (stats["preemptions"] - stats["swaps"]) * 800


def test_forks_and_prefix_hits(checkpoints: dict[str, Path]) -> None:
    """Completions share their prompt's rows and copy its last block; later prompts begin with rows on the host."""
    plain, tiered = pair(checkpoints["glm_moe_dsa"], pool=60 * 64)
    stem, other, tail = prompts(700, 1700, 50, seed=5)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True, n=2, logprobs=2)
    for batch in ([stem], [other], [stem[:650] + tail], [stem[:333] + tail]):
        ours, theirs = answers(tiered, batch, params), answers(plain, batch, params)
        assert tokens(ours) == tokens(theirs)
        assert [c.logprobs for o in ours for c in o.outputs] == [c.logprobs for o in theirs for c in o.outputs]
        assert ours[0].metrics.cached_tokens == theirs[0].metrics.cached_tokens
    stats = tiered.engine.scheduler.stats()
    assert min(stats[name] for name in ("copied_blocks", "cached_tokens", "loaded_blocks", "fetched_rows")) > 0


def test_a_selection_of_more_rows_than_are_kept_is_read_in_parts(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    plan = StepRows.plan

    def watched(self: StepRows, layer: int, selection: torch.Tensor) -> None:
        plan(self, layer, selection)
        queries = [i for part in self._parts for i in range(part.queries.start, part.queries.stop)]
        assert queries == list(range(len(selection)))
        for part in self._parts:
            hot = part.rows[part.rows >= self.tier.pages * 64].unique()
            assert len(hot) <= self.tier.hot_rows
            assert set(part.targets.tolist()) <= set(hot.tolist())
        most.append(len(self._parts))

    monkeypatch.setattr(StepRows, "plan", watched)
    batch, params = prompts(1500), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    plain, tiered = pair(checkpoints["deepseek_v32"], pool=1600)
    want = tokens(answers(plain, batch, params))
    assert tokens(answers(tiered, batch, params)) == want
    assert max(most) > 2
    monkeypatch.setattr(fetches, "MOST_INDICES", 24 * 7)
    _, tiered = pair(checkpoints["deepseek_v32"], pool=1600, hot_rows=2000)
    most.clear()
    assert tokens(answers(tiered, batch, params)) == want
    assert max(most) == 10  # 64 queries, 7 at a time


def test_an_aborted_request_does_not_touch_the_others(checkpoints: dict[str, Path]) -> None:
    """Its blocks, pages and places on the host go to others while these run."""
    plain, tiered = pair(checkpoints["glm_moe_dsa"])
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=150, ignore_eos=True)
    found = []
    for llm in (plain, tiered):
        done = {}
        for name, prompt in zip("abcd", prompts(620, 560, 120, 500, seed=9), strict=True):
            llm.engine.add_request(name, prompt, params)
        for step in itertools.count():
            if not llm.engine.has_unfinished_requests():
                break
            if step in (60, 100):
                llm.engine.abort_request("ac"[step == 100])
            done |= {o.request_id: tokens([o]) for o in llm.engine.step() if o.finished}
            llm.engine.scheduler.check_invariants()
        found.append(done)
    assert found[0].keys() == set("bd")
    assert found[0] == found[1]
    stats = tiered.engine.scheduler.stats()
    assert (stats["fetched_rows"] > 0, stats["free_swap_blocks"]) == (True, stats["swap_blocks"])


def test_a_failed_step_leaves_a_sound_tier(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails when some rows are planned and not fetched."""
    plain, tiered = pair(checkpoints["glm_moe_dsa"])
    first, second = prompts(1400, 1400, seed=7)
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(tiered.host_tier, "fetch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiered.generate([first], params, progress=False)
    for prompt in (first, second, first):
        assert tokens(answers(tiered, [prompt], params)) == tokens(answers(plain, [prompt], params))


@pytest.mark.parametrize("pool", [64 * 3, POOL])
def test_nothing_is_moved_or_fetched_while_pages_are_left(checkpoints: dict[str, Path], pool: int) -> None:
    """Even of fewer blocks than pages."""
    plain, tiered = pair(checkpoints["glm_moe_dsa"], pool)
    batch, params = prompts(100, 90), SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    assert tokens(answers(tiered, batch, params)) == tokens(answers(plain, batch, params))
    assert tiered.host_tier is not None
    assert not any(memory.any() for memory in tiered.host_tier.latent)
    assert tiered.engine.scheduler.stats()["fetched_rows"] == 0


def test_where_the_rows_are(checkpoints: dict[str, Path]) -> None:
    plain, tiered = pair(checkpoints["glm_moe_dsa"], hot_rows=100, kv_cache_dtype="fp8")
    tier, config = tiered.host_tier, tiered.config
    assert plain.host_tier is None
    assert tier is not None
    assert [cache.shape[0] for cache in tiered.caches.latent] == [20 + 2] * 4  # hot rows in whole blocks
    assert [memory.shape[0] for memory in tier.latent] == [24 + 6] * 4
    assert [None if memory is None else memory.shape[0] for memory in tier.index] == [6, None, 6, None]
    latent, index = latent_bytes_per_token(config, "fp8"), index_bytes_per_token(config, "fp8")
    assert tiered.caches.latent_bytes == 22 * 64 * latent
    assert tiered.caches.index_bytes == plain.caches.index_bytes == 24 * 64 * index
    assert tier.bytes == 64 * (30 * latent + 6 * index)


def test_a_gpus_host_memory_is_pinned_as_long_as_it_is_there(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, int] = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: pinned.update({address: size}) or 0,
        cudaHostUnregister=pinned.pop,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    _, tiered = pair(checkpoints["glm_moe_dsa"])
    monkeypatch.setattr(Placement, "is_gpu", True)
    limits = tiered.engine.scheduler.config
    tier = HostTier(tiered.caches, limits, Placement(torch.device("cpu"), "cpu"))
    memories = [memory for memory in (*tier.latent, *tier.index) if memory is not None]
    assert {(memory.data_ptr(), memory.nbytes) for memory in memories} <= set(pinned.items())
    assert len(pinned) == 6
    del tier, memories
    gc.collect()
    assert not pinned
    runtime.cudaHostRegister = lambda *_: 2
    with pytest.raises(MemoryError, match=r"kv_cache_tokens: \d+ bytes .* cannot be pinned \(CUDA error 2\)"):
        HostTier(tiered.caches, limits, Placement(torch.device("cpu"), "cpu"))


def test_warming_up_writes_no_row(checkpoints: dict[str, Path]) -> None:
    _, tiered = pair(checkpoints["glm_moe_dsa"])
    tier = tiered.host_tier
    assert tier is not None
    tiered.engine.runner.warm_up(64)
    for memory in (*tiered.caches.latent, *tier.latent, *tiered.caches.index, *tier.index):
        assert memory is None or not memory.any()


def test_pool_takes_what_memory_allows(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints["glm_moe_dsa"]
    options = {**SMALL, "device_latent_tokens": PAGES, "hot_rows": 64, "max_num_seqs": 3}
    config = LLM(path, **SMALL, kv_cache_tokens=64).config
    latent, index = 64 * latent_bytes_per_token(config, "float32"), 64 * index_bytes_per_token(config, "float32")
    # Rows of 21 blocks on the device, of 40 and of 10 kept ones on the host, index keys of 50.
    enough = 21 * latent + 50 * (latent + index)
    for memory, blocks in ((enough, 40), (enough - 1, 39)):
        free = int(memory / 0.4) + 1
        monkeypatch.setattr(placement, "available_memory", lambda free=free: free)
        assert LLM(path, **options).caches.num_blocks == blocks
    monkeypatch.setattr(placement, "available_memory", lambda: 10 * latent)
    with pytest.raises(MemoryError, match=r"kv_cache_tokens: .* beside the latent rows of device_latent_tokens"):
        LLM(path, **options)
    monkeypatch.setattr(placement, "total_memory", lambda: enough - 1)
    with pytest.raises(MemoryError, match=rf"kv_cache_tokens: the caches would take {enough} bytes"):
        LLM(path, **options, kv_cache_tokens=40 * 64)


def test_a_gpus_pool_counts_both_memories(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLM(checkpoints["glm_moe_dsa"], **SMALL, kv_cache_tokens=64).config
    latent, index = 64 * latent_bytes_per_token(config, "bfloat16"), 64 * index_bytes_per_token(config, "bfloat16")
    there = Placement(torch.device("cuda", 0), "triton")
    tier = cache_sizes.TierSize(pages=20, hot_blocks=4)
    sizes = {"device": 24 * latent + 100 * index, "host": 10**9}
    for name, method, share in (
        ("device", "available_memory", placement.GPU_MEMORY_SHARE),
        ("host", "available_host_memory", placement.HOST_MEMORY_SHARE),
    ):
        of = lambda self, name=name, share=share: None if sizes[name] is None else int(sizes[name] / share) + 1  # noqa: E731
        monkeypatch.setattr(Placement, method, of)

    def blocks(tier: cache_sizes.TierSize | None) -> int:
        return cache_sizes.blocks_that_fit(config, "bfloat16", 10**6, tier, there)

    assert blocks(tier) == 100
    sizes["host"] = 60 * latent + 15 * (latent + index)
    assert blocks(tier) == 60
    sizes["host"] = None  # type: ignore[assignment]
    assert blocks(None) == (24 * latent + 100 * index) // (latent + index)
    with pytest.raises(ValueError, match="kv_cache_tokens: expected a number"):
        blocks(tier)


@pytest.mark.parametrize("seqs", [1, 3, 70])
@pytest.mark.parametrize("batched", [1, 64, 65])
def test_fewest_pages_are_the_schedulers(seqs: int, batched: int) -> None:
    limits: dict[str, Any] = {"max_batched_tokens": batched, "max_num_seqs": seqs}
    with pytest.raises(ValueError, match="at least") as refused:
        cache_sizes.tier_size(1, None, selected=1, **limits)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0]) // 64
    SchedulerConfig(10, num_latent_blocks=least, **limits)
    with pytest.raises(ValueError, match="num_latent_blocks"):
        SchedulerConfig(10, num_latent_blocks=least - 1, **limits)
    size = cache_sizes.tier_size(least * 64, None, selected=10, **limits)
    assert size == cache_sizes.TierSize(least, -(-max(10, least * 16) // 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_latent_tokens": 0}, "device_latent_tokens: expected a positive integer, got 0"),
        (
            {"device_latent_tokens": 1216},
            "device_latent_tokens: expected at least 1280 with max_batched_tokens 64 and max_num_seqs 3 "
            "(lower these for fewer), got 1216",
        ),
        ({"hot_rows": 64}, "hot_rows: expected None without device_latent_tokens, got 64"),
        (
            {"device_latent_tokens": PAGES, "hot_rows": 23},
            "hot_rows: expected at least the 24 keys that a query selects, got 23",
        ),
        (
            {"device_latent_tokens": PAGES, "attention": "dense"},
            "device_latent_tokens: expected None with attention='dense', which reads every row, got 1280",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    checkpoints: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LLM(checkpoints["glm_moe_dsa"], **SMALL, **options)
