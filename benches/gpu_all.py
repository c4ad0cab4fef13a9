"""Everything about the GPU kernels in one run: correctness, then timing, in under nine minutes.

    python benches/gpu_all.py                    # needs a GPU; writes benches/results/gpu/<device>.json and .svg
    python benches/gpu_all.py --only top_k sparse_prefill --no-write
    python benches/gpu_all.py --dry              # all of it, small, without a GPU; checks in Triton's interpreter

First every kernel is compiled, by running everything once in as many processes as there are cores. Then, one at a time:
the card's own ceilings, the checks, the cases. Times are medians over inputs rotated past the second-level cache;
beside each stands the fraction of what the card reaches on a plain copy and a plain product. Each item has a limit of
time, and what goes wrong in it is recorded with its traceback and stops nothing else. A case whose operator failed a
check is timed, but says so. The file is written anew after each item, so whatever ends the run leaves a whole one.

Exit status: 0 when every check passed and nothing went wrong, 1 otherwise, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_worker import Item, Worker, run_in_parallel

RESULTS = Path(__file__).parent / "results" / "gpu"
CASES = (
    "sparse_prefill",
    "index_prefill",
    "sparse_decode",
    "index_decode",
    "fused_top_k",
    "top_k",
    "coded_prefill",
    "decode_layer",
    "engine_decode",
    "dense_and_sparse",
)
PEERS = ("flash_mla", "deep_gemm", "tilelang")
NO_GPU = 2
LIMITS = {"machine": 90.0, "check": 75.0, "tune": 60.0, "case": 75.0, "curve": 60.0}
"""Seconds that one item of a kind may take."""
COMPILING = 170.0
"""Seconds that compiling may take in all."""
CHECKS_OF = {
    "sparse_prefill": ("check_sparse_attention", "check_repeats", "check_far_rows"),
    "sparse_decode": ("check_fp8_attention", "check_writes", "check_graph"),
    "index_prefill": ("check_scores", "check_far_scores"),
    "index_decode": ("check_paged_scores", "check_far_pages"),
    "fused_top_k": ("check_fused", "check_repeats"),
    "top_k": ("check_top_k",),
    "coded_prefill": ("check_coded_prefill", "check_writes"),
    "decode_layer": ("check_fp8_attention", "check_paged_scores", "check_writes", "check_graph"),
    "engine_decode": ("check_engine",),
}
"""What must hold for a case's times to mean anything."""


def main() -> int:
    """Runs everything."""
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
        print("torch sees no GPU. --dry runs everything, small, without one.", file=sys.stderr)
        return NO_GPU
    return Run(args).all()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="small sizes, without a GPU")
    parser.add_argument("--device", default="cuda", help="which GPU (default: cuda)")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=530.0, help="when the run ends, whatever is left")
    parser.add_argument("--tune", action="store_true", help="first measure configurations, and keep them on disk")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--results", type=Path, help=f"folder of the results (default: {RESULTS}; with --dry, none)")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    args.no_write |= args.dry and args.results is None
    args.results = args.results or RESULTS
    return args


class Run:
    """One run: its record, and what is written of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from gpu_items import Options, items

        self.args = args
        self.path: Path | None = None
        self.began = time.monotonic()
        self.deadline = self.began + args.seconds
        self.options: dict[str, Any] = {"device": "cpu" if args.dry else args.device, "dry": args.dry}
        self.options["commit"] = args.commit
        self.items: list[Item] = items(Options(**self.options), args.only or list(CASES), args.tune)
        self.failed: set[str] = set()  # names of checks
        self.scratch = tempfile.TemporaryDirectory(prefix="heedful-")
        self.record: dict[str, Any] = {"machine": {"device": "unknown"}, "ceilings": {}, "checks": [], "tuned": []}
        self.record |= {"rows": [], "points": [], "crossover": {}, "errors": [], "left_out": []}
        self.record["peers"] = {name: _version(name) for name in PEERS}

    def all(self) -> int:
        """Compiles, checks and times; the exit status."""
        if not self.args.dry:
            self._compile()
        worker = self._worker()
        for place, item in enumerate(self.items):
            left = self.deadline - time.monotonic()
            if left < 5:
                self.record["left_out"] += [f"{kind} {name or ''}: out of time" for kind, name in self.items[place:]]
                break
            if item[0] not in ("machine", "check") and "ceilings" not in self.options:
                # From here on rows stand beside the ceilings; the process that measured them has others.
                self.options["ceilings"] = self.record["ceilings"]
                worker.close()
                worker = self._worker()
            for event, value in worker.run(item, min(LIMITS[item[0]], left)):
                self._take(item, event, value)
            self._finish(item)
        worker.close()
        self._summary()
        return int(bool(self.failed or self.record["errors"] or self.record["left_out"]))

    def _worker(self, **more: Any) -> Worker:
        from gpu_items import Options

        environment = {"TRITON_INTERPRET": "1" if self.args.dry else "0"}
        if self.args.dry or more.get("compiling"):  # what is measured then is no use to anyone
            environment["HEEDFUL_CACHE_DIR"] = self.scratch.name
        return Worker("gpu_items:runner", Options(**self.options, **more), environment)

    def _compile(self) -> None:
        """Runs everything once, side by side: Triton keeps what it compiles on disk, where the others find it."""
        processes = os.cpu_count() or 1
        # Checks of far addresses want the memory for themselves.
        items = [item for item in self.items if item[0] != "machine" and not str(item[1]).startswith("check_far")]
        # What compiles longest comes first.
        items.sort(key=lambda item: ("tune", "case", "curve", "check").index(item[0]))
        until = min(self.began + COMPILING, self.deadline)
        errors = run_in_parallel(lambda: self._worker(compiling=True), items, processes, COMPILING, until)
        self.record["compiling"] = {"seconds": time.monotonic() - self.began, "processes": processes}
        self.record["compiling"]["errors"] = {f"{kind} {name}": error for (kind, name), error in errors.items()}
        print(f"compiled in {time.monotonic() - self.began:.0f} s by {processes} processes", flush=True)
        for item, error in errors.items():
            print(f"  {item}: {error}", flush=True)
        self._write()

    def _take(self, item: Item, event: str, value: Any) -> None:
        kind, name = item
        if event == "error":
            self.record["errors"].append({"item": f"{kind} {name or ''}".strip(), **value})
            if kind == "check":
                self.failed.add(name)
            print(f"ERROR  {kind} {name or ''}: {value['error']}", flush=True)
        elif event == "result" and kind == "machine":
            for key, found in value.items():
                self.record[key].update(found)
            print(json.dumps(value), flush=True)
        elif event == "result" and kind == "check":
            self.record["checks"].append({"check": name, **value})
            if not value["passed"]:
                self.failed.add(name)
            mark = "left  " if value["left_out"] else "ok    " if value["passed"] else "FAILED"
            numbers = f"error {value['error']:.1e}, bound {value['bound']:.1e}"
            print(f"{mark} {value['name']:<50} {numbers} {value['detail']}", flush=True)
        elif event == "result" and kind == "tune":
            self.record["tuned"].append(value)
            print(f"{value['step']}: {value['quickest']}", flush=True)
        elif event == "result" and kind == "case":
            if wrong := sorted(self.failed.intersection(CHECKS_OF[name])):
                value.pop("met", None)
                value["wrong"] = ", ".join(wrong)
            self.record["rows"].append(value)
            print(_line(value), flush=True)
        elif event == "result":
            self.record["points"].append(value)
            micro = value["seconds_per_token"] * 1e6
            print(f"{value['phase']:<8} {value['context']:>7}  {micro:9.2f} us a token  {value['way']}", flush=True)

    def _finish(self, item: Item) -> None:
        from gpu_curve import crossovers

        self.record["seconds"] = time.monotonic() - self.began
        self.record["crossover"] = crossovers(self.record["points"])
        self._write()

    def _summary(self) -> None:
        from gpu_timing import state

        self.record["state_at_the_end"] = {} if self.args.dry else state()
        passed = sum(check["passed"] and not check["left_out"] for check in self.record["checks"])
        all_checks = sum(kind == "check" for kind, _ in self.items)
        if self.record["points"]:
            print("sparse is quicker than every dense way from", self.record["crossover"])
        for line in self.record["left_out"]:
            print(f"left out: {line}")
        path = self._write()
        if path and self.record["points"]:
            self._plot(path.with_suffix(".svg"))
        print(f"{passed} of {all_checks} checks passed, {len(self.record['rows'])} rows, ", end="")
        print(f"{len(self.record['errors'])} errors, {time.monotonic() - self.began:.0f} s")

    def _write(self) -> Path | None:
        """The record as it is, whole at any moment."""
        if self.args.no_write:
            return None
        self.args.results.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in self.record["machine"]["device"].lower()).strip("-")
        path: Path = self.args.results / f"{name}.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n")
        temporary.replace(path)
        if self.path not in (None, path):  # written before the card's name was known
            self.path.unlink(missing_ok=True)
        self.path = path
        return path

    def _plot(self, path: Path) -> None:
        from gpu_curve import plot

        try:
            plot(self.record, path)
        except Exception as error:  # the figures are on disk
            print(f"no plot: {type(error).__name__}: {error}")


def _version(name: str) -> str:
    """The installed version of a peer."""
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec(name) is None:
        return "not installed here"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _line(entry: dict[str, Any]) -> str:
    parts = [f"{entry['case']:<58}", f"{entry['seconds'] * 1e3:9.3f} ms"]
    parts.append(f"{entry['tflops']:7.1f} TFLOP/s" if "tflops" in entry else " " * 15)
    parts.append(f"{entry['gigabytes_per_second']:7.0f} GB/s" if "gigabytes_per_second" in entry else " " * 12)
    if "fraction_of_limit" in entry:
        parts.append(f"{entry['fraction_of_limit']:4.0%} of the limit")
    if "times_faster_than_peer" in entry:
        parts.append(f"{entry['times_faster_than_peer']:.2f} times {entry['peer']}")
    if "met" in entry:
        parts.append(f"goal {entry['goal']}: {'met' if entry['met'] else 'missed'}")
    if "wrong" in entry:
        parts.append(f"WRONG: {entry['wrong']} failed")
    return "  ".join(parts) + (f"  ({entry['note']})" if "note" in entry else "")


if __name__ == "__main__":
    raise SystemExit(main())
