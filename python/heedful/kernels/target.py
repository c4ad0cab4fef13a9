"""The device that a kernel is compiled for: what its launcher chooses a configuration by.

Limits are those of the vendors' data sheets: shared memory a block may have, streaming multiprocessors (compute units),
and whether the matrix unit multiplies FP8 (e4m3fn as it is stored here).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

KIB = 1024


def check_triton() -> None:
    """That Triton is one that the kernels run with: 3.4 or newer. Called when this module is imported.

    Raises:
        ImportError: it is older; the message says so.
    """
    if not hasattr(triton, "knobs"):
        found = getattr(triton, "__version__", "an unknown release")
        raise ImportError(f"heedful.kernels: expected Triton 3.4 or newer (torch 2.8 or newer), found {found}")


check_triton()

#: Shared memory a block may ask for, by compute capability; others get the least of these.
_SHARED_MEMORY = {
    75: 64 * KIB,
    80: 163 * KIB,
    86: 99 * KIB,
    87: 163 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    103: 227 * KIB,
    110: 227 * KIB,
    120: 99 * KIB,
    121: 99 * KIB,
}
_LEAST_SHARED_MEMORY = 64 * KIB
#: Multiprocessors of the card that a capability stands for where no card is there: A100, L40S, H100, B200, RTX 5090.
_NUM_SMS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Target:
    """What launchers need to know of a device.

    Attributes:
        name: of the device, as the driver gives it; the key of tuning tables.
        backend: "cuda", "hip" or "interpreter" (Triton's, on CPU tensors).
        capability: 80 for compute capability 8.0; 0 unless the backend is "cuda".
        arch: Triton's name of the architecture: 90, or "gfx942".
        warp_size: threads of a warp (wavefront).
        shared_memory: bytes of shared memory that one block may have.
        fp8_dot: whether the matrix unit multiplies e4m3fn.
        num_sms: multiprocessors, at least 1.
    """

    name: str
    backend: str
    capability: int
    arch: int | str
    warp_size: int
    shared_memory: int
    fp8_dot: bool
    num_sms: int

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self.backend == "interpreter"

    @property
    def hopper(self) -> bool:
        """Whether there are matrix instructions of a warp group (wgmma)."""
        return self.backend == "cuda" and 90 <= self.capability < 100

    @staticmethod
    def of(device: torch.device | torch.Tensor) -> Target:
        """The target of a device, or of a tensor's device.

        Raises:
            ValueError: a device on which no kernel runs: a CPU outside Triton's interpreter, or an unknown kind.
        """
        device = device.device if isinstance(device, torch.Tensor) else device
        return _of(device.type, torch.cuda.current_device() if device.type == "cuda" else 0, device.index)

    @staticmethod
    def cuda(capability: int) -> Target:
        """The target of a compute capability (90 for 9.0) whose card need not be there."""
        return Target(
            name=f"sm_{capability}",
            backend="cuda",
            capability=capability,
            arch=capability,
            warp_size=32,
            shared_memory=_SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY),
            fp8_dot=capability >= 89,
            num_sms=_NUM_SMS.get(capability, 108),
        )

    @staticmethod
    def hip(arch: str) -> Target:
        """The target of an AMD architecture ("gfx942") whose card need not be there."""
        cdna4 = arch.startswith("gfx95")
        return Target(
            name=arch,
            backend="hip",
            capability=0,
            arch=arch,
            warp_size=64 if arch.startswith("gfx9") else 32,
            shared_memory=160 * KIB if cdna4 else 64 * KIB,
            fp8_dot=cdna4,  # gfx942 multiplies another e4m3, without negative zero
            num_sms=256 if cdna4 else 304,
        )


#: The interpreter: as roomy as the largest card, so that it runs what that one would.
INTERPRETER = Target("interpreter", "interpreter", 0, 0, 32, 227 * KIB, True, 4)


@functools.cache
def _of(kind: str, current: int, index: int | None) -> Target:
    if triton.knobs.runtime.interpret and kind == "cpu":
        return INTERPRETER
    if kind != "cuda":
        raise ValueError(f"device: expected a GPU, got {kind!r} (under TRITON_INTERPRET=1 kernels run on the CPU)")
    properties = torch.cuda.get_device_properties(current if index is None else index)
    if torch.version.hip:
        like = Target.hip(properties.gcnArchName.split(":")[0])
    else:
        like = Target.cuda(10 * properties.major + properties.minor)
    return replace(
        like,
        name=properties.name,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0) or like.shared_memory,
        num_sms=properties.multi_processor_count,
    )
