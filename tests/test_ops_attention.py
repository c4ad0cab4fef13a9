"""Sparse and dense attention: equal to the reference, defined on empty rows, unmoved by threads and batches."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.ops import reference

quick = settings(deadline=None, max_examples=60)


@st.composite
def attention_inputs(draw: st.DrawFn) -> dict[str, Any]:
    T, S, Hkv, group, Dk = (draw(st.integers(*b)) for b in ((0, 10), (0, 300), (1, 3), (1, 5), (1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inputs: dict[str, Any] = {
        "q": rng.standard_normal((T, Hkv * group, Dk), np.float32),
        "kv": rng.standard_normal((S, Hkv, Dk), np.float32),
        "scale": draw(st.sampled_from([0.0, 0.3, -1.0])),
    }
    form = draw(st.sampled_from(["prefix", "whole", "apart"]))
    if form == "prefix":
        inputs["value_dim"] = draw(st.integers(1, Dk))
    if form == "apart":
        inputs["v"] = rng.standard_normal((S, Hkv, draw(st.integers(1, 30))), np.float32)
    if draw(st.booleans()):
        inputs["sink"] = rng.choice([-np.inf, -1.0, 0.0, 2.0, 90.0, np.inf], Hkv * group).astype(np.float32)
    return inputs


def near(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    # Averages of values below 5 in float32: some tens of roundings of 6e-8 in the logits and in the sums.
    assert got[0].dtype == got[1].dtype == np.float32
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=2e-5)


@quick
@given(attention_inputs(), st.integers(0, 80), st.integers(0, 2**32))
def test_sparse_attention_equals_the_reference(inputs: dict[str, Any], K: int, seed: int) -> None:
    T, S = len(inputs["q"]), len(inputs["kv"])
    indices = np.random.default_rng(seed).integers(-5, S + 5, (T, K)).astype(np.int32)
    with np.errstate(over="ignore"):
        near(
            ops.sparse_attention(**inputs, indices=indices),
            reference.sparse_attention(**inputs, indices=indices),
        )


@quick
@given(attention_inputs(), st.integers(-3, 60), st.booleans())
def test_dense_attention_equals_the_reference(inputs: dict[str, Any], shift: int, default: bool) -> None:
    T = len(inputs["q"])
    positions = None if default else np.arange(T) * 7 + shift
    with np.errstate(over="ignore"):
        want = reference.dense_attention(**inputs, q_positions=positions)
    near(ops.dense_attention(**inputs, q_positions=positions), want)


def test_a_row_without_keys_is_zero_with_lse_minus_infinity() -> None:
    q, kv = np.ones((3, 2, 4), np.float32), np.ones((5, 4), np.float32)
    indices = np.array([[-1, 5], [0, -1], [7, 2**31 - 1]], np.int32)
    out, lse = ops.sparse_attention(q, kv, indices, scale=1.0, sink=np.zeros(2, np.float32))
    assert out[[0, 2]].tolist() == np.zeros((2, 2, 4)).tolist()
    assert np.isneginf(lse[[0, 2]]).all()
    assert np.isfinite(lse[1]).all()
    assert (out[1] > 0).all()


def test_choosing_every_key_in_order_is_dense_attention_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    q, kv = rng.standard_normal((40, 16, 72), np.float32), rng.standard_normal((700, 72), np.float32)
    keys = np.arange(700)
    every = np.where(keys <= 660 + np.arange(40)[:, None], keys, -1).astype(np.int32)
    dense = ops.dense_attention(q, kv, scale=0.1, value_dim=64)
    sparse = ops.sparse_attention(q, kv, every, scale=0.1, value_dim=64)
    for a, b in zip(dense, sparse, strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    q, kv = (
        np.full((1, 1, 2), 1e3, np.float32),
        np.array([[1e3, 1e3], [1e3, 1e3 - 1], [-1e3, -1e3]], np.float32),
    )
    out, lse = ops.dense_attention(q, kv, scale=1.0)
    want_out, want_lse = reference.dense_attention(q, kv[:, None], 1.0)
    np.testing.assert_allclose(out, want_out, rtol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_future_keys_leave_no_trace_even_when_they_are_nan() -> None:
    rng = np.random.default_rng(1)
    q, kv = rng.standard_normal((16, 4, 32), np.float32), rng.standard_normal((100, 32), np.float32)
    clean = ops.dense_attention(q, kv, scale=0.2)
    kv[95:] = np.nan
    spoilt = ops.dense_attention(q, kv, scale=0.2)
    np.testing.assert_array_equal(clean[0][:11], spoilt[0][:11])
    np.testing.assert_array_equal(clean[1][:11], spoilt[1][:11])
    assert np.isnan(spoilt[0][11:]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    kv = halves(3000, 40, seed=2).to(getattr(torch, dtype))
    indices = torch.from_numpy(rng.integers(-1, 3000, (40, 700)).astype(np.int32))
    before, results = ops.get_num_threads(), []
    try:
        for n in (1, threads):
            ops.set_num_threads(n)
            for T in (1, 40):  # keys of one query are shared out; many queries are a task each
                q = halves(40, 20, 40, seed=3).to(kv.dtype)[:T]
                results.append(ops.sparse_attention(q, kv, indices[:T], scale=0.2))
                results.append(ops.dense_attention(q, kv, scale=0.2, q_positions=2000 + np.arange(T)))
    finally:
        ops.set_num_threads(before)
    single, several = results[:4], results[4:]
    for a, b in zip(single, several, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    # The first query alone, and among forty: the same bits.
    assert torch.equal(single[0][0][0], single[2][0][0])
    assert torch.equal(single[1][0][0], single[3][0][0])


def halves(*shape: int, seed: int = 0) -> Any:
    """Random bfloat16 numbers."""
    torch = pytest.importorskip("torch")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_float16_is_rounded_once_at_the_end() -> None:
    torch = pytest.importorskip("torch")
    q, kv = halves(5, 3, 48).half(), halves(90, 48, seed=1).half()
    out, lse = ops.dense_attention(q, kv, scale=0.2, value_dim=40)
    wide, wide_lse = ops.dense_attention(q.float(), kv.float(), scale=0.2, value_dim=40)
    assert out.dtype == torch.float16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, wide.half(), rtol=0, atol=0)
    torch.testing.assert_close(lse, wide_lse, rtol=0, atol=0)


def near_halves(got: tuple[Any, Any], want: tuple[Any, Any], largest: float) -> None:
    """bfloat16 rounds each probability by 2^-9 of itself, and so an average of values by 2^-9 of the largest; then the
    output by 2^-9 of itself (2^-8 where the reference lies on the other side of a power of two).
    """
    torch = pytest.importorskip("torch")
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2**-8, atol=2**-9 * largest)
    torch.testing.assert_close(got[1], want[1].float(), rtol=2e-5, atol=2e-5)


SIZES = [(128, 576, 512), (16, 192, 128), (7, 33, 17), (1, 1, 1), (48, 66, 66)]


@pytest.mark.parametrize(("H", "Dk", "Dv"), SIZES)
@pytest.mark.parametrize("form", ["prefix", "apart", "grouped"])
def test_bfloat16_attention_equals_the_reference(H: int, Dk: int, Dv: int, form: str) -> None:
    T, S, K = 3, 700, 600
    rng = np.random.default_rng(5)
    kv = halves(S, *([H] if form == "grouped" else []), Dk)
    inputs: dict[str, Any] = {"q": halves(T, H, Dk, seed=1), "kv": kv, "scale": Dk**-0.5}
    if form == "prefix":
        inputs["value_dim"] = Dv
    else:
        inputs["v"] = halves(*kv.shape[:-1], Dv, seed=2)
    inputs["sink"] = halves(H, seed=3).float()
    indices = rng.integers(-20, S + 20, (T, K)).astype(np.int32)
    indices[1] = -1  # a row without keys
    indices[2, 131:] = -1  # an odd number of keys
    chosen = pytest.importorskip("torch").from_numpy(indices)
    want = ops.sparse_attention(**inputs, indices=chosen, backend="reference")
    near_halves(ops.sparse_attention(**inputs, indices=chosen), want, 4.5)
    near_halves(ops.dense_attention(**inputs), ops.dense_attention(**inputs, backend="reference"), 4.5)


@quick
@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 300), st.integers(0, 80), st.integers(0, 2**32))
def test_bfloat16_rows_that_nobody_chose_leave_no_trace(H: int, Dk: int, S: int, K: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    q, kv = halves(2, H, Dk, seed=seed), halves(S, Dk, seed=seed + 1)
    indices = torch.from_numpy(rng.integers(-1, S + 1, (2, K)).astype(np.int32))
    clean = ops.sparse_attention(q, kv, indices, scale=0.2)
    unused = np.setdiff1d(np.arange(S), indices.numpy())
    kv[unused] = torch.nan
    spoilt = ops.sparse_attention(q, kv, indices, scale=0.2)
    torch.testing.assert_close(clean, spoilt, rtol=0, atol=0)
    near_halves(spoilt, ops.sparse_attention(q, kv, indices, scale=0.2, backend="reference"), 4.5)


@pytest.mark.parametrize("level", ["portable", "neon", "avx2", "avx512", "avx512_vnni"])
def test_the_reference_is_met_at_every_level(level: str) -> None:
    """The level is chosen once a process, so these tests run again in another one."""
    chosen = "equals_the_reference or leave_no_trace or without_keys or threads"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    result = subprocess.run(
        command, env=os.environ | {"HEEDFUL_SIMD": level}, capture_output=True, text=True, timeout=300
    )
    if f"this machine has no {level}" in result.stdout:
        pytest.skip(f"no {level} here")
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("D", [1, 2, 16, 128])
def test_hadamard_is_the_orthonormal_matrix_and_its_own_inverse(D: int) -> None:
    x = np.random.default_rng(4).standard_normal((3, 5, D), np.float32)
    got = ops.hadamard(x)
    np.testing.assert_allclose(got, reference.hadamard(x), atol=1e-5)
    np.testing.assert_allclose(ops.hadamard(got), x, atol=1e-5)
    np.testing.assert_allclose(got, ops.hadamard(x, backend="reference"), atol=1e-5)


def test_hadamard_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"x: expected a last dimension that is a power of two, got shape \[2, 6\]"):
        ops.hadamard(np.ones((2, 6), np.float32))
