"""DeepGEMM's scoring functions on CPU tensors: ranges, shifted columns, pages of codes and scales, several queries."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.compat import deep_gemm
from heedful.compat.deep_gemm import (
    fp8_fp4_mqa_logits,
    fp8_fp4_paged_mqa_logits,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    get_num_sms,
    get_paged_mqa_logits_metadata,
)

E4M3 = torch.float8_e4m3fn
INT = torch.int32


def test_parameters_have_the_names_and_places_that_callers_use() -> None:
    contiguous = "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits max_seqlen_k"
    paged = "q kv_cache weights context_lens block_table schedule_meta max_context_len clean_logits"
    names = {
        fp8_mqa_logits: contiguous,
        fp8_paged_mqa_logits: paged + " indices",
        fp8_fp4_mqa_logits: contiguous + " logits_dtype schedule_meta",
        fp8_fp4_paged_mqa_logits: paged + " logits_dtype indices",
        get_paged_mqa_logits_metadata: "context_lens block_kv num_sms indices",
    }
    for function, expected in names.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected.split()


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


def pages(keys: torch.Tensor, size: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of `size` keys that stand `gap` bytes apart, written here by hand, and the keys they hold."""
    blocks, dim = len(keys) // size, keys.shape[1]
    codes, scale = quantized(keys)
    cache = torch.full((blocks, size * (dim + 4) + gap), 77, dtype=torch.uint8)[:, : size * (dim + 4)]
    cache[:, : size * dim] = codes.view(torch.uint8).view(blocks, -1)
    cache[:, size * dim :] = scale.view(blocks, size).view(torch.uint8)
    return cache.view(blocks, size, 1, dim + 4), codes.float() * scale[:, None]


@settings(deadline=None, max_examples=60)
@given(
    size=st.sampled_from([(64, 0), (64, 16), (32, 0), (16, 4), (1, 0), (128, 0), (256, 512)]),
    batch=st.integers(1, 3),
    next_n=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 16]),
    dim=st.sampled_from([32, 128]),
    options=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_decoding_scores_over_pages(
    size: tuple[int, int], batch: int, next_n: int, heads: int, dim: int, options: tuple[bool, bool], seed: int
) -> None:
    each, pair = options
    generator = torch.Generator().manual_seed(seed)
    columns, most = 200, -(-192 // size[0])
    blocks = batch * most + 1
    cache, values = pages(torch.randn(blocks * size[0], dim, generator=generator), *size)
    table = torch.randperm(blocks, generator=generator)[: batch * most].view(batch, most).to(INT)
    q = torch.randn(batch, next_n, heads, dim, generator=generator).to(E4M3)
    weights = torch.randn(batch * next_n, heads, generator=generator)
    lens = torch.randint(0, 193, (batch,), generator=generator, dtype=INT)
    seen = lens[:, None] - next_n + 1 + torch.arange(next_n)
    if each:
        seen = torch.randint(0, 193, (batch, next_n), generator=generator, dtype=INT)
    lens = seen if each else lens
    for row in range(batch):  # what lies behind a sequence's blocks is not looked at
        table[row, -(-int(lens[row].max()) // size[0]) :] = -5
    metadata = get_paged_mqa_logits_metadata(lens, size[0], get_num_sms())
    if pair:
        logits = fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, table, metadata, columns)
    else:
        hint = torch.arange(batch, dtype=INT)
        logits = fp8_paged_mqa_logits(q, cache, weights, lens, table, metadata, columns, indices=hint)
    assert logits.shape == (batch * next_n, columns)
    for i in range(batch):
        rows = values.view(blocks, size[0], dim)[table[i].clamp(0).long()].flatten(0, 1)
        want = scores(q[i].float(), rows, weights[i * next_n : (i + 1) * next_n])
        for j in range(next_n):
            count = max(0, int(seen[i, j]))
            got = logits[i * next_n + j]
            torch.testing.assert_close(got[:count].double(), want[j, :count], atol=1e-3, rtol=1e-4)
            assert got[count:].isneginf().all()


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("block", [-1, 6])
def test_a_block_that_the_cache_does_not_have_is_refused(size: int, block: int) -> None:
    q, cache, weights = torch.randn(2, 1, 4, 32), torch.zeros(6, size, 1, 36, dtype=torch.uint8), torch.ones(2, 4)
    table, lens = torch.tensor([[0, 1, block], [2, block, 0]], dtype=INT), torch.tensor([size, size + 1], dtype=INT)
    with pytest.raises(ValueError, match=rf"block_tables?: .* from 0 to 6 - 1.*(, got {block}|, got {block} in )"):
        fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 3 * size)
    table[1, 1] = 3
    fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 3 * size)


@pytest.mark.parametrize(
    ("size", "length", "place", "unseen"),
    [(16, 100, 5, [1]), (32, 200, 3, [1]), (64, 300, 2, [2]), (128, 600, 3, [6, 7])],
)
def test_a_copied_page_of_a_missing_block_is_no_page(size: int, length: int, place: int, unseen: list[int]) -> None:
    """A GPU, where nobody looks at blocks, reads it no more than a page that the caller's table lacks."""
    cache, table = torch.zeros(9, size, 36, dtype=torch.uint8), torch.arange(8, dtype=INT)[None].clone()
    table[0, place], table[0, 7] = 9, -1  # the latter behind the end
    missing = deep_gemm._missing(table, 9, size, torch.tensor([[1, length]]))
    assert missing.nonzero().tolist() == [[0, place]]
    copied = deep_gemm._pages_of_64(cache, table, missing)[1]
    assert (copied < 0).nonzero()[:, 1].tolist() == unseen


@pytest.mark.parametrize("size", [32, 64])
def test_decoding_without_queries(size: int) -> None:
    q, cache, table = (
        torch.randn(2, 0, 4, 32),
        torch.zeros(6, size, 1, 36, dtype=torch.uint8),
        torch.zeros(2, 3).to(INT),
    )
    for lens in (torch.tensor([3, 9], dtype=INT), torch.zeros(2, 0, dtype=INT)):
        assert fp8_paged_mqa_logits(q, cache, torch.ones(0, 4), lens, table, None, 64).shape == (0, 64)


def test_pages_that_the_caches_of_ops_hold() -> None:
    keys, cache = torch.randn(256, 32), torch.zeros(4, 64, 1, 36, dtype=torch.uint8)
    ops.write_index_cache(keys, cache[:, :, 0], torch.arange(256))
    assert torch.equal(cache, pages(keys, 64, 0)[0])


def test_pairs_and_narrow_numbers() -> None:
    q, (k, scale) = torch.randn(5, 4, 32).to(E4M3), quantized(torch.randn(20, 32))
    weights, starts, ends = torch.randn(5, 4).bfloat16(), torch.zeros(5, dtype=INT), torch.arange(15, 20, dtype=INT)
    want = fp8_mqa_logits(q, (k, scale), weights.float(), starts, ends)
    got = fp8_fp4_mqa_logits((q, None), (k, scale), weights, starts, ends, logits_dtype=torch.bfloat16)
    torch.testing.assert_close(got, want.bfloat16(), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"q\[1\]: expected None \(codes of four bits are not served\), got Tensor"):
        fp8_fp4_mqa_logits((q, torch.ones(5, 4)), (k, scale), weights, starts, ends)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q: expected a pair of codes and None, got Tensor"):
        fp8_fp4_mqa_logits(q, (k, scale), weights, starts, ends)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits_dtype: expected"):
        fp8_fp4_mqa_logits((q, None), (k, scale), weights, starts, ends, logits_dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, dtype=torch.int64)}, "q: expected float8_e4m3fn or"),
        ({"kv": torch.zeros(5, 4)}, "kv: expected keys and their scales, got Tensor"),
        ({"kv": (torch.zeros(5, 3), torch.ones(5))}, "kv[0]: expected"),
        ({"kv": (torch.zeros(5, 4), torch.ones(4))}, "kv[1]: expected float32 [seq_len_kv=5], got float32 [4]"),
        ({"weights": torch.zeros(2, 2)}, "weights: expected float32 or bfloat16 or float16 [seq_len=2, heads=3], got"),
        ({"cu_seq_len_k_end": torch.zeros(3, dtype=INT)}, "cu_seq_len_k_end: expected int32 or int64 [seq_len=2]"),
        ({"max_seqlen_k": -1}, "max_seqlen_k: expected an integer from 0"),
        ({"kv": (torch.zeros(5, 4), [1.0] * 5)}, "kv[1]: expected a torch tensor, got list"),
        ({"cu_seq_len_k_start": [0, 0]}, "cu_seq_len_k_start: expected a torch tensor, got list"),
        ({"weights": [[1.0]]}, "weights: expected a torch tensor, got list"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache": torch.zeros(2, 64, 1, 24).byte()}, "kv_cache: expected uint8 [num_blocks, block_kv, 1, 20], got"),
        ({"weights": torch.zeros(2, 2)}, "weights: expected float32 or bfloat16 or float16 [batch * next_n=1"),
        ({"context_lens": torch.ones(2, dtype=INT)}, "context_lens: expected int32 or int64 [batch=1], got int32 [2]"),
        ({"block_table": torch.zeros(1, dtype=INT)}, "block_table: expected int32 [batch=1, max_blocks], got int32"),
        ({"indices": torch.zeros(2, dtype=INT)}, "indices: expected int32 [batch=1], got int32 [2]"),
        ({"max_context_len": 0}, "max_context_len: expected an integer from 1"),
        ({"context_lens": [1]}, "context_lens: expected a torch tensor, got list"),
        ({"block_table": [[0]]}, "block_table: expected a torch tensor, got list"),
        ({"kv_cache": None}, "kv_cache: expected a NumPy array or a torch tensor, got NoneType"),
    ],
)
def test_bad_arguments_of_decoding_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 1, 2, 16).to(E4M3),
        "kv_cache": torch.zeros(2, 64, 1, 20, dtype=torch.uint8),
        "weights": torch.zeros(1, 2),
        "context_lens": torch.ones(1, dtype=INT),
        "block_table": torch.zeros(1, 1, dtype=INT),
        "schedule_meta": None,
        "max_context_len": 64,
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fp8_paged_mqa_logits(**(arguments | change))
    assert message in str(raised.value)
