"""The border: what is accepted, what comes back, what is not copied, and that errors name their argument."""

# ruff: noqa: E501 -- the table of bad calls reads best one call a line

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import heedful
from heedful import _core, ops

F32 = np.float32


def indexer_call(**changes: Any) -> Any:
    arguments = {"q": np.ones((2, 3, 4), F32), "k": np.ones((5, 4), F32), "weights": np.ones((2, 3), F32)}
    return ops.index_scores(**(arguments | changes))


def attention_call(**changes: Any) -> Any:
    arguments = {
        "q": np.ones((2, 3, 4), F32),
        "kv": np.ones((5, 4), F32),
        "indices": np.zeros((2, 6), np.int32),
        "scale": 1.0,
    }
    return ops.sparse_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (indexer_call, {"q": np.ones((2, 3, 4))}, "q: expected float32 or bfloat16 or float16 or float8_e4m3fn or int8 [T, Hi, Di], got float64 [2, 3, 4]"),
        (indexer_call, {"q": np.ones((2, 4), F32)}, "q: expected"),
        (indexer_call, {"q": [[[1.0]]]}, "q: expected a NumPy array or a torch tensor, got list"),
        (indexer_call, {"q": np.ones((2, 3, 4), ">f4")}, "q: expected"),
        (indexer_call, {"q": np.ones((2, 0, 4), F32), "weights": np.ones((2, 0), F32)}, "q: expected [T, Hi, Di] with Hi and Di of at least 1"),
        (indexer_call, {"k": np.ones((5, 3), F32)}, "k: expected float32 or bfloat16 or float16 or float8_e4m3fn or int8 [S, Di=4], got float32 [5, 3]"),
        (indexer_call, {"weights": np.ones((2, 4), F32)}, "weights: expected float32 [T=2, Hi=3], got float32 [2, 4]"),
        (indexer_call, {"weights": np.ones((2, 3), np.float16)}, "weights: expected float32 [T=2, Hi=3], got float16 [2, 3]"),
        (indexer_call, {"k_scale": np.array([1, 1, np.nan, 1, 1], F32)}, "k_scale: expected finite scales, got NaN at 2"),
        (indexer_call, {"k_scale": np.ones(4, F32)}, "k_scale: expected float32 [S=5], got float32 [4]"),
        (indexer_call, {"q_positions": [1]}, "q_positions: expected int32 or int64 [T=2], got int64 [1]"),
        (indexer_call, {"q_positions": np.ones(2)}, "q_positions: expected int32 or int64 [T=2], got float64 [2]"),
        (indexer_call, {"backend": "cuda"}, "backend: expected one of auto, cpu, triton, reference, got 'cuda'"),
        (attention_call, {"indices": np.zeros((2, 6), np.int64)}, "indices: expected int32 [T=2, K], got int64 [2, 6]"),
        (attention_call, {"kv": np.ones((5, 2, 4), F32)}, "kv: expected a number of heads that divides 3, got 2"),
        (attention_call, {"kv": np.ones((5, 5), F32)}, "kv: expected"),
        (attention_call, {"v": np.ones((4, 2), F32)}, "v: expected float32 or bfloat16 or float16 [S=5, Dv], got float32 [4, 2]"),
        (attention_call, {"v": np.ones((5, 2), F32), "value_dim": 2}, "value_dim: expected None when v is given"),
        (attention_call, {"value_dim": 2.5}, "value_dim: expected an integer from 1 to 4, got 2.5"),
        (attention_call, {"value_dim": 5}, "value_dim: expected an integer from 1 to 4, got 5"),
        (attention_call, {"scale": float("inf")}, "scale: expected a finite number, got inf"),
        (attention_call, {"scale": "big"}, "scale: expected a finite number, got 'big'"),
        (attention_call, {"scale": 1e300}, "scale: expected"),
        (attention_call, {"sink": np.ones(2, F32)}, "sink: expected float32 [H=3], got float32 [2]"),
        (lambda **c: ops.top_k(np.ones((1, 3), F32), **c), {"k": 0}, "k: expected an integer from 1 to 2147483647, got 0"),
        (lambda **c: ops.top_k(np.ones((1, 3), F32), **c), {"k": 2.0}, "k: expected an integer from 1 to 2147483647, got 2.0"),
        (lambda **c: ops.top_k(np.ones((1, 3), F32), 2, **c), {"lengths": [4]}, "lengths: expected values from 0 to 3, got 4"),
        (lambda **c: ops.top_k(np.ones((1, 3), F32), 2, **c), {"lengths": [-1]}, "lengths: expected values from 0 to 3, got -1"),
        (lambda **c: ops.top_k(**c), {"scores": np.ones(3), "k": 1}, "scores: expected float32 or bfloat16 or float16 [T, S], got float64 [3]"),
        (lambda **c: ops.quantize_fp8(np.ones(3, F32), **c), {"group_size": 0}, "group_size: expected an integer from 1"),
        (lambda **c: ops.dequantize_fp8(np.ones(3, np.uint8), **c), {"scales": np.ones(2, F32)}, "scales: expected float32 [1] for codes [3], got [2]"),
        (lambda **c: heedful.set_num_threads(**c), {"n": 0}, "n: expected a number of threads from 1 to 1024, got 0"),
        (lambda **c: heedful.set_num_threads(**c), {"n": 1.5}, "n: expected a number of threads from 1 to 1024, got 1.5"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(call: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call(**changes)
    assert message in str(raised.value)


def test_triton_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for q, kind in ((np.ones((2, 3, 4), F32), "a NumPy array"), (torch.ones(2, 3, 4), "a CPU tensor")):
        with pytest.raises(ValueError, match=f"q: expected a CUDA tensor for backend='triton' .* got {kind}"):
            indexer_call(q=q, backend="triton")


def test_tensors_of_another_device_are_refused() -> None:
    torch = pytest.importorskip("torch")
    q = torch.ones(2, 3, 4, device="meta")
    with pytest.raises(ValueError, match="q: expected a tensor on a CPU or a CUDA device, got one on meta"):
        indexer_call(q=q)
    with pytest.raises(ValueError, match="k: is on meta, but q is on cpu"):
        indexer_call(q=torch.ones(2, 3, 4), k=torch.ones(5, 4, device="meta"))
    with pytest.raises(ValueError, match="k: is on meta, but q is on cpu"):
        indexer_call(k=torch.ones(5, 4, device="meta"))
    with pytest.raises(ValueError, match="q: expected a CPU tensor for backend='cpu', got one on meta"):
        indexer_call(q=q, backend="cpu")


def test_tensors_that_require_grad_are_refused_where_grad_would_be_lost() -> None:
    torch = pytest.importorskip("torch")
    tensors = {
        "q": torch.ones(2, 3, 4, requires_grad=True),
        "k": torch.ones(5, 4),
        "weights": torch.ones(2, 3),
    }
    with pytest.raises(ValueError, match="q: requires grad, but this operator has no backward"):
        ops.index_scores(**tensors)
    with torch.no_grad():
        assert ops.index_scores(**tensors).shape == (2, 5)
    with torch.inference_mode():
        assert ops.index_scores(**tensors).shape == (2, 5)


def test_what_comes_in_decides_what_goes_out() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 4), F32), rng.standard_normal((5, 4), F32)
    weights = rng.standard_normal((2, 3), F32)
    from_numpy = ops.index_scores(q, k, weights)
    tensors = [torch.from_numpy(x) for x in (q, k, weights)]
    from_torch = ops.index_scores(*tensors)
    assert isinstance(from_numpy, np.ndarray)
    assert isinstance(from_torch, torch.Tensor)
    np.testing.assert_array_equal(from_numpy, from_torch.numpy())
    chosen = ops.index_top_k(*tensors, 2)
    assert chosen.dtype == torch.int32
    bf16 = [x.to(torch.bfloat16) for x in tensors[:2]]
    for backend in ("auto", "reference"):
        out, lse = ops.dense_attention(*bf16, scale=1.0, backend=backend)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_bfloat16_of_numpy_is_that_of_torch() -> None:
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(1)
    q = rng.standard_normal((3, 2, 8), F32).astype(ml_dtypes.bfloat16)
    kv = rng.standard_normal((20, 8), F32).astype(ml_dtypes.bfloat16)
    out, lse = ops.dense_attention(q, kv, scale=0.5)
    assert out.dtype == ml_dtypes.bfloat16
    as_torch = [torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) for x in (q, kv)]
    torch_out, torch_lse = ops.dense_attention(*as_torch, scale=0.5)
    np.testing.assert_array_equal(out.view(np.uint16), torch_out.view(torch.uint16).numpy())
    np.testing.assert_array_equal(lse, torch_lse.numpy())
    wide, _ = ops.dense_attention(q, kv, scale=0.5, backend="reference")
    # Both are rounded to bfloat16; ours rounds probabilities too, which are weights of values below 4.
    np.testing.assert_allclose(wide.astype(F32), out.astype(F32), rtol=2**-7, atol=4 * 2**-9)


def test_strided_inputs_are_accepted_and_mean_what_they_say() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((4, 3, 8), F32)[::2, :, ::2], rng.standard_normal((4, 5), F32).T
    weights = rng.standard_normal((3, 2), F32).T
    want = ops.index_scores(q.copy(), k.copy(), weights.copy())
    np.testing.assert_array_equal(ops.index_scores(q, k, weights), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_caches_of_torch_are_written_in_place(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    width = {"uint8": 512 + 16 + 128}.get(dtype, 576)
    cache = torch.zeros(2, 64, width, dtype=getattr(torch, dtype))
    address, rows = cache.data_ptr(), torch.randn(3, 576).to(torch.bfloat16)
    ops.write_latent_cache(rows, cache, torch.tensor([3, -1, 70]), value_dim=512)
    assert cache.data_ptr() == address
    assert cache[0, 3].any()
    assert cache[1, 6].any()
    assert not cache[0, :3].any()
    back = ops.read_latent_cache(cache, torch.tensor([3, 70]), value_dim=512, rope_dim=64)
    assert isinstance(back, torch.Tensor)
    torch.testing.assert_close(back, rows[[0, 2]].float(), rtol=0.07 if dtype == "uint8" else 0, atol=0.02 if dtype == "uint8" else 0)  # fmt: skip


def test_views_share_the_callers_memory() -> None:
    torch = pytest.importorskip("torch")
    from heedful._arrays import Arguments

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        tensor = torch.zeros(4, 6).to(dtype)
        name = str(dtype).removeprefix("torch.")
        view = Arguments("auto").take("x", tensor, (name,), "N, D")
        assert view.data.__array_interface__["data"][0] == tensor.data_ptr()


def test_sizes_of_zero_are_no_error() -> None:
    for T, S in ((0, 5), (2, 0), (0, 0)):
        q, k, weights = np.ones((T, 3, 4), F32), np.ones((S, 4), F32), np.ones((T, 3), F32)
        assert ops.index_scores(q, k, weights).shape == (T, S)
        assert ops.index_top_k(q, k, weights, 2).tolist() == ([[-1, -1]] * T if S == 0 else [])
        out, lse = ops.dense_attention(q, k, scale=1.0)
        assert out.shape == (T, 3, 4)
        assert not out.any()
        assert np.isneginf(lse).all()
        out, _ = ops.sparse_attention(q, k, np.zeros((T, 0), np.int32), scale=1.0)
        assert not out.any()


def test_impossible_sizes_are_a_memory_error_and_nothing_worse() -> None:
    with pytest.raises(MemoryError):
        ops.top_k(np.ones((100_000, 1), F32), 2**31 - 1)


SIMD_PROGRAM = """
import numpy as np
from heedful import _core, ops
rng = np.random.default_rng(0)
q, k = rng.integers(-3, 4, (3, 5, 9)).astype("f4"), rng.integers(-3, 4, (70, 9)).astype("f4")
scores = ops.index_scores(q, k, np.ones((3, 5), "f4"))
out, _ = ops.dense_attention(q, k, scale=0.3)
np.testing.assert_array_equal(scores, ops.reference.index_scores(q, k, np.ones((3, 5))))
import ml_dtypes
whole = rng.integers(-8, 9, (2, 70, 64)), rng.integers(-8, 9, (30_000, 64)), rng.integers(-3, 4, (2, 70)).astype("f4")
want = ops.reference.index_scores(*whole)
for name in ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"):
    q8, k8 = (x.astype(getattr(ml_dtypes, name, name)) for x in whole[:2])
    np.testing.assert_array_equal(ops.index_scores(q8, k8, whole[2]), want)
    np.testing.assert_array_equal(ops.index_top_k(q8, k8, whole[2], 999), ops.reference.top_k(want, 999))
    pages = np.zeros((469, 64, 68), "i1" if name == "int8" else "u1")
    ops.write_index_cache(whole[1].astype("f4"), pages, np.arange(30_000))
    arguments = dict(block_tables=np.arange(469)[None], seq_lens=[30_000], query_start_loc=[0, 2], cache=pages)
    near = ops.index_scores_paged(q8, whole[2], **arguments)
    np.testing.assert_allclose(near, ops.index_scores_paged(q8, whole[2], **arguments, backend="reference"), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(ops.index_top_k_paged(q8, whole[2], 999, **arguments), ops.top_k(near, 999))
np.testing.assert_allclose(out, ops.reference.dense_attention(q, k[:, None], 0.3)[0], atol=1e-5)
print(_core.simd_level(), ops.get_num_threads())
"""


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("level", ["portable", "neon", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_the_environment_sets_level_and_threads(level: str) -> None:
    result = run_python(SIMD_PROGRAM, HEEDFUL_SIMD=level, HEEDFUL_NUM_THREADS="3")
    if f"HEEDFUL_SIMD: this machine has no {level}" in result.stderr:
        pytest.skip(f"no {level} here")
    assert result.stdout.split() == [level, "3"], result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "HEEDFUL_SIMD",
            "sse9",
            'HEEDFUL_SIMD: expected one of portable, neon, avx2, avx512, avx512_vnni, avx512_bf16, got "sse9"',
        ),
        (
            "HEEDFUL_NUM_THREADS",
            "many",
            'HEEDFUL_NUM_THREADS: expected a number of threads from 1 to 1024, got "many"',
        ),
        (
            "HEEDFUL_NUM_THREADS",
            "0",
            'HEEDFUL_NUM_THREADS: expected a number of threads from 1 to 1024, got "0"',
        ),
    ],
)
def test_a_bad_environment_is_a_clear_error(name: str, value: str, message: str) -> None:
    result = run_python(SIMD_PROGRAM, **{name: value})
    assert result.returncode == 1
    assert f"ValueError: {message}" in result.stderr


FORK_PROGRAM = """
import os, numpy as np
from heedful import ops
scores = np.arange(200_000, dtype="f4").reshape(20, -1)
want = ops.top_k(scores, 3)
child = os.fork()
if child == 0:
    np.testing.assert_array_equal(ops.top_k(scores, 3), want)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_compute() -> None:
    result = run_python(FORK_PROGRAM)
    assert result.returncode == 0, result.stderr


def test_operators_need_no_torch() -> None:
    program = (
        "import sys, numpy as np, heedful; heedful.top_k(np.ones((1, 3), 'f4'), 2); assert 'torch' not in sys.modules"
    )
    assert run_python(program).returncode == 0


def test_the_simd_level_is_one_of_the_known() -> None:
    assert _core.simd_level() in ("portable", "neon", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
