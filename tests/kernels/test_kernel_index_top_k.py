"""The fused selection is that of the two calls, in every order of scores, over contiguous keys and pages, in parts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernel_index_scores import batches, float64, inputs, on, paged_batch, whole

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


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1])
def test_keys_of_a_block_that_is_none_of_the_caches_are_not_selected(device: torch.device, bad: int) -> None:
    arguments = paged_batch(np.random.default_rng(6))
    scores = float64(scoring_kernels.index_scores_paged_reference(**arguments))
    scores[:3, 64:128] = -np.inf  # of the first sequence's second block
    arguments["block_tables"][0, 1] = bad
    got = fused(device, Scoring.paged(**on(device, arguments)), 90, False, 64, 2)
    np.testing.assert_array_equal(got, reference.top_k(scores, 90, None, False))


@pytest.mark.parametrize("starts", [(0, 3, 2**31 - 1), (0, 3, -(2**31)), (-7, 3, 5), (9, 9, 9), (0, 2**31 - 1, 5)])
def test_wild_lengths_and_starts_write_no_row_that_is_not_there(device: torch.device, starts: tuple[int, ...]) -> None:
    arguments = paged_batch(np.random.default_rng(7))
    arguments["query_start_loc"] = torch.tensor(starts, dtype=torch.int32)
    arguments["seq_lens"] = torch.tensor([2**31 - 1, -4], dtype=torch.int32)
    scoring, target = Scoring.paged(**on(device, arguments)), Target.of(device)
    sizes = replace(kernels.fused_sizes(scoring, 20, torch.float32, target), BLOCK=64, CAP=128)
    room = torch.full((5 + 64, 20), -7, dtype=torch.int32, device=device)
    for launch in kernels.plan(scoring, 20, False, room[32:37], target, sizes, 1):
        launch.run()
    assert (room[:32] == -7).all()
    assert (room[37:] == -7).all()
    assert (room[32:37] < 128).all()


COMPILED = """
import torch
from heedful.kernels import index_scores, index_top_k, top_k
from heedful.kernels.compilation import Compilation, compile_for
from heedful.kernels.scoring import Scoring
from heedful.kernels.target import Target

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def contiguous(T, S, H, D, q, k, ranges, scale):
    starts, ends = (None if ranges is None else meta(T, dtype=ranges) for _ in range(2))
    keys = meta(S, D, dtype=k)
    return Scoring.contiguous(meta(T, H, D, dtype=q), keys, meta(T, H), starts, ends, meta(S) if scale else None)

def paged(B, H, D, q, stored, M):
    shape = (7, 64 * (D + 4)) if stored.itemsize == 1 else (7, 64, D)
    i32 = torch.int32
    batch = meta(B, M, dtype=i32), meta(B, dtype=i32), meta(B + 1, dtype=i32)
    return Scoring.paged(meta(B, H, D, dtype=q), meta(B, H), meta(*shape, dtype=stored), *batch, 64 * M)

f32, f16, bf16, f8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
scorings = [
    contiguous(1, 1, 1, 1, f32, f32, torch.int32, False),
    contiguous(1, 1, 3, 12, bf16, bf16, torch.int64, True),
    contiguous(33, 999, 5, 100, f8, f8, None, True),
    contiguous(5, 999, 20, 40, f16, bf16, torch.int64, False),
    contiguous(33, 999, 128, 128, bf16, f8, torch.int32, True),
    paged(1, 64, 128, f8, torch.uint8, 1),
    paged(1, 1, 1, torch.int8, torch.int8, 9),
    paged(2, 3, 12, f32, f32, 5),
]
target = Target.cuda({capability})
launches = []
for scoring in scorings:
    launches.append(index_scores.plan(scoring, meta(scoring.T, scoring.S), target))
    for k in (1, 7):
        out = meta(scoring.T, k, dtype=torch.int32)
        launches += index_top_k.plan(scoring, k, k == 7, out, target, parts=1)
for T, S, k, dtype, lengths in ((1, 1, 1, f32, None), (1, 100_000, 1, bf16, torch.int64), (3, 99, 5, f16, torch.int32)):
    out, limits = meta(T, k, dtype=torch.int32), None if lengths is None else meta(T, dtype=lengths)
    launches += top_k.plan(meta(T, S, dtype=dtype), k, limits, True, out, target)
for launch in launches:
    compiled = compile_for(Compilation("", launch), target)
    assert compiled.shared <= target.shared_memory, launch
    # What one thread of a block has written others read after a barrier; nothing may pass a cache that is not coherent.
    assert "ld.global.nc" not in compiled.assembly
print(len(launches))
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_arguments_of_one_and_unusual_shapes_compile(capability: int) -> None:
    # Triton compiles apart for integers that are 1, which the interpreter does not: in a process without it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = COMPILED.replace("{capability}", str(capability))
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
        script = Path(folder) / "compiled.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=900, env=environment
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
