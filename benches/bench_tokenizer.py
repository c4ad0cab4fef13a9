"""The tokenizer beside its peers: new, repeated, first and hostile text, short lines, threads, decoding, loading.

Each peer runs in a process of its own with one thread; they take turns, text by text, and a cell is the median of its
texts. Ids are compared with those of Hugging Face tokenizers in every cell, and a cell with others says WRONG. Ratios
are to tiktoken with the same vocabulary in the same run; more is better, also where the figure is a time. In the
tables, "*" marks a peer's worst input, "?" a figure that could not be checked.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import corpora
import tokenizer_texts as texts
from tokenizer_cells import (
    BASE,
    COST,
    MEGABYTES,
    MICROSECONDS,
    SECONDS,
    SPEED,
    TIMES,
    TOKENS,
    Cell,
    Table,
    machine,
)
from tokenizer_peers import PEERS, version
from tokenizer_worker import CutOffError, PeerError, Worker

OURS = "heedful"
REFERENCE = "hf"
WARM = 1
"""Slices of each kind that are encoded before anything is timed."""
THREADS = 2
GROWTH_MEGABYTES = 100
LINES_PER_TURN = 1000
STREAMED = 20_000

Answer = dict[str, Any]


class Bench:
    """What all rows share: the peers, their workers, the limits, and the reference's answers."""

    def __init__(self, args: argparse.Namespace, file: Path, scratch: Path) -> None:
        self.peers: list[str] = args.peers
        self.turns = sorted(self.peers, key=lambda peer: peer != REFERENCE)  # its answers are needed for the others
        self.repeats: int = args.repeats
        self.few = min(3, self.repeats)  # for rows of which a repeat takes long
        self.limit: float = args.limit
        self.file, self.folder, self.scratch = file, args.corpus, scratch
        self.warm = [f"{kind}/{index}" for index in range(WARM) for kind in texts.KINDS]
        self.new = range(WARM, texts.slices(self.folder))
        self.known: dict[str, Any] = {}
        self.referee = self.worker(REFERENCE) if version(REFERENCE) else None

    def worker(self, peer: str, warm: bool = False) -> Worker:
        """A process for a peer."""
        return Worker(peer, self.file, self.folder, self.warm if warm else None)

    def reference(self, key: str, operation: str, **arguments: Any) -> Any:
        """A part of the reference's answer; None without a reference."""
        name = json.dumps([key, operation, arguments])
        if name not in self.known and self.referee is not None:
            try:
                self.known[name] = self.referee.call(60.0, operation, **arguments)[key]
            except (CutOffError, PeerError) as problem:
                progress(f"  no reference for {operation} {arguments}: {problem}")
                self.known[name] = None
        return self.known.get(name)

    def ids(self, text: str) -> Any:
        """The reference's ids of a text, as a digest."""
        return self.reference("ids", "encode", text=text)

    def ask(self, cell: Cell, worker: Worker, operation: str, **arguments: Any) -> Answer | None:
        """A worker's answer; None if there is none, which the cell then says, or if the cell has had its time."""
        if cell.note or cell.wrong or cell.spent > self.limit / 2:
            return None
        start = time.perf_counter()
        try:
            answer = worker.call(self.limit, operation, **arguments)
        except (CutOffError, PeerError) as problem:
            cell.note = str(problem)
            cell.values.clear()
            return None
        cell.spent += time.perf_counter() - start
        if answer.get("missing"):
            cell.note = "not in this version" if worker.command[2] == OURS else "-"
            return None
        return answer

    def check(self, cell: Cell, got: Any, expected: Any) -> None:
        """Marks a cell whose ids are not the reference's."""
        if expected is None or (isinstance(expected, list) and None in expected):
            cell.unchecked = True
        elif got != expected:
            cell.wrong = True

    def encode(self, cell: Cell, peer: str, worker: Worker, text: str) -> None:
        """Times a text to numpy."""
        answer = self.ask(cell, worker, "encode", text=text)
        if answer is None:
            return
        if peer == REFERENCE:
            self.known[json.dumps(["ids", "encode", {"text": text}])] = answer["ids"]
        self.check(cell, answer["ids"], self.ids(text))
        cell.values.append(answer["bytes"] / answer["seconds"] / 1e6)


def documents(bench: Bench, table: Table) -> None:
    """New documents, then the same again as a batch."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    chosen = bench.new[: bench.repeats]
    for index in chosen:
        for kind, name in texts.KINDS.items():
            for peer in bench.turns:
                bench.encode(table.cell(f"new {name}", peer, SPEED), peer, workers[peer], f"{kind}/{index}")
    for _ in range(bench.few):
        for kind, name in texts.KINDS.items():
            names = [f"{kind}/{index}" for index in chosen]
            for peer in bench.turns:
                cell = table.cell(f"again, flat batch, {name}", peer, SPEED)
                if answer := bench.ask(cell, workers[peer], "batch", names=names):
                    bench.check(cell, answer["ids"], [bench.ids(text) for text in names])
                    cell.values.append(answer["bytes"] / answer["seconds"] / 1e6)
    stop(workers)


def first(bench: Bench, table: Table) -> None:
    """The first megabyte of a process."""
    for index in bench.new[: bench.few]:
        for kind in ("english", "chinese"):
            for peer in bench.turns:
                worker = bench.worker(peer)
                worker.call(120.0, "load")
                cell = table.cell(f"first {texts.KINDS[kind]}", peer, SPEED)
                bench.encode(cell, peer, worker, f"{kind}/{index}")
                worker.stop()


def adversarial(bench: Bench, table: Table) -> None:
    """Hostile texts."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    for repeat in range(bench.few):
        for name in texts.ADVERSARIAL:
            for peer in bench.turns:
                bench.encode(table.cell(name, peer, SPEED), peer, workers[peer], f"adversarial/{name}/{repeat}")
    stop(workers)


def lines(bench: Bench, table: Table) -> None:
    """Short lines, one call each."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    for turn in range(2 * bench.repeats):
        for kind, name in texts.KINDS.items():
            where = {"kind": kind, "first": turn * LINES_PER_TURN, "count": LINES_PER_TURN}
            for peer in bench.turns:
                cell = table.cell(f"{name} line", peer, MICROSECONDS)
                if answer := bench.ask(cell, workers[peer], "short_lines", **where):
                    bench.check(cell, answer["ids"], bench.reference("ids", "short_lines", **where))
                    cell.values += [1e6 * seconds for seconds in answer["times"]]
    stop(workers)


def threads(bench: Bench, table: Table) -> None:
    """One thread, then two on the same object, on new text."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    for turn in range(min(bench.few, len(bench.new) // (1 + THREADS))):
        at = (bench.new[index] for index in range(turn * (1 + THREADS), (turn + 1) * (1 + THREADS)))
        groups = [[f"{kind}/{index}" for kind in texts.KINDS] for index in at]
        for peer in bench.turns:
            one = table.cell("1 thread, all four kinds", peer, SPEED)
            two = table.cell(f"{THREADS} threads", peer, SPEED)
            gain = table.cell("gain", peer, TIMES)
            speeds: dict[int, float] = {}
            runs = [(one, groups[:1]), (two, groups[1:])]
            for cell, part in runs if turn % 2 else runs[::-1]:  # later text finds fuller caches
                if answer := bench.ask(cell, workers[peer], "threads", groups=part):
                    bench.check(cell, answer["ids"], [bench.ids(text) for group in part for text in group])
                    cell.values.append(answer["bytes"] / answer["seconds"] / 1e6)
                    speeds[len(part)] = cell.values[-1]
            if len(speeds) == len(runs):
                gain.values.append(speeds[THREADS] / speeds[1])
            gain.note = two.note or one.note
            gain.wrong = one.wrong or two.wrong
    stop(workers)


def decode(bench: Bench, table: Table) -> None:
    """Arrays of ids to text, and ids one by one."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    for index in bench.new[: bench.few]:
        for kind, name in texts.KINDS.items():
            for peer in bench.turns:
                text = f"{kind}/{index}"
                cell = table.cell(f"decode {name}", peer, TOKENS)
                if answer := bench.ask(cell, workers[peer], "decode", text=text):
                    cell.wrong |= not answer["right"]
                    cell.values.append(answer["tokens"] / answer["seconds"] / 1e6)
    for index in bench.new[: bench.few]:
        for kind in ("english", "chinese"):
            for peer in bench.turns:
                cell = table.cell(f"stream {texts.KINDS[kind]}, a token", peer, MICROSECONDS)
                if answer := bench.ask(cell, workers[peer], "stream", text=f"{kind}/{index}", count=STREAMED):
                    cell.wrong |= not answer["right"]
                    cell.values += [1e6 * seconds for seconds in answer["times"]]
    stop(workers)


def load(bench: Bench, table: Table) -> None:
    """Loading in fresh processes: seconds and resident memory."""
    cache = bench.scratch / "tokenizer.cache"
    ways: list[tuple[str, str | None]] = [("tokenizer.json", None)]
    worker = bench.worker(OURS)
    probe = Cell(SECONDS)
    if OURS in bench.peers and bench.ask(probe, worker, "save_cache", path=str(cache)) is not None:
        ways.append(("our cache file", str(cache)))
    worker.stop()
    for _ in range(bench.repeats):
        for way, path in ways:
            for peer in bench.turns:
                seconds = table.cell(f"load {way}", peer, SECONDS)
                memory = table.cell(f"memory by {way}", peer, MEGABYTES)
                if path and peer != OURS:
                    seconds.note = memory.note = "-"
                    continue
                worker = bench.worker(peer)
                if answer := bench.ask(seconds, worker, "load", cache=path):
                    seconds.values.append(answer["seconds"])
                    memory.values.append(answer["megabytes"])
                    if path:  # the same tokenizer came back
                        text = f"english/{bench.new[0]}"
                        checked = bench.ask(seconds, worker, "encode", text=text) or {}
                        bench.check(seconds, checked.get("ids"), bench.ids(text))
                worker.stop()
    if OURS in bench.peers and len(ways) == 1:
        for unit, name in ((SECONDS, "load our cache file"), (MEGABYTES, "memory by our cache file")):
            for peer in bench.peers:
                table.cell(name, peer, unit).note = probe.note if peer == OURS else "-"


def growth(bench: Bench, table: Table) -> None:
    """Resident memory after 100 MB of text that is new to the end, beyond what the process takes to have the texts."""
    names = [f"{kind}/{index}" for index in range(texts.slices(bench.folder)) for kind in texts.KINDS][
        :GROWTH_MEGABYTES
    ]
    progress(f"  mixing {GROWTH_MEGABYTES - len(names)} MB of new text")
    for seed in range(len(names), GROWTH_MEGABYTES):
        path = bench.scratch / f"growth-{seed}.txt"
        path.write_text(texts.recombined(bench.folder, seed), encoding="utf-8")
        names.append(f"@{path}")
    random.Random(0).shuffle(names)
    for peer in bench.turns:
        cell = table.cell(f"memory by {GROWTH_MEGABYTES} MB of new text", peer, MEGABYTES)
        worker = bench.worker(peer)
        done, seconds = 0, 0.0
        try:
            worker.call(120.0, "load")
            for name in names:
                worker.call(bench.limit, "read", text=name)
            loaded = worker.call(bench.limit, "memory")["megabytes"]
            while done < len(names) and seconds < 3 * bench.limit:
                answer = worker.call(bench.limit, "encode", text=names[done])
                seconds += answer["seconds"]
                if done % 10 == 0:  # a sample: the reference is slow
                    bench.check(cell, answer["ids"], bench.ids(names[done]))
                done += 1
            cell.values.append(worker.call(bench.limit, "memory")["megabytes"] - loaded)
            cell.note = f"after {done} MB, time limit" if done < len(names) else ""
        except (CutOffError, PeerError) as problem:
            cell.note = str(problem)
        worker.stop()


def offsets(bench: Bench, table: Table) -> None:
    """What offsets cost over ids alone, on text that was seen."""
    workers = {peer: bench.worker(peer, warm=True) for peer in bench.peers}
    for index in bench.new[: bench.few]:
        for unit in ("char", "byte"):
            for kind in ("english", "chinese"):
                text = f"{kind}/{index}"
                for peer in bench.turns:
                    cell = table.cell(f"{unit} offsets, {texts.KINDS[kind]}: time over ids alone", peer, COST)
                    if unit == "byte" and peer != OURS:
                        cell.note = "-"
                        continue
                    if answer := bench.ask(cell, workers[peer], "offsets", text=text, unit=unit):
                        bench.check(cell, answer["ids"], 2 * [bench.ids(text)])
                        if unit == "char" and peer == OURS:
                            expected = bench.reference("offsets", "offsets", text=text, unit=unit)
                            bench.check(cell, answer["offsets"], expected)
                        cell.values.append(answer["with"] / answer["alone"])
    stop(workers)


ROWS: dict[str, tuple[str, Callable[[Bench, Table], None]]] = {
    "documents": ("1 MB documents, 1 thread", documents),
    "first": ("first MB of a process", first),
    "adversarial": ("adversarial, 1 MB", adversarial),
    "lines": ("40-60 characters, list out", lines),
    "threads": ("Python threads, one object, new text", threads),
    "decode": ("decoding", decode),
    "load": ("loading, fresh process", load),
    "growth": ("memory growth", growth),
    "offsets": ("offsets", offsets),
}


def stop(workers: dict[str, Worker]) -> None:
    """Ends processes."""
    for worker in workers.values():
        worker.stop()


def progress(line: str) -> None:
    """Says what is going on, apart from the tables."""
    print(line, file=sys.stderr, flush=True)


def usable(names: list[str], bench: Callable[[str], Worker]) -> list[str]:
    """The peers that are installed and serve the file; the others are named with what to do."""
    served = []
    for name in names:
        if version(name) is None:
            progress(f"{name} is left out: not installed (pip install {PEERS[name].package})")
            continue
        worker = bench(name)
        try:
            worker.call(120.0, "load")
            served.append(name)
        except (CutOffError, PeerError) as problem:
            progress(f"{name} is left out: {problem} (if that is its version: pip install -U {PEERS[name].package})")
        worker.stop()
    return served


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (default: all)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)} (default: all that are installed)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="texts or runs of a cell (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=10.0, metavar="SECONDS",
                        help="a call that takes longer is cut off; after half of it a cell is not repeated any more"
                        " (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="a tokenizer.json (default: DeepSeek-V3.2's, from tests/data)")  # fmt: skip
    parser.add_argument("--corpus", type=Path, metavar="DIR", default=corpora.default_folder(),
                        help="texts; corpora.py fills it if it is empty (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="record everything there")
    args = parser.parse_args()
    if args.repeats < 1 or args.limit <= 0:
        parser.error("--repeats and --limit must be positive")
    if args.tokenizer and not args.tokenizer.is_file():
        parser.error(f"--tokenizer: no file {args.tokenizer}")
    return args


def main() -> None:
    """Runs the benchmark."""
    args = arguments()
    try:
        corpora.build(args.corpus, progress)
    except corpora.CorporaError as error:
        sys.exit(f"error: {error}")
    began = time.monotonic()
    args.repeats = min(args.repeats, texts.slices(args.corpus) - WARM)
    with tempfile.TemporaryDirectory(prefix="heedful-bench-") as scratch:
        file = args.tokenizer
        if file is None:
            file = Path(scratch) / "tokenizer.json"
            data = Path(__file__).parents[1] / "tests" / "data" / "tokenizers" / "deepseek-v3.2.json.xz"
            file.write_bytes(lzma.decompress(data.read_bytes()))
        args.peers = usable(args.peers, lambda peer: Worker(peer, file, args.corpus))
        if not args.peers:
            sys.exit("error: no peer is left")
        if version(REFERENCE) is None:
            progress("tokenizers is not installed (pip install tokenizers): ids are not checked")
        bench = Bench(args, file, Path(scratch))
        record: dict[str, Any] = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": {peer: version(peer) for peer in args.peers},
            "tokenizer": args.tokenizer.name if args.tokenizer else "deepseek-v3.2",
            "repeats": args.repeats,
            "base": BASE,
            "cells": [],
        }
        versions = ", ".join(f"{PEERS[peer].package} {number}" for peer, number in record["versions"].items())
        about = record["machine"]
        commit = about["commit"][:12] + " with changes" * about["changed"]
        print(f"{about['cpu']}, {about['cores']} cores, Python {about['python']}; commit {commit}")
        print(f"{versions}; vocabulary of {record['tokenizer']}")
        print(f"(x): ratio to {BASE}, more is better; ids are Hugging Face's in every cell without a mark\n")
        for row in args.rows:
            title, run = ROWS[row]
            start = time.monotonic()
            table = Table(row, title, args.peers)
            run(bench, table)
            print(table.markdown(mark_worst=row == "adversarial") + "\n", flush=True)
            record["cells"] += table.record()
            progress(f"  {row}: {time.monotonic() - start:.0f} s")
        if bench.referee:
            bench.referee.stop()
        record["seconds"] = round(time.monotonic() - began, 1)
    progress(f"{record['seconds']:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
