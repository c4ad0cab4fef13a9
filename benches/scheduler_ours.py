"""heedful's side of bench_scheduler.py, all of it through the Python binding."""

from __future__ import annotations

import numpy as np

from heedful import Scheduler, SchedulerConfig, __version__
from heedful._core import BlockPool, PrefixCache
from scheduler_workload import (
    BLOCK,
    LONG,
    POOL_CALL,
    POOL_CALLS,
    PROMPT,
    QUIET_RUNS,
    QUIET_STEPS,
    RUNNING,
    SAMPLED,
    STEPS,
    Clock,
    Rows,
    answer,
    chat,
    prompt,
    steps,
    timed,
)


def decode(prompts: list[np.ndarray], count: int = STEPS) -> tuple[list[float], list[float]]:
    """Steps of decoding requests: schedule() and update() together, and schedule() alone."""
    running = len(prompts)
    blocks = (PROMPT // BLOCK + 24) * running + 1024
    scheduler = Scheduler(SchedulerConfig(blocks, BLOCK, max_batched_tokens=16_384, max_num_seqs=running))
    for i, tokens in enumerate(prompts):
        scheduler.add(str(i), tokens, max_tokens=100_000)

    alone: list[float] = []
    while True:
        step = scheduler.schedule()
        assert step is not None
        whole = step.num_seqs == step.num_tokens == running
        scheduler.update(np.full(len(step.sample_rows), SAMPLED, dtype=np.int32))
        if whole:
            break
    sampled = np.full(running, SAMPLED, dtype=np.int32)

    def one() -> float:
        with Clock() as planning:
            step = scheduler.schedule()
        assert step is not None
        assert step.num_seqs == running
        with Clock() as applying:
            scheduler.update(sampled)
        alone.append(planning.seconds)
        return planning.seconds + applying.seconds

    both = list(steps(one, count))
    return both, alone[-count:]


def pool() -> float:
    """Blocks out and back in calls of POOL_CALL."""
    blocks = BlockPool(POOL_CALL * POOL_CALLS * 2)
    with Clock() as clock:
        held = [blocks.allocate(POOL_CALL) for _ in range(POOL_CALLS)]
        for some in held:
            blocks.release(some)
    return clock.seconds / (POOL_CALL * POOL_CALLS)


def hit() -> list[float]:
    """A request whose long prompt is cached but for its last block: from add() to its end."""
    tokens = np.array(prompt(LONG), dtype=np.int32)
    scheduler = Scheduler(SchedulerConfig(4 * LONG // BLOCK, BLOCK, max_batched_tokens=16_384))
    sampled = np.array([SAMPLED], dtype=np.int32)

    def one() -> float:
        with Clock() as clock:
            scheduler.add("request", tokens, max_tokens=1)
            while scheduler.has_unfinished():
                step = scheduler.schedule()
                assert step is not None
                scheduler.update(sampled[: len(step.sample_rows)])
        return clock.seconds

    one()
    return timed(one)


def main() -> None:
    """Times every row."""
    rows: Rows = {}
    for running in RUNNING:
        prompts = [np.array(prompt(PROMPT, seed=i), dtype=np.int32) for i in range(running)]
        rows[f"step {running}"], rows[f"schedule {running}"] = decode(prompts)
        runs = [decode(prompts, QUIET_STEPS)[0] for _ in range(QUIET_RUNS)]
        rows[f"quiet {running}"] = [min(times) for times in zip(*runs, strict=True)]
    rows["pool"] = timed(pool, 40)
    tokens = np.array(prompt(LONG), dtype=np.int32)
    cache = PrefixCache(4 * LONG // BLOCK, BLOCK)

    def hashing() -> float:
        with Clock() as clock:
            cache.hash_blocks(tokens)
        return clock.seconds

    rows["hash"] = timed(hashing)
    cache.insert(tokens)

    def match() -> float:
        with Clock() as clock:
            found = cache.match(tokens)
        assert len(found) >= LONG // BLOCK - 1
        return clock.seconds

    rows["match"] = timed(match, 40)
    rows["hit"] = hit()
    prompts = [np.array(tokens, dtype=np.int32) for tokens in chat()]

    def turns() -> float:
        cache = PrefixCache(4096 * 4, BLOCK)
        with Clock() as clock:
            for tokens in prompts:
                cache.match(tokens)
                cache.insert(tokens)
        return clock.seconds / len(prompts)

    rows["chat"] = timed(turns)
    answer(__version__, rows)


if __name__ == "__main__":
    main()
