"""FlashMLA's functions on CPU tensors: shapes, bases, marks and cache rows as its interface and README say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.compat.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

INF = math.inf


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


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "fp8"])
def test_sparse_decoding_reads_slots_of_the_cache(kind: str) -> None:
    torch.manual_seed(0)
    b, s_q, h_q, d, d_v, blocks, topk = 3, 2, 5, 576, 512, 4, 70
    latent = torch.randn(blocks * 64, d)
    bytes_, dtype = (656, torch.uint8) if kind == "fp8" else (d, getattr(torch, kind))
    cache = torch.zeros(blocks, 64, 1, bytes_, dtype=dtype)
    ops.write_latent_cache(latent, cache[:, :, 0], torch.arange(blocks * 64), value_dim=d_v)
    rows = ops.read_latent_cache(cache[:, :, 0], torch.arange(blocks * 64), value_dim=d_v, rope_dim=d - d_v)
    q = torch.randn(b, s_q, h_q, d).to(torch.float32 if kind == "float32" else torch.bfloat16)
    indices = torch.randint(0, blocks * 64, (b, s_q, topk), dtype=torch.int32)
    indices[:, :, ::7] = -1
    indices[1, 1] = -1
    length = torch.tensor([topk, 40, 3], dtype=torch.int32)
    sink = torch.randn(h_q)
    metadata, num_splits = get_mla_metadata(torch.tensor([9]), s_q * h_q, 1, h_q, kind == "fp8", topk)
    out, lse = flash_mla_with_kvcache(
        q, cache, None, None, d_v, metadata, num_splits,
        is_fp8_kvcache=kind == "fp8", indices=indices, attn_sink=sink, topk_length=length,
    )  # fmt: skip
    assert (out.shape, out.dtype, lse.shape) == ((b, s_q, h_q, d_v), q.dtype, (b, h_q, s_q))
    tolerance = 1e-4 if kind == "float32" else 3e-2
    for i in range(b):
        for t in range(s_q):
            chosen = [slot for slot in indices[i, t, : length[i]].tolist() if slot >= 0]
            want = attend(q[i, t], rows, chosen, d**-0.5, d_v, sink)
            torch.testing.assert_close(out[i, t].double(), want[0], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[i, :, t].double(), want[2].double(), atol=tolerance, rtol=tolerance)
    assert lse[1, :, 1].isposinf().all()


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


def test_more_queries_than_the_cache_has_slots() -> None:
    cache, q = torch.randn(1, 64, 1, 8), torch.randn(150, 1, 2, 8)
    indices = torch.randint(-1, 64, (150, 1, 6), dtype=torch.int32)
    out, _ = flash_mla_with_kvcache(q, cache, None, None, 8, softmax_scale=1.0, indices=indices)
    one, _ = flash_mla_with_kvcache(q[140:141], cache, None, None, 8, softmax_scale=1.0, indices=indices[140:141])
    torch.testing.assert_close(out[140:141], one, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_k_cache": torch.zeros(1)}, "extra_k_cache: expected None"),
        ({"causal": True}, "causal: expected False with indices"),
        ({"indices": torch.zeros(1, 1, 4)}, "indices: expected int32 [b=1, s_q=1, topk], got float32 [1, 1, 4]"),
        ({"indices": None}, "block_table: expected int32 for dense attention, got None"),
        ({"k_cache": torch.zeros(1, 32, 1, 8)}, "k_cache: expected bfloat16 or float32 [num_blocks, 64, 1, width]"),
        ({"is_fp8_kvcache": True}, "k_cache: expected uint8 [num_blocks, 64, 1, width], got float32"),
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
