"""Compiles every Triton kernel for cards that need not be there, and prints registers, spills and shared memory.

    python benches/compile_kernels.py [--cards 80 90 120 gfx942] [--only index_scores] [--main] [--json] [--write]

Each file of `heedful.kernels` that has a function `compilations(target)` takes part. `--write` puts the table into
benches/results/kernels-compiled.md. The status is 1 if a kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

import heedful.kernels
from heedful.kernels.compilation import Compilation, compile_for
from heedful.kernels.target import Target

RESULTS = Path(__file__).parent / "results" / "kernels-compiled.md"
HEADER = """# Kernels, compiled ahead of time

`python benches/compile_kernels.py --write` with triton {triton}, torch {torch}, no GPU at hand. One row a kernel and
card, in the configuration that its launcher takes there. Spills are bytes of stack a thread (spilled registers on
gfx942); shared memory is that of a block, beside its limit. "main": held by the tests to having no spills on sm_80,
sm_90 and sm_120, and on sm_90, where matrices are multiplied, to using wgmma.

"""


def modules() -> list[str]:
    """Files of `heedful.kernels`, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(heedful.kernels.__path__))


def measure(names: list[str], cards: list[str], main_alone: bool) -> list[dict[str, Any]]:
    """A row for each compilation; progress goes to stderr."""
    rows = []
    for name in names:
        module = importlib.import_module(f"heedful.kernels.{name}")
        for card in cards if hasattr(module, "compilations") else ():
            target = Target.cuda(int(card)) if card.isdecimal() else Target.hip(card)
            for compilation in module.compilations(target):
                if main_alone and not compilation.main:
                    continue
                rows.append(_row(name, compilation, target))
    return rows


def _row(module: str, compilation: Compilation, target: Target) -> dict[str, Any]:
    began = time.perf_counter()
    row = {"module": module, "name": compilation.name, "target": target.name, "limit": target.shared_memory}
    row |= {"main": compilation.main, "multiplies": compilation.wgmma, "error": None}
    row |= {"warps": compilation.launch.num_warps, "stages": compilation.launch.num_stages}
    try:
        compiled = compile_for(compilation, target)
        row |= {**dataclasses.asdict(compiled), "wgmma": compiled.wgmma}
        del row["assembly"]
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}", "registers": 0, "spills": 0, "shared": 0, "wgmma": False}
    row["seconds"] = round(time.perf_counter() - began, 1)
    print(_line(row), file=sys.stderr, flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    what = f"{row['module']}: {row['name']}{' (main)' if row['main'] else ''}"
    if row["error"]:
        return f"| {what} | {row['target']} | {row['error'].splitlines()[0]} | | | | | |"
    shared = f"{row['shared'] / 1024:.1f} of {row['limit'] / 1024:.0f} KiB"
    wgmma = "yes" if row["wgmma"] else ""
    shape = f"{row['warps']} | {row['stages']}"
    return f"| {what} | {row['target']} | {shape} | {row['registers']} | {row['spills']} | {shared} | {wgmma} |"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| kernel | card | warps | stages | registers | spills | shared memory | wgmma |"
    return "\n".join([head, "|---" * 8 + "|", *map(_line, rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", nargs="+", default=["80", "90", "120"], help="compute capabilities, or gfx942")
    parser.add_argument("--only", nargs="+", default=modules(), choices=modules(), metavar="MODULE")
    parser.add_argument("--main", action="store_true", help="the main configurations alone")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    rows = measure(args.only, args.cards, args.main)
    if args.write:
        RESULTS.write_text(HEADER.format(triton=triton.__version__, torch=torch.__version__) + table(rows))
    print(json.dumps(rows) if args.json else table(rows))
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
