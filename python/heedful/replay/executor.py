"""The simulated executor's memory traffic: which rows a step would read, and what of them the host tier has to send.

No model runs, so selections are invented: a decoding token selects k rows spread over its whole context, of which one
in `TURNOVER` is another at each step (indexers mostly select again what they selected before); a chunk of n prompt
tokens reads min(L, n k) rows. All layers are taken to select alike, so one layer is planned and its traffic is
multiplied.
"""

from __future__ import annotations

import numpy as np

from heedful._core import Scheduler, Step
from heedful.replay.cost import CostModel

TURNOVER = 16
"""One in so many selected rows changes at a step."""


class Executor:
    """Counts the bytes that cross the link to the host.

    Args:
        scheduler: whose steps are run.
        cost: sizes of the model.
    """

    def __init__(self, scheduler: Scheduler, cost: CostModel) -> None:
        self._scheduler = scheduler
        self._cost = cost
        self._block_size = scheduler.config.block_size
        self._tiered = scheduler.config.num_latent_blocks is not None
        self._steps = 0

    def moved_bytes(self, step: Step) -> float:
        """Bytes a step moves between device and host: latent pages and rows, index keys of preempted requests."""
        if not self._tiered:
            return 0.0
        self._steps += 1
        rows = self._block_size * (len(step.loads) + len(step.stores)) + self._fetched(step)
        keys = self._block_size * (len(step.swap_outs) + len(step.swap_ins))
        return float(rows) * self._cost.latent_bytes + float(keys) * self._cost.index_bytes

    def _fetched(self, step: Step) -> int:
        tables, lengths, queries = step.block_tables, step.seq_lens, np.diff(step.query_start_loc)
        slots = []
        for place, (length, count) in enumerate(zip(lengths.tolist(), queries.tolist(), strict=True)):
            positions = self._selected(length, count)
            slots.append(tables[place, positions // self._block_size] * self._block_size + positions % self._block_size)
        selected = np.concatenate(slots).astype(np.int64)
        most = self._scheduler.config.hot_rows  # what one plan may fetch
        pieces = (selected[begin : begin + most] for begin in range(0, len(selected), most))
        return sum(len(self._scheduler.plan_fetch(0, piece)[1]) for piece in pieces)

    def _selected(self, length: int, queries: int) -> np.ndarray:
        """Positions that the queries of one sequence select, int64, each once."""
        rows = min(length, queries * self._cost.top_k)
        if rows == length:
            return np.arange(length, dtype=np.int64)
        # One row out of each of k equal parts; the part's row changes every TURNOVER steps, in turn.
        part = np.arange(rows, dtype=np.int64)
        turn = (self._steps + part) // TURNOVER
        width = length // rows
        return part * width + (turn * 0x9E3779B1 + part * 0x85EBCA77) % width
