"""What the compiler makes of the kernels for each card, run in the emulator (tests/emulator).

Triton is in its interpreter in this run, so each card is a process of its own, two at a time. Hopper runs everything,
the others what multiplies and converts. All tests with all examples:

    EMULATE=80 pytest tests/kernels tests/emulated
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EVERYTHING = sorted({path.stem.removeprefix("test_kernel_") for path in (TESTS / "kernels").glob("test_*.py")})
NOT_RUN = {"assembly", "compiled", "tuning"}  # these compile for cards of their own, or measure
PRODUCTS = ["dequantize", "experts", "index_scores", "index_top_k", "quantize", "sparse_attention", "write_cache"]
CARDS = {90: [name for name in EVERYTHING if name not in NOT_RUN], 80: PRODUCTS, 120: PRODUCTS}
EXAMPLES = "2"  # of a drawn test

if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
    pytest.skip("torch and Triton are needed", allow_module_level=True)


def run(card: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMULATE": str(card), "EMULATE_EXAMPLES": EXAMPLES, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "tests/emulated"]
    command += [f"tests/kernels/test_kernel_{name}.py" for name in CARDS[card]]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[int, Future[subprocess.CompletedProcess[str]]]]:
    pool = ThreadPoolExecutor(max_workers=2)
    yield {card: pool.submit(run, card) for card in CARDS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("card", CARDS)
def test_compiled_kernels_give_what_the_references_give(
    card: int, runs: dict[int, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = runs[card].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout[-1000:]
    assert int(found[1]) > 100
