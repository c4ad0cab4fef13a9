"""Timing on a GPU: medians of calls over inputs rotated past the second-level cache, and the card's own ceilings."""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

Call = Callable[[], object]

LEAST_CALLS, MOST_CALLS = 10, 300


def machine(device: torch.device) -> dict[str, Any]:
    """What a record must name: device, driver, versions and commit."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "architecture": getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "changed_files": len(_output("git", "-C", str(Path(__file__).parent), "status", "--short").splitlines()),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def l2_bytes(device: torch.device) -> int:
    """Size of the second-level cache; 64 MiB where it is not told."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20


def rotated(make: Callable[[int], Call], input_bytes: int, device: torch.device) -> list[Call]:
    """Calls over as many different inputs as together exceed the second-level cache twice, at least two.

    Args:
        make: from a seed to a call that holds its own inputs.
        input_bytes: that one call reads.
        device: the GPU.
    """
    count = max(2, math.ceil(2 * l2_bytes(device) / max(1, input_bytes)) + 1)
    free, _ = torch.cuda.mem_get_info(device)
    most = max(1, int(0.6 * free / max(1, input_bytes)))
    return [make(seed) for seed in range(min(count, most, 64))]


def median_seconds(calls: Sequence[Call], seconds: float = 0.4) -> float:
    """Median time of a call on the device, launched one by one, for about that many seconds in all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    first = _timed(calls[-1])
    count = min(max(int(seconds / max(first, 1e-6)), LEAST_CALLS), MOST_CALLS)
    times = []
    for number in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[number % len(calls)]()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3


def median_replayed_seconds(calls: Sequence[Call], replays: int = 30) -> float:
    """Median time of a call inside a CUDA graph that holds all of them, so that no launch is waited for."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    times = [_timed(graph.replay) for _ in range(replays)]
    del kept
    return statistics.median(times) / len(calls)


def _timed(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device) -> dict[str, float]:
    """Rates that the card reaches: of a copy (bytes read and written) and of products in bfloat16 and FP8, a second."""
    size = 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"copy_bytes_per_second": 2 * size / median_seconds([lambda: target.copy_(source)])}
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16_flops"] = 2 * n**3 / median_seconds([lambda: a @ b])
    if hasattr(torch, "_scaled_mm"):
        one = torch.ones((), device=device)
        try:
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
            product = median_seconds(
                [lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)]
            )
            found["fp8_flops"] = 2 * n**3 / product
        except RuntimeError as error:  # a card without FP8 products
            print(f"no FP8 products here: {str(error).partition(chr(10))[0]}")
    return found
