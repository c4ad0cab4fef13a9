"""Which configuration of a kernel is quickest on this device: measured at warm-up, kept on disk, looked up by launches.

A launcher asks `choose`, which never measures: it gives what a warm-up has found for the shape's bucket, or else the
first candidate, the static default. `measure` is for warm-ups. A table is one JSON file a device and Triton version, in
$HEEDFUL_CACHE_DIR, $XDG_CACHE_HOME/heedful or ~/.cache/heedful. It is bounded, and what it names counts only if it is
one of the candidates at hand, so a file that is old, damaged or hostile costs speed at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from heedful.kernels.compilation import Launch
from heedful.kernels.target import Target

C = TypeVar("C")  # a configuration: a frozen dataclass of numbers and such

MAX_ENTRIES = 1024
"""Entries of a table; the oldest leave first."""
_MAX_BYTES = 1 << 22  # a larger file is not ours
_REPEATS = 11

_tables: dict[Path, dict[str, Any]] = {}
_chosen: dict[tuple[Any, ...], Any] = {}


def bucket(*sizes: int | str | torch.dtype) -> tuple[int | str, ...]:
    """A key of shapes that are served alike: numbers rounded up to powers of two, dtypes by name, text as it is: what
    candidates depend on exactly must be text."""
    return tuple(triton.next_power_of_2(x) if isinstance(x, int) else str(x).removeprefix("torch.") for x in sizes)


def choose(kernel: str, key: tuple[int | str, ...], target: Target, candidates: Callable[[], Sequence[C]]) -> C:
    """The configuration of a launch: the one that was measured best, else the first candidate."""
    place = (kernel, key, target)
    if place not in _chosen:
        if len(_chosen) >= 4 * MAX_ENTRIES:
            _chosen.clear()
        offered = candidates()
        entry = _table(_path(target)).get(_name(kernel, key))
        _chosen[place] = next((c for c in offered if _values(c) == entry), offered[0])
    found: C = _chosen[place]
    return found


def measure(
    kernel: str,
    key: tuple[int | str, ...],
    target: Target,
    candidates: Sequence[C],
    launches: Callable[[C], Sequence[Launch]],
) -> C:
    """Runs every candidate on the device, keeps the quickest in the table, and gives it.

    Args:
        kernel, key: as launches give them to `choose`.
        candidates: the default first; those that the device cannot run are passed over.
        launches: what a candidate launches; it is run a dozen times.

    Raises:
        RuntimeError: no candidate could be run; with the last one's reason.
    """
    timed, reason = [], None
    for place, candidate in enumerate(candidates):
        try:
            timed.append((_seconds(launches(candidate)), place))
        except Exception as error:  # out of shared memory or registers: Triton's errors have no common base
            reason = error
    if not timed:
        raise RuntimeError(f"{kernel}: none of {len(candidates)} configurations runs on {target.name}") from reason
    best = candidates[min(timed)[1]]
    _keep(_path(target), _name(kernel, key), _values(best))
    _chosen.pop((kernel, key, target), None)
    return best


def cache_folder() -> Path:
    """The folder of tables; it need not exist."""
    if own := os.environ.get("HEEDFUL_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heedful"


def forget() -> None:
    """Drops what is held in memory, so that tables are read again."""
    _tables.clear()
    _chosen.clear()


def _seconds(launches: Sequence[Launch]) -> float:
    """The median time of the launches, in seconds, compiled beforehand."""
    for launch in launches:
        launch.run()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for launch in launches:
            launch.run()
        return time.perf_counter() - start
    device = next(x.device for x in launches[0].arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(device):
        flushed = torch.empty(1 << 26, dtype=torch.int32, device=device)  # more than any second-level cache holds
        times = []
        for _ in range(_REPEATS):
            flushed.zero_()
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            for launch in launches:
                launch.run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1000)
    return statistics.median(times)


def _values(candidate: Any) -> Any:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(candidate)))


def _name(kernel: str, key: tuple[int | str, ...]) -> str:
    return " ".join([kernel, *map(str, key)])


def _path(target: Target) -> Path:
    device = re.sub(r"[^A-Za-z0-9]+", "-", target.name).strip("-").lower() or "device"
    return cache_folder() / "kernels" / f"{device}-triton-{triton.__version__}.json"


def _table(path: Path) -> dict[str, Any]:
    if path not in _tables:
        _tables[path] = _read(path)
    return _tables[path]


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file; none if it is missing, too large or no table."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_BYTES:
            found = json.loads(path.read_text("utf-8"))
            if isinstance(found, dict):
                return found
    return {}


def _keep(path: Path, name: str, values: Any) -> None:
    """Adds an entry, in memory and, if the folder can be written, on disk: whole or not at all."""
    entries = _read(path)  # another process may have written meanwhile
    entries.pop(name, None)
    entries[name] = values
    entries = dict(list(entries.items())[-MAX_ENTRIES:])
    _tables[path] = entries
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
