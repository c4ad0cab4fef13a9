"""Where a step's latent rows are with a host tier, and what each layer's selection fetches from it.

As long as every page of a step is on the device, its latent tables are read like any block tables and nothing here
costs anything. Otherwise a layer's selection becomes rows of the device: those in pages by the tables, the others by
the scheduler's plan, which sees each distinct row once. The host has to know which rows these are, so each layer with
an indexer waits for its selection; this is why steps are not recorded as graphs with a tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from heedful import Step
from heedful.engine.cache_layout import BLOCK_SIZE
from heedful.engine.caches import table_tensor
from heedful.engine.host_tier import HostTier
from heedful.engine.placement import to_device

PlanFetch = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""`heedful.Scheduler.plan_fetch`: a layer and slots -> rows, sources and targets."""

MOST_INDICES = 2**22
"""Selected keys looked at together, which bounds the memory this takes."""


class Part(NamedTuple):
    """Some of a step's queries whose rows are on the device together."""

    queries: slice
    rows: torch.Tensor
    """int32 [n, K]: the row of each selected key in the layer's cache; -1 for none."""
    sources: torch.Tensor
    """int64 [f]: rows of the host tier to fetch before."""
    targets: torch.Tensor
    """int64 [f]: where to."""


class StepRows:
    """The latent rows of one step.

    Args:
        tier: the host's part of the caches.
        step: after its moves.
        plan_fetch: of the scheduler that made the step.
    """

    def __init__(self, tier: HostTier, step: Step, plan_fetch: PlanFetch) -> None:
        def here(array: np.ndarray) -> torch.Tensor:
            return to_device(torch.from_numpy(array), tier.device)

        self.tier = tier
        self.slot_mapping = here(step.latent_slot_mapping)
        """[N] int64: the row of the latent caches that each token is written to."""
        self.tables = table_tensor(step.latent_tables, tier.device, tier.backend)
        """[B, M] int32: pages of each sequence, -1 where rows are on the host alone."""
        self.on_device = not ((step.latent_tables < 0) & (step.block_tables >= 0)).any()
        """Whether every row that the step may read has a page."""
        self._plan_fetch = plan_fetch
        self._parts: list[Part] = []
        if not self.on_device:
            self._block_tables = here(step.block_tables)
            self._sequences = here(np.repeat(np.arange(step.num_seqs), np.diff(step.query_start_loc)))[:, None]
            slots = tier.caches.num_blocks * BLOCK_SIZE
            # By slot of the pool; the last is for keys that are not wanted.
            self._wanted = torch.zeros(slots + 1, dtype=torch.bool, device=tier.device)
            self._row_of_slot = torch.zeros(slots + 1, dtype=torch.int32, device=tier.device)

    def plan(self, layer: int, selection: torch.Tensor) -> None:
        """Plans the fetches of a layer, and of those after it that share its selection (int32 [N, K])."""
        self._parts.clear()
        N, K = selection.shape
        most = max(1, MOST_INDICES // max(K, 1))
        waiting = [slice(first, min(first + most, N)) for first in reversed(range(0, N, most))]
        while waiting:
            queries = waiting.pop()
            part = self._plan_part(layer, queries, selection[queries])
            if part is None:
                middle = (queries.start + queries.stop) // 2
                waiting += [slice(middle, queries.stop), slice(queries.start, middle)]
            else:
                self._parts.append(part)

    def fetched(self, layer: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Fetches what is planned into a layer's cache: queries and their rows, part by part, each to be read before
        the next is asked for."""
        for part in self._parts:
            self.tier.fetch(layer, part.sources, part.targets)
            yield part.queries, part.rows

    def _plan_part(self, layer: int, queries: slice, selection: torch.Tensor) -> Part | None:
        """None if more rows must be fetched than are kept on the device, and there are queries to part."""
        chosen = selection >= 0
        position = selection.clamp_min(0).long()
        block, offset = position // BLOCK_SIZE, position % BLOCK_SIZE
        sequence = self._sequences[queries]
        page = self.tables[sequence, block]
        missing = chosen & (page < 0)
        slot = (self._block_tables[sequence, block].long() * BLOCK_SIZE + offset).where(missing, len(self._wanted) - 1)
        self._wanted.zero_().index_fill_(0, slot.flatten(), True)
        slots = self._wanted[:-1].nonzero()[:, 0].cpu().numpy()
        if len(slots) > self.tier.hot_rows and len(selection) > 1:
            return None
        rows, sources, targets = (torch.from_numpy(array) for array in self._plan_fetch(layer, slots))
        device = self.tier.device
        self._row_of_slot[to_device(torch.from_numpy(slots), device)] = to_device(rows.int(), device)
        found = torch.where(missing, self._row_of_slot[slot], page * BLOCK_SIZE + offset.int()).where(chosen, -1)
        return Part(queries, found, to_device(sources, device), to_device(targets, device))
