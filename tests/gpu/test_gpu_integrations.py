"""The functions of other libraries on a GPU: what the CPU gives, and what transformers' eager attention gives."""

from __future__ import annotations

import copy

import pytest
import torch

import heedful.integrations.transformers
import oracle
from heedful import ops
from heedful.compat.deep_gemm import fp8_mqa_logits, fp8_paged_mqa_logits
from heedful.compat.flash_mla import flash_mla_sparse_fwd, flash_mla_with_kvcache

assert heedful.integrations.transformers


def test_flash_mla(gpu: torch.device) -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(9, 64, 576).bfloat16(), torch.randn(500, 1, 576).bfloat16()
    indices = torch.randint(-1, 510, (9, 1, 128), dtype=torch.int32)
    indices[3] = -1
    want = flash_mla_sparse_fwd(q, kv, indices, 0.05)
    for got, expected in zip(flash_mla_sparse_fwd(q.to(gpu), kv.to(gpu), indices.to(gpu), 0.05), want, strict=True):
        torch.testing.assert_close(got.cpu(), expected, atol=3e-2, rtol=3e-2)
    cache = torch.zeros(8, 64, 1, 656, dtype=torch.uint8)
    ops.write_latent_cache(torch.randn(512, 576), cache[:, :, 0], torch.arange(512), value_dim=512)
    q, indices = torch.randn(3, 2, 64, 576).bfloat16(), torch.randint(-1, 512, (3, 2, 128), dtype=torch.int32)
    arguments = {"is_fp8_kvcache": True}
    want = flash_mla_with_kvcache(q, cache, None, None, 512, indices=indices, **arguments)
    got = flash_mla_with_kvcache(q.to(gpu), cache.to(gpu), None, None, 512, indices=indices.to(gpu), **arguments)
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), expected, atol=3e-2, rtol=3e-2)


def test_flash_mla_with_a_second_cache_and_other_pages(gpu: torch.device) -> None:
    torch.manual_seed(0)
    cache, sink = torch.zeros(8, 64, 656, dtype=torch.uint8), torch.randn(64)
    ops.write_latent_cache(torch.randn(512, 576), cache, torch.arange(512), value_dim=512)
    q, indices = torch.randn(3, 2, 64, 576).bfloat16(), torch.randint(-1, 480, (3, 2, 128), dtype=torch.int32)
    lengths = torch.tensor([128, 0, 50], dtype=torch.int32)
    for page, other in ((64, 32), (256, 61)):
        found = []
        for device in (torch.device("cpu"), gpu):
            rows = cache.to(device).flatten(0, 1)
            pages = [rows[: 512 // n * n].view(-1, n, 1, 656) for n in (page, other)]
            chosen, sinks, counts = indices.to(device), sink.to(device), lengths.to(device)
            extra = {"extra_k_cache": pages[1], "extra_indices_in_kvcache": chosen, "extra_topk_length": counts}
            found.append(
                flash_mla_with_kvcache(
                    q.to(device), pages[0], None, None, 512, is_fp8_kvcache=True, indices=chosen, attn_sink=sinks,
                    topk_length=counts.flip(0), **extra,
                )
            )  # fmt: skip
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got.cpu(), want, atol=3e-2, rtol=3e-2)


def close_scores(got: torch.Tensor, want: torch.Tensor) -> None:
    """FP8 matrix units keep some 14 bits of a sum."""
    assert torch.equal(got.cpu().isneginf(), want.isneginf())
    seen = want.isfinite()
    assert (got.cpu() - want)[seen].abs().max() < 2e-3 * want[seen].abs().max()


def test_deep_gemm(gpu: torch.device) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(20, 64, 128).to(torch.float8_e4m3fn), torch.randn(300, 128).to(torch.float8_e4m3fn)
    weights, scale = torch.randn(20, 64), torch.rand(300)
    starts, ends = torch.randint(0, 150, (20,), dtype=torch.int32), torch.randint(150, 301, (20,), dtype=torch.int32)
    want = fp8_mqa_logits(q, (k, scale), weights, starts, ends)
    on = [x.to(gpu) for x in (q, k, scale, weights, starts, ends)]
    got = fp8_mqa_logits(on[0], (on[1], on[2]), *on[3:])
    close_scores(got, want)
    cache = torch.zeros(6, 64, 1, 132, dtype=torch.uint8)
    ops.write_index_cache(torch.randn(384, 128), cache[:, :, 0], torch.arange(384))
    q, weights = torch.randn(2, 2, 64, 128).to(torch.float8_e4m3fn), torch.randn(4, 64)
    lens, table = torch.tensor([150, 0], dtype=torch.int32), torch.tensor([[4, 1, 5], [0, 0, 0]], dtype=torch.int32)
    want = fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 192)
    got = fp8_paged_mqa_logits(*(x.to(gpu) for x in (q, cache, weights, lens, table)), None, 192)
    close_scores(got, want)
    other = torch.cat([cache.flatten(1)[:, :8192].reshape(12, -1), cache.flatten(1)[:, 8192:].reshape(12, -1)], 1)
    other, table = other.view(12, 32, 1, 132), torch.stack([2 * table, 2 * table + 1], -1).flatten(1)
    got = fp8_paged_mqa_logits(*(x.to(gpu) for x in (q, other, weights, lens, table)), None, 192)
    close_scores(got, want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_transformers(gpu: torch.device, name: str) -> None:
    wide = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
    eager = oracle.build(name, **wide).to(gpu)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("heedful")
    ids, mask = torch.randint(2, 199, (2, 80), device=gpu), torch.ones(2, 80, dtype=torch.long, device=gpu)
    mask[1, :30] = 0
    got, want = (model(ids, attention_mask=mask).logits[mask.bool()].log_softmax(-1) for model in (ours, eager))
    assert float((got - want).abs().median()) < 1e-3
