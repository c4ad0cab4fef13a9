"""What commands print: sections of named values, numbers that people can read, help that tells defaults."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


class HelpFormatter(argparse.HelpFormatter):
    """Adds the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool)
        told = told and action.default != argparse.SUPPRESS
        return f"{action.help} (default: %(default)s)" if told else action.help


def print_json(values: Mapping[str, object]) -> None:
    """Prints a report for programs."""
    print(json.dumps(values, indent=2))


def print_section(title: str, rows: Mapping[str, str]) -> None:
    """Prints a heading and one line a value, the values in one column."""
    width = max(map(len, rows), default=0) + 2
    print(title)
    for name, value in rows.items():
        print(f"  {name:<{width}}{value}")
    print()


def bytes_text(count: int) -> str:
    """1536 -> "1.50 KiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def count_text(count: int) -> str:
    """1536000 -> "1.54 M"."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:,.2f} {unit}"
    return str(count)
