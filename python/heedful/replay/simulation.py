"""The loop: requests arrive, the scheduler plans, a cost model says how long it took, invented tokens come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from heedful._core import Scheduler, SchedulerConfig, Step
from heedful.replay.cost import CostModel
from heedful.replay.executor import Executor
from heedful.replay.result import Point, ReplayResult, Series
from heedful.replay.trace import TraceRequest

_SAMPLED = 7  # the id of every generated token; requests have no stop tokens


def replay(
    trace: Sequence[TraceRequest],
    config: SchedulerConfig,
    cost: CostModel,
    *,
    speed: float = 1.0,
    check_every: int = 0,
    on_progress: Callable[[int], None] = lambda ended: None,
) -> ReplayResult:
    """Runs a trace through a scheduler, in simulated time.

    Args:
        trace: the requests, in the order of arrival.
        config: the scheduler's.
        cost: how long a step takes.
        speed: how much faster the requests arrive than in the trace.
        check_every: `check_invariants` is asked after each so many steps; 0 asks at the end alone.
        on_progress: is told how many requests have ended or were refused.

    Returns:
        What came of it. Every request that was taken has finished, and no block is held.

    Raises:
        ValueError: speed is no positive number.
        RuntimeError: the scheduler has requests and plans nothing, or its state is wrong.
    """
    if not (np.isfinite(speed) and speed > 0):
        raise ValueError(f"speed: expected a positive number, got {speed}")
    return _Replay(trace, config, cost, speed).run(check_every, on_progress)


class _Replay:
    def __init__(self, trace: Sequence[TraceRequest], config: SchedulerConfig, cost: CostModel, speed: float) -> None:
        self.trace = trace
        self.arrivals = [request.arrival / speed for request in trace]
        self.scheduler = Scheduler(config)
        self.cost = cost
        self.executor = Executor(self.scheduler, cost)
        self.clock = 0.0
        self.arrived = 0
        self.first_token: dict[str, float] = {}
        self.result = ReplayResult(
            requests=len(trace),
            finished=0,
            refused=0,
            refusal=None,
            elapsed=0.0,
            steps=0,
            prompt_tokens=0,
            output_tokens=0,
            cached_tokens=0,
            preemptions=0,
            peak_running=0,
            ttft=[],
            tpot=[],
            step_seconds=[],
            stats={},
            series=Series(),
        )
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.step_seconds: list[float] = []

    def run(self, check_every: int, on_progress: Callable[[int], None]) -> ReplayResult:
        result, scheduler = self.result, self.scheduler
        while self.arrived < len(self.trace) or scheduler.has_unfinished():
            if not scheduler.has_unfinished():
                self.clock = max(self.clock, self.arrivals[self.arrived])
            self._take_arrivals()
            if scheduler.has_unfinished():
                self._step()
                if check_every and result.steps % check_every == 0:
                    scheduler.check_invariants()
            on_progress(result.finished + result.refused)
        scheduler.check_invariants()
        stats = scheduler.stats()
        if stats["used_blocks"]:
            raise RuntimeError(f"{stats['used_blocks']} blocks are held after the last request")
        result.elapsed = self.clock
        result.stats = stats
        result.cached_tokens = stats["cached_tokens"]
        result.preemptions = stats["preemptions"]
        result.ttft, result.tpot, result.step_seconds = self.ttft, self.tpot, self.step_seconds
        return result

    def _take_arrivals(self) -> None:
        while self.arrived < len(self.trace) and self.arrivals[self.arrived] <= self.clock:
            request = self.trace[self.arrived]
            try:
                self.scheduler.add(str(self.arrived), request.token_ids(), max_tokens=request.output_tokens)
                self.result.prompt_tokens += request.prompt_tokens
            except (ValueError, RuntimeError) as error:
                self.result.refused += 1
                self.result.refusal = self.result.refusal or str(error)
            self.arrived += 1

    def _step(self) -> None:
        scheduler, result = self.scheduler, self.result
        begin = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        if step is None:
            raise RuntimeError(f"the scheduler plans nothing, with {scheduler.num_waiting} requests waiting")
        self.clock += self.cost.seconds(np.diff(step.query_start_loc), step.seq_lens, self.executor.moved_bytes(step))
        self._note_first_tokens(step)
        sampled = np.full(len(step.sample_rows), _SAMPLED, dtype=np.int32)
        again = time.perf_counter()
        finished = scheduler.update(sampled)
        self.step_seconds.append(planned - begin + time.perf_counter() - again)
        result.steps += 1
        result.output_tokens += len(sampled)
        for name, _ in finished:
            self._note_finished(name)
        stats = scheduler.stats()
        result.peak_running = max(result.peak_running, stats["running"] + len(finished))
        queried = stats["queried_tokens"]
        used_share = stats["used_blocks"] / stats["total_blocks"]
        hit_share = stats["cached_tokens"] / queried if queried else 0.0
        result.series.add(Point(self.clock, stats["running"], stats["waiting"], used_share, hit_share))

    def _note_first_tokens(self, step: Step) -> None:
        # Only a request whose first token is not out yet is looked at closely: the rest are as many as the batch.
        names = step.request_ids
        for place in step.sample_request.tolist():
            name = names[place]
            if name not in self.first_token:
                self.first_token[name] = self.clock

    def _note_finished(self, name: str) -> None:
        index = int(name)
        first = self.first_token.pop(name)
        self.result.finished += 1
        self.ttft.append(first - self.arrivals[index])
        count = self.trace[index].output_tokens
        if count > 1:
            self.tpot.append((self.clock - first) / (count - 1))
