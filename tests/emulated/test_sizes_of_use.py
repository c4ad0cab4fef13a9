"""The configurations of large calls, a block or two of each, and addresses past 2^31 elements.

Tensors are as large as in use, but only the memory that those blocks touch is ever taken.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import driver
from heedful.kernels import fetch_rows as fetch_kernel
from heedful.kernels import index_scores, index_top_k, sparse_attention, top_k, write_cache
from heedful.kernels.compilation import Launch
from heedful.kernels.rows import Rows
from heedful.kernels.scoring import Scoring
from heedful.kernels.target import Target
from heedful.ops import read_latent_cache

S, K = 131072, 2048
FAR = 2**31


def run(launch: Launch, *programs: int) -> None:
    """Runs these programs of the first axis, counted from the end if negative; all others are 0."""
    grid = (*launch.grid, 1, 1)[:3]
    with driver.only(*((n % grid[0], 0, 0) for n in programs)):
        launch.run()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers [..., D] and the scale of each row."""
    scale = x.abs().amax(-1) / 448
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def scores_of(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("th,ths->ts", weights, torch.relu(torch.einsum("thd,sd->ths", q.float(), k.float())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_scores_of_a_long_prefill(dtype: str) -> None:
    T, kind = FAR // S + 16, getattr(torch, dtype)
    q, keys = torch.empty((T, 64, 128), dtype=kind), numbers(S, 128, seed=1)
    q[-8:] = numbers(8, 64, 128).to(kind)
    weights, starts, ends = numbers(T, 64), torch.full((T,), S - 300), torch.full((T,), S - 20)
    k, scale = codes(keys) if kind.itemsize == 1 else (keys.to(kind), None)
    out = torch.empty((T, S))
    scoring = Scoring.contiguous(q, k, weights, starts.int(), ends.int(), scale)
    launch = index_scores.plan(scoring, out, Target.of(q))
    grid = launch.grid
    with driver.only(*((grid[0] - 1, part, 0) for part in range(grid[1] - 1, grid[1]))):
        launch.run()
    want = scores_of(q[-1:], k[S - 300 : S - 20], weights[-1:])
    if scale is not None:
        want *= scale[S - 300 : S - 20]
    torch.testing.assert_close(out[-1:, S - 300 : S - 20], want, rtol=1e-4, atol=1e-3)
    assert torch.isneginf(out[-1, S - 20 :]).all()
    assert torch.isneginf(out[-1, S - 310 : S - 300]).all()


def far_pages() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache of index keys past 2^31 bytes, the last pages of which hold keys; these, as float32; a block table."""
    blocks, pages = FAR // (64 * 132) + 100, 33
    cache = torch.empty((blocks, 64 * 132), dtype=torch.uint8)
    values, scale = codes(numbers(pages, 64, 128, seed=2))
    cache[-pages:, : 64 * 128] = values.view(torch.uint8).flatten(1)
    cache[-pages:, 64 * 128 :] = scale.view(torch.uint8)
    table = torch.arange(blocks - pages, blocks, dtype=torch.int32)[None]
    return cache, (values.float() * scale[..., None]).flatten(0, 1), table


def test_scores_of_far_pages() -> None:
    cache, keys, table = far_pages()
    q, weights = codes(numbers(2, 64, 128))[0], numbers(2, 64, seed=3)
    got = index_scores.index_scores_paged(
        q, weights, cache=cache, block_tables=table, seq_lens=torch.tensor([2100], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 2], dtype=torch.int32), max_seq_len=2112,
    )  # fmt: skip
    want = scores_of(q, keys[:2100], weights)
    torch.testing.assert_close(got[1, :2100], want[1], rtol=1e-4, atol=5e-2)
    torch.testing.assert_close(got[0, :2099], want[0, :2099], rtol=1e-4, atol=5e-2)
    assert torch.isneginf(got[0, 2099:]).all()


def test_selection_of_a_long_prefill() -> None:
    T = FAR // S + 16
    scores, out = torch.empty((T, S)), torch.empty((T, K), dtype=torch.int32)
    scores[-1] = numbers(S)
    lengths = torch.zeros(T, dtype=torch.int32)  # programs go through many rows; only the last is to be read
    lengths[-1] = S
    (launch,) = top_k.plan(scores, K, lengths, False, out, Target.of(scores))
    run(launch, (T - 1) % launch.grid[0])
    assert torch.equal(out[-1].sort().values, scores[-1].topk(K).indices.int().sort().values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("paged", [False, True])
def test_scores_and_selection_in_one(dtype: str, paged: bool) -> None:
    """The first program of 4,096 queries, which see few keys, and many."""
    kind, T = getattr(torch, dtype), 4096
    q, weights, keys = numbers(T, 64, 128).to(kind), numbers(T, 64, seed=1), numbers(8192, 128, seed=2)
    if paged:
        cache = keys.to(torch.bfloat16).view(128, 64, 128)
        k, scale = keys.to(torch.bfloat16), torch.ones(8192)
        if kind.itemsize == 1:
            k, scale = codes(keys)
            cache = torch.cat([k.view(torch.uint8).view(128, -1), scale.view(torch.uint8).view(128, -1)], 1)
        table, start = torch.arange(128, dtype=torch.int32)[None], torch.tensor([0, T], dtype=torch.int32)
        scoring = Scoring.paged(q, weights, cache, table, torch.tensor([8192], dtype=torch.int32), start, 8192)
    else:
        k, scale = codes(keys) if kind.itemsize == 1 else (keys.to(kind), torch.ones(8192))
        ends = torch.arange(8192 - T + 1, 8193, dtype=torch.int32)
        scoring = Scoring.contiguous(q, k, weights, None, ends, scale if kind.itemsize == 1 else None)
    out = torch.full((T, 512), -7, dtype=torch.int32)
    launch = index_top_k.plan(scoring, 512, False, out, Target.of(q), parts=1)[0]
    run(launch, 0)
    done = (out[:, 0] != -7).nonzero()[:, 0]
    assert len(done)
    for t in done[[0, -1]].tolist():
        seen = 8192 - T + t + 1
        want = (scores_of(q[t : t + 1], k[:seen], weights[t : t + 1]) * scale[:seen])[0].topk(512)
        missing = set(want.indices.tolist()) - set(out[t].tolist())
        near = (
            want.values[-1] + want.values[0].abs() * 1e-5
        )  # sums in another order may exchange what is as good as equal
        assert all(want.values[want.indices.tolist().index(i)] <= near for i in missing)


@pytest.mark.parametrize("form", ["bfloat16", "float16", "pages", "fp8"])
def test_prefill(form: str) -> None:
    """The published sizes over 2,048 of so many rows that neither they nor q nor out can be addressed by 32 bits."""
    dtype = torch.float16 if form == "float16" else torch.bfloat16
    T = FAR // (128 * 512) + 8
    blocks, filled = FAR // (64 * (656 if form == "fp8" else 576)) + 64, 64
    q, indices = torch.empty((T, 128, 576), dtype=dtype), torch.empty((T, K), dtype=torch.int32)
    q[-1] = numbers(128, 576).to(dtype)
    rng = np.random.default_rng(4)
    indices[-1] = torch.from_numpy(64 * blocks - 1 - rng.permutation(64 * filled)[:K].astype(np.int32))
    indices[-1, 100:1200] = -1
    latent = numbers(64 * filled, 576, seed=5).to(dtype)
    if form == "fp8":
        cache = torch.empty((blocks, 64, 656), dtype=torch.uint8)
        last = cache[-filled:].clone()
        write_cache.write_latent_cache_reference(latent, last, torch.arange(64 * filled), value_dim=512)
        cache[-filled:] = last
        latent = read_latent_cache(last, torch.arange(64 * filled), value_dim=512, rope_dim=64)
    else:
        cache = torch.empty((blocks, 64, 576), dtype=dtype)
        cache[-filled:] = latent.view(filled, 64, 576)
    rows = Rows.contiguous(cache.view(-1, 576), 512, None) if form in ("bfloat16", "float16") else None
    rows = rows or Rows.pages(cache, 576, 512)
    launches = sparse_attention.plan(q, rows, indices, 576**-0.5, None, None, None, None, Target.of(q))
    assert len(launches) == 1
    run(launches[0], *range(-(launches[0].grid[0] // T), 0))  # every head of the last query
    chosen = latent[(indices[-1][indices[-1] >= 0].long() - 64 * (blocks - filled))].double()
    logits = q[-1].double() @ chosen.T * 576**-0.5
    out, lse = launches[0].arguments["out"][-1], launches[0].arguments["lse"][-1]
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ chosen[:, :512], rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
@pytest.mark.parametrize("batch", [1, 64])
def test_decode(form: str, batch: int) -> None:
    latent, q = numbers(64 * 48, 576).to(torch.bfloat16), numbers(batch, 128, 576, seed=1).to(torch.bfloat16)
    cache = latent.view(48, 64, 576)
    if form == "fp8":
        cache = torch.empty((48, 64, 656), dtype=torch.uint8)
        write_cache.write_latent_cache_reference(latent, cache, torch.arange(64 * 48), value_dim=512)
        latent = read_latent_cache(cache, torch.arange(64 * 48), value_dim=512, rope_dim=64)
    indices = torch.stack(
        [torch.randperm(64 * 48, generator=torch.Generator().manual_seed(b))[:K] for b in range(batch)]
    )
    rows = Rows.pages(cache, 576, 512)
    launches = sparse_attention.plan(q, rows, indices.int(), 576**-0.5, None, None, None, None, Target.of(q))
    first = launches[0]
    per_query, parts = first.grid[0] // batch, (*first.grid, 1)[1]
    with driver.only(*((n, part, 0) for n in range(per_query) for part in range(parts))):
        first.run()
    for launch in launches[1:]:
        grid = (*launch.grid, 1, 1)[:3]
        of_one = grid[0] // batch
        with driver.only(*((x, y, 0) for x in range(of_one) for y in range(grid[1]))):
            launch.run()
    chosen = latent[indices[0]].double()
    logits = q[0].double() @ chosen.T * 576**-0.5
    out, lse = launches[-1].arguments["out"][0], launches[-1].arguments["lse"][0]
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ chosen[:, :512], rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-3, atol=1e-3)


def test_far_rows_are_written_and_fetched() -> None:
    blocks = FAR // (64 * 656) + 64
    cache = torch.empty((blocks, 64, 656), dtype=torch.uint8)
    cache[-2:] = 0
    want, latent = cache[-2:].clone(), numbers(9, 576).to(torch.bfloat16)
    slots = torch.arange(128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))[:9]]
    far = slots + 64 * (blocks - 2)
    with driver.only((0, 0, 0), (1, 0, 0), (2, 0, 0)):
        write_cache.write_latent_cache(latent, cache, far, value_dim=512)
    write_cache.write_latent_cache_reference(latent, want, slots, value_dim=512)
    assert torch.equal(cache[-2:], want)
    near = torch.zeros((1, 64, 656), dtype=torch.uint8)
    launch = fetch_kernel.plan(cache.view(-1, 656), near.view(-1, 656), far, torch.arange(9))
    with driver.only(*((x, 0, 0) for x in range(launch.grid[0]))):
        launch.run()
    assert torch.equal(near[0, :9], want.view(-1, 656)[slots])
