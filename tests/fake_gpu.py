"""A GPU that holds no numbers: the Python of launchers and benchmarks runs at full size, and nothing is computed.

Tensors are torch's fake ones, launches are noted in place of being run. What it finds are wrong shapes, strides,
devices and names, before a card is at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from heedful.kernels import target, tuning
from heedful.kernels.compilation import Launch

DEVICE = torch.device("cuda", 0)


def h100() -> SimpleNamespace:
    """What torch says of the card."""
    limits = {"L2_cache_size": 50 * 2**20, "total_memory": 80 * 2**30, "shared_memory_per_block_optin": 227 * 1024}
    return SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, **limits)


@contextlib.contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Inside, tensors on `DEVICE` are fake; gives the launches so far."""
    launches: list[Launch] = []
    card: dict[str, Any] = {
        "get_device_properties": lambda device=None: h100(),
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
    }
    for name, value in card.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(FakeTensor, "data_ptr", lambda self: 0)
    patch.setattr(Launch, "run", lambda launch: launches.append(launch))  # bound, unlike the append itself
    patch.setattr(tuning, "_seconds", lambda planned: [launch.run() for launch in planned] and 1.0)
    patch.setattr(tuning, "_keep", lambda *entry: None)
    patch.setenv("HEEDFUL_CACHE_DIR", "/nonexistent")
    patch.setattr(target, "_of", lambda *device: replace(target.Target.cuda(90), name=h100().name))
    tuning.forget()
    try:
        with FakeTensorMode(), torch.inference_mode():
            yield launches
    finally:
        tuning.forget()
