"""Size of the CPU thread pool that all compiled parallel work of the package shares."""

from __future__ import annotations

import operator

from heedful import _core


def set_num_threads(n: int) -> None:
    """Sizes the pool (1 to 1024 threads). The default is HEEDFUL_NUM_THREADS, else what the machine offers.

    No result depends on it. Raises ValueError for another number, RuntimeError when the system refuses the
    threads.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise ValueError(f"n: expected a number of threads from 1 to 1024, got {n!r}") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"n: expected a number of threads from 1 to 1024, got {count}")
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """Number of threads of the pool."""
    return _core.get_num_threads()
