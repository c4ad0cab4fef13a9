"""What a replay gives: counts, percentiles and how they went over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)

_MAX_POINTS = 4096


class Point(NamedTuple):
    """State after a step; shares are of all blocks, and of all prompt tokens looked up so far."""

    time: float
    running: int
    waiting: int
    used_share: float
    hit_share: float


class Series:
    """Points over simulated time; when they grow many, every second one is dropped, again and again."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._every = 1
        self._seen = 0

    def add(self, point: Point) -> None:
        """One more step."""
        if self._seen % self._every == 0:
            self._points.append(point)
        self._seen += 1
        if len(self._points) == _MAX_POINTS:
            del self._points[1::2]
            self._every *= 2

    def columns(self) -> dict[str, list[float]]:
        """The points by name of what they hold."""
        return {name: [getattr(point, name) for point in self._points] for name in Point._fields}


@dataclass
class ReplayResult:
    """What came of a trace. Times are simulated seconds, but for `scheduler_seconds`.

    Args:
        requests: how many there were.
        finished: that came to their end.
        refused: that the scheduler did not take, with the reason of the first.
        elapsed: from the first arrival to the last token.
        steps, prompt_tokens, output_tokens, preemptions: counts; prompt tokens are those of requests that were taken.
        cached_tokens: prompt tokens that were found in the prefix cache.
        peak_running: requests that ran at the same time, at most.
        ttft: seconds from arrival to first token, one for each finished request.
        tpot: seconds a token after the first, one for each finished request with more than one.
        step_seconds: CPU seconds that schedule() and update() took together, one for each step.
        stats: the scheduler's own counts at the end.
        series: how it went.
    """

    requests: int
    finished: int
    refused: int
    refusal: str | None
    elapsed: float
    steps: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    peak_running: int
    ttft: Sequence[float]
    tpot: Sequence[float]
    step_seconds: Sequence[float]
    stats: dict[str, int]
    series: Series

    @property
    def hit_share(self) -> float:
        """Share of prompt tokens that were found in the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def throughput(self) -> float:
        """Generated tokens a simulated second."""
        return self.output_tokens / self.elapsed if self.elapsed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: percentiles in place of the lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        counts = {
            name: value for name, value in values.items() if value is None or isinstance(value, (int, float, str))
        }
        return {
            **counts,
            "hit_share": self.hit_share,
            "output_tokens_per_second": self.throughput,
            "ttft": percentiles(self.ttft),
            "tpot": percentiles(self.tpot),
            "scheduler_step": percentiles(self.step_seconds),
            "stats": self.stats,
            "series": self.series.columns(),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The percentiles and the largest; None of nothing."""
    if not len(values):
        return None
    found = np.percentile(np.asarray(values), PERCENTILES)
    named = {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
    return {**named, "max": float(max(values))}
