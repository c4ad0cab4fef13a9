"""Memory of this machine: how much there is, and how much of it this process may still take.

A container's limit counts where it is below the machine's own. Pages of files do not count as taken: the system gives
them back. Standard library alone.
"""

from __future__ import annotations

import os
from pathlib import Path

# Limit, usage and statistics of the control group that a container sees as its own: version 2, then version 1.
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_FILE_PAGES = ("active_file", "inactive_file")


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory, or None where the system does not tell.

    Args:
        root: where the system's files are looked for.
    """
    total = _meminfo(root, "MemTotal")
    if total is None:
        total = _pages("SC_PHYS_PAGES")
    limits = [limit for limit, _ in _cgroups(root)]
    return min([total, *limits]) if total is not None else None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken without swapping, or None where the system does not tell.

    Args:
        root: where the system's files are looked for.
    """
    available = _meminfo(root, "MemAvailable")
    if available is None:
        available = _pages("SC_AVPHYS_PAGES")
    if available is None:
        return None
    return max(0, min([available, *(limit - used for limit, used in _cgroups(root))]))


def _meminfo(root: Path, field: str) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, macOS no such name
        return None


def _cgroups(root: Path) -> list[tuple[int, int]]:
    """Limit and bytes taken, of each control group that has a limit."""
    found = []
    for folder, limit_file, usage_file in _CGROUPS:
        try:
            limit = int((root / folder / limit_file).read_text())  # "max" is no number: no limit
            used = int((root / folder / usage_file).read_text())
            statistics = dict(line.split() for line in (root / folder / "memory.stat").read_text().splitlines())
            found.append((limit, used - sum(int(statistics.get(name, 0)) for name in _FILE_PAGES)))
        except (OSError, ValueError):
            continue
    return found
