"""Timing on a GPU: medians of calls over inputs rotated past the second-level cache, and the card's own ceilings.

`Timer` measures. `Once` and `HostClock` have its methods: the first runs each call once, so that its kernels are
compiled, the second times on the host's clock, where there is no GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

import heedful
from heedful import ops

Call = Callable[[], object]

LEAST_CALLS, MOST_CALLS = 10, 300
WARM_SECONDS = 0.1  # of calls before the first that counts: clocks rise within that
L2_BYTES = 64 * 2**20  # where it is not told
UNKNOWN = "unknown"  # what a program that is not there would have said


class Timer:
    """Times calls on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rotated(self, make: Callable[[int], Call], input_bytes: float) -> list[Call]:
        """Calls over as many different inputs as together exceed the second-level cache twice, at least two.

        Args:
            make: from a seed to a call that holds its own inputs.
            input_bytes: that one call reads.
        """
        count = max(2, math.ceil(2 * l2_bytes(self.device) / max(1.0, input_bytes)) + 1)
        most = max(1, int(0.4 * self.free_bytes() / max(1.0, input_bytes)))
        return [make(seed) for seed in range(min(count, most, 64))]

    def median(self, calls: Sequence[Call], seconds: float = 0.4) -> float:
        """Median seconds of a call on the device, launched one by one, for about that many seconds in all."""
        warm, one = time.perf_counter(), 0.0
        for number in range(MOST_CALLS):
            one = self._timed(calls[number % len(calls)])
            if number and time.perf_counter() - warm > WARM_SECONDS:
                break
        count = min(max(int(seconds / max(one, 1e-6)), LEAST_CALLS if one < 0.1 else 3), MOST_CALLS)
        pairs = []
        for number in range(count):
            start, end = self._events()
            start.record()
            calls[number % len(calls)]()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def replayed(self, calls: Sequence[Call], seconds: float = 0.3) -> float:
        """Median seconds of a call inside a CUDA graph that holds all of them, so that no launch is waited for."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self.median([graph.replay], seconds) / len(calls)

    def free_bytes(self) -> int:
        """Memory that a case may still take."""
        return torch.cuda.mem_get_info(self.device)[0]

    def _events(self) -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _timed(self, call: Call) -> float:
        start, end = self._events()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


class Once(Timer):
    """Runs one call of each measurement: what compiles its kernels. Every time is a second."""

    def rotated(self, make: Callable[[int], Call], input_bytes: float) -> list[Call]:
        return [make(0)]

    def median(self, calls: Sequence[Call], seconds: float = 0.4) -> float:
        calls[0]()
        torch.cuda.synchronize(self.device)
        return 1.0

    replayed = median


class HostClock(Timer):
    """Times two calls on the host: for a run without a GPU, whose figures nobody keeps."""

    def median(self, calls: Sequence[Call], seconds: float = 0.4) -> float:
        times = []
        for call in calls[:2]:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    replayed = median

    def rotated(self, make: Callable[[int], Call], input_bytes: float) -> list[Call]:
        return [make(seed) for seed in range(2)]

    def free_bytes(self) -> int:
        return 2**40


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What a record must name: device, driver, clocks, power, versions and commit."""
    found: dict[str, Any] = {
        "device": "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "heedful": heedful.__version__,
        "commit": commit or _git("rev-parse", "HEAD"),
        "changed_files": None if (changed := _git("status", "--short")) == UNKNOWN else len(changed.splitlines()),
        "kernels_sha256": _kernels_sha256(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
        found |= {"device": properties.name, "architecture": architecture}
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        found |= {"l2_bytes": l2_bytes(device), **state()}
    return found


def state() -> dict[str, str]:
    """What nvidia-smi says of the card now."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    values = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").partition("\n")[0]
    found = [value.strip() for value in values.split(",")]
    return dict(zip(fields, found, strict=True)) if len(found) == len(fields) else {"nvidia-smi": values}


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _kernels_sha256() -> str:
    """Of the kernels' sources: names a state of them where there is no repository."""
    total = hashlib.sha256()
    for path in sorted((Path(heedful.__file__).parent / "kernels").glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def l2_bytes(device: torch.device) -> int:
    """Size of the second-level cache."""
    if device.type != "cuda":
        return L2_BYTES
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_BYTES


def ceilings(timer: Timer, size: int = 2**30, n: int = 8192) -> Iterator[tuple[str, float]]:
    """Rates that the card reaches, a second: of a copy (bytes read and written), of products in bfloat16 and FP8; and
    seconds of host and device that one launch takes. One after another, so that what was found is kept."""
    device = timer.device
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    yield "copy_bytes_per_second", 2 * size / timer.median([lambda: target.copy_(source)])
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "bfloat16_flops", 2 * n**3 / timer.median([lambda: a @ b])
    if hasattr(torch, "_scaled_mm"):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        for name, fast in (("fp8_flops", True), ("fp8_exact_sums_flops", False)):

            def product(fast: bool = fast) -> object:
                return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

            with contextlib.suppress(RuntimeError, ValueError):  # a card without FP8 products
                yield name, 2 * n**3 / timer.median([product])
    small = torch.zeros(16, device=device)
    yield "launch_seconds_in_a_graph", timer.replayed([lambda: small.add_(1)] * 200)
    began = time.perf_counter()
    for _ in range(1000):
        small.add_(1)
    yield "launch_seconds_on_the_host", (time.perf_counter() - began) / 1000
    if device.type == "cuda":
        rows = torch.zeros(8, 128, device=device)
        ops.hadamard(rows)
        began = time.perf_counter()
        for _ in range(200):
            ops.hadamard(rows)
        yield "heedful_call_seconds_on_the_host", (time.perf_counter() - began) / 200
        torch.cuda.synchronize(device)
