"""Items of a run (checks, cases, points of a curve) in processes of their own, so that none takes others with it.

A `Worker` holds one process that runs item after item. An item that raises, ends its process or takes too long becomes
an "error" event, and the next one gets a new process: after an illegal access a CUDA context serves nobody.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Item = tuple[str, Any]
"""A kind and what names the item within it."""
Event = tuple[str, Any]
"""("result", a record), then ("done", seconds), or ("error", {"error", "traceback"})."""

START_SECONDS = 90.0  # that a process may take to import and to open the device


class Worker:
    """One process at a time, which runs items.

    Args:
        runner: "module:function"; the function takes `options` once and gives back a function from an item to records.
        options: anything that can be pickled.
        environment: variables that are set in the process before anything is imported there.
    """

    def __init__(self, runner: str, options: Any, environment: dict[str, str] | None = None) -> None:
        self._arguments = (runner, options, environment or {})
        self._process: Any = None
        self._pipe: Any = None

    def run(self, item: Item, seconds: float) -> Iterator[Event]:
        """Events of one item, which may take that many seconds."""
        deadline = time.monotonic() + seconds
        if self._process is None:
            self._start()
            if (event := self._event(min(deadline, time.monotonic() + START_SECONDS)))[0] == "error":
                yield event
                return
        try:
            self._pipe.send(item)
        except OSError as error:
            yield self._failed(f"the process ended before this item: {error}")
            return
        while True:
            event = self._event(deadline)
            yield event
            if event[0] in ("done", "error"):
                return

    def close(self) -> None:
        """Ends the process, which is idle."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(5)
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()

    def _event(self, deadline: float) -> Event:
        try:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                return self._failed("out of time")
            event: Event = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            return self._failed(f"the process ended with code {self._process.exitcode}")
        if event[0] == "error":
            self._process.join(5)
            self._kill()
        return event

    def _failed(self, reason: str) -> Event:
        self._kill()
        return ("error", {"error": reason, "traceback": ""})


def _serve(pipe: Any, runner: str, options: Any, environment: dict[str, str]) -> None:
    """The process: runs what it is sent until something fails."""
    os.environ.update(environment)
    try:
        module, name = runner.split(":")
        run: Callable[[Item], Iterator[Any]] = getattr(importlib.import_module(module), name)(options)
        pipe.send(("ready", None))
        while True:
            if (item := pipe.recv()) is None:
                return
            began = time.monotonic()
            for record in run(item):
                pipe.send(("result", record))
            gc.collect()
            pipe.send(("done", time.monotonic() - began))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:500]
        pipe.send(("error", {"error": reason, "traceback": traceback.format_exc()[-4000:]}))


def run_in_parallel(
    make: Callable[[], Worker], items: Sequence[Item], processes: int, seconds: float, until: float
) -> dict[Item, str]:
    """Runs items in several processes at once, results thrown away.

    Args:
        make: a worker.
        items: taken in this order.
        processes: at the same time.
        seconds: that one item may take.
        until: when all must be over, on the clock of `time.monotonic`.

    Returns:
        What went wrong, by item.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    errors: dict[Item, str] = {}

    def work() -> None:
        worker = make()
        try:
            while (left := until - time.monotonic()) > 0:
                item = waiting.get_nowait()
                for kind, value in worker.run(item, min(seconds, left)):
                    if kind == "error":
                        errors[item] = value["error"]
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(max(1, min(processes, len(items))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while True:
        try:
            errors[waiting.get_nowait()] = "out of time"
        except queue.Empty:
            return errors
