"""The operators on a GPU: the benchmark's checks at both sizes (CUDA graphs, addresses past 2^31 among them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gpu_checks
from heedful import ops


@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("sizes", [gpu_checks.SMALL, gpu_checks.FULL], ids=["small", "full"])
def test_checks(gpu: torch.device, check: gpu_checks.Check, sizes: gpu_checks.Sizes) -> None:
    result = check(gpu_checks.Inputs(sizes, gpu, "auto"))
    assert result.passed, result


@pytest.mark.parametrize("check", gpu_checks.GPU_CHECKS, ids=lambda check: check.__name__)
def test_checks_of_the_device(gpu: torch.device, check: gpu_checks.Check) -> None:
    result = check(gpu_checks.Inputs(gpu_checks.FULL, gpu, "auto"))
    if result.left_out:
        pytest.skip(result.detail)
    assert result.passed, result


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
