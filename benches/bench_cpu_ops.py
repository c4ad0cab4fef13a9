"""The CPU operators beside torch and NumPy: selection, index scores, sparse attention, the whole decode step.

Sizes are those of DeepSeek-V3.2: 64 index heads of 128, 128 heads of 576 + 512, 2,048 chosen keys. All ways of one
piece of work take turns, run by run, in one process; a figure is the median of its runs, in milliseconds. Beside ours
stands the ratio to a peer of the same kind: its time over ours. "of limit" compares with the rate of an instruction
(one core's, times the threads) or of reading the second-level cache, measured by small kernels before anything else.
Idle threads of all libraries sleep at once (it starts itself anew with the environment that says so).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpu_ops_inputs as work
import heedful
from heedful import _core, ops

QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""Without these, the idle threads of torch and NumPy go on spinning for milliseconds, into the next one's turn."""
RESULTS = Path(__file__).parent / "results"
CEILINGS = Path(__file__).parent.parent / "rust/core/examples/ceilings.rs"
CONTEXTS = [4096, 16_384, 65_536, 131_072, 262_144, 1_048_576]
PREFILL_KEYS = 16_384
GOAL_KEYS = 131_072
PLACES = [
    "top_k",
    "index scores, T = 1",
    "index scores, T = 64",
    "sparse attention, T = 1",
    "sparse attention, T = 16",
    "decode step",
]
"""The order of the table."""
PARTS = ["top_k", "index", "index_prefill", "sparse", "sparse_prefill", "step"]

Row = dict[str, Any]


def progress(text: str) -> None:
    """A line that is not part of the tables."""
    print(text, file=sys.stderr, flush=True)


def ceilings() -> dict[str, float | None]:
    """Rates of this machine's instructions and caches; empty without a Rust compiler."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "ceilings"
        build = ["rustc", "-O", "--edition", "2024", str(CEILINGS), "-o", str(binary)]
        try:
            subprocess.run(build, check=True, capture_output=True)
            result = subprocess.run([binary], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            progress(f"no ceilings: {problem}")
            return {}
    rates: dict[str, float | None] = json.loads(result.stdout)
    return rates


def families(inputs: work.Inputs, parts: list[str], contexts: list[int]) -> Iterator[tuple[int, work.Family]]:
    """Each piece of work with its context."""
    for S in contexts:
        if "top_k" in parts:
            yield S, work.top_k(inputs, S)
        if "index" in parts:
            yield S, work.index(inputs, S, 1)
        if "sparse" in parts:
            yield S, work.sparse(inputs, S, 1)
        if "step" in parts:
            yield S, work.step(inputs, S)
    longest = max(contexts)
    if "index_prefill" in parts:
        S = min(PREFILL_KEYS, longest)
        yield S, work.index(inputs, S, 64)
    if "sparse_prefill" in parts:
        yield longest, work.sparse(inputs, min(131_072, longest), 16)


def measure(family: work.Family, budget: float, most: int) -> dict[str, float]:
    """Median seconds of every way; runs take turns for `budget` seconds (3 counted at least, `most` at most)."""
    ways = {**{("heedful", n): f for n, f in family.ours.items()}, **{("peer", n): f for n, f in family.peers.items()}}
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run(0)
    end = time.perf_counter() + budget
    order = list(ways.items())
    for i in range(1, most + 1):
        order.append(order.pop(0))  # what runs first differs from turn to turn
        for way, run in order:
            start = time.perf_counter()
            run(i)
            times[way].append(time.perf_counter() - start)
        if i >= 3 and time.perf_counter() > end:
            break
    return {f"{who} {name}": statistics.median(values) for (who, name), values in times.items()}


def record(S: int, threads: int, family: work.Family, medians: dict[str, float]) -> Row:
    """What was measured of one piece of work at one context."""
    ours = {name: medians[f"heedful {name}"] * 1e3 for name in family.ours}
    return {
        "work": family.name,
        "S": S,
        "threads": threads,
        "ours": ours,
        "peers": {name: medians[f"peer {name}"] * 1e3 for name in family.peers},
        "base": family.base,
        "goals": family.goals,
        "amounts": family.work,
    }


def ratio(row: Row, way: str) -> float:
    """A peer's time over ours."""
    return float(row["peers"][row["base"][way]] / row["ours"][way])


def share(row: Row, way: str, rates: dict[str, float]) -> str:
    """The time that the ceiling allows, over ours."""
    ceiling, amount = row["amounts"].get(way, ("", 0.0))
    rate = rates.get(ceiling)
    return "-" if not rate else f"{amount / (rate * 1e6 * row['threads']) / row['ours'][way]:.0%}"


def table(rows: list[Row], rates: dict[str, float]) -> str:
    """A block for each piece of work and number of threads; a line for each way, a column for each context."""
    blocks: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        blocks.setdefault((row["work"], row["threads"]), []).append(row)
    lines = []
    for (name, threads), block in sorted(blocks.items(), key=lambda item: (PLACES.index(item[0][0]), item[0][1])):
        block.sort(key=lambda row: row["S"])
        contexts = "".join(f"{row['S']:>17,}" for row in block)
        title = f"{name}, {threads} thread" + "s" * (threads > 1)
        lines.append(f"{title:<44}{contexts}  of limit")
        for way in block[0]["ours"]:
            cells = "".join(f"{row['ours'][way]:>10.3f}{ratio(row, way):>6.1f}x" for row in block)
            shares = ", ".join(share(row, way, rates) for row in block) if way in block[0]["amounts"] else ""
            kind = block[0]["amounts"][way][0] if shares else ""
            label = f"{way} (to {block[0]['base'][way]})"
            lines.append(f"  {label:<42}{cells}  {shares} {kind}".rstrip())
        for peer in block[0]["peers"]:
            cells = "".join(f"{row['peers'][peer]:>10.3f}{'':>7}" for row in block)
            lines.append(f"  {peer:<42}{cells}".rstrip())
        lines.append("")
    return "\n".join(lines)


def goals(rows: list[Row]) -> str:
    """Of each goal, whether it was reached and by how much."""
    lines = []
    for row in rows:
        for way, goal in row["goals"].items():
            if row["threads"] != 1 or row["S"] != GOAL_KEYS:
                continue
            got = ratio(row, way)
            word = "reached" if got >= goal else f"missed by {1 - got / goal:.0%}"
            lines.append(f"{row['work']}, {way}: {got:.1f} times {row['base'][way]}, goal {goal:g}: {word}")
    return f"goals, one thread, S = {GOAL_KEYS:,}\n" + "\n".join(lines) if lines else ""


def machine() -> str:
    """One line on where this ran."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    ours = f"heedful {heedful.__version__}, {_core.simd_level()}"
    return f"{os.cpu_count()} cores of {name}; {platform.system()}; {versions}; {ours}"


def plot(rows: list[Row], path: Path) -> None:
    """Time of a decode step against context, dense and sparse."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    steps = [r for r in rows if r["work"] == "decode step"]
    threads = sorted({r["threads"] for r in steps})
    figure, axes = plt.subplots(1, len(threads), figsize=(5.5 * len(threads), 4.2), sharey=True, squeeze=False)
    for count, ax in zip(threads, axes[0], strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in sorted((r for r in steps if r["threads"] == count), key=lambda r: r["S"]):
            for peer in ("torch dense bf16", "torch sparse bf16"):
                lines.setdefault(peer, []).append((row["S"], row["peers"][peer]))
            for way, ms in row["ours"].items():
                kind = "" if way.startswith("dense") else "sparse, "
                lines.setdefault(f"heedful {kind}{way}", []).append((row["S"], ms))
        for name, points in lines.items():
            dense, ours = "dense" in name, name.startswith("heedful")
            style = {"linestyle": "--" if dense else "-", "marker": "o" if ours else "s", "markersize": 4}
            ax.plot(*zip(*points, strict=True), label=name, **style)
        ax.set(
            xscale="log", yscale="log", xlabel="context S, tokens", title=f"{count} thread{'s' if count > 1 else ''}"
        )
        ax.set_xscale("log", base=2)
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(fontsize=7)
    axes[0][0].set_ylabel("attention of one token, one layer, ms")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="keys S, multiples of 64")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, ours and the peers'"
    )
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for one piece of work at one context")
    parser.add_argument("--runs", type=int, default=200, help="counted runs at most")
    parser.add_argument("--quick", action="store_true", help="two contexts, one thread, few runs: some seconds")
    parser.add_argument(
        "--data", type=Path, help="JSON file that figures are added to, so that a record can be made in pieces"
    )
    parser.add_argument("--record", action="store_true", help="write the table and the plot to benches/results")
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.threads, args.budget, args.runs = [4096, 32_768], [1], 0.2, 7
    if any(S < work.PAGE or S % work.PAGE for S in args.contexts):
        parser.error("--contexts: expected multiples of 64")
    if not QUIET.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | QUIET)

    known: dict[str, Any] = {"rows": {}, "machine": machine(), "ceilings": {}}
    if args.data and args.data.exists():
        known = json.loads(args.data.read_text())
    progress("ceilings ...")
    for name, rate in ceilings().items():
        if rate is not None:  # of several pieces, the one that nothing disturbed
            known["ceilings"][name] = max(rate, known["ceilings"].get(name, 0.0))
    progress("inputs ...")
    inputs = work.Inputs(max(args.contexts))
    for threads in args.threads:
        torch.set_num_threads(threads)
        ops.set_num_threads(threads)
        for S, family in families(inputs, args.parts, args.contexts):
            start = time.perf_counter()
            medians = measure(family, args.budget, args.runs)
            row = record(S, threads, family, medians)
            known["rows"][f"{family.name}/{S}/{threads}"] = row
            seconds = time.perf_counter() - start
            progress(f"{family.name}, S = {S:,}, {threads} threads: {seconds:.1f} s")
            if args.data:
                args.data.write_text(json.dumps(known))

    rows = list(known["rows"].values())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in known["ceilings"].items())
    head = f"{known['machine']}\nceilings of one core, G operations or GB a second: {rates}"
    text = f"{head}\n\n{table(rows, known['ceilings'])}\n{goals(rows)}"
    print(text)
    if args.record:
        title = "# CPU operators beside torch and NumPy (benches/bench_cpu_ops.py)"
        note = (
            "Medians in milliseconds; beside ours, in how many times that time the peer in brackets does the same."
            "\n\n![time of a decode step against context](cpu-ops.svg)"
        )
        body = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        (RESULTS / "cpu-ops.md").write_text(f"{title}\n\n{note}\n\n{body}\n")
        plot(rows, RESULTS / "cpu-ops.svg")


if __name__ == "__main__":
    main()
