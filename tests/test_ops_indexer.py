"""Index scores and top-k: what is selected on ties, NaN, masks and lengths, whatever the threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from heedful import ops
from heedful.ops import reference

quick = settings(deadline=None, max_examples=60)
#: Scores full of ties, with every special value.
SCORES = st.one_of(
    st.integers(-2, 2).map(float),
    st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 3.4e38, -3.4e38, 1e-40]),
    st.floats(width=32),
)


@quick
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 90)), elements=SCORES),
    st.integers(1, 100),
    st.data(),
)
def test_top_k_is_the_head_of_the_sorted_row(scores: np.ndarray, k: int, data: st.DataObject) -> None:
    T, S = scores.shape
    lengths = data.draw(st.none() | st.lists(st.integers(0, S), min_size=T, max_size=T))
    got = ops.top_k(scores, k, lengths=lengths)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, reference.top_k(scores, k, lengths))
    rising = ops.top_k(scores, k, lengths=lengths, sorted=False)
    np.testing.assert_array_equal(rising, reference.top_k(scores, k, lengths, sorted_=False))
    np.testing.assert_array_equal(got, ops.top_k(scores, k, lengths=lengths, backend="reference"))


def test_top_k_on_a_row_worth_reading() -> None:
    scores = np.array([[2, np.nan, 5, -np.inf, 5, 0, -0.0]], np.float32)
    assert ops.top_k(scores, 8).tolist() == [[2, 4, 0, 5, 6, 1, -1, -1]]
    assert ops.top_k(scores, 2, lengths=[1]).tolist() == [[0, -1]]


@pytest.mark.parametrize("order", ["rising", "falling", "constant", "random"])
def test_top_k_of_long_rows_in_any_order(order: str) -> None:
    S = 20_000
    rows = {
        "rising": np.arange(S) // 3,
        "falling": -np.arange(S) // 3,
        "constant": np.ones(S),
        "random": np.random.default_rng(0).integers(0, 5000, S),
    }
    scores = np.stack([rows[order]] * 2).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :2048]
    np.testing.assert_array_equal(ops.top_k(scores, 2048), expected)
    np.testing.assert_array_equal(ops.top_k(scores, 2048, sorted=False), np.sort(expected))


@st.composite
def index_inputs(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Whole numbers, so that scores are exact in float32 and ties are many."""
    T, S, Hi, Di = (draw(st.integers(low, high)) for low, high in ((0, 20), (0, 200), (1, 20), (1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def whole(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape).astype(np.float32)

    inputs = {"q": whole(T, Hi, Di), "k": whole(S, Di), "weights": whole(T, Hi)}
    if draw(st.booleans()):
        inputs["k_scale"] = whole(S)
    if draw(st.booleans()):
        inputs["q_positions"] = rng.integers(-2, S + 3, T)
    return inputs


@quick
@given(index_inputs(), st.integers(1, 250))
def test_exact_scores_and_their_selection_equal_the_reference(inputs: dict[str, np.ndarray], k: int) -> None:
    scores = ops.index_scores(**inputs)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, reference.index_scores(**inputs))
    chosen = ops.index_top_k(**inputs, top_k=k)
    np.testing.assert_array_equal(chosen, ops.top_k(scores, k))
    np.testing.assert_array_equal(chosen, ops.index_top_k(**inputs, top_k=k, backend="reference"))


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


@quick
@given(index_inputs(), st.integers(1, 250), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_every_pair_of_dtypes_selects_what_the_reference_does(
    inputs: dict[str, np.ndarray], k: int, q_dtype: str, k_dtype: str
) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name, dtype in (("q", q_dtype), ("k", k_dtype)):  # whole numbers from -3 to 3 are exact in each
        inputs[name] = inputs[name].astype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(ops.index_scores(**inputs), ops.index_scores(**inputs, backend="reference"))
    for sorted_ in (True, False):
        got = ops.index_top_k(**inputs, top_k=k, sorted=sorted_)
        want = ops.index_top_k(**inputs, top_k=k, sorted=sorted_, backend="reference")
        np.testing.assert_array_equal(got, want)


def test_bytes_of_every_size_are_multiplied_exactly() -> None:
    rng = np.random.default_rng(6)
    q, k = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((3, 64, 128), (300, 128)))
    weights = np.eye(64, dtype=np.float32)[[0, 17, 63]]
    np.testing.assert_array_equal(ops.index_scores(q, k, weights), reference.index_scores(q, k, weights))


def test_scores_of_real_numbers_are_near_the_reference() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((70, 64, 128), np.float32), rng.standard_normal((900, 128), np.float32)
    weights = rng.standard_normal((70, 64), np.float32)
    got, want = ops.index_scores(q, k, weights), reference.index_scores(q, k, weights)
    seen = np.isfinite(want)
    np.testing.assert_array_equal(seen, np.isfinite(got))
    # 64 dots of 128 products, each off by at most 128 roundings of a sum of magnitudes of about 80: at the very
    # worst 64 * 80 * 128 * 6e-8 = 0.04; roundings are independent, so a fortieth of it is ample.
    assert np.abs(got[seen] - want[seen]).max() < 1e-3


def test_many_queries_and_one_query_take_different_paths_to_the_same_bits() -> None:
    # 5000 keys of one query are shared out among threads; 70 queries are tiled, a tile a thread.
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((70, 5, 24), np.float32), rng.standard_normal((5000, 24), np.float32)
    weights = rng.standard_normal((70, 5), np.float32)
    together = ops.index_scores(q, k, weights)
    chosen = ops.index_top_k(q, k, weights, 300)
    for t in (0, 33, 69):
        at = [5000 - 70 + t]
        alone = ops.index_scores(q[t : t + 1], k, weights[t : t + 1], q_positions=at)
        np.testing.assert_array_equal(alone[0], together[t])
        alone = ops.index_top_k(q[t : t + 1], k, weights[t : t + 1], 300, q_positions=at)
        np.testing.assert_array_equal(alone[0], chosen[t])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((9, 6, 32), np.float32), rng.standard_normal((6000, 32), np.float32)
    weights = rng.standard_normal((9, 6), np.float32)
    before, results = ops.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            ops.set_num_threads(n)
            results.append((ops.index_scores(q, k, weights), ops.index_top_k(q, k, weights, 100)))
    finally:
        ops.set_num_threads(before)
    for scores, chosen in results[1:]:
        np.testing.assert_array_equal(scores, results[0][0])
        np.testing.assert_array_equal(chosen, results[0][1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_key_disturbs_only_its_own_score(bad: float) -> None:
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((3, 4, 8), np.float32), rng.standard_normal((200, 8), np.float32)
    weights = rng.standard_normal((3, 4), np.float32)
    clean = ops.index_scores(q, k, weights)
    k[150, 2] = bad
    with np.errstate(invalid="ignore"):
        want = reference.index_scores(q, k, weights)
    got = ops.index_scores(q, k, weights)
    np.testing.assert_array_equal(np.delete(got, 150, 1), np.delete(clean, 150, 1))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def test_quantised_keys_score_as_their_values() -> None:
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((4, 3, 128), np.float32), rng.standard_normal((90, 128), np.float32)
    weights = rng.standard_normal((4, 3), np.float32)
    codes, scales = ops.quantize_fp8(k)
    torch = pytest.importorskip("torch")
    fp8 = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(np.ascontiguousarray(scales[:, 0]))
    got = ops.index_scores(torch.from_numpy(q), fp8, torch.from_numpy(weights), k_scale=scale).numpy()
    want = reference.index_scores(q, reference.dequantize_fp8(codes, scales), weights)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    small = rng.integers(-127, 128, (90, 128)).astype(np.int8)
    got = ops.index_scores(q, small, weights, k_scale=scale.numpy())
    np.testing.assert_allclose(got, reference.index_scores(q, small, weights, None, scales[:, 0]), rtol=1e-4, atol=1e-2)
