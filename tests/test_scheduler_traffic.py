"""The scheduler in use: random traffic over a toy model that reads its cache through the block tables, and threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import Scheduler, SchedulerConfig, Step


@dataclass
class Traffic:
    """Random requests over a toy model, whose cache rows and tokens are hashes of the whole prefix."""

    s: Scheduler
    rng: random.Random
    cache: dict[int, int] = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    stops: dict[str, list[int]] = field(default_factory=dict)
    preemptions: int = 0

    def add(self) -> None:
        config = self.s.config
        edge = config.block_size * self.rng.randint(1, 2) + self.rng.randint(-1, 1)
        length = max(1, min(self.rng.choice([1, 5, edge]), config.num_blocks * config.block_size - 1))
        name = f"request-{len(self.prompts)}"
        self.prompts[name] = [self.rng.randrange(50) for _ in range(length)]
        self.outputs[name] = []
        self.stops[name] = self.rng.sample(range(50), self.rng.randint(0, 2))
        self.s.add(
            name,
            self.prompts[name],
            max_tokens=self.rng.randint(1, 20),
            priority=self.rng.randint(0, 2),
            stop_token_ids=self.stops[name],
        )

    def alone(self, name: str, count: int) -> list[int]:
        """The first tokens that a request gets when it is served alone."""
        row, out = 0, []
        tokens = list(self.prompts[name])
        for position in range(len(tokens) + count - 1):
            row = hash((row, tokens[position]))
            if position >= len(self.prompts[name]) - 1:
                out.append(row % 50)
                tokens.append(row % 50)
        return out

    def compute(self, step: Step) -> np.ndarray:
        """The toy model, from the arrays of the step alone."""
        size = self.s.config.block_size
        for source, target in step.copies.tolist():
            for offset in range(size):
                self.cache[target * size + offset] = self.cache.get(source * size + offset, -1)
        for place in range(step.num_seqs):
            for i in range(step.query_start_loc[place], step.query_start_loc[place + 1]):
                position = int(step.positions[i])
                row = 0
                if position > 0:
                    block = int(step.block_tables[place, (position - 1) // size])
                    row = self.cache[block * size + (position - 1) % size]
                self.cache[int(step.slot_mapping[i])] = hash((row, int(step.token_ids[i])))
            assert step.positions[step.query_start_loc[place + 1] - 1] == step.seq_lens[place] - 1
        rows = (self.cache[int(step.slot_mapping[i])] for i in step.sample_rows)
        return np.array([row % 50 for row in rows], dtype=np.int32)

    def step(self, between: Callable[[Step], None] = lambda step: None) -> None:
        step = self.s.schedule()
        if step is None:
            assert not self.s.has_unfinished()
            return
        self.s.check_invariants()
        self.preemptions += len(step.preempted)
        assert 1 <= step.num_tokens <= self.s.config.max_batched_tokens
        assert step.num_seqs <= self.s.config.max_num_seqs
        ids = self.compute(step)
        between(step)
        ended = dict(self.s.update(ids))
        self.s.check_invariants()
        for place, token in zip(step.sample_request, ids, strict=True):
            name = step.request_ids[place]
            if name in self.outputs:
                self.outputs[name].append(int(token))
                assert (ended.get(name) == "stop") == (int(token) in self.stops[name])
        for name in ended:
            output = self.outputs.pop(name)
            assert output == self.alone(name, len(output)), name

    def abort_one(self) -> None:
        if self.outputs:
            name = self.rng.choice(sorted(self.outputs))
            assert self.s.abort(name)
            del self.outputs[name]

    def drain(self) -> None:
        for _ in range(20_000):
            if not self.s.has_unfinished():
                break
            self.step()
        assert self.outputs == {}
        assert self.s.stats()["used_blocks"] == 0


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.sampled_from([(64, 3), (64, 5), (16, 6), (4, 12), (1, 40)]),
    budget=st.sampled_from([1, 16, 100]),
    max_num_seqs=st.sampled_from([1, 4, 64]),
    policy=st.sampled_from(["fcfs", "priority"]),
    watermark=st.sampled_from([0.0, 0.01, 0.4]),
    seed=st.integers(0, 2**32),
)
def test_random_traffic_gives_every_request_what_it_gets_alone(
    blocks: tuple[int, int], budget: int, max_num_seqs: int, policy: Any, watermark: float, seed: int
) -> None:
    s = Scheduler(
        SchedulerConfig(
            blocks[1],
            block_size=blocks[0],
            max_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            policy=policy,
            watermark=watermark,
        )
    )
    rng = random.Random(seed)
    traffic = Traffic(s, rng)
    for _ in range(30):
        for _ in range(rng.randint(0, 2)):
            traffic.add()
        if rng.random() < 0.1:
            traffic.abort_one()
        traffic.step(lambda step: traffic.abort_one() if rng.random() < 0.1 else None)
    traffic.drain()


def test_a_long_run_with_many_preemptions() -> None:
    traffic = Traffic(
        Scheduler(SchedulerConfig(10, block_size=4, max_batched_tokens=32, watermark=0.0)), random.Random(1)
    )
    for _ in range(1500):
        if traffic.s.num_waiting < 4:
            traffic.add()
        traffic.step()
    traffic.drain()
    stats = traffic.s.stats()
    assert stats["finished"] == len(traffic.prompts) > 300
    assert stats["preemptions"] == traffic.preemptions > 100
    assert stats["cached_tokens"] > 500
    assert stats["peak_used_blocks"] == 10


def test_threads_share_a_scheduler() -> None:
    s = Scheduler(SchedulerConfig(64, block_size=4, max_batched_tokens=64))
    count, errors, done = 100, [], threading.Event()

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def target() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                done.set()

        return threading.Thread(target=target)

    class Slow:
        """An id that lets other threads run while it is read."""

        def __index__(self) -> int:
            threading.Event().wait(0.0001)
            return 3

    def client(name: str) -> None:
        for number in range(count):
            s.add(f"{name}{number}", [Slow(), 2, 3], max_tokens=1 + number % 5)  # type: ignore[list-item]
            if number % 7 == 0:
                s.abort(f"{name}{number}")

    def server() -> None:
        while not done.is_set():
            step = s.schedule()
            if step is not None:
                s.update(np.zeros(len(step.sample_rows), dtype=np.int32))

    def observer() -> None:
        while not done.is_set():
            s.check_invariants()
            assert s.stats()["total_blocks"] == 64

    clients = [guarded(lambda name=name: client(name)) for name in ("a", "b")]  # type: ignore[misc]
    others = [guarded(server), guarded(observer)]
    for thread in (*clients, *others):
        thread.start()
    for thread in clients:
        thread.join(60)
    done.set()
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    step = s.schedule()
    while step is not None:
        s.update(np.zeros(len(step.sample_rows), dtype=np.int32))
        step = s.schedule()
    s.check_invariants()
    stats = s.stats()
    assert stats["finished"] + stats["aborted"] == 2 * count
    assert stats["used_blocks"] == 0
