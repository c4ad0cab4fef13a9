"""Tests of compiled kernels in the emulator: they run where tests/conftest.py has turned it on (EMULATE=90)."""

from __future__ import annotations

import os

if not os.environ.get("EMULATE"):
    collect_ignore_glob = ["test_*.py"]
