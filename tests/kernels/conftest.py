"""Where kernel tests run: in Triton's interpreter, on a GPU (tests/conftest.py), or, compiled, in the emulator.

    EMULATE=90 [EMULATE_EXAMPLES=5] pytest tests/kernels tests/emulated

compiles them for compute capability 9.0 and runs what comes out of it (tests/emulator), drawn tests with that many
examples. Files here are named test_kernel_*.py, because names of test files are unique in the suite.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
from hypothesis import settings

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
EMULATED = os.environ.get("EMULATE")

if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> object:
    """CPU in the interpreter, else the GPU; without one the test is skipped."""
    import torch

    if INTERPRETED or EMULATED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a GPU")
    return torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Limits the examples of drawn tests, each of which may be a kernel to compile."""
    most = os.environ.get("EMULATE_EXAMPLES")
    for item in items if EMULATED and most else ():
        function = getattr(item, "obj", None)
        given = getattr(function, "_hypothesis_internal_use_settings", None)
        if given is not None and given.max_examples > int(most):
            function._hypothesis_internal_use_settings = settings(given, max_examples=int(most))
