"""`heedful doctor`: what this machine can run, on which backend and why, and how to get what is missing.

The operators are run, not merely looked for: a small input goes through the compiled core and through the float64
references. Status 0 means that the CPU path works.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from heedful.cli.report import bytes_text, print_json, print_section
from heedful.memory import available_memory, total_memory

_PACKAGES = ("numpy", "torch", "triton", "safetensors", "tqdm")
_TORCH_EXTRA = "pip install 'heedful[torch]'"
_MAX_ERROR = 1e-4
"""Largest difference between operators and references: float32 sums of a few hundred products stay far below."""
_MAX_GPU_ERROR = 2e-2
"""The same of a GPU, whose float32 products may be those of TF32 (10 bits)."""


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
    triton = _check_triton()
    gpu = _check_gpu(torch, triton, gpus)
    return {
        "cpu_works": operators["status"] == "ok",
        "versions": {
            "heedful": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": _machine(),
        "gpus": gpus,
        "backend": _backend(torch, gpu, gpus),
        "checks": {
            "CPU operators": operators,
            "LLM, heedful.nn": torch,
            "checkpoints": _check_package("safetensors"),
            "built-in model": _check_builtin(),
            "Triton": triton,
            "GPU": gpu,
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
        "memory_bytes": total_memory(),
        "available_memory_bytes": available_memory(),
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


Status = Literal["ok", "missing", "failed", "unused"]


def _check(status: Status, detail: str) -> dict[str, str]:
    return {"status": status, "detail": " ".join(detail.split())}


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
    simd = f"{_core.simd_level()} ({_reason('HEEDFUL_SIMD', 'the widest that this CPU has and heedful uses')})"
    threads = f"{ops.get_num_threads()} threads ({_reason('HEEDFUL_NUM_THREADS', 'what the machine offers')})"
    return _check("ok", f"{simd}, {threads}; within {error:.0e} of the references")


def _reason(variable: str, default: str) -> str:
    return f"set by {variable}" if variable in os.environ else default


def _check_torch() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Whether torch serves, and the GPUs it sees."""
    try:
        import torch

        gpus = []
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(number)
                # ROCm's torch names AMD's architectures; NVIDIA's are streaming multiprocessor versions.
                amd = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
                architecture = amd or f"SM{properties.major}{properties.minor}"
                gpus.append(
                    {"name": properties.name, "memory_bytes": properties.total_memory, "architecture": architecture}
                )
    except Exception as error:  # a torch that does not import or a driver that does not answer
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return _check("missing", f"torch is not installed: {_TORCH_EXTRA}"), []
        return _check("failed", f"torch does not work: {type(error).__name__}: {error}"), []
    return _check("ok", f"torch {torch.__version__}, {torch.get_num_threads()} threads"), gpus


def _check_package(name: str) -> dict[str, str]:
    try:
        importlib.import_module(name)
    except Exception as error:  # it may be there and broken
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return _check("missing", f"{name} is not installed: {_TORCH_EXTRA}")
        return _check("failed", f"{name} does not work: {type(error).__name__}: {error}")
    return _check("ok", f"{name} {_version(name)}")


def _check_builtin() -> dict[str, str]:
    try:
        from heedful import builtin
        from heedful.cli.inspect import describe

        path = builtin.path()
        problems = describe(path)["problems"]
    except Exception as error:  # a package that was cut short
        problems = [f"{type(error).__name__}: {error}"]
    return _check("failed", problems[0]) if problems else _check("ok", str(path))


def _check_triton() -> dict[str, str]:
    version = _version("triton")
    if version is None:
        return _check("missing", "triton is not installed, and needed for GPUs alone: pip install triton")
    try:
        importlib.import_module("triton")
    except Exception as error:  # it may be there and broken
        return _check("failed", f"triton does not work: {type(error).__name__}: {error}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _check("ok", f"triton {version}; TRITON_INTERPRET=1: kernels run in its interpreter, on the CPU")
    return _check("ok", f"triton {version}")


def _check_gpu(torch: dict[str, str], triton: dict[str, str], gpus: list[dict[str, Any]]) -> dict[str, str]:
    """Whether a kernel runs on the first GPU: a small selection goes through it."""
    if torch["status"] != "ok":
        return _check("missing", "nothing to look for one with: torch is not there")
    if not gpus:
        return _check("missing", "torch sees none")
    if triton["status"] != "ok":
        return _check("unused", "its kernels need Triton: models and operators run on the CPU")
    try:
        return _compare_on_gpu(gpus[0])
    except Exception as error:  # a driver or a compiler that does not work
        return _check("failed", f"{type(error).__name__}: {error}"[:400])


def _compare_on_gpu(gpu: dict[str, Any]) -> dict[str, str]:
    import torch

    from heedful import ops
    from heedful.kernels.target import Target

    generator = torch.Generator().manual_seed(0)
    q, k, weights, rows, latents = (
        torch.randn(shape, generator=generator) for shape in ((4, 16, 64), (300, 64), (4, 16), (4, 16, 128), (300, 128))
    )
    on = [x.cuda(0) for x in (q, k, weights, rows, latents)]
    indices = ops.index_top_k(on[0], on[1], on[2], 32)
    out, _ = ops.sparse_attention(on[3], on[4], indices, scale=0.1, value_dim=96)
    wanted, _ = ops.sparse_attention(rows, latents, indices.cpu(), scale=0.1, value_dim=96)
    error = float((out.cpu() - wanted).abs().max())
    if not error <= _MAX_GPU_ERROR:
        return _check("failed", f"kernels differ from the CPU by {error:.1e}")
    target = Target.of(on[0])
    fp8 = "FP8 products" if target.fp8_dot else "FP8 rows are read and multiplied as bfloat16"
    room = bytes_text(target.shared_memory)
    return _check("ok", f"{gpu['name']} ({gpu['architecture']}): kernels agree with the CPU; {fp8}; {room} a block")


def _backend(torch: dict[str, str], gpu: dict[str, str], gpus: list[dict[str, Any]]) -> dict[str, str]:
    """What device="auto" takes, and why."""
    if torch["status"] != "ok":
        return {"name": "cpu", "why": "torch is not there, or does not work"}
    if not gpus:
        return {"name": "cpu", "why": "torch sees no GPU"}
    name = f"{gpus[0]['name']} ({gpus[0]['architecture']})"
    if gpu["status"] == "unused":
        return {"name": "cpu", "why": f"{gpus[0]['name']} is there, but Triton is not, or does not work"}
    if gpu["status"] == "failed":
        return {"name": "triton", "why": f"{name}, although its kernels failed the check above: take device='cpu'"}
    return {"name": "triton", "why": f"{name} runs the Triton kernels"}


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
        rows[f"gpu {number}"] = f"{gpu['name']} ({gpu['architecture']}), {bytes_text(gpu['memory_bytes'])}"
    print_section("Machine", rows)
    print_section(
        "What works", {name: f"{check['status']:<9}{check['detail']}" for name, check in report["checks"].items()}
    )
    print(f"Backend: {report['backend']['name']} ({report['backend']['why']})")
