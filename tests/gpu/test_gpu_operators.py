"""The operators on a GPU: the benchmark's checks at both sizes, no waiting, CUDA graphs, addresses past 2^31."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gpu_checks
from heedful import ops

C, R, DI = 512, 64, 128


@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sizes", [gpu_checks.SMALL, gpu_checks.FULL], ids=["small", "full"])
def test_checks(gpu: torch.device, check: gpu_checks.Check, sizes: gpu_checks.Sizes) -> None:
    result = check(gpu_checks.Inputs(sizes, gpu, "auto"))
    assert result.passed, result


def decode_arguments(device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    return {
        "q": normal(4, 16, C + R),
        "index_q": normal(4, 8, DI).to(torch.float8_e4m3fn),
        "weights": torch.rand(4, 8, device=device, generator=generator),
        "rows": normal(4, C + R),
        "keys": normal(4, DI),
        "slots": torch.tensor([40, 130, 200, -1], device=device),
        "block_tables": torch.tensor([[0], [2], [3], [0]], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([41, 3, 9, 1], dtype=torch.int32, device=device),
        "query_start_loc": torch.arange(5, dtype=torch.int32, device=device),
        "latent": torch.zeros(4, 64, 656, dtype=torch.uint8, device=device),
        "index": torch.zeros(4, 64, DI + 4, dtype=torch.uint8, device=device),
    }


def decode_step(a: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that an attention layer does in a decoding step."""
    batch = {name: a[name] for name in ("block_tables", "seq_lens", "query_start_loc")}
    ops.write_latent_cache(a["rows"], a["latent"], a["slots"], value_dim=C)
    ops.write_index_cache(a["keys"], a["index"], a["slots"], hadamard=True)
    chosen = ops.index_top_k_paged(
        a["index_q"], a["weights"], 32, cache=a["index"], max_seq_len=64, sorted=False, **batch
    )  # fmt: skip
    return ops.sparse_attention_paged(a["q"], chosen, scale=0.05, value_dim=C, cache=a["latent"], **batch)[0]


def test_a_step_does_not_wait_for_the_device(gpu: torch.device) -> None:
    arguments = decode_arguments(gpu)
    decode_step(arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_step(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_inside_a_graph_follows_its_inputs(gpu: torch.device) -> None:
    placed = decode_arguments(gpu)
    decode_step(placed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode_step(placed)
    for seed in (1, 2):
        new = decode_arguments(gpu, seed)
        for name, tensor in placed.items():
            tensor.copy_(new[name])
        graph.replay()
        assert torch.equal(result, decode_step(new))
        assert torch.equal(placed["latent"], new["latent"])


def room_for(device: torch.device, gigabytes: float) -> None:
    if torch.cuda.mem_get_info(device)[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def test_rows_past_two_to_the_31_elements(gpu: torch.device) -> None:
    room_for(gpu, 7)
    blocks = 2**31 // (64 * (C + R)) + 3
    cache = torch.zeros(blocks, 64, C + R, dtype=torch.bfloat16, device=gpu)
    rows = torch.randn(100, C + R, device=gpu).bfloat16()
    slots = torch.arange(blocks * 64 - 100, blocks * 64, device=gpu)
    ops.write_latent_cache(rows, cache, slots, value_dim=C)
    assert torch.equal(cache.view(-1, C + R)[-100:], rows)
    q = torch.randn(3, 16, C + R, device=gpu).bfloat16()
    far = ops.sparse_attention_paged(q, slots.int().expand(3, -1), scale=0.05, value_dim=C, cache=cache)
    near = torch.arange(100, dtype=torch.int32, device=gpu).expand(3, -1)
    torch.testing.assert_close(far, ops.sparse_attention(q, rows, near, scale=0.05, value_dim=C))


def test_scores_past_two_to_the_31_elements(gpu: torch.device) -> None:
    room_for(gpu, 12)
    T, S = 2**31 // 131072 + 8, 131072
    q, k = (torch.randn(*shape, device=gpu).bfloat16() for shape in ((T, 1, 32), (S, 32)))
    weights, positions = torch.ones(T, 1, device=gpu), torch.full((T,), S - 1, device=gpu)
    scores = ops.index_scores(q, k, weights, q_positions=positions)
    last = ops.index_scores(q[-3:], k, weights[-3:], q_positions=positions[-3:])
    assert torch.equal(scores[-3:], last)
    assert torch.equal(ops.top_k(scores, 50)[-3:], ops.top_k(last, 50))


def test_pages_past_two_to_the_31_bytes(gpu: torch.device) -> None:
    room_for(gpu, 5)
    blocks = 2**31 // (64 * (DI + 4)) + 5
    cache = torch.zeros(blocks, 64, DI + 4, dtype=torch.uint8, device=gpu)
    keys, few = torch.randn(100, DI, device=gpu), torch.zeros(2, 64, DI + 4, dtype=torch.uint8, device=gpu)
    ops.write_index_cache(keys, cache, torch.arange(100, device=gpu) + (blocks - 2) * 64)
    ops.write_index_cache(keys, few, torch.arange(100, device=gpu))
    q, weights = torch.randn(1, 8, DI, device=gpu).bfloat16(), torch.ones(1, 8, device=gpu)
    rest: dict[str, Any] = {"seq_lens": [100], "query_start_loc": [0, 1], "max_seq_len": 100}
    far = ops.index_scores_paged(q, weights, cache=cache, block_tables=[[blocks - 2, blocks - 1]], **rest)
    assert torch.equal(far, ops.index_scores_paged(q, weights, cache=few, block_tables=[[0, 1]], **rest))


@pytest.mark.parametrize(
    "function", [ops.index_scores, lambda *a, **k: ops.index_top_k(*a, 5, **k)], ids=["scores", "selection"]
)
def test_arguments_of_another_device_are_named(gpu: torch.device, function: Callable[..., Any]) -> None:
    q, k, weights = torch.ones(2, 3, 32, device=gpu), torch.ones(9, 32), torch.ones(2, 3)
    with pytest.raises(ValueError, match="k: is on cpu, but q is on cuda:0"):
        function(q, k, weights)
    with pytest.raises(ValueError, match="k: is on cpu, but q is on cuda:0"):
        function(q, k.numpy(), weights)
    with pytest.raises(ValueError, match="q: expected a CPU tensor for backend='cpu', got one on cuda:0"):
        function(q, k, weights, backend="cpu")
