"""Everything about the GPU kernels in one run: correctness, then timing, in under nine minutes.

    python benches/gpu_all.py                    # needs a GPU; writes benches/results/gpu/<device>.json and .svg
    python benches/gpu_all.py --only top_k sparse_prefill --no-write
    python benches/gpu_all.py --dry              # the correctness part, small, in Triton's interpreter, without a GPU

Exit status: 0 when every check passed, 1 when one failed, 2 without a GPU. Times are medians over inputs rotated past
the second-level cache; beside each stands the fraction of what the card reaches on a plain copy and a plain product.
Checks come first: nothing that is wrong is timed (`--force` times it nevertheless).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu"
CASES = ("sparse_prefill", "sparse_decode", "index_prefill", "index_decode", "top_k", "fused_top_k", "dense_and_sparse")
NO_GPU = 2


def main() -> int:
    """Runs the checks and the cases."""
    args = _arguments()
    if args.dry:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set: kernels would run in the interpreter. Unset it, or use --dry.", file=sys.stderr)
        return NO_GPU
    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install 'heedful[torch]'", file=sys.stderr)
        return NO_GPU
    if not args.dry and not torch.cuda.is_available():
        print("torch sees no GPU. --dry runs the correctness part without one.", file=sys.stderr)
        return NO_GPU
    started = time.monotonic()

    def left() -> float:
        return args.seconds - (time.monotonic() - started)

    device = torch.device("cpu" if args.dry else args.device)
    checks = list(_check(device, args.dry))
    failed = [check for check in checks if not check["passed"]]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed, {time.monotonic() - started:.0f} s")
    if args.dry or (failed and not args.force):
        return 1 if failed else 0
    record = _measure(device, args.only or CASES, args.tune, left)
    record["checks"] = checks
    record["seconds"] = time.monotonic() - started
    if not args.no_write:
        _write(record)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="small checks alone, in Triton's interpreter")
    parser.add_argument("--device", default="cuda", help="which GPU (default: cuda)")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=500.0, help="cases that would begin later are left out")
    parser.add_argument("--tune", action="store_true", help="first measure configurations, and keep them on disk")
    parser.add_argument("--force", action="store_true", help="time even if a check failed")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def _check(device: Any, dry: bool) -> Iterator[dict[str, Any]]:
    """Each check's outcome, printed as it comes."""
    import gpu_checks

    backend = "triton" if dry else "auto"
    sizes = gpu_checks.SMALL if dry else gpu_checks.FULL
    calls = [
        (check.__name__, lambda check=check: check(gpu_checks.Inputs(sizes, device, backend)))
        for check in gpu_checks.CHECKS
    ]
    calls.append(("check_engine", lambda: gpu_checks.check_engine(device, backend)))
    for name, call in calls:
        began = time.monotonic()
        try:
            result = call()
            found = {**asdict(result), "passed": result.passed}
        except Exception as error:  # the others are still worth knowing
            traceback.print_exc()
            found = {"name": name, "passed": False, "detail": f"{type(error).__name__}: {error}"[:500]}
        mark = "ok    " if found["passed"] else "FAILED"
        numbers = f"error {found['error']:.1e}, bound {found['bound']:.1e}" if "error" in found else ""
        print(f"{mark} {found['name']:<50} {numbers} {found['detail']} ({time.monotonic() - began:.1f} s)", flush=True)
        yield found


def _measure(device: Any, names: Any, tune: bool, left: Any) -> dict[str, Any]:
    """Rows of every case that time is left for."""
    import torch

    import gpu_cases
    import gpu_timing

    torch.cuda.set_device(device)
    record: dict[str, Any] = {"machine": gpu_timing.machine(device), "ceilings": gpu_timing.ceilings(device)}
    ceilings = record["ceilings"]
    print(json.dumps(record, indent=1))
    record["rows"], record["left_out"], record["tuned"] = [], [], []
    for line in gpu_cases.tune(device, left) if tune else ():
        record["tuned"].append(line)
        print(line, flush=True)
    for case in gpu_cases.CASES:
        if case.__name__ not in names:
            continue
        if left() < 15:
            record["left_out"].append(f"{case.__name__}: out of time")
            continue
        try:
            for row in case(device, ceilings):
                entry = row.record(ceilings)
                record["rows"].append(entry)
                print(_line(entry), flush=True)
        except Exception as error:  # as above
            traceback.print_exc()
            record["left_out"].append(f"{case.__name__}: {type(error).__name__}: {error}"[:500])
        gpu_cases._latent_pages.cache_clear()
        torch.cuda.empty_cache()
    if "dense_and_sparse" in names:
        contexts = [4096, 8192, 16384, 32768, 65536, 131072]
        points = []
        for point in gpu_cases.dense_and_sparse(device, contexts, left):
            points.append(point)
            print(f"{point.phase:<8} {point.context:>7}  {point.seconds_per_token * 1e6:9.2f} us a token  {point.way}")
        record["points"] = [asdict(point) for point in points]
        record["crossover"] = gpu_cases.crossovers(points)
        print("sparse is quicker than every dense way from", record["crossover"])
    for peer in ("flash_mla", "deep_gemm", "tilelang"):
        record.setdefault("peers", {})[peer] = "installed" if _has(peer) else "not installed here"
    for line in record["left_out"]:
        print(f"left out: {line}")
    return record


def _has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _line(entry: dict[str, Any]) -> str:
    parts = [f"{entry['case']:<58}", f"{entry['seconds'] * 1e3:9.3f} ms"]
    parts.append(f"{entry['tflops']:7.1f} TFLOP/s" if "tflops" in entry else " " * 15)
    parts.append(f"{entry['gigabytes_per_second']:7.0f} GB/s" if "gigabytes_per_second" in entry else " " * 12)
    parts.append(f"{entry['fraction_of_limit']:4.0%} of the limit")
    if "times_faster_than_peer" in entry:
        parts.append(f"{entry['times_faster_than_peer']:.2f} times {entry['peer']}")
    if "met" in entry:
        parts.append(f"goal {entry['goal']}: {'met' if entry['met'] else 'missed'}")
    return "  ".join(parts) + (f"  ({entry['note']})" if "note" in entry else "")


def _write(record: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in record["machine"]["device"].lower()).strip("-")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    if record.get("points"):
        try:
            _plot(record, path.with_suffix(".svg"))
        except ModuleNotFoundError as error:
            print(f"no plot: {error.name} is not installed")


def _plot(record: dict[str, Any], path: Path) -> None:
    """Seconds of a token's attention against the context, dense and sparse."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for point in record["points"]:
            if point["phase"] == phase:
                lines.setdefault(point["way"], []).append((point["context"], point["seconds_per_token"] * 1e6))
        for way, values in lines.items():
            ax.loglog(*zip(*values, strict=True), marker="o", label=way, base=2)
        ax.set(title=f"{phase}, {record['machine']['device']}", xlabel="context, tokens", ylabel="us a token and layer")
        ax.grid(True, which="both", alpha=0.3)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"written: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
