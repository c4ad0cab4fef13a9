"""What every side of bench_scheduler.py is timed on, and how: the same tokens, the same counts, the same clock."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator

RUNNING = (64, 256, 1024)
"""Decoding requests."""
PROMPT = 1024
STEPS = 200
"""Timed steps of each count, after WARM_STEPS."""
QUIET_STEPS, QUIET_RUNS = 600, 9
"""Steps whose times are taken apart from the machine's noise: the least of so many equal runs, step by step."""
WARM_STEPS = 20
LONG = 131_072
"""Tokens of a long prompt."""
BLOCK = 64
POOL_CALL = 16
POOL_CALLS = 64
CONVERSATIONS, TURNS, SYSTEM, TURN = 64, 8, 1024, 256
REPEATS = 9
VOCAB = 129_280
SAMPLED = 7

Rows = dict[str, list[float]]
"""Seconds of each repeat, by row."""


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def chat() -> list[list[int]]:
    """Prompts of conversations that take turns: all begin with one system prompt, each turn continues the last."""
    system = prompt(SYSTEM, seed=-1)
    conversations = [prompt(TURNS * TURN, seed=i) for i in range(CONVERSATIONS)]
    return [system + tokens[: (turn + 1) * TURN] for turn in range(TURNS) for tokens in conversations]


def timed(run: Callable[[], float], repeats: int = REPEATS) -> list[float]:
    """Seconds that `run` says it took, after one run that is not counted."""
    run()
    return [run() for _ in range(repeats)]


def steps(step: Callable[[], float], count: int = STEPS) -> Iterator[float]:
    """Seconds of each step, without pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    for _ in range(WARM_STEPS):  # behind the collection, which leaves the caches cold
        step()
    yield from (step() for _ in range(count))
    gc.enable()


class Clock:
    """`with Clock() as clock: ...; clock.seconds`."""

    def __enter__(self) -> Clock:
        self.seconds = 0.0
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin


def answer(version: str, rows: Rows) -> None:
    """A side's last line."""
    print(json.dumps({"version": version, "rows": rows}))
    sys.stdout.flush()
