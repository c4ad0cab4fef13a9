"""The scheduler against its model for long: `make soak`."""

from __future__ import annotations

import argparse
import sys
import time

import scheduler_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000, help="random calls in all")
    parser.add_argument("--world", type=int, default=1000, help="random calls to one scheduler")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first world; each has the next one")
    options = parser.parse_args()
    began, shown, done, finished = time.monotonic(), 0.0, 0, 0
    for world in range(-(-options.operations // options.world)):
        model = scheduler_model.run(options.seed + world, options.world)
        done += model.operations
        finished += model.finished
        seconds = time.monotonic() - began
        if seconds - shown > 2 and sys.stderr.isatty():
            shown = seconds
            left = seconds / done * (options.operations - done)
            print(f"\r{done:,} operations, {left / 60:.1f} minutes left ", end="", file=sys.stderr, flush=True)
    print(f"{done:,} operations, {finished:,} requests served, no row lost; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
