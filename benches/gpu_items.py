"""What the processes of `gpu_all.py` run: from an item to its records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import gpu_cases
import gpu_checks
import gpu_curve
import gpu_timing
from gpu_worker import Item


@dataclass(frozen=True)
class Options:
    """How a process runs its items.

    Attributes:
        device: "cuda", or with `dry` "cpu".
        dry: small sizes, on the CPU: checks in Triton's interpreter, cases by the CPU's operators.
        compiling: each call once, so that its kernels are compiled and on disk.
        commit: for the record; None asks git.
        ceilings: those that were measured; stand-ins where they are not known yet.
    """

    device: str = "cuda"
    dry: bool = False
    compiling: bool = False
    commit: str | None = None
    ceilings: dict[str, float] = field(default_factory=dict)


UNKNOWN = {"copy_bytes_per_second": 1e12, "bfloat16_flops": 1e15}
"""Stand-ins for ceilings that could not be measured; rows that would be judged by them are not."""
JUDGED = ("fraction_of_limit", "share_of_copy", "goal", "met")


def _known(ceilings: dict[str, float]) -> dict[str, float]:
    return {**UNKNOWN, **ceilings}


def checks(dry: bool) -> list[gpu_checks.Check]:
    """The checks, in the order in which they are made."""
    return [*gpu_checks.CHECKS, *(() if dry else gpu_checks.GPU_CHECKS), gpu_checks.check_engine]


def items(options: Options, names: list[str], tuning: bool) -> list[Item]:
    """Everything, in order of importance: ceilings, checks, configurations, cases, the curve."""
    found: list[Item] = [("machine", None), *(("check", check.__name__) for check in checks(options.dry))]
    shapes = gpu_cases.SMALL if options.dry else gpu_cases.FULL
    if tuning:
        bench = gpu_cases.Bench(gpu_timing.HostClock(torch.device("cpu")), shapes, UNKNOWN)
        found += [("tune", name) for name in gpu_cases.tuning_steps(bench)]
    cases = [("case", case.__name__) for case in gpu_cases.CASES if case.__name__ in names]
    curve = [("curve", context) for context in shapes.contexts] if "dense_and_sparse" in names else []
    return [*found, *cases[:6], *reversed(curve), *cases[6:]]


def device_of(name: str) -> torch.device:
    """A device with its number, which setting it wants."""
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def runner(options: Options) -> Callable[[Item], Iterator[dict[str, Any]]]:
    """Runs items one after another; `Worker` calls it once in a process."""
    device = device_of(options.device)
    timer_type = gpu_timing.HostClock if options.dry else gpu_timing.Once if options.compiling else gpu_timing.Timer
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    backend = "triton" if options.dry else "auto"
    shapes = gpu_cases.SMALL if options.dry else gpu_cases.FULL
    bench = gpu_cases.Bench(timer_type(device), shapes, _known(options.ceilings))
    sizes = gpu_checks.SMALL if options.dry else gpu_checks.FULL

    def run(item: Item) -> Iterator[dict[str, Any]]:
        kind, name = item
        with torch.inference_mode():
            yield from _records(kind, name, bench, gpu_checks.Inputs(sizes, device, backend), options)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return run


def _records(
    kind: str, name: Any, bench: gpu_cases.Bench, inputs: gpu_checks.Inputs, options: Options
) -> Iterator[dict[str, Any]]:
    if kind == "machine":
        yield {"machine": gpu_timing.machine(bench.device, options.commit)}
        small = {"size": 2**20, "n": 64} if options.dry else {}
        for ceiling, rate in gpu_timing.ceilings(bench.timer, **small):
            yield {"ceilings": {ceiling: rate}}
    elif kind == "check":
        check = next(check for check in checks(options.dry) if check.__name__ == name)
        result = check(inputs)
        yield {**asdict(result), "passed": result.passed}
    elif kind == "tune":
        yield {"step": name, "quickest": str(gpu_cases.tuning_steps(bench)[name]())}
    elif kind == "case":
        case = next(case for case in gpu_cases.CASES if case.__name__ == name)
        for row in case(bench):
            found = row.record(bench.ceilings)
            if missing := UNKNOWN.keys() - options.ceilings.keys():
                found = {key: value for key, value in found.items() if key not in JUDGED}
                found["note"] = f"not measured: {', '.join(sorted(missing))}"
            yield found
    else:
        for point in gpu_curve.curve(bench, name):
            yield asdict(point)
