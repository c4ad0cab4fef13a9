"""Files that want to do harm: each loads or is refused, in little time and memory.

Each is loaded in a process of its own (hostile_files.py). Memory is asserted strictly: what loading takes beyond the
file's own text. Time is asserted loosely, at several times the second that is meant, for machines that are slow or
busy: what it is to catch is work that grows faster than the file. Limits of the process end one that takes far more.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hostile_files import HOSTILE

LIMIT_MB = 200
LIMIT_SECONDS = 5.0
ENOUGH = 4 << 30
"""Bytes of address space: Python, the file's text (up to 200 MB, several times while it is made), and the limit."""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ENOUGH, ENOUGH))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_takes_little(name: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("hostile_files.py")), name]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    result = json.loads(done.stdout)
    assert result["outcome"].startswith(HOSTILE[name][1]), result
    assert result["mb"] < LIMIT_MB, result
    assert result["seconds"] < LIMIT_SECONDS, result
