"""Where the engine computes: a device, and what computes the attention there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from heedful import _arrays
from heedful.memory import available_memory, total_memory

Backend = Literal["cpu", "triton"]
"""The compiled CPU operators, or the Triton kernels."""

CPU_MEMORY_SHARE = 0.4
GPU_MEMORY_SHARE = 0.85
HOST_MEMORY_SHARE = 0.7
"""Share of the memory left beside the weights that the caches take when `kv_cache_tokens` is not given: a CPU's, a
GPU's, and the host's for what a GPU leaves there."""


@dataclass(frozen=True)
class Placement:
    """A device and a backend that runs on it.

    Args:
        device: "cpu" or a CUDA device (those of ROCm have this name too).
        backend: "cpu" for CPU tensors; "triton" for CUDA tensors, and for CPU tensors in Triton's interpreter.
    """

    device: torch.device
    backend: Backend

    @staticmethod
    def choose(device: str, backend: str) -> Placement:
        """From what the user asked for.

        Args:
            device: "auto", "cpu", "cuda" or "cuda:N"; auto is the first GPU if torch sees one and Triton is there.
            backend: "auto", "cpu" or "triton".

        Raises:
            ValueError: a device that is not there, or a backend that does not run on it.
        """
        if backend not in ("auto", "cpu", "triton"):
            raise ValueError(f"backend: expected one of auto, cpu, triton, got {backend!r}")
        if device == "auto":
            device = "cuda" if backend != "cpu" and torch.cuda.is_available() and _has_triton() else "cpu"
            if backend == "triton" and not torch.cuda.is_available() and not _is_interpreted():
                raise ValueError("backend: 'triton' needs a CUDA device, and torch sees none")
        try:
            where = torch.device(device)
        except (RuntimeError, TypeError):
            where = None
        if where is None or where.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected one of auto, cpu, cuda, cuda:N, got {device!r}")
        if where.type == "cpu":
            if backend == "triton" and not _is_interpreted():
                raise ValueError(
                    "backend: 'triton' runs on device='cuda' (or on the CPU in Triton's interpreter, which "
                    "TRITON_INTERPRET=1 turns on), got device='cpu'"
                )
            return Placement(where, "triton" if backend == "triton" else "cpu")
        if backend == "cpu":
            raise ValueError(f"backend: 'cpu' runs on device='cpu', got device={device!r}")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = where.index if where.index is not None else 0
        if index >= count:
            raise ValueError(f"device: expected a device that torch sees, got {device!r} where it sees {count} GPUs")
        if not _has_triton():
            raise ValueError(f"device: {device!r} needs Triton, which is not installed: pip install triton")
        return Placement(torch.device("cuda", index), "triton")

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def available_memory(self) -> int | None:
        """Bytes that can still be taken, or None where the system does not tell."""
        if self.is_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            # What torch holds and nobody uses is free to the caches as well.
            return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return available_memory()

    def total_memory(self) -> int | None:
        """Bytes of memory, or None where the system does not tell."""
        return torch.cuda.mem_get_info(self.device)[1] if self.is_gpu else total_memory()

    def available_host_memory(self) -> int | None:
        """Bytes of the host's memory that can still be taken, or None where the system does not tell."""
        return available_memory()

    def total_host_memory(self) -> int | None:
        """Bytes of the host's memory, or None where the system does not tell."""
        return total_memory()

    @property
    def memory_share(self) -> float:
        """Share of the available memory for the caches."""
        return GPU_MEMORY_SHARE if self.is_gpu else CPU_MEMORY_SHARE


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device, without waiting for what runs there; the tensor may be changed right afterwards."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return _arrays.kernels_take_cpu_tensors() and _has_triton()
