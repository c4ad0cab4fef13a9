"""The fused selection is that of the two calls, in every order of scores, over contiguous keys and pages, in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernel_index_scores import batches, float64, inputs, on, whole

from heedful.kernels import index_scores as scoring_kernels
from heedful.kernels import index_top_k as kernels
from heedful.kernels.scoring import Scoring, operand_type
from heedful.kernels.target import Target
from heedful.ops import reference

few = settings(deadline=None, max_examples=20)


def fused(device: torch.device, scoring: Scoring, k: int, sorted: bool, BLOCK: int, parts: int | None) -> np.ndarray:
    """The fused kernel's selection, of small blocks and buffers, so that short rows cut them often."""
    target = Target.of(device)
    dot = operand_type(scoring.q_dtype, scoring.k_dtype, target)
    sizes = kernels.fused_sizes(scoring, k, dot, target)
    sizes = replace(sizes, BLOCK=BLOCK, CAP=1 << (k + BLOCK - 1).bit_length())
    out = torch.full((scoring.T, k), -7, dtype=torch.int32, device=device)
    for launch in kernels.plan(scoring, k, sorted, out, target, sizes, parts):
        launch.run()
    return out.cpu().numpy()


@few
@given(
    inputs(max_queries=7, max_keys=500), st.integers(1, 90), st.sampled_from([64, 128]), st.integers(1, 3), st.data()
)
def test_contiguous_keys(
    device: torch.device, arguments: dict[str, Any], k: int, BLOCK: int, parts: int, data: st.DataObject
) -> None:
    sorted_ = data.draw(st.booleans()) and k < 20
    given_ = on(device, arguments)
    names = ("q", "k", "weights", "starts", "ends", "k_scale")
    got = fused(device, Scoring.contiguous(*(given_.get(name) for name in names)), k, sorted_, BLOCK, parts)
    scores = float64(scoring_kernels.index_scores_reference(**arguments))
    np.testing.assert_array_equal(got, reference.top_k(scores, k, None, sorted_))


@few
@given(batches(max_seqs=3, max_tokens=400), st.integers(1, 90), st.sampled_from([64, 128]), st.integers(1, 3))
def test_keys_in_pages(device: torch.device, arguments: dict[str, Any], k: int, BLOCK: int, parts: int) -> None:
    scoring = Scoring.paged(**on(device, arguments))
    got = fused(device, scoring, k, False, BLOCK, parts)
    scores = float64(scoring_kernels.index_scores_paged_reference(**arguments))
    np.testing.assert_array_equal(got, reference.top_k(scores, k, None, False))


@pytest.mark.parametrize("order", ["rising", "falling", "constant", "random", "among NaN"])
def test_long_rows_in_any_order_at_the_sizes_of_use(device: torch.device, order: str) -> None:
    S = 6500
    key = {
        "rising": np.arange(S) / 64,
        "falling": -np.arange(S) / 64 + S,
        "constant": np.ones(S),
        "random": np.random.default_rng(0).integers(0, 3000, S),
        "among NaN": np.where(np.arange(S) % 3, np.nan, np.arange(S)),
    }[order]
    k = torch.from_numpy(key.astype(np.float32))[:, None] * torch.tensor([1.0, 0.0])
    q, weights = torch.tensor([[[1.0, 0.5]], [[2.0, 0.0]], [[-1.0, 1.0]]]), torch.tensor([[1.0], [-1.0], [1.0]])
    ends = torch.tensor([S, S - 1, 4000])
    scoring = Scoring.contiguous(*(x.to(device) for x in (q, k, weights)), None, ends.to(device), None)
    got = fused(device, scoring, 1500, False, 2048, 2)
    scores = float64(scoring_kernels.index_scores_reference(q, k, weights, ends=ends))
    np.testing.assert_array_equal(got, reference.top_k(scores, 1500, None, False))


@pytest.mark.parametrize("bound", [0, 1 << 26])
@pytest.mark.parametrize("sorted_", [False, True])
def test_the_launchers_choose_by_the_size_of_the_scores(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, bound: int, sorted_: bool
) -> None:
    monkeypatch.setattr(kernels, "SCORES_BYTES", bound)
    rng = np.random.default_rng(3)
    q, k, weights, scale = (whole(rng, *shape).to(device) for shape in ((5, 4, 32), (700, 32), (5, 4), (700,)))
    ends = torch.arange(696, 701, device=device)
    got = kernels.index_top_k(q, k, weights, 9, ends=ends, k_scale=scale, sorted=sorted_)
    scores = float64(scoring_kernels.index_scores_reference(q, k, weights, ends=ends, k_scale=scale))
    np.testing.assert_array_equal(got.cpu().numpy(), reference.top_k(scores, 9, None, sorted_))

    cache = whole(rng, 12, 64, 32).to(device)
    tables = torch.tensor([[3, 1, 7, 0], [11, 5, 2, 9]], dtype=torch.int32, device=device)
    lens = torch.tensor([200, 256], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    batch = {"cache": cache, "block_tables": tables, "seq_lens": lens, "query_start_loc": starts, "max_seq_len": 256}
    got = kernels.index_top_k_paged(q, weights, 9, **batch, sorted=sorted_)
    scores = float64(scoring_kernels.index_scores_paged_reference(q, weights, **batch))
    np.testing.assert_array_equal(got.cpu().numpy(), reference.top_k(scores, 9, None, sorted_))
