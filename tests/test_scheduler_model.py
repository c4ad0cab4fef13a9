"""The scheduler against its model: 50,000 random operations in 250 worlds."""

from __future__ import annotations

from collections import Counter

import pytest

import scheduler_model

WORLDS, OPERATIONS, PARTS = 250, 200, 5
MODEL_COUNTS = ("finished", "aborted", "forked", "abandoned", "operations", "snapshots", "reused", "restored")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_operations_keep_every_promise(part: int) -> None:
    totals: Counter[str] = Counter()
    for world in range(part, WORLDS, PARTS):
        model = scheduler_model.run(world, OPERATIONS)
        totals.update(model.s.stats())
        totals.update({name: getattr(model, name) for name in MODEL_COUNTS})
    # The worlds are worth their name.
    assert totals["operations"] == WORLDS // PARTS * OPERATIONS
    for name in (
        "stored_blocks",
        "loaded_blocks",
        "dropped_pages",
        "fetched_rows",
        "hot_row_hits",
        "preemptions",
        "cached_tokens",
        "forked",
        "copied_blocks",
        "accepted_tokens",
        "evicted_blocks",
        "abandoned",
        "reused",
        "restored",
        "restored_tokens",
        "swaps",
    ):
        assert totals[name] >= 10, (name, totals)
