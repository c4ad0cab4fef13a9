"""`heedful doctor`: what this machine can run, on which backend and why, and how to get what is missing.

The operators are run, not merely looked for: a small input goes through the compiled core and through the float64
references. Status 0 means that the CPU path works.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from heedful.cli.report import bytes_text, print_json, print_section

_PACKAGES = ("numpy", "torch", "triton", "safetensors", "tqdm")
_TORCH_EXTRA = "pip install 'heedful[torch]'"
_MAX_ERROR = 1e-4
"""Largest difference between operators and references: float32 sums of a few hundred products stay far below."""


def add_parser(subparsers: Any) -> None:
    """Adds the command to the `heedful` parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="show what this machine can run",
        description="Show what this machine can run, on which backend and why. The exit status is 0 when the CPU "
        "path works.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    report = examine()
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["cpu_works"] else 1


def examine() -> dict[str, Any]:
    """The facts about this machine, as JSON has them."""
    from heedful import __version__

    operators = _check_operators()
    torch, gpus = _check_torch()
    return {
        "cpu_works": operators["status"] == "ok",
        "versions": {
            "heedful": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": _machine(),
        "gpus": gpus,
        "backend": _backend(gpus),
        "checks": {
            "CPU operators": operators,
            "LLM, heedful.nn": torch,
            "checkpoints": _check_package("safetensors"),
            "built-in model": _check_builtin(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": _memory("MemTotal"),
        "available_memory_bytes": _memory("MemAvailable"),
    }


def _cpu_name() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        return platform.processor() or platform.machine()  # ARM kernels give no model name


def _memory(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        pass
    if field != "MemTotal":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _check(status: Literal["ok", "missing", "failed"], detail: str) -> dict[str, str]:
    return {"status": status, "detail": detail}


def _check_operators() -> dict[str, str]:
    try:
        return _compare_with_references()
    except Exception as error:  # whatever is broken here is what the user came to learn
        return _check("failed", f"{type(error).__name__}: {error}")


def _compare_with_references() -> dict[str, str]:
    """Scores, selects and attends over random numbers, and compares with the references."""
    import numpy as np

    from heedful import _core, ops
    from heedful.ops import reference

    T, S, H, Hi, Di, C, R, K = 4, 300, 2, 4, 64, 96, 32, 32
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, dtype=np.float32)

    q_index, k_index, weights = normal(T, Hi, Di), normal(S, Di), normal(T, Hi)
    q, kv, scale = normal(T, H, C + R), normal(S, C + R), (C + R) ** -0.5
    scores = ops.index_scores(q_index, k_index, weights)
    indices = ops.top_k(scores, K)
    out, _ = ops.sparse_attention(q, kv, indices, scale=scale, value_dim=C)
    if not np.array_equal(indices, reference.top_k(scores, K)):
        return _check("failed", "top_k: the selection differs from the reference's")
    wanted_scores = ops.index_scores(q_index, k_index, weights, backend="reference")
    wanted, _ = ops.sparse_attention(q, kv, indices, scale=scale, value_dim=C, backend="reference")
    seen = np.isfinite(wanted_scores)
    if not np.array_equal(seen, np.isfinite(scores)):
        return _check("failed", "index_scores: the causal mask differs from the reference's")
    largest = np.abs(wanted_scores[seen]).max()
    error = max(float(np.abs(scores[seen] - wanted_scores[seen]).max() / largest), float(np.abs(out - wanted).max()))
    if not error <= _MAX_ERROR:
        return _check("failed", f"operators differ from the references by {error:.1e}")
    return _check("ok", f"{_core.simd_level()}, {ops.get_num_threads()} threads; within {error:.0e} of the references")


def _check_torch() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Whether torch serves, and the GPUs it sees."""
    if _version("torch") is None:
        return _check("missing", f"torch is not installed: {_TORCH_EXTRA}"), []
    try:
        import torch

        gpus = []
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(number)
                capability = f"{properties.major}.{properties.minor}"
                gpus.append(
                    {"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability}
                )
    except Exception as error:  # a torch that does not import or a driver that does not answer
        return _check("failed", f"torch does not work: {type(error).__name__}: {error}"), []
    return _check("ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads"), gpus


def _check_package(name: str) -> dict[str, str]:
    version = _version(name)
    if version is None:
        return _check("missing", f"{name} is not installed: {_TORCH_EXTRA}")
    return _check("ok", f"{name} {version}")


def _check_builtin() -> dict[str, str]:
    from heedful import builtin
    from heedful.cli.inspect import describe

    path = builtin.path()
    try:
        problems = describe(path)["problems"]
    except (ValueError, OSError) as error:
        problems = [str(error)]
    return _check("failed", problems[0]) if problems else _check("ok", str(path))


def _backend(gpus: list[dict[str, Any]]) -> dict[str, str]:
    why = "this version has no GPU kernels" if gpus else "torch sees no GPU"
    return {"name": "cpu", "why": why}


def _print(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print_section("Versions", {name: version or "not installed" for name, version in report["versions"].items()})

    def memory(count: int | None) -> str:
        return "unknown" if count is None else bytes_text(count)

    rows = {
        "system": machine["system"],
        "cpu": f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable",
        "memory": f"{memory(machine['memory_bytes'])}, {memory(machine['available_memory_bytes'])} available",
    }
    for number, gpu in enumerate(report["gpus"]):
        rows[f"gpu {number}"] = f"{gpu['name']}, {bytes_text(gpu['memory_bytes'])}, capability {gpu['capability']}"
    print_section("Machine", rows)
    print_section(
        "What works", {name: f"{check['status']:<9}{check['detail']}" for name, check in report["checks"].items()}
    )
    print(f"Backend: {report['backend']['name']} ({report['backend']['why']})")
