"""Where kernel tests run: see tests/conftest.py. Files here are named test_kernel_*.py, because names of test files are
unique in the suite."""

from __future__ import annotations

import importlib.util
import os

import pytest

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
EMULATED = os.environ.get("EMULATE")

if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
    collect_ignore_glob = ["test_*.py"]


if EMULATED:
    from emulator import driver

    driver.activate(int(EMULATED))


@pytest.fixture(scope="session")
def device() -> object:
    """CPU in the interpreter, else the GPU; without one the test is skipped."""
    import torch

    if INTERPRETED or EMULATED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a GPU")
    return torch.device("cuda")
