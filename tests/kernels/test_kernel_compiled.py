"""Every kernel compiles for cards that are not here, its main configurations without spills, within shared memory.

The compiler needs Triton outside its interpreter, hence a process of its own; it writes what it makes into Triton's
cache, so a second run is quick.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benches" / "compile_kernels.py"


@functools.cache
def rows(capability: int) -> list[dict[str, Any]]:
    """What the script found of the main configurations."""
    command = [sys.executable, str(SCRIPT), "--cards", str(capability), "--main", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_main_configurations_fit_the_card(capability: int) -> None:
    found = rows(capability)
    assert found
    for row in found:
        assert row["error"] is None, row
        assert row["spills"] == 0, row
        assert row["shared"] <= row["limit"], row
        if capability == 90 and row["multiplies"]:
            assert row["wgmma"], row


def test_products_and_sums_are_fused_whatever_the_default() -> None:
    script = (
        "from heedful.kernels import split; from heedful.kernels.compilation import compile_for; "
        "from heedful.kernels.target import Target; card = Target.cuda(90); "
        "print('fma.rn.f32' in compile_for(split.compilations(card)[0], card).assembly)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "True\n", done.stderr
