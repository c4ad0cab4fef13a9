"""Tests of compiled kernels in the emulator: they run where tests/kernels/conftest.py has turned it on (EMULATE=90)."""

from __future__ import annotations

import os

if os.environ.get("EMULATE"):
    from emulator import driver

    driver.activate(int(os.environ["EMULATE"]))
else:
    collect_ignore_glob = ["test_*.py"]
