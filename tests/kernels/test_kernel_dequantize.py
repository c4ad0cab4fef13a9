"""Coded pages as rows of numbers: codes times scales, rounded once; attention over them is that over the pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.kernels import dequantize, sparse_attention
from heedful.kernels.rows import Rows

few = settings(deadline=None, max_examples=25)


def coded(rng: np.random.Generator, num_blocks: int, C: int, R: int) -> torch.Tensor:
    """A cache of coded pages, [num_blocks, 64, C + 4 ceil(C / 128) + 2 R]."""
    latent = torch.from_numpy(rng.standard_normal((num_blocks * 64, C + R), np.float32) * 2)
    cache = torch.zeros((num_blocks, 64, C + 4 * -(-C // 128) + 2 * R), dtype=torch.uint8)
    ops.write_latent_cache(latent, cache, np.arange(num_blocks * 64), value_dim=C)
    return cache


@few
@given(
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 128]), min_size=1, max_size=4),
    st.sampled_from([(16, 8), (12, 4), (40, 0), (9, 3), (130, 6), (256, 16), (512, 64)]),
    st.integers(0, 2**32),
)
def test_rows_are_codes_times_scales(device: torch.device, lens: list[int], widths: tuple[int, int], seed: int) -> None:
    rng, (C, R), M = np.random.default_rng(seed), widths, 3
    cache = coded(rng, 4 * M, C, R)
    tables = torch.from_numpy(rng.permutation(4 * M)[: len(lens) * M].reshape(len(lens), M).astype(np.int32))
    want = dequantize.dequantize_pages_reference(cache, C, tables).view(len(lens), M * 64, C + R)
    tables[:, -1] = torch.tensor([-1, 4 * M, 2**30, -(2**30)], dtype=torch.int32)[: len(lens)]
    batch = tables.to(device), torch.tensor(lens, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    out, (places, *_) = dequantize.dequantize_pages(Rows.pages(cache.to(device), C + R, C), batch)
    assert out.shape == (len(lens) * M * 64, C + R)
    for b, length in enumerate(lens):
        seen = min(length, 64 * (M - 1))
        assert torch.equal(out.view(len(lens), M * 64, -1)[b, :seen].cpu(), want[b, :seen])
        assert places[b].tolist() == [*range(b * M, b * M + M - 1), -1]


def test_attention_takes_them_where_rows_are_read_often(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, (C, R), N, M = np.random.default_rng(0), (128, 16), 40, 3
    cache = coded(rng, 9, C, R).to(device)
    q = torch.from_numpy(rng.standard_normal((N, 5, C + R), np.float32)).to(device, torch.bfloat16)
    indices = torch.from_numpy(rng.integers(-20, 200, (N, 120)).astype(np.int32)).to(device)
    tables = torch.tensor([[7, 2, 4], [0, 8, -1]], dtype=torch.int32, device=device)
    lens, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([150, 128], [0, 25, N]))
    calls = []
    whole = sparse_attention.dequantize_pages
    monkeypatch.setattr(sparse_attention, "dequantize_pages", lambda *given_: calls.append(1) or whole(*given_))

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention.sparse_attention_paged(
            q, indices, scale=0.03, value_dim=C, cache=cache, block_tables=tables, seq_lens=lens, query_start_loc=starts
        )

    often = attend()
    assert calls == [1]
    monkeypatch.setattr(dequantize, "MOST_BYTES", 2 * M * 64 * (C + R) * 2 - 1)
    rarely = attend()
    assert calls == [1]
    for got, want in zip(often, rarely, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("N", "K", "M", "dtype", "worth"),
    [
        (4096, 2048, 2048, torch.bfloat16, True),
        (256, 2048, 2048, torch.bfloat16, True),
        (255, 2048, 2048, torch.bfloat16, False),
        (4096, 2048, 2048, torch.float16, False),  # products are float32 there, and rounding would show
        (1, 2048, 4, torch.bfloat16, False),  # of 256 rows each is read once
        (1 << 20, 2048, 8192, torch.bfloat16, False),  # 604 MB
    ],
)
def test_when_it_is_worth_it(N: int, K: int, M: int, dtype: torch.dtype, worth: bool) -> None:
    q, tables = torch.empty((N, 1, 576), dtype=dtype, device="meta"), torch.empty((1, M), device="meta")
    rows = Rows.pages(torch.empty((9, 64, 656), dtype=torch.uint8, device="meta"), 576, 512)
    assert dequantize.is_worth_it(q, rows, K, tables) == worth
