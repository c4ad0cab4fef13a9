"""Preemption by swap, and what the host tier tells of a request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heedful import Scheduler, SchedulerConfig, Step

SIZE = 4


def scheduler(num_blocks: int = 8, **limits: Any) -> Scheduler:
    """Few blocks and as few latent pages as two requests may have."""
    defaults = {
        "max_batched_tokens": 32,
        "max_num_seqs": 2,
        "watermark": 0.0,
        "num_latent_blocks": 28,
        "hot_rows": 16,
        "preemption": "swap",
    }
    return Scheduler(SchedulerConfig(num_blocks, block_size=SIZE, **{**defaults, "num_swap_blocks": 8, **limits}))


def step_of(s: Scheduler) -> Step:
    step = s.schedule()
    assert step is not None
    s.check_invariants()
    return step


def update(s: Scheduler, step: Step) -> list[str]:
    ended = s.update(np.full(len(step.sample_rows), 7, np.int32))
    s.check_invariants()
    return [name for name, _ in ended]


def preempted(s: Scheduler, second: list[int] | None = None) -> Step:
    """Two requests of 3 blocks each and then some; the step in which the second gives its blocks away."""
    s.add("a", list(range(100, 112)), max_tokens=12)
    s.add("b", list(range(200, 212)) if second is None else second, max_tokens=12)
    for _ in range(12):
        step = step_of(s)
        if step.preempted:
            return step
        update(s, step)
    raise AssertionError("nobody gave way")


def test_kept_rows_are_named_moved_and_not_computed_anew() -> None:
    s = scheduler()
    computed = 0
    step = preempted(s)
    assert (step.preempted, step.swapped) == (["b"], ["b"])
    kept = s.explain("b")["kept_tokens"]
    assert kept == 16
    blocks, places = step.swap_outs.T.tolist()
    assert len(set(blocks)) == len(set(places)) == kept // SIZE
    assert max(places) < s.config.swap_blocks == 8
    # Rows that are on the device alone are stored, each page once.
    pages, homes = step.stores.T.tolist()
    assert len(set(pages)) == len(set(homes)) >= kept // SIZE
    assert max(homes) < s.config.host_blocks == 16
    assert s.stats()["free_swap_blocks"] == 4
    ended = update(s, step)
    while "a" not in ended:
        ended = update(s, step_of(s))
    step = step_of(s)
    assert step.request_ids == ["b"]
    account = s.explain("b")
    assert account["reused_tokens"] + account["restored_tokens"] == kept
    assert account["restored_tokens"] == 4 * len(step.swap_ins) > 0
    assert set(step.swap_ins[:, 0].tolist()) <= set(places)
    assert step.positions.tolist() == list(range(kept, kept + step.num_tokens))
    assert (account["kept_tokens"], account["preemptions"], account["swaps"]) == (0, 1, 1)
    computed += step.num_tokens
    assert s.stats()["free_swap_blocks"] == 4, "they are kept until the step is done"
    update(s, step)
    stats = s.stats()
    assert (stats["free_swap_blocks"], stats["swaps"]) == (8, 1)
    assert stats["restored_tokens"] == account["restored_tokens"]


def test_without_room_rows_are_computed_anew() -> None:
    s = scheduler(num_swap_blocks=3)
    step = preempted(s)
    assert (step.preempted, step.swapped, len(step.swap_outs)) == (["b"], [], 0)
    assert s.explain("b")["kept_tokens"] == 0


@pytest.mark.parametrize(("swap_cost", "swaps"), [(0.5, True), (1.5, False)])
def test_auto_takes_what_costs_less(swap_cost: float, swaps: bool) -> None:
    step = preempted(scheduler(preemption="auto", swap_cost=swap_cost))
    assert bool(step.swapped) == swaps


def test_auto_does_not_keep_what_another_request_uses() -> None:
    s = scheduler(7, preemption="auto", swap_cost=0.5)
    step = preempted(s, second=[*range(100, 112), 5])
    assert (step.preempted, step.swapped) == (["b"], [])


def test_a_failed_step_loses_what_it_kept() -> None:
    s = scheduler()
    preempted(s)
    s.abandon()
    s.check_invariants()
    assert s.explain("b")["kept_tokens"] == 0
    assert s.stats()["free_swap_blocks"] == 8
    while s.has_unfinished():
        update(s, step_of(s))


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_aborted_request_gives_its_places_back(in_flight: bool) -> None:
    s = scheduler()
    step = preempted(s)
    if in_flight:
        s.abort("b")
    update(s, step)
    if not in_flight:
        s.abort("b")
    s.check_invariants()
    assert s.stats()["free_swap_blocks"] == 8


def test_fetched_rows_are_counted_for_their_request() -> None:
    s = scheduler(60, num_latent_blocks=28, max_batched_tokens=32, max_num_seqs=2)
    for name, first in (("a", 0), ("b", 500)):
        s.add(name, list(range(first, first + 100)), max_tokens=8)
    while s.explain("b")["output_tokens"] < 2:
        step = step_of(s)
        for name, pages, table in zip(step.request_ids, step.latent_tables, step.block_tables, strict=True):
            slots = table[(pages < 0) & (table >= 0)][:2].astype(np.int64) * SIZE
            before = s.explain(name)["fetched_rows"]
            fetched = len(s.plan_fetch(0, np.concatenate([slots, slots]))[1])
            assert s.explain(name)["fetched_rows"] == before + fetched
        update(s, step)
    total = sum(s.explain(name)["fetched_rows"] for name in "ab")
    assert total == s.stats()["fetched_rows"] > 0


def test_restored_rows_are_fetched_before_any_step(tmp_path: Path) -> None:
    s = scheduler(12)
    pages, host, keys = (np.zeros((blocks, 3), np.uint8) for blocks in (28, s.config.host_blocks, 12))
    parts = {"latent": (pages, host), "index": keys}
    s.add("a", list(range(9)), max_tokens=1)
    step = step_of(s)
    pages[step.latent_tables[0]] = keys[step.block_tables[0]] = [[1] * 3, [2] * 3, [3] * 3]
    update(s, step)
    assert s.snapshot(tmp_path / "cache", parts, model="m") == 3
    other = scheduler(12)
    for part in (pages, host, keys):
        part[:] = 0
    assert other.restore(tmp_path / "cache", parts, model="m") == 3
    other.check_invariants()
    assert not pages.any()
    block = int(np.flatnonzero(keys[:, 0] == 2)[0])
    _, sources, _ = other.plan_fetch(0, np.array([block * SIZE + 1]))
    assert host[sources // SIZE].tolist() == [[2] * 3]
    with pytest.raises(ValueError, match="parts: expected a host tier's places beside the pages"):
        other.snapshot(tmp_path / "none", {"latent": pages, "index": keys}, model="m")
    with pytest.raises(ValueError, match='parts: expected 3 bytes a block of "latent" on the host too, got 2'):
        other.snapshot(tmp_path / "none", {"latent": (pages, host[:, :2].copy())}, model="m")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_latent_blocks": None}, "num_swap_blocks: expected 0 without a host tier (num_latent_blocks), got 8"),
        ({"num_swap_blocks": 0}, 'preemption: expected "auto" or "recompute" without room in a host tier'),
        ({"preemption": "drop"}, 'preemption: expected one of auto, recompute, swap, got "drop"'),
        ({"swap_cost": -1.0}, "swap_cost: expected a number of at least 0, got -1"),
        ({"swap_cost": float("nan")}, "swap_cost: expected a number of at least 0, got NaN"),
        ({"num_swap_blocks": 2**31 - 5}, "num_swap_blocks: expected no more than an int32 counts together"),
        ({"num_swap_blocks": -1}, "num_swap_blocks: expected a positive integer, got -1"),
    ],
)
def test_bad_limits_are_refused_by_name(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        scheduler(**limits)


def test_room_follows_the_pool_where_nothing_is_said() -> None:
    tier = {"num_latent_blocks": 28, "hot_rows": 16, "max_batched_tokens": 32, "max_num_seqs": 2, "block_size": SIZE}
    assert (SchedulerConfig(40, **tier).swap_blocks, SchedulerConfig(40, **tier).host_blocks) == (10, 50)
    assert SchedulerConfig(40, **tier, preemption="recompute").swap_blocks == 0
    assert (SchedulerConfig(40).swap_blocks, SchedulerConfig(40).host_blocks) == (0, 0)
