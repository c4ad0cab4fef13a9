"""FlashMLA's and DeepGEMM's functions on the kernels: what they give on the CPU, marks of empty rows included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fake_gpu
from heedful import ops
from heedful.compat.deep_gemm import fp8_fp4_mqa_logits, fp8_fp4_paged_mqa_logits, fp8_mqa_logits, fp8_paged_mqa_logits
from heedful.compat.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata

E4M3, INT = torch.float8_e4m3fn, torch.int32


def both(function: Any, device: torch.device, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the kernels and the CPU give."""

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    ours = function(*map(there, args), backend="triton", **{name: there(value) for name, value in kwargs.items()})
    return ours, function(*args, backend="cpu", **kwargs)


def close(ours: Any, cpu: Any, tolerance: float = 1e-4) -> None:
    for a, b in zip(ours, cpu, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a.cpu(), b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("s_q", [1, 9])  # one query's keys are cut into parts
@pytest.mark.parametrize("log_base", [2.0, math.e])
def test_sparse_prefill(device: torch.device, s_q: int, log_base: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = torch.randn(s_q, 6, 144, generator=generator), torch.randn(90, 1, 144, generator=generator)
    indices = torch.randint(-2, 95, (s_q, 1, 200), generator=generator, dtype=INT)
    indices[s_q // 2 :: 3] = -1 if s_q > 1 else 5
    length = torch.randint(60, 200, (s_q,), generator=generator, dtype=INT)
    sink = torch.randn(6, generator=generator)
    for extra in ({}, {"attn_sink": sink, "topk_length": length, "indexer_topk": 150}):
        close(*both(flash_mla_sparse_fwd, device, q, kv, indices, 0.1, 128, log_base=log_base, **extra))


@pytest.mark.parametrize("fp8", [False, True])
def test_decoding(device: torch.device, fp8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, q = torch.randn(256, 144, generator=generator), torch.randn(2, 2, 5, 144, generator=generator)
    cache = torch.zeros(4, 64, 1, 128 + 4 + 32 if fp8 else 144, dtype=torch.uint8 if fp8 else torch.float32)
    ops.write_latent_cache(rows, cache[:, :, 0], torch.arange(256), value_dim=128)
    indices = torch.randint(-1, 256, (2, 2, 70), generator=generator, dtype=INT)
    indices[1, 0] = -1
    table, lens = torch.tensor([[2, 1], [3, 0]], dtype=INT), torch.tensor([100, 3], dtype=INT)
    options: dict[str, Any] = {"is_fp8_kvcache": fp8}
    sparse = {"indices": indices, "topk_length": torch.tensor([70, 9], dtype=INT)}
    close(*both(flash_mla_with_kvcache, device, q, cache, None, None, 128, **options, **sparse), 1e-3)
    for causal in (False, True):
        close(*both(flash_mla_with_kvcache, device, q, cache, table, lens, 128, causal=causal, **options), 1e-3)


@pytest.mark.parametrize("fp8", [False, True])
def test_decoding_over_two_caches_of_other_pages(device: torch.device, fp8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, sink = torch.randn(2, 2, 5, 144, generator=generator), torch.randn(5, generator=generator)
    flat = torch.zeros(4, 64, 128 + 4 + 32 if fp8 else 144, dtype=torch.uint8 if fp8 else torch.float32)
    ops.write_latent_cache(torch.randn(256, 144, generator=generator), flat, torch.arange(256), value_dim=128)
    indices = torch.randint(-1, 256, (2, 2, 70), generator=generator, dtype=INT)
    indices[1, 0] = -1
    options: dict[str, Any] = {"is_fp8_kvcache": fp8, "indices": indices, "attn_sink": sink}
    lengths = {"topk_length": torch.tensor([70, 9], dtype=INT), "extra_topk_length": torch.tensor([0, 40], dtype=INT)}
    for page, other in ((128, 64), (32, 2), (5, 61)):
        caches = [flat.flatten(0, 1)[: 256 // n * n].view(-1, n, 1, flat.shape[2]) for n in (page, other)]
        extra = {"extra_k_cache": caches[1], "extra_indices_in_kvcache": indices.flip(-1)[..., :50], **lengths}
        close(*both(flash_mla_with_kvcache, device, q, caches[0], None, None, 128, **options), 1e-3)
        close(*both(flash_mla_with_kvcache, device, q, caches[0], None, None, 128, **options, **extra), 1e-3)


def test_scores(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, generator=generator).to(E4M3) for shape in ((7, 4, 32), (90, 32)))
    weights, scale = torch.randn(7, 4, generator=generator), torch.rand(90, generator=generator)
    starts, ends = (torch.randint(-3, 95, (7,), generator=generator, dtype=INT) for _ in range(2))
    for width in (0, 60):
        ours, cpu = both(fp8_mqa_logits, device, q, (k, scale), weights, starts, ends, max_seqlen_k=width)
        close([ours], [cpu], 1e-3)
    cache = torch.zeros(4, 64, 1, 36, dtype=torch.uint8)
    ops.write_index_cache(torch.randn(256, 32, generator=generator), cache[:, :, 0], torch.arange(256))
    q, weights = torch.randn(3, 2, 4, 32, generator=generator).to(E4M3), torch.randn(6, 4, generator=generator)
    table = torch.tensor([[2, 1], [3, 0], [0, 0]], dtype=INT)
    for lens in (torch.tensor([100, 3, 0], dtype=INT), torch.tensor([[5, 100], [3, 3], [0, 0]], dtype=INT)):
        ours, cpu = both(fp8_paged_mqa_logits, device, q, cache, weights, lens, table, None, 128)
        close([ours], [cpu], 1e-3)
    flat = cache[:, :, 0].flatten(1)
    codes, scales = flat[:, :2048].reshape(256, 32), flat[:, 2048:].reshape(256, 4)
    for size in (32, 128):  # pages of another size are copied first
        pages = [part.reshape(256 // size, -1) for part in (codes, scales)]
        other = torch.cat(pages, 1).view(256 // size, size, 1, 36)
        tables = torch.arange(256 // size, dtype=INT).expand(3, -1)
        ours, cpu = both(fp8_paged_mqa_logits, device, q, other, weights, lens, tables, None, 128)
        close([ours], [cpu], 1e-3)


def on_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=fake_gpu.DEVICE)


def test_flash_mla_at_full_size_looks_at_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values: what looked at one would raise, as it would wait on a card."""
    with fake_gpu.fake_gpu(monkeypatch) as launches:
        q, sink = on_card(64, 2, 128, 576), on_card(128, dtype=torch.float32)
        indices, lengths, table = on_card(64, 2, 2048, dtype=INT), on_card(64, dtype=INT), on_card(64, 512, dtype=INT)
        metadata = get_mla_metadata()
        for page in (64, 32, 61):
            for width, dtype in ((576, torch.bfloat16), (656, torch.uint8)):
                cache = on_card(500, page + 3, 1, width, dtype=dtype)[:, :page]
                extra = (on_card(300, 64, 1, width, dtype=dtype), indices[..., :512].contiguous(), lengths, lengths)
                rest = (0.1, False, dtype == torch.uint8, indices, sink)
                out, lse = flash_mla_with_kvcache(q, cache, None, None, 512, *metadata, *rest, *extra)
                assert (out.shape, out.dtype, lse.shape) == ((64, 2, 128, 512), q.dtype, (64, 128, 2))
        for causal in (False, True):
            dense = flash_mla_with_kvcache(q, on_card(500, 128, 1, 576), table, lengths, 512, causal=causal)
            assert dense[0].shape == (64, 2, 128, 512)
        q, indices = on_card(4096, 128, 576), on_card(4096, 1, 2048, dtype=INT)
        found = flash_mla_sparse_fwd(q, on_card(32768, 1, 576), indices, 0.1, 512, sink, indexer_topk=512)
        assert [tuple(part.shape[1:]) for part in found] == [(128, 512), (128,), (128,), (128,)]
        assert len(launches) >= 16


def test_deep_gemm_at_full_size_looks_at_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu.fake_gpu(monkeypatch):
        q, k, weights = on_card(4096, 64, 128, dtype=E4M3), on_card(32768, 128, dtype=E4M3), on_card(4096, 64)
        ends, scale = on_card(4096, dtype=INT), on_card(32768, dtype=torch.float32)
        logits = fp8_fp4_mqa_logits((q, None), (k, scale), weights, ends, ends, logits_dtype=torch.bfloat16)
        assert (logits.shape, logits.dtype) == ((4096, 32768), torch.bfloat16)
        assert fp8_mqa_logits(q, (k, scale), weights, ends, ends, False, 1000).shape == (4096, 1000)
        q, weights, table = on_card(64, 2, 64, 128, dtype=E4M3), on_card(128, 64), on_card(64, 100, dtype=INT)
        for page in (64, 32, 256):
            cache = on_card(1000, page, 1, 132, dtype=torch.uint8)
            for lens in (on_card(64, dtype=INT), on_card(64, 2, dtype=INT)):
                assert fp8_fp4_paged_mqa_logits((q, None), cache, weights, lens, table, None, 6400).shape == (128, 6400)
