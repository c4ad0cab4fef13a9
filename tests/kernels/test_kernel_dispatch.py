"""`heedful.ops` with backend="triton": the kernels behind every operator give what the CPU gives, errors included.

The kernels' own tests compare them with the references over drawn shapes; here it is the way from operators to them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heedful import ops

T, S, H, Hi, Di, C, R, K = 5, 150, 4, 4, 32, 128, 16, 40
BLOCKS = 6
SCALE = (C + R) ** -0.5

Batch = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(value: Any, device: torch.device) -> Any:
    """Tensors of a call's arguments, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: place(part, device) for name, part in value.items()}
    return value


def both(function: Any, device: torch.device, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the kernels and the CPU give."""
    ours = function(*[place(a, device) for a in args], backend="triton", **place(kwargs, device))
    return ours, function(*args, backend="cpu", **kwargs)


def close(ours: torch.Tensor, cpu: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (ours.shape, ours.dtype) == (cpu.shape, cpu.dtype)
    torch.testing.assert_close(ours.cpu(), cpu, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three sequences of 2, 1 and 2 queries."""
    return {
        "block_tables": torch.tensor([[4, 1, 5], [2, 0, 0], [3, 0, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([150, 64, 3], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, 3, 5], dtype=torch.int32),
    }


def index_cache(dtype: torch.dtype) -> torch.Tensor:
    width = Di + 4 if dtype.itemsize == 1 else Di
    cache = torch.zeros(BLOCKS, 64, width, dtype=dtype)
    ops.write_index_cache(normal(BLOCKS * 64, Di, seed=3), cache, torch.arange(BLOCKS * 64))
    return cache


def latent_cache(dtype: torch.dtype) -> torch.Tensor:
    width = C + 4 + 2 * R if dtype == torch.uint8 else C + R
    cache = torch.zeros(BLOCKS, 64, width, dtype=dtype)
    ops.write_latent_cache(normal(BLOCKS * 64, C + R, seed=4), cache, torch.arange(BLOCKS * 64), value_dim=C)
    return cache


@pytest.mark.parametrize("positions", [None, [3, 149, 0, 70, 20]])
def test_scores_and_selection(device: torch.device, positions: list[int] | None) -> None:
    q, k, weights = normal(T, Hi, Di), normal(S, Di, seed=1), normal(T, Hi, seed=2)
    scale = normal(S, seed=5).abs()
    close(*both(ops.index_scores, device, q, k, weights, q_positions=positions, k_scale=scale))
    ours, cpu = both(ops.index_top_k, device, q, k, weights, K, q_positions=positions, k_scale=scale)
    assert torch.equal(ours.cpu(), cpu)


@pytest.mark.parametrize("sorted_", [True, False])
def test_top_k(device: torch.device, sorted_: bool) -> None:
    lengths = torch.tensor([S, 0, 3, 77, 150])
    ours, cpu = both(ops.top_k, device, normal(T, S), K, lengths=lengths, sorted=sorted_)
    assert torch.equal(ours.cpu(), cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8])
def test_scores_and_selection_over_pages(device: torch.device, batch: Batch, dtype: torch.dtype) -> None:
    q, weights, cache = normal(T, Hi, Di), normal(T, Hi, seed=2), index_cache(dtype)
    close(*both(ops.index_scores_paged, device, q, weights, cache=cache, **batch), 1e-3)
    close(*both(ops.index_scores_paged, device, q, weights, cache=cache, max_seq_len=200, **batch), 1e-3)
    ours, cpu = both(ops.index_top_k_paged, device, q, weights, K, cache=cache, sorted=False, **batch)
    assert torch.equal(ours.cpu(), cpu)


@pytest.mark.parametrize("form", ["prefix", "apart", "heads"])
def test_attention(device: torch.device, form: str) -> None:
    q, kv = normal(T, H, C + R), normal(S, C + R, seed=1)
    indices = torch.randint(-2, S + 2, (T, K), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    indices[1] = -1
    values: dict[str, Any] = {"value_dim": C}
    if form == "apart":
        values = {"v": normal(S, 24, seed=2)}
    if form == "heads":
        kv, values = normal(S, 2, C + R, seed=1), {"v": normal(S, 2, 24, seed=2)}
    lengths = torch.tensor([K, 3, 0, 20, 7])
    sparse = both(
        ops.sparse_attention, device, q, kv, indices, scale=SCALE, sink=normal(H), topk_length=lengths, **values
    )
    dense = both(ops.dense_attention, device, q, kv, scale=SCALE, **values)
    for ours, cpu in (sparse, dense):
        close(ours[0], cpu[0])
        close(ours[1], cpu[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_attention_over_pages_and_slots(device: torch.device, batch: Batch, dtype: torch.dtype) -> None:
    q, cache = normal(T, H, C + R), latent_cache(dtype)
    indices = torch.randint(-2, 155, (T, K), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    common: dict[str, Any] = {"scale": SCALE, "value_dim": C, "cache": cache}
    results = [
        both(ops.sparse_attention_paged, device, q, indices, sink=normal(H), **common, **batch),
        both(ops.sparse_attention_paged, device, q, indices, **common),
        both(ops.dense_attention_paged, device, q, **common, **batch),
    ]
    for ours, cpu in results:
        close(ours[0], cpu[0], 2e-3)
        close(ours[1], cpu[1], 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_latent_rows_are_written(device: torch.device, dtype: torch.dtype) -> None:
    cache = latent_cache(dtype)
    ours, slots = cache.to(device), torch.tensor([7, -1, 300])
    rows = normal(3, C + R, seed=9)
    ops.write_latent_cache(rows.to(device), ours, slots.to(device), value_dim=C, backend="triton")
    ops.write_latent_cache(rows, cache, slots, value_dim=C, backend="cpu")
    assert torch.equal(ours.cpu(), cache)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8])
def test_index_keys_are_written(device: torch.device, dtype: torch.dtype, hadamard: bool) -> None:
    cache = index_cache(dtype)
    ours, slots = cache.to(device), torch.tensor([7, -1, 300])
    keys = normal(3, Di, seed=9)
    ops.write_index_cache(keys.to(device), ours, slots.to(device), hadamard=hadamard, backend="triton")
    ops.write_index_cache(keys, cache, slots, hadamard=hadamard, backend="cpu")
    read = [ops.read_index_cache(x.cpu(), torch.arange(BLOCKS * 64), dim=Di) for x in (ours, cache)]
    # A sum in another order may move a code by one.
    torch.testing.assert_close(*read, atol=0.3 if hadamard and dtype.itemsize == 1 else 1e-5, rtol=0)
    assert torch.equal(read[0][:7], read[1][:7])


def test_codecs(device: torch.device) -> None:
    x = normal(3, 2, 256)
    close(*both(ops.hadamard, device, x), 1e-5)
    for function in (ops.quantize_int8, ops.quantize_fp8):
        (codes, scales), (cpu_codes, cpu_scales) = both(function, device, x)
        assert torch.equal(codes.cpu(), cpu_codes)
        close(scales, cpu_scales, 1e-6)
    back, want = both(ops.dequantize_fp8, device, codes.cpu(), scales.cpu())
    close(back, want, 1e-6)


def test_errors_are_those_of_the_cpu(device: torch.device, batch: Batch) -> None:
    q, weights, cache = (x.to(device) for x in (normal(T, Hi, Di), normal(T, Hi), index_cache(torch.float32)))
    options = {"backend": "triton", "cache": cache}
    with pytest.raises(ValueError, match=r"weights: expected float32 \[N=5, Hi=4\], got float32 \[5, 3\]"):
        ops.index_scores_paged(q, weights[:, :3], **options, **place(batch, device))
    with pytest.raises(ValueError, match=r"cache: expected .* \[num_blocks, 64, 32\]"):
        ops.index_scores_paged(q, weights, backend="triton", cache=cache[:, :, 1:], **place(batch, device))
    strided = torch.zeros(BLOCKS, 64, 2 * Di, device=device)[:, :, ::2]
    with pytest.raises(ValueError, match="cache: expected a C-contiguous array"):
        ops.index_scores_paged(q, weights, backend="triton", cache=strided, **place(batch, device))
    kv, indices = normal(S, 3, 8).to(device), torch.zeros(T, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="kv: expected a number of heads that divides 4, got 3"):
        ops.sparse_attention(normal(T, 4, 8).to(device), kv, indices, scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="weights: is on meta, but q is on"):
        ops.index_scores_paged(q, weights.to("meta"), **options, **place(batch, device))
    if device.type == "cpu":  # what lies on a GPU is not looked at
        broken = batch | {"seq_lens": torch.tensor([150, 64, 1], dtype=torch.int32)}
        with pytest.raises(ValueError, match=r"query_start_loc|seq_lens"):
            ops.index_scores_paged(q, weights, **options, **broken)
        with pytest.raises(ValueError, match="slot_mapping: expected slots from -1 to 383, got 384"):
            ops.write_index_cache(normal(1, Di), cache, [384], backend="triton")
