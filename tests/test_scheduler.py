"""The scheduler from Python: what a Step holds, what arguments may be, and how a bad call is refused."""

# ruff: noqa: E501 -- the tables of bad calls read best one call a line

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from heedful import Scheduler, SchedulerConfig, Step

INT32_MAX = 2**31 - 1


def scheduler(num_blocks: int = 8, **limits: Any) -> Scheduler:
    """Without a prefix cache, so that blocks and tokens can be counted by hand; test_prefix_cache.py has one."""
    return Scheduler(SchedulerConfig(num_blocks, **{"enable_prefix_caching": False, **limits}))


def sampled(step: Step, token: int = 7) -> np.ndarray:
    return np.full(len(step.sample_rows), token, dtype=np.int32)


def run(s: Scheduler) -> list[tuple[str, Any]]:
    """One step; who ended."""
    step = s.schedule()
    assert step is not None
    ended = s.update(sampled(step))
    s.check_invariants()
    return ended


def assert_serves(s: Scheduler) -> None:
    """Everything that is there is served to its end, and one more request; then every block is free."""
    s.check_invariants()
    if not s.has_unfinished():
        s.add("one more", [1, 2, 3], max_tokens=2)
    for _ in range(10_000):
        if not s.has_unfinished():
            break
        run(s)
    assert s.schedule() is None
    stats = s.stats()
    assert (stats["running"], stats["waiting"], stats["used_blocks"]) == (0, 0, 0)


# What a step holds


def test_a_step_has_the_documented_arrays() -> None:
    s = scheduler(max_batched_tokens=70)
    s.add("a", range(10, 13), max_tokens=4)
    s.add("b", np.arange(65), max_tokens=4)
    s.add("c", [5] * 10, max_tokens=4)
    step = s.schedule()
    assert step is not None
    arrays = {
        "token_ids": (np.int32, (70,)),
        "positions": (np.int64, (70,)),
        "slot_mapping": (np.int64, (70,)),
        "query_start_loc": (np.int32, (4,)),
        "seq_lens": (np.int32, (3,)),
        "block_tables": (np.int32, (3, 2)),
        "sample_rows": (np.int32, (2,)),
        "sample_request": (np.int32, (2,)),
    }
    for name, (dtype, shape) in arrays.items():
        array = getattr(step, name)
        assert isinstance(array, np.ndarray), name
        assert (array.dtype, array.shape) == (dtype, shape), name
        assert array.flags.c_contiguous, name
        assert array is getattr(step, name), f"{name} is made once"
    assert (step.num_tokens, step.num_seqs) == (70, 3)
    assert step.request_ids == ["a", "b", "c"]
    assert step.token_ids.tolist() == [10, 11, 12, *range(65), 5, 5]
    assert step.positions.tolist() == [*range(3), *range(65), 0, 1]
    assert step.slot_mapping.tolist() == [*range(3), *range(64, 64 + 65), 192, 193]
    assert step.query_start_loc.tolist() == [0, 3, 68, 70]
    assert step.seq_lens.tolist() == [3, 65, 2]
    assert step.block_tables.tolist() == [[0, -1], [1, 2], [3, -1]]
    assert step.sample_rows.tolist() == [2, 67]  # c is cut: nothing of it is sampled
    assert step.sample_request.tolist() == [0, 1]
    assert step.preempted == []
    assert repr(step) == "Step(num_tokens=70, num_seqs=3, preempted=[])"


def test_a_step_without_samples_has_empty_rows() -> None:
    s = scheduler(max_batched_tokens=4)
    s.add("a", range(6), max_tokens=1)
    step = s.schedule()
    assert step is not None
    assert (step.sample_rows.shape, step.sample_request.shape) == ((0,), (0,))
    assert s.update(np.empty(0, np.int32)) == []
    assert_serves(s)


def test_a_steps_lists_are_made_once() -> None:
    """A getter that builds its list anew makes every loop over the requests quadratic."""
    s = scheduler()
    s.add("a", [1], max_tokens=1)
    step = s.schedule()
    assert step is not None
    assert step.request_ids is step.request_ids
    assert step.preempted is step.preempted


def test_a_steps_arrays_outlive_the_next_steps_and_the_scheduler() -> None:
    s = scheduler(block_size=4)
    s.add("a", range(5), max_tokens=20)
    steps = []
    while s.has_unfinished():
        step = s.schedule()
        assert step is not None
        steps.append(step)
        s.update(sampled(step))
    first = steps[0].slot_mapping
    first[:] = -9  # the arrays are the step's own
    s.add("b", range(5), max_tokens=1)
    second = s.schedule()
    assert second is not None
    del s
    gc.collect()
    assert second.slot_mapping.tolist() == [0, 1, 2, 3, 4]
    assert [step.positions.tolist() for step in steps] == [[0, 1, 2, 3, 4], *([p] for p in range(5, 24))]
    assert first.tolist() == [-9] * 5


def test_preemption_is_named_and_computed_anew() -> None:
    s = scheduler(4, block_size=4, watermark=0)
    s.add("a", range(8), max_tokens=2)
    s.add("b", range(8), max_tokens=3)
    assert run(s) == []
    step = s.schedule()
    assert step is not None
    assert (step.request_ids, step.preempted) == (["a"], ["b"])
    assert (s.num_running, s.num_waiting, s.stats()["preemptions"]) == (1, 1, 1)
    assert s.update(sampled(step)) == [("a", "length")]
    step = s.schedule()
    assert step is not None
    assert step.token_ids.tolist() == [*range(8), 7]
    assert s.update(sampled(step)) == []
    assert s.output_token_ids("b").tolist() == [7, 7]
    assert_serves(s)


def test_priority_is_the_lower_number_first() -> None:
    s = scheduler(policy="priority", max_num_seqs=1)
    for name, priority in (("later", 3), ("first", -2), ("last", 2**63 - 1)):
        s.add(name, [1], max_tokens=1, priority=priority)
    assert [run(s), run(s), run(s)] == [[("first", "length")], [("later", "length")], [("last", "length")]]


def test_stop_tokens_end_a_request_and_belong_to_it() -> None:
    s = scheduler()
    s.add("a", [1], max_tokens=9, stop_token_ids=[7])
    step = s.schedule()
    assert step is not None
    assert s.token_ids("a").tolist() == [1]
    assert s.update(sampled(step)) == [("a", "stop")]
    assert_serves(s)


@pytest.mark.parametrize("prompt_len", [63, 64, 65, 127, 128])
def test_a_request_that_outgrows_the_pool_ends_by_length(prompt_len: int) -> None:
    s = scheduler(2)
    s.add("a", range(prompt_len), max_tokens=10**9)
    steps = 1
    while not (ended := run(s)):
        steps += 1
    assert ended == [("a", "length")]
    assert steps == max(128 - prompt_len, 1)
    assert_serves(s)


def test_abort_ends_at_once_and_blocks_follow_when_no_step_writes_them() -> None:
    s = scheduler(max_num_seqs=1)
    s.add("a", [1] * 65, max_tokens=9)
    s.add("b", [1], max_tokens=9)
    assert s.abort("b")  # waiting
    assert not s.abort("b")
    step = s.schedule()
    assert step is not None
    assert s.abort("a")  # in flight
    assert not s.has_unfinished()
    assert s.stats()["used_blocks"] == 2
    s.add("a", [2], max_tokens=1)  # its name is free
    assert s.update(sampled(step)) == []
    assert s.stats()["used_blocks"] == 0
    assert run(s) == [("a", "length")]
    s.add("c", [1], max_tokens=9)
    run(s)
    assert s.abort("c")  # between steps
    assert s.stats()["used_blocks"] == 0
    assert_serves(s)


def test_stats_count() -> None:
    s = scheduler(4, block_size=4)
    s.add("a", range(5), max_tokens=2)
    s.add("b", range(3), max_tokens=1)
    s.add("c", range(3), max_tokens=1)
    s.abort("c")
    assert (s.num_running, s.num_waiting) == (0, 2)
    assert run(s) == [("b", "length")]
    stats = s.stats()
    assert {name: count for name, count in stats.items() if count} == {
        "running": 1,
        "total_blocks": 4,
        "free_blocks": 2,
        "used_blocks": 2,
        "peak_used_blocks": 3,
        "steps": 1,
        "scheduled_tokens": 8,
        "queried_tokens": 8,
        "finished": 1,
        "aborted": 1,
    }
    assert {"waiting", "waiting_tokens", "cached_blocks", "evict_age_steps", "hit_age_steps"} < set(stats)


def test_config_says_what_it_is() -> None:
    config = SchedulerConfig(np.int32(9), max_waiting=3)  # type: ignore[arg-type]  # numpy's ints are ints here
    assert (config.num_blocks, config.block_size, config.max_batched_tokens) == (9, 64, 8192)
    assert (config.max_num_seqs, config.policy, config.max_waiting) == (256, "fcfs", 3)
    assert (config.watermark, config.max_model_len) == (0.01, None)
    assert Scheduler(config).config == config != SchedulerConfig(9)
    assert "num_blocks=9, block_size=64" in repr(config)


# Token ids come in many shapes


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        [np.int64(3), np.int8(1), 2],
        bytes([3, 1, 2]),
        np.array([3, 1, 2], np.int64),
        np.array([3, 1, 2], np.int32),
        np.array([3, 1, 2], np.uint32),
        np.array([3, 1, 2], np.uint8),
        np.array([3, 1, 2], np.uint64),
        np.array([3, 1, 2], ">i4"),
        np.array([3, 9, 1, 9, 2])[::2],
        np.array([[3, 9], [1, 9], [2, 9]], np.int32)[:, 0],
        np.array([2, 1, 3])[::-1],
        np.frombuffer(b"\0" + np.array([3, 1, 2], np.int32).tobytes(), np.int32, offset=1),
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}-{getattr(ids, 'strides', '')}",
)
def test_ids_of_any_integer_sequence_are_taken(ids: Any) -> None:
    s = scheduler()
    s.add("a", ids, max_tokens=1)
    s.add("b", [5], max_tokens=9, stop_token_ids=ids)
    assert s.token_ids("a").tolist() == [3, 1, 2]
    step = s.schedule()
    assert step is not None
    assert s.update(sampled(step, 2)) == [("a", "length"), ("b", "stop")]


def test_the_prompt_is_copied() -> None:
    s = scheduler()
    ids = np.arange(3)
    s.add("a", ids, max_tokens=1)
    ids[:] = 9
    assert s.token_ids("a").tolist() == [0, 1, 2]


def test_sampled_ids_may_be_a_strided_or_unaligned_array() -> None:
    unaligned = np.frombuffer(b"\0" + np.array([3, 1], np.int32).tobytes(), np.int32, offset=1)
    for ids in (np.array([[3, 9], [1, 9]], np.int32)[:, 0], unaligned):
        s = scheduler()
        s.add("a", [1], max_tokens=2)
        s.add("b", [1], max_tokens=2)
        s.schedule()
        s.update(ids)
        assert (s.output_token_ids("a").tolist(), s.output_token_ids("b").tolist()) == ([3], [1])


# Bad calls: each names its argument and changes nothing


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks: expected an integer from 1 to 2147483647, got 0"),
        ({"num_blocks": -1}, ValueError, "num_blocks: expected a positive integer, got -1"),
        ({"num_blocks": 2**31}, ValueError, "num_blocks: expected an integer from 1 to 2147483647, got 2147483648"),
        ({"num_blocks": 2**70}, ValueError, "num_blocks: expected an integer of 64 bits, got int"),
        ({"num_blocks": 3.0}, TypeError, "num_blocks: expected an integer of 64 bits, got float"),
        ({"num_blocks": None}, TypeError, "num_blocks: expected an integer of 64 bits, got NoneType"),
        ({"num_blocks": "3"}, TypeError, "num_blocks: expected an integer of 64 bits, got str"),
        ({"block_size": 0}, ValueError, "block_size: "),
        ({"block_size": -64}, ValueError, "block_size: "),
        ({"max_batched_tokens": 0}, ValueError, "max_batched_tokens: "),
        ({"max_batched_tokens": 2**31}, ValueError, "max_batched_tokens: "),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs: "),
        ({"max_num_seqs": []}, TypeError, "max_num_seqs: "),
        (
            {"policy": "lifo"},
            ValueError,
            'policy: expected one of fcfs, priority, longest_prefix, fair, deadline, got "lifo"',
        ),
        ({"policy": 3}, TypeError, "policy: expected valid Unicode text, got int"),
        ({"max_waiting": 0}, ValueError, "max_waiting: expected an integer from 1 to 2147483647, got 0"),
        ({"max_waiting": -1}, ValueError, "max_waiting: "),
        ({"max_model_len": 0}, ValueError, "max_model_len: "),
        ({"max_model_len": 1.5}, TypeError, "max_model_len: "),
        ({"watermark": float("nan")}, ValueError, "watermark: expected a number from 0 to below 1, got NaN"),
        ({"watermark": float("inf")}, ValueError, "watermark: "),
        ({"watermark": -0.01}, ValueError, "watermark: "),
        ({"watermark": 1.0}, ValueError, "watermark: "),
        ({"watermark": "much"}, TypeError, "watermark: expected a number, got str"),
    ],
)
def test_bad_limits_are_refused_by_name(limits: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        SchedulerConfig(**{"num_blocks": 4, **limits})
    assert str(raised.value).startswith(message)


def test_a_scheduler_needs_a_config() -> None:
    with pytest.raises(TypeError):
        Scheduler(8)  # type: ignore[arg-type]


class Endless(Sequence[int]):
    """A sequence that lies about its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        raise ZeroDivisionError

    def __iter__(self) -> Iterator[int]:
        raise ZeroDivisionError


OK: dict[str, Any] = {"request_id": "b", "token_ids": [1], "max_tokens": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"request_id": "a"}, ValueError, 'request_id: "a" is in use'),
        ({"request_id": 3}, TypeError, "request_id: expected valid Unicode text, got int"),
        ({"request_id": "\ud800"}, ValueError, "request_id: expected valid Unicode text, got str"),
        ({"token_ids": []}, ValueError, "token_ids: expected at least one token, got an empty prompt"),
        ({"token_ids": np.empty(0, np.int64)}, ValueError, "token_ids: expected at least one token"),
        ({"token_ids": [1, -1]}, ValueError, "token_ids: expected ids from 0 to 2147483647, got -1"),
        ({"token_ids": [2**31]}, ValueError, "token_ids: expected ids from 0 to 2147483647, got 2147483648"),
        ({"token_ids": [2**70]}, ValueError, "token_ids: expected ids from 0 to 2147483647, got one beyond 64 bits"),
        ({"token_ids": np.array([-1], np.int32)}, ValueError, "token_ids: expected ids from 0 to 2147483647, got -1"),
        ({"token_ids": np.array([2**31], np.uint32)}, ValueError, "token_ids: expected ids from 0 to 2147483647, got 2147483648"),
        ({"token_ids": np.array([2**64 - 1], np.uint64)}, ValueError, "token_ids: expected ids from 0 to 2147483647, got one beyond 64 bits"),
        ({"token_ids": [1.5]}, TypeError, "token_ids: expected a list of ints or an integer array, got list"),
        ({"token_ids": "text"}, TypeError, "token_ids: expected a list of ints or an integer array, got str"),
        ({"token_ids": None}, TypeError, "token_ids: expected a list of ints or an integer array, got NoneType"),
        ({"token_ids": {1, 2}}, TypeError, "token_ids: expected a list of ints or an integer array, got set"),
        ({"token_ids": [[1]]}, TypeError, "token_ids: expected a list of ints or an integer array, got list"),
        ({"token_ids": np.ones(2)}, TypeError, "token_ids: expected a list of ints or an integer array, got ndarray of float64 (2,)"),
        ({"token_ids": np.ones(2, bool)}, TypeError, "token_ids: expected a list of ints or an integer array, got ndarray of bool (2,)"),
        ({"token_ids": np.ones((1, 2), int)}, TypeError, "token_ids: expected a list of ints or an integer array, got ndarray of int64 (1, 2)"),
        ({"token_ids": np.array(3)}, TypeError, "token_ids: expected a list of ints or an integer array, got ndarray of int64 ()"),
        ({"token_ids": range(100)}, ValueError, "token_ids: expected fewer than 100 tokens (max_model_len), got 100"),
        ({"token_ids": range(65)}, ValueError, "token_ids: expected at most 64 tokens (num_blocks * block_size), got 65"),
        ({"token_ids": range(2**40)}, ValueError, "token_ids: expected fewer than 100 tokens (max_model_len), got 1099511627776"),
        ({"token_ids": range(2**64)}, ValueError, "token_ids: expected fewer ids than memory can hold"),
        ({"token_ids": Endless(3)}, ZeroDivisionError, ""),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected at least 1, got 0"),
        ({"max_tokens": -1}, ValueError, "max_tokens: expected a positive integer, got -1"),
        ({"max_tokens": 2**64}, ValueError, "max_tokens: expected an integer of 64 bits, got int"),
        ({"max_tokens": 1.0}, TypeError, "max_tokens: expected an integer of 64 bits, got float"),
        ({"priority": 2**63}, ValueError, "priority: expected an integer of 64 bits, got int"),
        ({"priority": "high"}, TypeError, "priority: expected an integer of 64 bits, got str"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids: expected ids from 0 to 2147483647, got -1"),
        ({"stop_token_ids": [2**31]}, ValueError, "stop_token_ids: expected ids from 0 to 2147483647, got 2147483648"),
        ({"stop_token_ids": 3}, TypeError, "stop_token_ids: expected a list of ints or an integer array, got int"),
        ({"stop_token_ids": range(2**62)}, MemoryError, "stop_token_ids: no memory for 4611686018427387904 ids"),
        ({"stop_token_ids": Endless(2**62)}, MemoryError, "stop_token_ids: no memory for 4611686018427387904 ids"),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_bad_request_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    s = scheduler(4, block_size=16, max_model_len=100, max_waiting=2)
    s.add("a", [1, 2], max_tokens=3)
    before = s.stats()
    with pytest.raises(error) as raised:
        s.add(**{**OK, **change})
    assert str(raised.value).startswith(message)
    assert s.stats() in (before, before | {"refused_invalid": 1})
    s.add(**OK)
    assert_serves(s)


def test_a_full_queue_refuses_until_there_is_room() -> None:
    s = scheduler(max_waiting=2)
    s.add("a", [1], max_tokens=1)
    s.add("b", [1], max_tokens=1)
    with pytest.raises(RuntimeError, match=r"the waiting queue is full: 2 requests wait \(max_waiting\)"):
        s.add("c", [1], max_tokens=1)
    assert s.stats()["refused_full"] == 1
    run(s)
    s.add("c", [1], max_tokens=1)
    assert_serves(s)


BAD_SAMPLES: list[tuple[Any, type[Exception], str]] = [
    (np.array([1], np.int32), ValueError, "sampled_ids: expected 2 ids, one a sample row, got 1"),
    (np.array([1, 2, 3], np.int32), ValueError, "sampled_ids: expected 2 ids, one a sample row, got 3"),
    (np.array([1, -2], np.int32), ValueError, "sampled_ids: expected ids of at least 0, got -2"),
    (np.array([1, 2]), ValueError, "sampled_ids: expected an int32 array [n], got ndarray of int64 (2,)"),
    (np.array([1, 2], np.float32), ValueError, "sampled_ids: expected an int32 array [n], got ndarray of float32 (2,)"),
    (np.array([[1, 2]], np.int32), ValueError, "sampled_ids: expected an int32 array [n], got ndarray of int32 (1, 2)"),
    ([1, 2], TypeError, "sampled_ids: expected an int32 array [n], got list"),
    (None, TypeError, "sampled_ids: expected an int32 array [n], got NoneType"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_SAMPLES)
def test_a_bad_update_is_refused_and_the_step_stays(ids: Any, error: type[Exception], message: str) -> None:
    s = scheduler()
    s.add("a", [1], max_tokens=2)
    s.add("b", [1], max_tokens=1)
    step = s.schedule()
    assert step is not None
    before = s.stats()
    with pytest.raises(error) as raised:
        s.update(ids)
    assert str(raised.value) == message
    assert s.stats() == before
    s.check_invariants()
    assert s.update(sampled(step)) == [("b", "length")]
    assert_serves(s)


def test_calls_out_of_turn_are_refused() -> None:
    s = scheduler()
    with pytest.raises(RuntimeError, match="update: there is no step to update"):
        s.update(np.empty(0, np.int32))
    assert s.schedule() is None
    s.add("a", [1], max_tokens=1)
    step = s.schedule()
    assert step is not None
    with pytest.raises(RuntimeError, match="schedule: the last step has not been updated"):
        s.schedule()
    assert s.update(sampled(step)) == [("a", "length")]
    with pytest.raises(RuntimeError, match="update: there is no step to update"):
        s.update(sampled(step))
    assert_serves(s)


def test_unknown_names_are_refused() -> None:
    s = scheduler()
    for call in (s.token_ids, s.output_token_ids):
        with pytest.raises(ValueError, match='request_id: there is no request "a"'):
            call("a")
        with pytest.raises(TypeError, match="request_id: expected valid Unicode text, got int"):
            call(3)  # type: ignore[arg-type]
    assert s.abort("a") is False
    with pytest.raises(TypeError, match="request_id: expected valid Unicode text, got NoneType"):
        s.abort(None)  # type: ignore[arg-type]


def test_the_largest_limits_cost_nothing() -> None:
    s = scheduler(INT32_MAX, block_size=INT32_MAX, max_batched_tokens=INT32_MAX, max_num_seqs=INT32_MAX)
    s.add("a", [1], max_tokens=2**63 - 1, stop_token_ids=[7])
    assert run(s) == [("a", "stop")]
    assert_serves(s)


def test_ids_may_call_the_scheduler_while_they_are_read() -> None:
    s = scheduler()
    s.add("a", [1], max_tokens=1)

    class Meddler:
        def __index__(self) -> int:
            s.abort("a")
            s.check_invariants()
            return 5

    s.add("b", [Meddler()], max_tokens=1)  # type: ignore[list-item]
    assert s.stats()["aborted"] == 1
    assert_serves(s)
