"""What the tokenizer benchmark measured: cells, the tables made of them, and the record of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE = "tiktoken"
"""Ratios are to this peer."""


@dataclass
class Unit:
    """A unit of measurement."""

    name: str
    digits: int
    more_is_better: bool
    ratio: bool = True


SPEED = Unit("MB/s", 1, True)
TOKENS = Unit("Mtok/s", 1, True)
MICROSECONDS = Unit("us", 2, False)
SECONDS = Unit("s", 3, False)
MEGABYTES = Unit("MB", 0, False, ratio=False)
TIMES = Unit("x", 2, True, ratio=False)
COST = Unit("x", 2, False, ratio=False)


@dataclass
class Cell:
    """One peer in one row: what was measured, or why not."""

    unit: Unit
    values: list[float] = field(default_factory=list)
    note: str = ""
    """Instead of the value ("cut off at 10 s") or, with values, beside it."""
    wrong: bool = False
    """Something came out that the reference does not give."""
    unchecked: bool = False
    """There was no reference to compare with."""
    spent: float = 0.0
    """Seconds that it took so far, with everything around the measurement."""

    @property
    def median(self) -> float | None:
        """The figure, if there is one and it may be shown."""
        return statistics.median(self.values) if self.values and not self.wrong else None

    def shown(self, base: Cell | None, mark: bool) -> str:
        """The cell's text: the figure, its ratio to another cell's, and an asterisk if it is to be marked."""
        if self.wrong:
            return "WRONG"
        if self.median is None:
            return self.note or "not measured"
        shown = f"{self.median:,.{self.unit.digits}f}{'*' if mark else ''}"
        if self.unit.ratio and base is not None and base.median:
            ratio = self.median / base.median if self.unit.more_is_better else base.median / self.median
            shown += f" ({ratio:.2g}x)" if ratio < 10 else f" ({ratio:.0f}x)"
        return shown + "?" * self.unchecked + (f" {self.note}" if self.note else "")


class Table:
    """A group of rows: cells by row and peer."""

    def __init__(self, key: str, title: str, peers: list[str]) -> None:
        self.key, self.title, self.peers = key, title, peers
        self.rows: dict[str, dict[str, Cell]] = {}

    def cell(self, row: str, peer: str, unit: Unit) -> Cell:
        """The cell of a row and a peer; new if need be."""
        return self.rows.setdefault(row, {}).setdefault(peer, Cell(unit))

    def markdown(self, mark_worst: bool = False) -> str:
        """The table, to be pasted."""
        grid = [[self.title, *self.peers], ["---", *("---:" for _ in self.peers)]]
        worst = {}
        for peer in self.peers if mark_worst else ():
            medians = {row: median for row, cells in self.rows.items() if (median := cells[peer].median)}
            worst[peer] = min(medians, key=medians.__getitem__, default=None)
        for row, cells in self.rows.items():
            unit = next(iter(cells.values())).unit.name
            shown = [cells[peer].shown(cells.get(BASE), worst.get(peer) == row) for peer in self.peers]
            grid.append([f"{row}, {unit}", *shown])
        widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
        lines = []
        for index, line in enumerate(grid):
            if index == 1:
                line = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            first, *others = line
            cells_ = [
                first.ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True)),
            ]
            lines.append(f"| {' | '.join(cells_)} |")
        return "\n".join(lines)

    def record(self) -> list[dict[str, Any]]:
        """Every cell, for a file."""
        return [
            {"table": self.key, "row": row, "peer": peer, "unit": cell.unit.name, "median": cell.median,
             "values": cell.values, "spent": cell.spent, "wrong": cell.wrong, "unchecked": cell.unchecked,
             "note": cell.note}
            for row, cells in self.rows.items() for peer, cell in cells.items()
        ]  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures depend on: the CPU, the interpreter, the commit."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed": bool(changes),
    }
