"""Items that succeed, fail and hang, for the tests of `benches/gpu_worker.py`; imported in processes of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any


def runner(options: dict[str, Any]) -> Callable[[tuple[str, Any]], Iterator[Any]]:
    """What the items do is their name; "count" tells how many the process has run."""
    if options.get("broken"):
        raise RuntimeError("no device")
    seen = 0

    def run(item: tuple[str, Any]) -> Iterator[Any]:
        nonlocal seen
        seen += 1
        kind, value = item
        if kind == "raise":
            yield "before"
            raise ValueError(value)
        if kind == "exit":
            os._exit(value)
        if kind == "hang":
            time.sleep(60)
        if kind == "write":
            with open(value, "a") as file:
                file.write("x")
        yield {"count": seen, "variable": os.environ.get("GPU_BENCH_VARIABLE")}

    return run
