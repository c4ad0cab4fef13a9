"""The scheduler and its caches beside their peers: steps of decoding requests, block pool, prefix hash, hits, chat.

Each side runs in a process of its own, one after the other, on the same tokens. A peer is imported from where the
environment says: HEEDFUL_PEER_VLLM (a folder with an unzipped wheel of vLLM), HEEDFUL_PEER_NANOVLLM (a folder that
holds `nanovllm`), HEEDFUL_PEER_SGLANG (a folder with an unzipped wheel of SGLang, of which only the Rust prefix tree
is used); HEEDFUL_PEER_PATH lists folders for what they import, and HEEDFUL_PEER_PYTHON_<SIDE> names another
interpreter. A side that is not there is skipped with a message. Figures are medians; "worst" is the longest of all
timed steps, the machine's own pauses and first touches of memory included; ours are also given without them, as the
least of several equal runs at each step. A ratio is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scheduler_workload import BLOCK, CONVERSATIONS, LONG, QUIET_RUNS, QUIET_STEPS, RUNNING, TURNS

OURS = "heedful"
PEERS = {"vllm": "HEEDFUL_PEER_VLLM", "nanovllm": "HEEDFUL_PEER_NANOVLLM", "sglang": "HEEDFUL_PEER_SGLANG"}
LIMIT = 600
"""Seconds of a side."""


@dataclass(frozen=True)
class Side:
    """What a side answered."""

    name: str
    version: str
    rows: dict[str, list[float]]


def run(name: str) -> Side | None:
    """Runs a side; None, with a message, where it is not there or breaks."""
    variable = PEERS.get(name)
    if variable is not None and not os.environ.get(variable):
        print(f"{name}: skipped, {variable} is not set", file=sys.stderr)
        return None
    script = Path(__file__).with_name("scheduler_ours.py" if name == OURS else f"scheduler_{name}.py")
    python = os.environ.get(f"HEEDFUL_PEER_PYTHON_{name.upper()}", sys.executable)
    folders = (
        [os.environ.get("HEEDFUL_PEER_PATH", ""), os.environ.get(variable or "", "")]
        if python == sys.executable
        else []
    )
    environment = dict(os.environ)
    if name != OURS:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH", "")]))
    print(f"{name}: running", file=sys.stderr)
    try:
        done = subprocess.run([python, script], capture_output=True, text=True, timeout=LIMIT, env=environment)
        values = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        reason = str(error)
        if isinstance(error, IndexError | json.JSONDecodeError):
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        if name == OURS:
            raise SystemExit(f"{name}: {reason}") from None
        print(f"{name}: skipped, {reason}", file=sys.stderr)
        return None
    return Side(name, values["version"], values["rows"])


def lines() -> list[tuple[str, str, str, float]]:
    """Row, its title, unit and seconds of that unit, where a rate has the negative of its count."""
    table = []
    for running in RUNNING:
        table.append((f"step {running}", f"schedule + update, {running:,} decoding", "µs", 1e6))
        table.append((f"schedule {running}", f"schedule alone, {running:,} decoding", "µs", 1e6))
    rate = [
        ("pool", "block pool, calls of 16", "M blocks/s", 1e-6),
        ("hash", "prefix hash, 128K tokens", "M tokens/s", LONG / 1e6),
        ("hit", "full prefix hit, 128K, hash and all", "M tokens/s", LONG / 1e6),
        ("match", "full prefix match, 128K", "M tokens/s", LONG / 1e6),
        ("chat", f"chat of {CONVERSATIONS} x {TURNS} turns: match + insert", "requests/s", 1.0),
    ]
    return table + [(row, title, unit, -count) for row, title, unit, count in rate]


def figure(values: list[float], unit: float) -> float:
    """The median in a row's unit."""
    median = statistics.median(values)
    return -unit / median if unit < 0 else median * unit


def print_table(sides: list[Side]) -> None:
    """One line for each row and side."""
    ours = sides[0]
    print(f"{'':<46} {'':<10} {'median':>12} {'worst':>10} {'':<11} {'ratio':>8}")
    for row, title, name, unit in lines():
        for side in sides:
            values = side.rows.get(row)
            if values is None:
                continue
            is_step = row.partition(" ")[0] in ("step", "schedule")
            worst = f"{max(values) * unit:,.1f}" if is_step else ""
            ratio = "" if side is ours else f"{statistics.median(values) / statistics.median(ours.rows[row]):.1f}x"
            median = figure(values, unit)
            digits = 1 if median < 1e4 else 0
            print(f"{title:<46} {side.name:<10} {median:>12,.{digits}f} {worst:>10} {name:<11} {ratio:>8}")
    print()
    for running in RUNNING:
        for row, title in (
            (f"step {running}", "one run"),
            (f"quiet {running}", f"{QUIET_STEPS} steps, least of {QUIET_RUNS} runs"),
        ):
            values = sorted(ours.rows[row])
            median = statistics.median(values)
            late, worst = values[int(0.99 * len(values))] / median, values[-1] / median
            print(f"{running:>5,} decoding, {title}: 99th percentile {late:.2f} medians, worst {worst:.2f} medians")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="sides to compare with")
    args = parser.parse_args()
    sides = [side for name in (OURS, *args.peers) if (side := run(name)) is not None]
    versions = ", ".join(f"{side.name} {side.version}" for side in sides)
    print(f"{versions}; Python {platform.python_version()}, blocks of {BLOCK} tokens\n")
    print_table(sides)


if __name__ == "__main__":
    main()
