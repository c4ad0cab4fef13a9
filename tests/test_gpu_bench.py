"""`benches/gpu_all.py` as far as it runs without a GPU: its help, its message, and its checks in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHES = Path(__file__).parent.parent / "benches"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHES / "gpu_all.py"), *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=300)


def test_help_says_what_it_does() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "--dry" in result.stdout
    assert "Exit status" in result.stdout


def test_without_a_gpu_it_says_so() -> None:
    result = run(CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (2, "")
    assert "torch sees no GPU" in result.stderr
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_the_checks_pass_in_the_interpreter() -> None:
    result = run("--dry", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 of 10 checks passed" in result.stdout


def test_crossovers_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))
    from gpu_cases import Point, Row, crossovers

    points = [Point("decode", way, context, seconds) for context, way, seconds in (
        (4096, "sparse", 2.0), (4096, "dense", 1.0), (8192, "sparse", 2.0), (8192, "dense", 2.5), (8192, "other", 9.0),
    )]  # fmt: skip
    assert crossovers(points) == {"prefill": "not reached", "decode": "8192 tokens"}
    ceilings = {"bfloat16_flops": 100.0, "copy_bytes_per_second": 10.0}
    record = Row("case", 4.0, flops=200.0, bytes=30.0, peer="them", peer_seconds=6.0).record(ceilings)
    assert record["fraction_of_limit"] == 0.75
    assert record["times_faster_than_peer"] == 1.5
    assert "met" not in record
