"""FlashMLA's functions on CPU tensors: shapes, bases, marks and cache rows as its interface and README say."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.compat.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    pages_of_slots,
)

INF = math.inf
INT = torch.int32


def test_parameters_have_the_names_and_places_that_callers_use() -> None:
    decoding = (
        "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal "
        "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length"
    )
    prefill = "q kv indices sm_scale d_v attn_sink topk_length indexer_topk"
    for function, names in ((flash_mla_with_kvcache, decoding), (flash_mla_sparse_fwd, prefill)):
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()
    metadata, num_splits = get_mla_metadata(cache_seqlens=torch.ones(1), num_q_tokens_per_head_k=1, num_heads_k=1)
    assert metadata == FlashMLASchedMeta(have_initialized=False, config=None, tile_scheduler_metadata=None)
    assert num_splits is None


def attend(q: torch.Tensor, rows: torch.Tensor, chosen: list[int], scale: float, d_v: int, sink: Any = None) -> Any:
    """One query [h_q, d] in float64: out, largest logit and lse in natural units, with FlashMLA's marks."""
    if not chosen:
        return torch.zeros(len(q), d_v).double(), torch.full((len(q),), -INF).double(), torch.full((len(q),), INF)
    keys = rows[chosen].double()
    logits = q.double() @ keys.T * scale
    lse = logits.logsumexp(-1)
    denominator = lse if sink is None else torch.logaddexp(lse, sink.double())
    return (logits - denominator[:, None]).exp() @ keys[:, :d_v], logits.amax(-1), lse


@settings(deadline=None, max_examples=40)
@given(
    s_q=st.integers(1, 5),
    h_q=st.integers(1, 9),
    s_kv=st.integers(1, 90),
    topk=st.integers(1, 40),
    width=st.sampled_from([(32, 16), (24, 24), (576, 512)]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_sparse_prefill(
    s_q: int, h_q: int, s_kv: int, topk: int, width: tuple[int, int], options: tuple[bool, bool, bool], seed: int
) -> None:
    with_sink, with_length, natural = options
    generator = torch.Generator().manual_seed(seed)
    d_qk, d_v = width
    q = torch.randn(s_q, h_q, d_qk, generator=generator)
    kv = torch.randn(s_kv, 1, d_qk, generator=generator)
    indices = torch.randint(-2, s_kv + 3, (s_q, 1, topk), generator=generator, dtype=torch.int32)
    indices[0] = -1
    scale = d_qk**-0.5
    sink = torch.randn(h_q, generator=generator) if with_sink else None
    length = torch.randint(0, topk + 1, (s_q,), generator=generator, dtype=torch.int32) if with_length else None
    base = {"log_base": math.e} if natural else {}
    out, max_logits, lse = flash_mla_sparse_fwd(q, kv, indices, scale, d_v, sink, length, **base)
    assert (out.shape, out.dtype) == ((s_q, h_q, d_v), q.dtype)
    unit = 1.0 if natural else math.log(2)
    for t in range(s_q):
        kept = indices[t, 0, : topk if length is None else int(length[t])].tolist()
        want = attend(q[t], kv[:, 0], [i for i in kept if 0 <= i < s_kv], scale, d_v, sink)
        torch.testing.assert_close(out[t].double(), want[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(max_logits[t].double() * unit, want[1].double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[t].double() * unit, want[2].double(), atol=1e-5, rtol=1e-5)


def test_largest_logits_do_not_depend_on_how_many_queries_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = torch.randn(7, 2, 8), torch.randn(20, 1, 8)
    indices = torch.randint(-1, 20, (7, 1, 5), dtype=torch.int32)
    whole = flash_mla_sparse_fwd(q, kv, indices, 0.3, 8)[1]
    monkeypatch.setattr("heedful.compat.flash_mla._MAX_LOGITS_BYTES", 1)
    torch.testing.assert_close(flash_mla_sparse_fwd(q, kv, indices, 0.3, 8)[1], whole, atol=0, rtol=0)


def test_lse_over_the_first_indices_alone_and_a_given_output() -> None:
    q, kv, sink = torch.randn(4, 3, 24), torch.randn(30, 1, 24), torch.randn(3)
    indices = torch.randint(0, 30, (4, 1, 12), dtype=INT)
    indices[2, :, :5] = -1
    length, given = torch.tensor([12, 3, 12, 0], dtype=INT), torch.full((4, 3, 16), math.nan)
    out, largest, lse, first = flash_mla_sparse_fwd(
        q, kv, indices, 0.2, 16, sink, topk_length=length, indexer_topk=5, out=given, log_base=math.e
    )
    assert out is given
    plain = flash_mla_sparse_fwd(q, kv, indices, 0.2, 16, sink, length, log_base=math.e)
    torch.testing.assert_close((out, largest, lse), plain, atol=0, rtol=0)
    for t in range(4):
        want = attend(q[t], kv[:, 0], [i for i in indices[t, 0, : min(5, int(length[t]))].tolist() if i >= 0], 0.2, 16)
        torch.testing.assert_close(first[t].double(), want[2].double(), atol=1e-5, rtol=1e-5)


def cache_of(kind: str, rows: torch.Tensor, blocks: int, page: int, gap: int, d_v: int) -> Any:
    """A cache of blocks that stand `gap` rows apart, and what its slots hold."""
    d = rows.shape[1]
    whole = torch.zeros(-(-blocks * page // 64), 64, rows.shape[1], dtype=getattr(torch, kind.replace("fp8", "uint8")))
    if kind == "fp8":
        whole = torch.zeros(*whole.shape[:2], d_v + 4 * -(-d_v // 128) + 2 * (d - d_v), dtype=torch.uint8)
    slots = torch.arange(blocks * page)
    ops.write_latent_cache(rows[: len(slots)], whole, slots, value_dim=d_v)
    held = ops.read_latent_cache(whole, slots, value_dim=d_v, rope_dim=d - d_v)
    cache = torch.full((blocks, page + gap, 1, whole.shape[2]), 77).to(whole.dtype)[:, :page]
    cache[:, :, 0] = whole.flatten(0, 1)[slots].view(blocks, page, -1)
    return cache, held


def selection(generator: torch.Generator, b: int, s_q: int, topk: int, slots: int, with_length: bool) -> Any:
    """Slots, some of them -1 or beyond the cache, and lengths; and each query's valid slots."""
    indices = torch.randint(-1, slots + slots // 8, (b, s_q, topk), generator=generator, dtype=INT)
    length = torch.randint(0, topk + 1, (b,), generator=generator, dtype=INT) if with_length else None
    kept = [topk] * b if length is None else length.tolist()
    valid = [
        [[slot for slot in row[: kept[i]] if 0 <= slot < slots] for row in rows]
        for i, rows in enumerate(indices.tolist())
    ]
    return indices, length, valid


PAGES = st.sampled_from([(64, 0), (64, 1), (64, 64), (1, 0), (1, 3), (5, 0), (61, 2), (32, 0), (128, 0), (256, 0)])


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["bfloat16", "float32", "fp8"]),
    b=st.integers(1, 3),
    s_q=st.integers(1, 3),
    h_q=st.integers(1, 5),
    width=st.sampled_from([(40, 32), (576, 512), (144, 128)]),
    pages=st.tuples(PAGES, PAGES),
    topk=st.integers(1, 70),
    sinks=st.sampled_from([None, "finite", "infinite"]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_sparse_decoding_reads_slots_of_one_cache_or_two(
    kind: str, b: int, s_q: int, h_q: int, width: Any, pages: Any, topk: int, sinks: Any, options: Any, seed: int
) -> None:
    (d, d_v), (with_length, with_extra, extra_length) = width, options
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, s_q, h_q, d, generator=generator).to(torch.float32 if kind == "float32" else torch.bfloat16)
    found, held, chosen = [], [], []
    for (page, gap), lengths in zip(pages, (with_length, extra_length), strict=True):
        blocks = max(1, 130 // page)
        rows = torch.randn(blocks * page + 64, d, generator=generator)
        cache, values = cache_of(kind, rows, blocks, page, gap, d_v)
        indices, length, valid = selection(generator, b, s_q, topk + 3 * len(found), blocks * page, lengths)
        found.append((cache, indices, length))
        held.append(values)
        chosen.append(valid)
    sink = None if sinks is None else torch.randn(h_q, generator=generator)
    if sinks == "infinite":
        sink = torch.tensor([math.inf, -math.inf, 0.5, 1.0, 2.0])[:h_q]
    extra: dict[str, Any] = {}
    if with_extra:
        extra = dict(zip(("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length"), found[1], strict=True))
    given = torch.full((b, s_q, h_q, d_v), math.nan, dtype=q.dtype)
    metadata, num_splits = get_mla_metadata(torch.tensor([9]), s_q * h_q, 1, h_q, kind == "fp8", topk)
    out, lse = flash_mla_with_kvcache(
        q, found[0][0], torch.empty(b, 0, dtype=INT), None, d_v, metadata, num_splits, is_fp8_kvcache=kind == "fp8",
        indices=found[0][1], attn_sink=sink, topk_length=found[0][2], out=given, **extra,
    )  # fmt: skip
    assert out is given
    assert (lse.shape, lse.dtype) == ((b, h_q, s_q), torch.float32)
    tolerance = 2e-5 if kind == "float32" else 3e-2
    rows = torch.cat(held)
    for i in range(b):
        for t in range(s_q):
            slots = chosen[0][i][t] + ([slot + len(held[0]) for slot in chosen[1][i][t]] if with_extra else [])
            want = attend(q[i, t], rows, slots, d**-0.5, d_v, sink)
            torch.testing.assert_close(out[i, t].double(), want[0], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[i, :, t].double(), want[2].double(), atol=tolerance, rtol=tolerance)


def test_pages_of_a_multiple_of_64_are_read_in_place() -> None:
    slots = torch.tensor([[0, 255, 300, -1, 1023, 1024]], dtype=INT)
    cache = torch.randn(4, 256, 24)
    pages, found = pages_of_slots(cache, slots)
    assert pages.data_ptr() == cache.data_ptr()
    assert pages.shape == (16, 64, 24)
    assert found.tolist() == [[0, 255, 300, -1, 1023, -1]]
    apart = torch.randn(4, 320, 24)[:, :256]
    pages, found = pages_of_slots(apart, slots)
    assert pages.data_ptr() == apart.data_ptr()
    assert found.tolist() == [[0, 255, 364, -1, 1215, -1]]
    assert torch.equal(pages.flatten(0, 1)[1215], apart[3, 255])


def test_codes_may_come_as_e4m3_tensors() -> None:
    cache = torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
    ops.write_latent_cache(torch.randn(128, 576), cache[:, :, 0], torch.arange(128), value_dim=512)
    q, indices = torch.randn(1, 1, 4, 576).bfloat16(), torch.arange(20, dtype=torch.int32).view(1, 1, 20)
    options: dict[str, Any] = {"is_fp8_kvcache": True, "indices": indices}
    as_bytes = flash_mla_with_kvcache(q, cache, None, None, 512, **options)
    as_codes = flash_mla_with_kvcache(q, cache.view(torch.float8_e4m3fn), None, None, 512, **options)
    torch.testing.assert_close(as_bytes, as_codes, atol=0, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_decoding_follows_the_block_table(causal: bool) -> None:
    torch.manual_seed(1)
    b, s_q, h_q, d, d_v = 2, 3, 4, 24, 16
    cache = torch.randn(5, 64, 1, d)
    table, lens = torch.tensor([[4, 1, 0], [2, 3, 0]], dtype=torch.int32), torch.tensor([130, 7], dtype=torch.int32)
    q = torch.randn(b, s_q, h_q, d)
    out, lse = flash_mla_with_kvcache(q, cache, table, lens, d_v, *get_mla_metadata(), softmax_scale=0.2, causal=causal)
    for i in range(b):
        rows = cache[table[i].long()].flatten(0, 2)
        for t in range(s_q):
            seen = int(lens[i]) - (s_q - 1 - t if causal else 0)
            want = attend(q[i, t], rows, list(range(seen)), 0.2, d_v)
            torch.testing.assert_close(out[i, t].double(), want[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[i, :, t].double(), want[2], atol=1e-5, rtol=1e-5)


def test_dense_decoding_over_pages_of_a_multiple_of_64() -> None:
    cache, q = torch.randn(6, 64, 1, 24), torch.randn(2, 2, 3, 24)
    small, large = (torch.tensor(table, dtype=INT) for table in ([[4, 5, 0, 1], [2, 3, 0, 0]], [[2, 0], [1, 0]]))
    lens = torch.tensor([200, 70], dtype=INT)
    want = flash_mla_with_kvcache(q, cache, small, lens, 16, causal=True)
    got = flash_mla_with_kvcache(q, cache.view(3, 128, 1, 24), large, lens, 16, causal=True)
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_decoding_without_queries() -> None:
    q, cache, table = torch.randn(2, 0, 4, 24), torch.randn(3, 64, 1, 24), torch.zeros(2, 1, dtype=INT)
    for options in ({"causal": True}, {"causal": False}, {"indices": torch.zeros(2, 0, 5, dtype=INT)}):
        out, lse = flash_mla_with_kvcache(q, cache, table, torch.tensor([3, 9], dtype=INT), 16, **options)
        assert (out.shape, lse.shape) == ((2, 0, 4, 16), (2, 4, 0))


def test_more_queries_than_the_cache_has_slots() -> None:
    cache, q = torch.randn(1, 64, 1, 8), torch.randn(150, 1, 2, 8)
    indices = torch.randint(-1, 64, (150, 1, 6), dtype=torch.int32)
    out, _ = flash_mla_with_kvcache(q, cache, None, None, 8, softmax_scale=1.0, indices=indices)
    one, _ = flash_mla_with_kvcache(q[140:141], cache, None, None, 8, softmax_scale=1.0, indices=indices[140:141])
    torch.testing.assert_close(out[140:141], one, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_k_cache": torch.zeros(1)}, "extra_k_cache: expected bfloat16 or float32 [extra_num_blocks"),
        ({"extra_k_cache": torch.zeros(1, 2, 1, 8)}, "extra_indices_in_kvcache: expected a NumPy array or a torch"),
        ({"extra_topk_length": torch.zeros(1)}, "extra_topk_length: expected None without extra_k_cache, got Tensor"),
        ({"extra_k_cache": torch.zeros(1), "indices": None}, "extra_k_cache: expected None without indices"),
        ({"out": torch.zeros(1, 1, 2, 7)}, "out: expected float32 [1, 1, 2, 8], got float32 [1, 1, 2, 7]"),
        ({"attn_sink": torch.zeros(3)}, "attn_sink: expected float32 [h_q=2], got float32 [3]"),
        ({"softmax_scale": math.inf}, "softmax_scale: expected a finite number, got inf"),
        ({"head_dim_v": 9}, "head_dim_v: expected an integer from 1 to 8, got 9"),
        ({"causal": True}, "causal: expected False with indices"),
        ({"indices": torch.zeros(1, 1, 4)}, "indices: expected int32 [b=1, s_q=1, topk], got float32 [1, 1, 4]"),
        ({"indices": None}, "block_table: expected int32 for dense attention, got None"),
        ({"k_cache": torch.zeros(1, 32, 2, 8)}, "k_cache: expected bfloat16 or float32 [num_blocks, page, 1, 8], got"),
        ({"is_fp8_kvcache": True}, "k_cache: expected uint8 [num_blocks, page, 1, 12], got float32"),
        ({"q": torch.zeros(1, 1, 8)}, "q: expected float32 or bfloat16 or float16 [b, s_q, h_q, d]"),
        ({"topk_length": torch.zeros(3, dtype=torch.int32)}, "topk_length: expected int32 or int64 [b=1]"),
    ],
)
def test_bad_arguments_of_decoding_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 1, 2, 8),
        "k_cache": torch.zeros(1, 64, 1, 8),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 8,
        "indices": torch.zeros(1, 1, 4, dtype=torch.int32),
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        flash_mla_with_kvcache(**(arguments | change))
    assert message in str(raised.value)


@pytest.mark.parametrize(("d", "row", "whose"), [(512, 584, "V4"), (512, 528, "V4.1"), (576, 352, "NVFP4")])
def test_rows_of_other_models_are_refused_by_name(d: int, row: int, whose: str) -> None:
    q, cache = torch.zeros(1, 1, 2, d), torch.zeros(2, 64, 1, row, dtype=torch.uint8)
    indices = torch.zeros(1, 1, 4, dtype=INT)
    with pytest.raises(ValueError, match=rf"k_cache: expected rows of V3.2's form, got rows of {row} bytes: .*{whose}"):
        flash_mla_with_kvcache(q, cache, None, None, 512, is_fp8_kvcache=True, indices=indices)


def test_dense_decoding_refuses_pages_that_are_no_multiple_of_64() -> None:
    table, lens = torch.zeros(1, 1, dtype=INT), torch.ones(1, dtype=INT)
    for cache in (torch.zeros(2, 32, 1, 8), torch.zeros(2, 65, 1, 8)[:, :64]):
        with pytest.raises(ValueError, match="k_cache: expected contiguous pages of a multiple of 64 for dense"):
            flash_mla_with_kvcache(torch.zeros(1, 1, 2, 8), cache, table, lens, 8)


@pytest.mark.parametrize("value", [[[[0, 1]]], np.zeros((1, 1, 2), np.int32)])
@pytest.mark.parametrize(
    "name",
    [
        "q", "k_cache", "block_table", "cache_seqlens", "indices", "attn_sink", "extra_k_cache",
        "extra_indices_in_kvcache", "topk_length", "extra_topk_length", "out",
    ],
)  # fmt: skip
def test_what_is_no_tensor_is_refused_by_name(name: str, value: Any) -> None:
    arguments = {"q": torch.zeros(1, 1, 2, 8), "k_cache": torch.zeros(1, 64, 1, 8), "block_table": None}
    arguments |= {"cache_seqlens": None, "head_dim_v": 8, name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected a torch tensor, got (list|ndarray)$"):
        flash_mla_with_kvcache(**arguments)
    if name in ("q", "indices", "attn_sink", "topk_length", "out"):
        arguments = {"q": torch.zeros(1, 2, 8), "kv": torch.zeros(4, 1, 8), "indices": torch.zeros(1, 1, 2, dtype=INT)}
        with pytest.raises(ValueError, match=f"^{name}: expected a torch tensor, got (list|ndarray)$"):
            flash_mla_sparse_fwd(**(arguments | {"sm_scale": 1.0, name: value}))


def test_bad_arguments_of_prefill_are_refused_by_name() -> None:
    q, kv, indices = torch.zeros(2, 3, 8), torch.zeros(5, 1, 8), torch.zeros(2, 1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kv: expected .* \[s_kv, 1, d_qk=8\], got float32 \[5, 2, 8\]"):
        flash_mla_sparse_fwd(q, torch.zeros(5, 2, 8), indices, 1.0, 8)
    with pytest.raises(ValueError, match=r"indices: expected int32 \[s_q=2, 1, topk\]"):
        flash_mla_sparse_fwd(q, kv, indices[:, 0], 1.0, 8)
    with pytest.raises(ValueError, match="sm_scale: expected a finite number, got nan"):
        flash_mla_sparse_fwd(q, kv, indices, float("nan"), 8)
    with pytest.raises(ValueError, match="log_base: expected 2"):
        flash_mla_sparse_fwd(q, kv, indices, 1.0, 8, log_base=1.0)
    with pytest.raises(ValueError, match="d_v: expected an integer from 1 to 8, got 512"):
        flash_mla_sparse_fwd(q, kv, indices, 1.0)
