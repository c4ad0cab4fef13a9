"""A launch of a kernel as a value, and its compilation for a card that is not there.

A launcher builds a `Launch` and runs it; `compilations(target)` of a kernel's file builds the same one from tensors on
torch's "meta" device, so what is checked without a card is what a card would run. Registers, stack and shared memory
are those that cuobjdump reads from the binary.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from heedful.kernels import interpreter
from heedful.kernels.target import Target

_ALIGNMENT = 16  # Triton compiles apart for pointers and integers that this divides
_TYPES = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs in each of up to three dimensions; nothing runs if one is 0.
        arguments: by the kernel's names, compile-time constants too.
        num_warps, num_stages: as Triton has them.
        max_registers: a thread's, so that enough blocks share a multiprocessor; CUDA alone.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    def run(self) -> None:
        """Launches the kernel on the device of its tensors; returns before it ends."""
        if 0 in self.grid:
            return
        devices = [value.device for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        device = next((each for each in devices if each.type == "cuda"), None)  # pinned memory may stand in front
        if device is None:
            interpreter.mend()
            self._run()
            return
        with torch.cuda.device(device):
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told besides the arguments. Products and sums are fused, whatever its default (from
        Triton 3.10 on they would not be)."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers is not None and not torch.version.hip:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class Compilation:
    """What to compile ahead of time.

    Attributes:
        name: a row of the table: operator, shape, dtypes.
        launch: as the launcher makes it, of tensors on the "meta" device.
        main: whether tests hold it to having no spills (and matrix instructions of a warp group on Hopper).
        wgmma: whether it multiplies matrices that are large enough for these.
    """

    name: str
    launch: Launch
    main: bool = False
    wgmma: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came of a compilation: registers a thread, bytes of stack a thread (spilled registers lie there), bytes of
    shared memory a block, and the text of the assembly (PTX or AMDGCN)."""

    registers: int
    spills: int
    shared: int
    assembly: str

    @property
    def wgmma(self) -> bool:
        """Whether it multiplies by instructions of a warp group."""
        return "wgmma.mma_async" in self.assembly


def compile_for(compilation: Compilation, target: Target) -> Compiled:
    """Compiles for `target`, whether or not there is such a card. Not in Triton's interpreter.

    Raises:
        RuntimeError: in the interpreter, where kernels are no longer source.
        Exception: whatever Triton or its assembler says.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = compilation.launch
    signature, constants, attributes = _specialise(launch)
    kernel = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=launch.options,
    )
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]
        registers, spills = (
            int(found[1]) if (found := re.search(rf"\.{name}:\s+(\d+)", assembly)) else 0
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(registers, spills, kernel.metadata.shared, assembly)
    usage = _resource_usage(kernel.asm["cubin"])
    shared = max(kernel.metadata.shared, usage["SHARED"])
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], shared, kernel.asm["ptx"])


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and attributes of the arguments, as Triton's own launch would derive them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        known = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or known:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % _ALIGNMENT == 0
        elif isinstance(value, bool):
            signature[name], aligned = "i1", False
        elif isinstance(value, int):
            signature[name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % _ALIGNMENT == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(place,)] = [["tt.divisibility", _ALIGNMENT]]
    return signature, constants, attributes


def _resource_usage(binary: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [_cuobjdump(), "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    return {name: found.get(name, 0) for name in ("REG", "STACK", "LOCAL", "SHARED")}


@functools.cache
def _cuobjdump() -> str:
    return str(triton.knobs.nvidia.cuobjdump.path)
