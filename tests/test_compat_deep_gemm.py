"""DeepGEMM's scoring functions on CPU tensors: ranges, shifted columns, pages of codes and scales, several queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.compat.deep_gemm import (
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_num_sms,
    get_paged_mqa_logits_metadata,
)

E4M3 = torch.float8_e4m3fn
INT = torch.int32


def scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, S] float64 from codes, the keys' scales applied."""
    return torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q.double(), k.double()).relu(), weights.double())


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = ops.quantize_fp8(x, group_size=x.shape[-1])
    return codes.view(E4M3), scales[..., 0]


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(1, 6),
    S=st.integers(1, 80),
    heads=st.sampled_from([1, 3, 16]),
    dim=st.sampled_from([16, 128]),
    shifted=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_prefill_scores_of_ranges(T: int, S: int, heads: int, dim: int, shifted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(T, heads, dim, generator=generator).to(E4M3)
    k, k_scale = quantized(torch.randn(S, dim, generator=generator))
    weights = torch.randn(T, heads, generator=generator)
    starts = torch.randint(0, S + 1, (T,), generator=generator, dtype=INT)
    ends = torch.randint(0, S + 1, (T,), generator=generator, dtype=INT)
    width = int((ends - starts).clamp_min(1).max()) if shifted else 0
    logits = fp8_mqa_logits(q, (k, k_scale), weights, starts, ends, clean_logits=False, max_seqlen_k=width)
    want = scores(q.float(), k.float() * k_scale[:, None], weights)
    place = torch.arange(S)
    want[~((place >= starts[:, None]) & (place < ends[:, None]))] = -math.inf
    if shifted:
        assert logits.shape == (T, width)
        for t in range(T):
            first, last = int(starts[t]), int(ends[t])
            torch.testing.assert_close(
                logits[t, : max(0, last - first)].double(), want[t, first:last], atol=1e-3, rtol=1e-4
            )
            assert logits[t, max(0, last - first) :].isneginf().all()
    else:
        torch.testing.assert_close(logits.double(), want, atol=1e-3, rtol=1e-4)


def pages(keys: torch.Tensor, blocks: int, slots: torch.Tensor) -> torch.Tensor:
    cache = torch.zeros(blocks, 64, 1, keys.shape[1] + 4, dtype=torch.uint8)
    ops.write_index_cache(keys, cache[:, :, 0], slots)
    return cache


@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("each", [False, True])
def test_decoding_scores_over_pages(next_n: int, each: bool) -> None:
    torch.manual_seed(0)
    batch, heads, dim, columns = 3, 4, 32, 200
    keys, table = torch.randn(384, dim), torch.tensor([[2, 0, 5], [1, 3, 0], [4, 0, 0]], dtype=INT)
    cache = pages(keys, 6, torch.arange(384))
    flat = cache.view(6, -1)
    codes = flat[:, : 64 * dim].reshape(-1, dim).view(E4M3).float()
    values = codes * flat[:, 64 * dim :].contiguous().view(torch.float32).reshape(-1, 1)
    q, weights = torch.randn(batch, next_n, heads, dim).to(E4M3), torch.randn(batch * next_n, heads)
    lens = torch.tensor([150, 64, 0], dtype=INT)
    seen = lens[:, None] - next_n + 1 + torch.arange(next_n)
    if each:
        seen = torch.stack([lens // 2, lens], dim=1)[:, 2 - next_n :].to(INT).contiguous()
    metadata = get_paged_mqa_logits_metadata(seen if each else lens, 64, get_num_sms())
    logits = fp8_paged_mqa_logits(q, cache, weights, seen if each else lens, table, metadata, columns)
    assert logits.shape == (batch * next_n, columns)
    for i in range(batch):
        rows = values.view(6, 64, dim)[table[i].long()].flatten(0, 1)
        want = scores(q[i].float(), rows, weights[i * next_n : (i + 1) * next_n])
        for j in range(next_n):
            count = max(0, int(seen[i, j]))
            got = logits[i * next_n + j]
            torch.testing.assert_close(got[:count].double(), want[j, :count], atol=1e-3, rtol=1e-4)
            assert got[count:].isneginf().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, dtype=torch.int64)}, "q: expected float8_e4m3fn or"),
        ({"kv": torch.zeros(5, 4)}, "kv: expected keys and their scales, got Tensor"),
        ({"kv": (torch.zeros(5, 3), torch.ones(5))}, "kv[0]: expected"),
        ({"kv": (torch.zeros(5, 4), torch.ones(4))}, "kv[1]: expected float32 [seq_len_kv=5], got float32 [4]"),
        ({"weights": torch.zeros(2, 2)}, "weights: expected float32 [seq_len=2, heads=3], got float32 [2, 2]"),
        ({"cu_seq_len_k_end": torch.zeros(3, dtype=INT)}, "cu_seq_len_k_end: expected int32 or int64 [seq_len=2]"),
        ({"max_seqlen_k": -1}, "max_seqlen_k: expected an integer from 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 4),
        "kv": (torch.zeros(5, 4), torch.ones(5)),
        "weights": torch.zeros(2, 3),
        "cu_seq_len_k_start": torch.zeros(2, dtype=INT),
        "cu_seq_len_k_end": torch.full((2,), 5, dtype=INT),
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fp8_mqa_logits(**(arguments | change))
    assert message in str(raised.value)


def test_pages_of_another_size_are_refused() -> None:
    q, weights = torch.zeros(1, 1, 2, 16).to(E4M3), torch.zeros(1, 2)
    lens, table = torch.ones(1, dtype=INT), torch.zeros(1, 1, dtype=INT)
    cache = torch.zeros(2, 32, 1, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"kv_cache: expected uint8 \[num_blocks, 64, 1, 20\]"):
        fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 64)
