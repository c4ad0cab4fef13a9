"""Index scores of the Triton kernels against float64, over drawn shapes, dtypes, ranges and pages.

Numbers are small and whole where equality is asked for, so every product and sum is exact in float32. The interpreter
multiplies bfloat16 wrongly, so there every dtype is loaded as it is and multiplied in float32; the products of the
other types are left to the compiled kernels (test_kernel_compiled.py) and to a GPU. Chips without FP8 are emulated:
codes come as bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.kernels import index_scores as kernels
from heedful.kernels.scoring import Scoring, example
from heedful.kernels.target import Target
from heedful.ops import reference

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}
few = settings(deadline=None, max_examples=40)


def whole(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Whole numbers from -3 to 3: exact in every dtype."""
    return torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float32))


@st.composite
def inputs(draw: st.DrawFn, max_queries: int = 9, max_keys: int = 200) -> dict[str, Any]:
    """Arguments of `index_scores`; strides are not always those of a contiguous tensor."""
    T, S, Hi, Di = (draw(st.integers(low, high)) for low, high in ((0, max_queries), (0, max_keys), (1, 20), (1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    q = whole(rng, T, Hi, Di).to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    k = whole(rng, S, Di).to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    found: dict[str, Any] = {"q": q, "k": k, "weights": whole(rng, T, Hi)}
    if draw(st.booleans()):  # rows apart, heads before queries
        wide = torch.zeros((S, 2 * Di + 3), dtype=k.dtype)
        wide[:, :Di] = k
        found |= {"k": wide[:, :Di], "q": q.transpose(0, 1).contiguous().transpose(0, 1)}
    if draw(st.booleans()):
        found["k_scale"] = whole(rng, S)
    if draw(st.booleans()):
        found["ends"] = torch.from_numpy(rng.integers(-2, S + 3, T).astype(draw(st.sampled_from(["i4", "i8"]))))
    if draw(st.booleans()):
        found["starts"] = torch.from_numpy(rng.integers(-2, S + 3, T).astype(np.int32))
    return found


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on a device, strides kept."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def float64(x: torch.Tensor) -> np.ndarray:
    """The numbers in NumPy."""
    return x.double().cpu().numpy()


@few
@given(inputs())
def test_exact_scores_equal_the_reference(device: torch.device, arguments: dict[str, Any]) -> None:
    T, S = len(arguments["q"]), len(arguments["k"])
    got = kernels.index_scores(**on(device, arguments))
    assert got.dtype == torch.float32
    assert got.shape == (T, S)
    np.testing.assert_array_equal(float64(got), float64(kernels.index_scores_reference(**arguments)))
    if "starts" not in arguments:
        positions = arguments["ends"].numpy() - 1 if "ends" in arguments else np.full(T, S)
        scale = float64(arguments["k_scale"]) if "k_scale" in arguments else None
        q, k, weights = (float64(arguments[name]) for name in ("q", "k", "weights"))
        np.testing.assert_array_equal(float64(got), reference.index_scores(q, k, weights, positions, scale))


@few
@given(inputs(max_queries=5, max_keys=80))
def test_codes_as_bytes_score_as_their_numbers(device: torch.device, arguments: dict[str, Any]) -> None:
    arguments["k"] = arguments["k"].float().to(torch.float8_e4m3fn)
    arguments["q"] = arguments["q"].float().to(torch.float8_e4m3fn)
    given_ = on(device, arguments)
    scoring = Scoring.contiguous(*(given_.get(name) for name in ("q", "k", "weights", "starts", "ends", "k_scale")))
    out = torch.empty((scoring.T, scoring.S), device=device)
    launch = kernels.plan(scoring, out, replace(Target.of(device), fp8_dot=False))
    assert launch.arguments["keys"].dtype == launch.arguments["q"].dtype == torch.uint8
    launch.run()
    np.testing.assert_array_equal(float64(out), float64(kernels.index_scores_reference(**arguments)))


@pytest.mark.parametrize(("starts", "ends"), [((0, 700, 1300), (2000, 701, 1300)), ((600, 650, 0), (900, 640, 0))])
def test_long_rows_are_cut_and_what_nobody_sees_is_skipped(
    device: torch.device, starts: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(7)
    arguments = {"q": whole(rng, 3, 4, 16), "k": whole(rng, 2000, 16), "weights": whole(rng, 3, 4)}
    arguments |= {"starts": torch.tensor(starts), "ends": torch.tensor(ends)}
    got = kernels.index_scores(**on(device, arguments))
    np.testing.assert_array_equal(float64(got), float64(kernels.index_scores_reference(**arguments)))


def test_heads_that_no_block_can_hold_are_named() -> None:
    scoring = example(8, 1000, 300, torch.bfloat16, torch.bfloat16, dim=256)
    with pytest.raises(ValueError, match="q: 300 index heads of 256 numbers do not fit"):
        kernels.plan(scoring, torch.empty((8, 1000), device="meta"), Target.cuda(90))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("heads", [3, 4])
def test_a_bad_key_disturbs_only_its_own_score(device: torch.device, bad: float, heads: int) -> None:
    rng = np.random.default_rng(4)
    q, k, weights = (
        torch.from_numpy(rng.standard_normal(s, np.float32)) for s in ((3, heads, 8), (200, 8), (3, heads))
    )
    clean = kernels.index_scores(*(x.to(device) for x in (q, k, weights)))
    k[150, 2] = bad
    got = float64(kernels.index_scores(*(x.to(device) for x in (q, k, weights))))
    want = float64(kernels.index_scores_reference(q, k, weights))
    np.testing.assert_array_equal(np.delete(got, 150, 1), np.delete(float64(clean), 150, 1))
    np.testing.assert_array_equal(got[:, 150], want[:, 150])


def test_the_published_sizes(device: torch.device) -> None:
    rng = np.random.default_rng(5)
    q = torch.from_numpy(rng.standard_normal((6, 64, 128), np.float32)).to(torch.float8_e4m3fn)
    k = torch.from_numpy(rng.standard_normal((300, 128), np.float32)).to(torch.float8_e4m3fn)
    weights = torch.from_numpy(rng.standard_normal((6, 64), np.float32))
    arguments = {"q": q, "k": k, "weights": weights, "k_scale": torch.rand(300), "ends": torch.arange(295, 301)}
    got = float64(kernels.index_scores(**on(device, arguments)))
    want = float64(kernels.index_scores_reference(**arguments))
    seen = np.isfinite(want)
    np.testing.assert_array_equal(seen, np.isfinite(got))
    # 64 dots of 128 products of size about 1, magnitudes of about 80 a dot: see tests/test_ops_indexer.py. Hopper's FP8
    # products keep 14 bits below the largest of a sum.
    assert np.abs(got[seen] - want[seen]).max() < (1e-3 if device.type == "cpu" else 0.2)


@st.composite
def batches(draw: st.DrawFn, max_seqs: int = 4, max_tokens: int = 150) -> dict[str, Any]:
    """A ragged batch over shuffled pages, some sequences empty, entries of tables beyond the pages unusable."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    boundary = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129])
    lens = draw(st.lists(boundary | st.integers(0, max_tokens), min_size=1, max_size=max_seqs))
    next_n = draw(st.sampled_from([1, 1, 2, 3, 7]))
    counts = [min(S, draw(st.integers(0, next_n))) for S in lens]
    Hi, Di = draw(st.integers(1, 9)), draw(st.sampled_from([1, 4, 12, 16, 32, 40]))
    pages = [-(-S // 64) for S in lens]
    num_blocks = sum(pages) + 2
    order = list(rng.permutation(num_blocks))
    tables = np.full((len(lens), max(pages, default=0) + 1), 2**30, np.int32)
    for b, count in enumerate(pages):
        tables[b, :count] = [order.pop() for _ in range(count)]
    N = sum(counts)
    kind = draw(st.sampled_from(["float32", "bfloat16", "float16", "uint8", "int8"]))
    keys = whole(rng, num_blocks, 64, Di)
    if kind in ("uint8", "int8"):
        codes = (
            keys.to(torch.float8_e4m3fn).view(torch.uint8) if kind == "uint8" else keys.to(torch.int8).view(torch.uint8)
        )
        scales = whole(rng, num_blocks, 64).view(torch.uint8).flatten(1)
        cache = torch.cat([codes.flatten(1), scales], 1).view(DTYPES.get(kind, torch.uint8))
        cache = cache.view(num_blocks, 64, Di + 4) if draw(st.booleans()) else cache
    else:
        cache = keys.to(DTYPES[kind])
    return {
        "q": whole(rng, N, Hi, Di).to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))]),
        "weights": whole(rng, N, Hi),
        "cache": cache,
        "block_tables": torch.from_numpy(tables),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_start_loc": torch.from_numpy(np.cumsum([0, *counts]).astype(np.int32)),
        "max_seq_len": max(lens) + draw(st.sampled_from([0, 0, 70])),
    }


@few
@given(batches())
def test_pages_hold_the_same_keys(device: torch.device, arguments: dict[str, Any]) -> None:
    got = kernels.index_scores_paged(**on(device, arguments))
    assert got.shape == (len(arguments["q"]), arguments["max_seq_len"])
    np.testing.assert_array_equal(float64(got), float64(kernels.index_scores_paged_reference(**arguments)))


def test_the_torch_references_are_those_of_numpy() -> None:
    rng = np.random.default_rng(8)
    q, k, weights, scale = whole(rng, 5, 3, 8), whole(rng, 70, 8), whole(rng, 5, 3), whole(rng, 70)
    got = kernels.index_scores_reference(q, k, weights, ends=torch.arange(66, 71), k_scale=scale)
    want = reference.index_scores(q.numpy(), k.numpy(), weights.numpy(), None, scale.numpy())
    np.testing.assert_array_equal(got.numpy(), want)


# -- numbers that nobody has looked at ---------------------------------------------------------------------------------


def test_a_range_beyond_32_bits_is_cut_before_it_is_narrowed(device: torch.device) -> None:
    rng = np.random.default_rng(9)
    arguments = {"q": whole(rng, 4, 3, 8), "k": whole(rng, 90, 8), "weights": whole(rng, 4, 3)}
    starts = torch.tensor([-(2**40), 2**32, 5, 0])
    ends = torch.tensor([2**32 + 7, 2**33, 2**63 - 1, -(2**32) + 9])
    got = float64(kernels.index_scores(**on(device, arguments | {"starts": starts, "ends": ends})))
    want = float64(kernels.index_scores_reference(**arguments, starts=starts.clamp(0, 90), ends=ends.clamp(0, 90)))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).sum(1).tolist() == [90, 0, 85, 0]


def paged_batch(rng: np.random.Generator, num_blocks: int = 6, kind: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two sequences of 3 and 2 queries over two pages each."""
    cache = whole(rng, num_blocks, 64, 32).to(kind)
    return {
        "q": whole(rng, 5, 4, 32),
        "weights": whole(rng, 5, 4),
        "cache": cache,
        "block_tables": torch.tensor([[3, 1], [2, 5]], dtype=torch.int32),
        "seq_lens": torch.tensor([100, 128], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3, 5], dtype=torch.int32),
        "max_seq_len": 200,
    }


@pytest.mark.parametrize("bad", [-1, -(2**31), 6, 2**31 - 1])
@pytest.mark.parametrize("coded", [False, True])
def test_keys_of_a_block_that_is_none_of_the_caches_are_unseen(device: torch.device, bad: int, coded: bool) -> None:
    rng = np.random.default_rng(10)
    arguments = paged_batch(rng)
    if coded:
        codes = arguments["cache"].to(torch.int8).view(torch.uint8).flatten(1)
        scales = whole(rng, 6, 64).view(torch.uint8).flatten(1)
        arguments["cache"] = torch.cat([codes, scales], 1).view(torch.int8)
    want = float64(kernels.index_scores_paged_reference(**arguments))
    want[:3, 64:128] = -np.inf  # of the first sequence's second block
    arguments["block_tables"][0, 1] = bad
    np.testing.assert_array_equal(float64(kernels.index_scores_paged(**on(device, arguments))), want)


def test_a_sequence_has_no_more_keys_than_its_table_and_no_fewer_than_none(device: torch.device) -> None:
    arguments = paged_batch(np.random.default_rng(11))
    want = float64(
        kernels.index_scores_paged_reference(
            **arguments | {"seq_lens": torch.tensor([0, 128]), "query_start_loc": torch.tensor([0, 3, 5])}
        )
    )
    for long in (129, 2**31 - 1):
        arguments["seq_lens"] = torch.tensor([-5, long], dtype=torch.int32)
        np.testing.assert_array_equal(float64(kernels.index_scores_paged(**on(device, arguments))), want)


@pytest.mark.parametrize(
    "starts", [(0, 3, 2**31 - 1), (0, 3, -(2**31)), (-7, 3, 5), (4, 3, 5), (0, 2**31 - 1, 5), (9, 9, 9), (-3, -2, -1)]
)
def test_starts_of_queries_name_no_row_that_is_not_there(device: torch.device, starts: tuple[int, ...]) -> None:
    # In the interpreter a wild address ends the process; rows around the result show what is written beside it.
    arguments = paged_batch(np.random.default_rng(12))
    arguments["query_start_loc"] = torch.tensor(starts, dtype=torch.int32)
    given_ = on(device, arguments)
    room = torch.full((5 + 64, 200), 7.0, device=device)
    kernels.plan(Scoring.paged(**given_), room[32:37], Target.of(device)).run()
    assert (room[:32] == 7).all()
    assert (room[37:] == 7).all()


def test_an_empty_cache_and_an_empty_table_hold_no_keys(device: torch.device) -> None:
    arguments = paged_batch(np.random.default_rng(13), num_blocks=0)
    assert (kernels.index_scores_paged(**on(device, arguments)) == -torch.inf).all()
    arguments = paged_batch(np.random.default_rng(13)) | {"block_tables": torch.empty((2, 0), dtype=torch.int32)}
    assert (kernels.index_scores_paged(**on(device, arguments)) == -torch.inf).all()


def test_what_no_kernel_can_count_is_named() -> None:
    long = torch.empty((2**31, 8), device="meta")
    q, weights = torch.empty((2, 3, 8), device="meta"), torch.empty((2, 3), device="meta")
    with pytest.raises(ValueError, match="k: expected at most 2147418112 keys, got 2147483648"):
        Scoring.contiguous(q, long, weights, None, None, None)
    arguments = on(torch.device("meta"), paged_batch(np.random.default_rng(14)))
    with pytest.raises(ValueError, match="max_seq_len: expected at most 2147418112 keys, got 2147483648"):
        Scoring.paged(**arguments | {"max_seq_len": 2**31})
    nobody = {"seq_lens": torch.empty(0, device="meta"), "query_start_loc": torch.empty(1, device="meta")}
    with pytest.raises(ValueError, match="seq_lens: expected sequences that the 5 queries belong to, got none"):
        Scoring.paged(**arguments | nobody)


def test_grids_stay_within_what_a_launch_may_have() -> None:
    q, weights = torch.empty((1, 1, 8), device="meta"), torch.empty((1, 1), device="meta")
    for S in (2**31 - 2**16, 70_000_000):
        scoring = Scoring.contiguous(q, torch.empty((S, 8), device="meta"), weights, None, None, None)
        launch = kernels.plan(scoring, torch.empty((1, S), device="meta"), Target.cuda(90))
        assert launch.grid[1] <= 65535
        assert launch.grid[1] * launch.arguments["chunk"] >= S


def test_rows_far_apart_are_put_together() -> None:
    # Offsets within a tile of keys are of 32 bits.
    k = torch.empty_strided((100, 8), (2**30, 1), device="meta")
    q, weights = torch.empty((2, 3, 8), device="meta"), torch.empty((2, 3), device="meta")
    assert Scoring.contiguous(q, k, weights, None, None, None).arguments["KEY_STRIDE"] == 8
