"""Triton's driver for the emulator: kernels are compiled for a card that is not there and run here, on CPU tensors."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from heedful import _arrays
from heedful.kernels import target

from .machine import Machine
from .program import parse

_only: list[tuple[int, int, int]] | None = None


@contextlib.contextmanager
def only(*blocks: tuple[int, int, int]) -> Iterator[None]:
    """Launches run these blocks alone: for sizes at which all would take hours."""
    global _only
    _only = list(blocks)
    try:
        yield
    finally:
        _only = None


class _Utilities:
    """What Triton asks of a driver's library."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.limit, "multiprocessor_count": 4, "warpSize": 32, "sm_clock_rate": 1}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        return name, binary, 0, 0, 1024


class _Launcher:
    """Calls a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.metadata = metadata
        self.machine: Machine | None = None

    def __call__(self, x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
        if self.machine is None:
            threads = 32 * self.metadata.num_warps
            self.machine = Machine(parse(function.decode()), threads, self.metadata.shared)
        arguments = rest[4:]
        parameters, tensors = [], {}
        for place, (type_, value) in enumerate(zip(self.types, arguments, strict=True)):
            if type_ == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                tensors[storage.data_ptr()] = (storage, f"argument {place}")
            parameters.append(_bits(type_, value))
        parameters += [np.zeros(1, np.uint64)] * 2  # scratch memory, of which no kernel asks
        memory = [(_bytes(storage), base, name) for base, (storage, name) in tensors.items() if storage.nbytes()]
        self.machine.launch((x, y, z), parameters, memory, _only)


def _bytes(storage: torch.UntypedStorage) -> np.ndarray[Any, Any]:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _bits(type_: str, value: Any) -> np.ndarray[Any, Any]:
    if type_.startswith("*"):
        return np.array([0 if value is None else value.data_ptr()], np.uint64)
    if type_ in ("fp32", "fp64"):
        size, code = (4, "f") if type_ == "fp32" else (8, "d")
        return np.frombuffer(struct.pack(code, value), f"u{size}")
    if type_ == "i1":
        return np.array([bool(value)], np.uint8)
    bits = int(type_[1:])
    return np.array([value & ((1 << bits) - 1)], f"u{bits // 8}")


class Driver(DriverBase):
    """A device of a compute capability, in NumPy."""

    launcher_cls = _Launcher

    def __init__(self, card: target.Target) -> None:
        super().__init__()
        self.card = card
        self.utils = _Utilities(card.shared_memory)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.card.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("time is not emulated")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Backend(CUDABackend):
    """Compiles as far as PTX."""

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        stages["cubin"] = lambda source, metadata: source.encode()

    def hash(self) -> str:
        return super().hash() + "-emulated"


def activate(capability: int) -> None:
    """From now on this process runs heedful's kernels on CPU tensors as a card of `capability` (90) would.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are never compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=0 before Triton is imported")
    card = target.Target.cuda(capability)
    triton.backends.backends["nvidia"] = triton.backends.Backend(compiler=_Backend, driver=Driver)
    triton.runtime.driver.set_active(Driver(card))
    target._of = lambda kind, current, index: card
    _arrays.kernels_take_cpu_tensors = lambda: True
