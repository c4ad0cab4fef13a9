"""Rows of the host tier reach the device rows that the scheduler planned, whatever they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import Scheduler, SchedulerConfig
from heedful.kernels.fetch_rows import fetch_rows, fetch_rows_reference, plan, staged_rows

PAGE = 64


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    st.integers(1, 700),
    st.integers(0, 40),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_rows_are_moved_and_no_others(
    device: torch.device, dtype: torch.dtype, width: int, count: int, pages: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    host, cache = (
        torch.from_numpy(rng.integers(0, 100, (n, width * dtype.itemsize)).astype(np.uint8)).view(dtype)
        for n in (128, 64)
    )
    sources = torch.from_numpy(rng.integers(0, 128, count))
    targets = torch.from_numpy(rng.permutation(64)[:count])
    want, got = cache.clone(), cache.to(device)
    fetch_rows_reference(host, want, sources, targets)
    host, got = (host.view(2, PAGE, width), got.view(1, PAGE, width)) if pages else (host, got)
    fetch_rows(host, got, sources, targets)
    assert torch.equal(got.cpu().view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


def test_rows_that_are_not_aligned_are_moved(device: torch.device) -> None:
    storage = torch.arange(1 + 8 * 16).to(torch.uint8)
    host, cache = storage[1:].view(8, 16), torch.zeros((8, 16), dtype=torch.uint8, device=device)
    fetch_rows(host, cache, torch.tensor([7, 0]), torch.tensor([2, 3]))
    assert torch.equal(cache[[2, 3]].cpu(), host[[7, 0]])
    assert not cache[[0, 1, 4, 5, 6, 7]].any()


def test_rows_outside_their_tensor_are_left_alone(device: torch.device) -> None:
    around = torch.arange(12 * 16).to(torch.uint8).view(12, 16)
    host, cache = around[2:10], torch.zeros((12, 16), dtype=torch.uint8, device=device)
    sources = torch.tensor([8, -1, 7, 2**33, 3, 4, 5])
    targets = torch.tensor([0, 1, 2, 3, -1, 8, 4])
    fetch_rows(host, cache[2:10], sources, targets)
    assert torch.equal(cache[[4, 6]].cpu(), host[[7, 5]])
    assert not cache[[0, 1, 2, 3, 5, 7, 8, 9, 10, 11]].any()


def test_rows_that_cross_in_one_piece_are_the_same(device: torch.device) -> None:
    host = torch.arange(8 * 16).to(torch.uint8).view(8, 16)
    cache = torch.zeros((8, 16), dtype=torch.uint8, device=device)
    sources, targets = torch.tensor([8, 7, -1, 0]), torch.tensor([1, 2, 3, 9])
    staged, places = staged_rows(host, sources, targets, pin_memory=device.type == "cuda")
    assert places.tolist() == [-1, 2, -1, 9]
    plan(staged.to(device), cache, None, places.to(device)).run()
    assert torch.equal(cache[2].cpu(), host[7])
    assert not cache[[0, 1, 3, 4, 5, 6, 7]].any()


def test_strided_rows_are_refused(device: torch.device) -> None:
    cache, numbers = torch.zeros((8, 4), device=device), torch.tensor([0])
    with pytest.raises(ValueError, match="rows: expected a contiguous tensor"):
        fetch_rows(torch.zeros((4, 8)).T, cache, numbers, numbers)


def test_a_selection_is_read_through_the_plan_of_the_scheduler(device: torch.device) -> None:
    """Prompts of more pages than the device has: every selected row is found where the plan says."""
    rng = np.random.default_rng(6)
    config = SchedulerConfig(num_blocks=40, num_latent_blocks=16, hot_rows=96, max_batched_tokens=128, max_num_seqs=2)
    scheduler, width, fetched = Scheduler(config), 24, 0
    host = torch.zeros((40, PAGE, width), dtype=torch.bfloat16)
    cache = torch.zeros((16 * PAGE + 96, width), dtype=torch.bfloat16, device=device)
    pages = cache[: 16 * PAGE].view(16, PAGE, width)
    for name in ("a", "b"):
        scheduler.add(name, rng.integers(0, 1000, 1000).astype(np.int32), max_tokens=6)
    written: dict[int, torch.Tensor] = {}  # by slot
    while (step := scheduler.schedule()) is not None:
        for page, block in step.stores.tolist():
            host[block] = pages[page].cpu()
        for block, page in step.loads.tolist():
            pages[page] = host[block].to(device)
        for source, target in step.latent_copies.tolist():
            pages[target] = pages[source].clone()
        rows = torch.from_numpy(rng.standard_normal((step.num_tokens, width))).to(torch.bfloat16)
        cache[torch.from_numpy(step.latent_slot_mapping).to(device)] = rows.to(device)
        written |= dict(zip(step.slot_mapping.tolist(), rows, strict=True))
        for place in range(step.num_seqs):
            positions = rng.permutation(int(step.seq_lens[place]))[:96]
            slots = step.block_tables[place, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
            places, sources, targets = scheduler.plan_fetch(0, slots)
            fetch_rows(host, cache, torch.from_numpy(sources), torch.from_numpy(targets))
            fetched += len(sources)
            found = cache[torch.from_numpy(places).to(device)].cpu()
            assert torch.equal(found, torch.stack([written[slot] for slot in slots.tolist()]))
        scheduler.update(np.zeros(len(step.sample_rows), np.int32))
    assert fetched > 100
