"""Which device and backend the engine takes, and what it says when it cannot have one."""

from __future__ import annotations

import pytest
import torch

from heedful.engine.placement import Placement


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, outside Triton's interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("heedful.engine.placement._has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [
        ("auto", "auto", ("cuda:0", "triton")),
        ("auto", "cpu", ("cpu", "cpu")),
        ("auto", "triton", ("cuda:0", "triton")),
        ("cpu", "auto", ("cpu", "cpu")),
        ("cuda", "auto", ("cuda:0", "triton")),
        ("cuda:1", "triton", ("cuda:1", "triton")),
    ],
)
def test_with_gpus(gpus: None, device: str, backend: str, expected: tuple[str, str]) -> None:
    placement = Placement.choose(device, backend)
    assert (str(placement.device), placement.backend) == expected


def test_a_gpu_without_triton_is_not_taken_by_itself(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.engine.placement._has_triton", lambda: False)
    assert Placement.choose("auto", "auto") == Placement(torch.device("cpu"), "cpu")
    with pytest.raises(ValueError, match="device: 'cuda' needs Triton"):
        Placement.choose("cuda", "auto")


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("cuda:2", "auto", "device: expected a device that torch sees, got 'cuda:2' where it sees 2 GPUs"),
        ("cuda", "cpu", "backend: 'cpu' runs on device='cpu', got device='cuda'"),
        ("cpu", "triton", "backend: 'triton' runs on device='cuda'"),
        ("mps", "auto", "device: expected one of auto, cpu, cuda, cuda:N, got 'mps'"),
        ("gpu", "auto", "device: expected one of auto, cpu, cuda, cuda:N, got 'gpu'"),
        ("auto", "metal", "backend: expected one of auto, cpu, triton, got 'metal'"),
    ],
)
def test_what_is_refused(gpus: None, device: str, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.choose(device, backend)


def test_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Placement.choose("auto", "auto") == Placement(torch.device("cpu"), "cpu")
    with pytest.raises(ValueError, match="got 'cuda' where it sees 0 GPUs"):
        Placement.choose("cuda", "auto")
    with pytest.raises(ValueError, match="backend: 'triton' needs a CUDA device, and torch sees none"):
        Placement.choose("auto", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Placement.choose("auto", "triton") == Placement(torch.device("cpu"), "triton")
    assert Placement.choose("cpu", "triton") == Placement(torch.device("cpu"), "triton")


def test_memory_of_the_cpu_is_that_of_the_machine(no_gpu: None) -> None:
    placement = Placement.choose("cpu", "auto")
    assert not placement.is_gpu
    total, available = placement.total_memory(), placement.available_memory()
    assert total is None or available is None or 0 < available <= total
