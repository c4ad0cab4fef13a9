"""Tests that need a GPU: `TRITON_INTERPRET=0 pytest tests/gpu`. Elsewhere they are skipped, and say why."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT.parent / "benches"))

if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
    collect_ignore_glob = ["test_*.py"]


def _missing() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "kernels run in Triton's interpreter in this run: TRITON_INTERPRET=0 pytest tests/gpu"
    return None


@pytest.fixture(scope="session")
def gpu() -> object:
    """The GPU; without one the test is skipped."""
    import torch

    if reason := _missing():
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _needs_gpu(gpu: object) -> None:
    """Every test here."""
