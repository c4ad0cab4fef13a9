"""Top-k of the Triton kernel: ties, NaN, masks, lengths, k of every size, cuts in every order, rows in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from heedful.kernels import top_k as kernels
from heedful.kernels.target import Target
from heedful.kernels.top_k import Sizes
from heedful.ops import reference

few = settings(deadline=None, max_examples=100)
#: Scores full of ties, with every special value.
SCORES = st.one_of(
    st.integers(-2, 2).map(float),
    st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, -0.0, 3.4028235e38, -3.4028235e38, 1e-40, -1e-40]),
    st.floats(width=32),
)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 150)), elements=SCORES)


def select(
    device: torch.device,
    scores: np.ndarray | torch.Tensor,
    k: int,
    lengths: list[int] | None = None,
    sorted: bool = True,
    sizes: Sizes | None = None,
    parts: int | None = None,
) -> np.ndarray:
    """The kernel's selection, of small blocks and buffers, so that short rows cut them often."""
    x = torch.as_tensor(scores, device=device)
    limits = None if lengths is None else torch.tensor(lengths, device=device)
    out = torch.full((len(x), k), -7, dtype=torch.int32, device=device)
    for launch in kernels.plan(x, k, limits, sorted, out, Target.of(device), sizes, parts):
        launch.run()
    return out.cpu().numpy()


def small(k: int, BLOCK: int) -> Sizes:
    """The least buffer for a block."""
    return Sizes(BLOCK, 1 << (k + BLOCK - 1).bit_length(), num_warps=4)


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 60), st.sampled_from([8, 16, 64]), st.sampled_from([1, 1, 2, 5]), st.data())
@example(np.full((1, 40), np.nan, np.float32), 3, 8, 2, None)
@example(np.array([[-np.inf, np.nan, -3.4028235e38, np.nan, -np.inf] * 9], np.float32), 11, 8, 1, None)
def test_selection_is_the_head_of_the_sorted_row(
    device: torch.device, scores: np.ndarray, k: int, BLOCK: int, parts: int, data: st.DataObject | None
) -> None:
    T, S = scores.shape
    lengths = data and data.draw(st.none() | st.lists(st.integers(0, S), min_size=T, max_size=T))
    sorted_ = bool(data and data.draw(st.booleans()))
    got = select(device, scores, k, lengths, sorted_, small(k, BLOCK), parts)
    np.testing.assert_array_equal(got, reference.top_k(scores, k, lengths, sorted_))


def test_a_row_worth_reading(device: torch.device) -> None:
    scores = torch.tensor([[2, np.nan, 5, -np.inf, 5, 0, -0.0]], device=device)
    assert kernels.top_k(scores, 8).tolist() == [[2, 4, 0, 5, 6, 1, -1, -1]]
    assert kernels.top_k(scores, 8, sorted=False).tolist() == [[0, 1, 2, 4, 5, 6, -1, -1]]
    assert kernels.top_k(scores, 2, lengths=torch.tensor([1], device=device)).tolist() == [[0, -1]]


def rows(order: str, S: int) -> np.ndarray:
    """A long row in some order of scores."""
    made = {
        "rising": np.arange(S) // 3,
        "falling": -np.arange(S) // 3,
        "constant": np.ones(S),
        "random": np.random.default_rng(0).standard_normal(S),
        "few values": np.random.default_rng(1).integers(0, 5, S),
        "rising numbers among NaN": np.where(np.arange(S) % 2, np.nan, np.arange(S)),
    }
    return made[order].astype(np.float32)


ORDERS = ["rising", "falling", "constant", "random", "few values", "rising numbers among NaN"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("k", "parts"), [(2048, 1), (1000, None), (4096, 2)])
def test_long_rows_in_any_order(device: torch.device, order: str, k: int, parts: int | None) -> None:
    # Sorting by score takes the interpreter long: it is left to the tests of short rows.
    scores = rows(order, 20_000)[None]
    got = select(device, scores, k, sorted=False, parts=parts)
    np.testing.assert_array_equal(got, reference.top_k(scores, k, sorted_=False))


@pytest.mark.parametrize(("k", "sorted_"), [(1, True), (3, True), (300, True), (5000, False), (8192, False)])
def test_k_of_every_size(device: torch.device, k: int, sorted_: bool) -> None:
    scores = np.stack([rows("random", 20_000), rows("few values", 20_000)])
    np.testing.assert_array_equal(select(device, scores, k, sorted=sorted_), reference.top_k(scores, k, None, sorted_))


def test_two_k_of_one_size_keep_apart(device: torch.device) -> None:
    scores = rows("random", 12_000)[None]
    for k in (5000, 8192):
        np.testing.assert_array_equal(select(device, scores, k, sorted=False), reference.top_k(scores, k, None, False))


def test_a_k_beyond_the_kernel_is_sorted_by_torch(device: torch.device) -> None:
    scores = torch.from_numpy(rows("few values", 9000)[None]).to(device)
    got = kernels.top_k(scores, 8500).cpu().numpy()
    np.testing.assert_array_equal(got, reference.top_k(scores.cpu().numpy(), 8500))


def test_a_row_of_a_million(device: torch.device) -> None:
    scores = rows("random", 1 << 20)[None]
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :500])
    np.testing.assert_array_equal(select(device, scores, 500, sorted=False, parts=1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(device: torch.device, dtype: torch.dtype) -> None:
    numbers = torch.from_numpy(np.random.default_rng(3).standard_normal((6, 300), np.float32)).to(device, dtype)
    expected = reference.top_k(numbers.double().cpu().numpy(), 20)
    np.testing.assert_array_equal(kernels.top_k(numbers, 20).cpu().numpy(), expected)
    apart = torch.full((6, 401), 99.0, dtype=dtype, device=device)[:, 1:301].copy_(numbers)
    np.testing.assert_array_equal(kernels.top_k(apart, 20).cpu().numpy(), expected)
    across = numbers.t().contiguous().t()
    np.testing.assert_array_equal(kernels.top_k(across, 20).cpu().numpy(), expected)


@few
@given(ROWS, st.integers(1, 160), st.data())
def test_the_torch_reference_is_that_of_numpy(scores: np.ndarray, k: int, data: st.DataObject) -> None:
    T, S = scores.shape
    lengths = data.draw(st.none() | st.lists(st.integers(0, S), min_size=T, max_size=T))
    for sorted_ in (True, False):
        limits = None if lengths is None else torch.tensor(lengths)
        got = kernels.top_k_reference(torch.from_numpy(scores), k, lengths=limits, sorted=sorted_)
        assert got.dtype == torch.int32
        np.testing.assert_array_equal(got.numpy(), reference.top_k(scores, k, lengths, sorted_))


def test_lengths_beyond_the_row_are_those_of_the_row_and_negative_ones_none(device: torch.device) -> None:
    scores = rows("random", 300)[None].repeat(5, 0)
    lengths = [2**40, -(2**32) + 9, -1, 301, 2**31]
    got = select(device, scores, 20, lengths, sizes=small(20, 64), parts=3)
    np.testing.assert_array_equal(got, reference.top_k(scores, 20, [300, 0, 0, 300, 300]))


def test_rows_that_no_kernel_can_count_are_named() -> None:
    scores, out = torch.empty((1, 2**31), device="meta"), torch.empty((1, 5), dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="scores: expected at most 2147418112 keys, got 2147483648"):
        kernels.plan(scores, 5, None, True, out, Target.cuda(90))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("S", [2048, 2049, 4096, 5000])
def test_rows_that_end_with_a_block_or_beside_it_are_cut_to_k(device: torch.device, order: str, S: int) -> None:
    scores = rows(order, S)[None]
    for k in (S - 1, S, S + 1):
        if k <= 2048:
            got = select(device, scores, k, sorted=False, parts=1)
            np.testing.assert_array_equal(got, reference.top_k(scores, k, None, False))
    got = select(device, scores, 1500, sorted=False, parts=1)
    np.testing.assert_array_equal(got, reference.top_k(scores, 1500, None, False))


def test_what_lies_in_the_room_for_candidates_does_not_matter(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = rows("random", 700)[None]
    want = reference.top_k(scores, 40, None, False)
    empty = torch.empty
    for filler in (np.nan, np.inf, 1e30):
        monkeypatch.setattr(torch, "empty", lambda *a, filler=filler, **kw: empty(*a, **kw).fill_(filler)
                            if kw.get("dtype", torch.float32) == torch.float32 else empty(*a, **kw))  # fmt: skip
        got = select(device, scores, 40, sorted=False, sizes=small(40, 64), parts=1)
        np.testing.assert_array_equal(got, want)
