"""A process that holds one loaded peer and times it on request, and the handle by which the benchmark talks to it.

A peer by itself in a process can crash, hang or grow without harm to the others, and still the peers take turns, text
by text, so that a noisy moment hits all alike. Requests and answers are lines of JSON; texts go by name.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import itertools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import tokenizer_texts as texts
from tokenizer_peers import PEERS, HeedfulCache, Peer

STREAM_BLOCK = 500
LINE_BLOCK = 50
"""Calls that are timed together where one is shorter than a look at the clock is exact."""

ONE_THREAD = {
    "HEEDFUL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class CutOffError(Exception):
    """The peer took too long and was stopped."""


class PeerError(Exception):
    """The peer raised or died; the message says how."""


# In the benchmark.


class Worker:
    """A process with a peer loaded, started when it is first needed and again after a crash or a cut."""

    def __init__(self, peer: str, file: Path, corpora: Path, warm: list[str] | None = None) -> None:
        """Args: the peer's name, its tokenizer file, the corpora, and texts to encode after loading, untimed."""
        self.command = [sys.executable, __file__, peer, str(file), str(corpora)]
        self.warm = warm or []
        self.process: subprocess.Popen[str] | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)

    def call(self, limit: float, operation: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            CutOffError: there was none within `limit` seconds.
            PeerError: the peer raised, or the process died.
        """
        if self.process is None and operation != "load":
            self.call(120.0, "load")
            for name in self.warm:
                self.call(120.0, "encode", text=name)
            if self.warm:
                self.call(120.0, "batch", names=self.warm[:1])
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                env={**os.environ, **ONE_THREAD},
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self.death()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(limit):
                self.stop()
                raise CutOffError(f"cut off at {limit:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise PeerError(self.death())
        answer = dict(json.loads(line))
        if "raised" in answer:
            self.stop()  # a peer that panicked may hold a poisoned lock
            raise PeerError(str(answer["raised"]))
        return answer

    def death(self) -> str:
        """How the process ended."""
        assert self.process is not None
        status = self.process.wait()
        self.stop()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or [""]
        return f"died (signal {-status})" if status < 0 else f"died: {last[0][:80]}"

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


# In the process.


def resident() -> float:
    """VmRSS in MB, less what the allocator of the C library keeps of freed memory, if that can be given back."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmRSS"))


def digest(values: Any) -> str:
    """A hash of ids or of a text."""
    content = values.encode() if isinstance(values, str) else np.ascontiguousarray(values, dtype="<u4").tobytes()
    return hashlib.blake2b(content, digest_size=12).hexdigest()


class Operations:
    """What can be asked of a peer. An answer has digests, from which the benchmark sees whether the result is right."""

    peer: Peer

    def __init__(self, name: str, file: Path, corpora: Path) -> None:
        self.name, self.file, self.corpora = name, file, corpora
        self.lines = functools.cache(functools.partial(texts.lines, corpora))

    def text(self, name: str) -> str:
        """A text that is ready: its UTF-8 form is made by no peer's clock."""
        text = texts.text(self.corpora, name)
        text.encode()
        return text

    def read(self, text: str) -> dict[str, Any]:
        """Makes a text ready and leaves it at that."""
        self.text(text)
        return {}

    def load(self, cache: str | None = None) -> dict[str, Any]:
        """Loads the tokenizer, from its file or a cache file; the import is not counted."""
        __import__(PEERS[self.name].package)
        before = resident()
        start = time.perf_counter()
        self.peer = HeedfulCache(Path(cache)) if cache else PEERS[self.name](self.file)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "megabytes": resident() - before}

    def save_cache(self, path: str) -> dict[str, Any]:
        """Writes our cache file."""
        if not hasattr(self.peer.tokenizer, "save_cache"):
            return {"missing": True}
        self.peer.tokenizer.save_cache(path)
        return {}

    def encode(self, text: str) -> dict[str, Any]:
        """A text to an array."""
        content = self.text(text)
        start = time.perf_counter()
        ids = self.peer.numpy(content)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": len(content.encode()), "ids": digest(ids)}

    def batch(self, names: list[str]) -> dict[str, Any]:
        """Many texts to flat ids."""
        if self.peer.batch is None:
            return {"missing": True}
        contents = [self.text(name) for name in names]
        start = time.perf_counter()
        result = self.peer.batch(contents)
        seconds = time.perf_counter() - start
        ids, offsets = self.peer.flat(result)
        rows = [digest(ids[start:end]) for start, end in itertools.pairwise(offsets.tolist())]
        return {"seconds": seconds, "bytes": sum(len(content.encode()) for content in contents), "ids": rows}

    def short_lines(self, kind: str, first: int, count: int) -> dict[str, Any]:
        """Distinct lines, a call and a list each: seconds of a call, by block."""
        lines = self.lines(kind)[first : first + count]
        results: list[list[int]] = []
        times = []
        encode = self.peer.list
        for at in range(0, len(lines), LINE_BLOCK):
            block = lines[at : at + LINE_BLOCK]
            start = time.perf_counter()
            for line in block:
                results.append(encode(line))  # noqa: PERF401 (a list of lists is what a caller has)
            times.append((time.perf_counter() - start) / len(block))
        return {"times": times, "ids": digest(np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in results]))}

    def threads(self, groups: list[list[str]]) -> dict[str, Any]:
        """Groups of texts to arrays, a Python thread for each group, one object."""
        contents = [[self.text(name) for name in group] for group in groups]
        results: list[list[Any]] = [[] for _ in groups]
        ready = threading.Barrier(len(groups) + 1)

        def encode_all(group: list[str], result: list[Any]) -> None:
            ready.wait()
            result.extend(map(self.peer.numpy, group))

        threads = [threading.Thread(target=encode_all, args=pair) for pair in zip(contents, results, strict=True)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        ready.wait()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        count = sum(len(content.encode()) for group in contents for content in group)
        return {"seconds": seconds, "bytes": count, "ids": [digest(ids) for result in results for ids in result]}

    def decode(self, text: str) -> dict[str, Any]:
        """An array of ids to a text."""
        content = self.text(text)
        ids = self.peer.numpy(content)
        start = time.perf_counter()
        decoded = self.peer.decode(ids)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": len(ids), "right": decoded == content}

    def stream(self, text: str, count: int) -> dict[str, Any]:
        """Ids to texts, one by one: seconds of a step, by block."""
        if self.peer.stream is None:
            return {"missing": True}
        content = self.text(text)[: 8 * count]
        ids = self.peer.numpy(content)[:count].tolist()
        push = self.peer.stream()
        results: list[str | None] = []
        times = []
        for at in range(0, len(ids), STREAM_BLOCK):
            block = ids[at : at + STREAM_BLOCK]
            start = time.perf_counter()
            for id in block:
                results.append(push(id))  # noqa: PERF401 (as a server does it)
            times.append((time.perf_counter() - start) / len(block))
        given = "".join(part or "" for part in results)
        # The last character can be unfinished; its bytes then wait in the stream.
        right = content.startswith(given) and len(given) >= len(self.peer.decode(np.array(ids, dtype=np.uint32))) - 3
        return {"times": times, "right": right}

    def offsets(self, text: str, unit: str) -> dict[str, Any]:
        """A seen text to an array, and to ids and offsets, in turns."""
        if self.peer.encode_offsets is None:
            return {"missing": True}
        content = self.text(text)
        alone = self.peer.numpy(content)
        start = time.perf_counter()
        self.peer.numpy(content)
        middle = time.perf_counter()
        ids, offsets = self.peer.encode_offsets(content, unit)
        end = time.perf_counter()
        return {
            "alone": middle - start,
            "with": end - middle,
            "ids": [digest(alone), digest(ids)],
            "offsets": digest(np.asarray(offsets).ravel()),
        }

    def memory(self) -> dict[str, Any]:
        """VmRSS."""
        return {"megabytes": resident()}


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    peer, file, corpora = sys.argv[1:]
    operations = Operations(peer, Path(file), Path(corpora))
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        gc.collect()
        try:
            answer = getattr(operations, request.pop("operation"))(**request)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            answer = {"raised": f"{type(error).__name__}: {error}"[:200].replace("\n", " ")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
