"""Threads of a block, memory, and the checks on what they do."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import matrix, numbers
from .program import Program
from .translate import Translator

Array = np.ndarray[Any, Any]
MOST_MARKED = 2**26  # bytes of a tensor whose accesses are marked: marks take 16 times as many
MANY = 0xFFFF  # "thread" of a mark that several threads made
IN_FLIGHT = -1  # an asynchronous copy is under way


class DeviceError(RuntimeError):
    """What a device, or a tool that watches one, would have reported."""


class Memory:
    """Bytes, and who wrote and read each of them last.

    A mark is block + 1 << 40 | barriers passed << 16 | thread, or 0.
    """

    def __init__(self, data: Array, base: int, name: str) -> None:
        self.data, self.base, self.name = data, base, name
        self.end = base + len(data)
        self.written: Array | None = None
        self.seen: Array | None = None
        if len(data) <= MOST_MARKED:
            self.written, self.seen = (np.zeros(len(data), np.int64) for _ in range(2))

    def gather(self, at: Array, width: int) -> Array:
        """[n, width] bytes."""
        if width in (4, 8) and not self.base % width and not len(self.data) % width:
            return self.data.view(f"u{width}")[at // width].view(np.uint8).reshape(-1, width)
        return self.data[at[:, None] + np.arange(width)]


class Machine:
    """A program for blocks of so many threads and bytes of shared memory."""

    def __init__(self, program: Program, threads: int, shared: int) -> None:
        self.program, self.threads = program, threads
        self.shared_size = shared
        self.translator = Translator(program)
        self.functions: dict[tuple[int, bool], Any] = {}
        self.tid = np.arange(threads, dtype=np.uint32)
        self.lane = self.tid % 32
        self.shuffles: dict[tuple[str, int, int], Array] = {}
        self.names = self._names()

    def _names(self) -> dict[str, Any]:
        names: dict[str, Any] = {name: getattr(numbers, name) for name in dir(numbers) if not name.startswith("_")}
        names |= {name: getattr(self, name) for name in dir(Machine) if not name.startswith("_")}
        names |= {
            "np": np,
            "where": np.where,
            "TRUE": np.ones(1, bool),
            "FALSE": np.zeros(1, bool),
            "laneid": self.lane,
        }
        names |= {"tid_x": self.tid, "ntid_x": np.array([self.threads], np.uint32)}
        return names

    def _function(self, block: int, masked: bool) -> Any:
        key = block, masked
        if key not in self.functions:
            source = self.translator.function(block, masked)
            self.names.update(self.translator.constants)
            scope: dict[str, Any] = {}
            exec(compile(source, f"{self.program.name}, block {block}", "exec"), self.names, scope)
            self.functions[key] = scope["f"]
        return self.functions[key]

    # -- a launch ------------------------------------------------------------------------------------------------------

    def launch(
        self,
        grid: Sequence[int],
        parameters: Sequence[Array],
        memory: Sequence[tuple[Array, int, str]],
        blocks: Iterable[tuple[int, int, int]] | None = None,
    ) -> None:
        """Runs every block, or those that are named.

        Args:
            grid: blocks along x, y, z.
            parameters: the kernel's, as bits, one element each.
            memory: what may be touched: its bytes, address and name.
            blocks: x, y, z of those to run.

        Raises:
            DeviceError: an access that is not allowed, or not ordered.
        """
        self.memories = sorted((Memory(*each) for each in memory), key=lambda m: m.base)
        self.bases = [m.base for m in self.memories]
        for (name, _), value in zip(self.program.parameters, parameters, strict=False):
            self.names[f"parameter_{name}"] = value
        for axis, count in zip("xyz", grid, strict=True):
            self.names[f"nctaid_{axis}"] = np.array([count], np.uint32)
        if blocks is None:
            blocks = ((x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid))))
        with np.errstate(all="ignore"):
            for self.block, place in enumerate(blocks):
                self.names |= {f"ctaid_{axis}": np.array([n], np.uint32) for axis, n in zip("xyz", place, strict=True)}
                self._run()

    def _run(self) -> None:
        zeros = {"p": np.zeros(1, bool)} | {bits: np.zeros(1, f"u{int(bits) // 8}") for bits in ("8", "16", "32", "64")}
        self.names.update({name: zeros[kind] for name, kind in self.program.registers.items()})
        self.shared = Memory(np.full(self.shared_size + 16, 0xFF, np.uint8)[: self.shared_size], 0, "shared memory")
        self.epoch, self.pending, self.groups = 0, [], []
        self.live = np.ones(self.threads, bool)
        at: int | None = 0
        while at is not None:
            self.now = at
            found = self._function(at, False)(None)
            at = self._apart(*found) if isinstance(found, tuple) else found

    def _apart(self, taken: Array, target: int | None, following: int) -> int | None:
        """Threads have parted: those of the first block in the text run, until all are in one place or have ended."""
        end = len(self.program.blocks)
        places = np.where(taken, end if target is None else target, following)
        while True:
            self.live = places != end
            if not self.live.any():
                return None
            at = int(places.min())
            mask = places == at
            if (mask == self.live).all() and self.live.all():
                return at
            self.now = at
            found = self._function(at, True)(mask)
            if isinstance(found, tuple):
                goes, target, following = found
                next_ = np.where(goes, end if target is None else target, following)
            else:
                next_ = end if found is None else found
            places = np.where(mask, next_, places)

    def branch(self, taken: Array, target: int | None, following: int) -> Any:
        """The next block if all threads agree, else what they chose."""
        if taken.all():
            return target
        return (taken, target, following) if taken.any() else following

    def _fault(self, what: str, line: int) -> DeviceError:
        return DeviceError(f"{self.program.name}, block {self.block}, line {line} of the PTX: {what}")

    # -- marks ---------------------------------------------------------------------------------------------------------

    def _mark(self, memory: Memory, at: Array, thread: Array, width: int, line: int, new: Array | None) -> None:
        """Marks bytes as read, or as written with `new`; faults if another thread's access is not ordered before."""
        if memory.written is None or memory.seen is None or not len(at):
            return
        places = at[:, None] + np.arange(width)
        unit = 5 if memory is self.shared else 0  # threads of a warp are in step as far as shared memory goes
        now = ((self.block + 1) << 24) | self.epoch
        me = (now << 16) | thread[:, None].astype(np.int64)

        def unordered(marks: Array) -> Array | None:
            recent = marks >> 16 == now
            found = None
            if recent.any():
                found = recent & (((marks & 0xFFFF) == MANY) | ((marks & 0xFFFF) >> unit != (me & 0xFFFF) >> unit))
            elsewhere = (marks > 0) & (marks >> 40 != self.block + 1)
            if elsewhere.any():
                found = elsewhere if found is None else found | elsewhere
            return found

        written = memory.written[places]
        if (written == IN_FLIGHT).any():
            raise self._fault(f"{memory.name} is used while an asynchronous copy to it is under way", line)
        wrong = unordered(written)
        seen = memory.seen[places]
        if new is not None:
            read = unordered(seen)
            if read is not None:
                wrong = read if wrong is None else read | wrong
            if wrong is not None:
                wrong &= memory.data[places] != new  # the same bytes written again harm nobody
        if wrong is not None and wrong.any():
            i, byte = (int(x) for x in np.argwhere(wrong)[0])
            what = "reads" if new is None else "writes"
            raise self._fault(
                f"thread {int(thread[i])} {what} {memory.name}, byte {int(places[i, byte])}, which another thread "
                "touches without a barrier between (race)",
                line,
            )
        if new is not None:
            memory.written[places] = me
            return
        recent = seen >> 16 == now
        if recent.any():
            several = recent & ((seen & 0xFFFF) >> unit != (me & 0xFFFF) >> unit)
            me = np.where(several, (now << 16) | MANY, me)
        memory.seen[places] = me

    def _full(self, x: Array) -> Array:
        """One element a thread."""
        return x if len(x) == self.threads else np.full(self.threads, x[0], x.dtype)

    def _lanes(self, at: Array, mask: Array | None) -> tuple[Array, Array]:
        """Addresses and threads of those that take part."""
        at = self._full(at)
        if mask is None:
            return at, self.tid
        mask = self._full(mask)
        return at[mask], self.tid[mask]

    # -- global memory -------------------------------------------------------------------------------------------------

    def _global(self, at: Array, width: int, line: int) -> list[tuple[Memory, Array, Array]]:
        """For each tensor that is touched: it, which accesses, and their offsets."""
        if (at % np.uint64(width)).any():
            raise self._fault(f"an address is not a multiple of {width} (misaligned access)", line)
        found = []
        rest = np.arange(len(at))
        while len(rest):
            first = int(at[rest[0]])
            place = bisect.bisect_right(self.bases, first) - 1
            memory = self.memories[place] if place >= 0 else None
            if memory is None or first + width > memory.end:
                near = "" if memory is None else f", {first - memory.end} bytes behind the end of {memory.name}"
                raise self._fault(f"{width} bytes at {first:#x} are in no tensor of the launch{near}", line)
            inside = (at[rest] >= np.uint64(memory.base)) & (at[rest] <= np.uint64(memory.end - width))
            mine = rest[inside]
            found.append((memory, mine, (at[mine] - np.uint64(memory.base)).astype(np.int64)))
            rest = rest[~inside]
        return found

    def _read_global(self, at: Array, thread: Array, width: int, line: int) -> Array:
        """[n, width] bytes."""
        data = np.empty((len(at), width), np.uint8)
        for memory, which, offset in self._global(at, width, line):
            data[which] = memory.gather(offset, width)
            self._mark(memory, offset, thread[which], width, line, None)
        return data

    def load_global(self, at: Array, width: int, count: int, mask: Array | None, line: int) -> list[Array]:
        """`count` numbers of `width` bytes a thread."""
        at, thread = self._lanes(at, mask)
        return self._numbers(self._read_global(at, thread, width * count, line), thread, width)

    def _numbers(self, data: Array, thread: Array, width: int) -> list[Array]:
        found = np.ascontiguousarray(data).view(f"u{width}").T
        if len(thread) == self.threads:
            return list(found)
        whole = np.zeros((len(found), self.threads), found.dtype)
        whole[:, thread] = found
        return list(whole)

    def _values(self, values: Sequence[Array], thread: Array, width: int) -> Array:
        """[n, width * count] bytes of what threads store."""
        columns = [self._full(x)[thread].astype(f"u{width}") for x in values]
        return np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint8)

    def store_global(self, at: Array, width: int, count: int, mask: Array | None, line: int, *values: Array) -> None:
        at, thread = self._lanes(at, mask)
        data = self._values(values, thread, width)
        for memory, which, offset in self._global(at, width * count, line):
            self._mark(memory, offset, thread[which], width * count, line, data[which])
            memory.data[offset[:, None] + np.arange(width * count)] = data[which]

    # -- shared memory -------------------------------------------------------------------------------------------------

    def _check_shared(self, at: Array, width: int, line: int) -> Array:
        if (at % np.uint32(width)).any():
            raise self._fault(f"an address in shared memory is not a multiple of {width} (misaligned access)", line)
        if len(at) and int(at.max()) + width > self.shared_size:
            raise self._fault(f"byte {int(at.max()) + width - 1} of {self.shared_size} of shared memory", line)
        return at.astype(np.int64)

    def _read_shared(self, at: Array, thread: Array, width: int, line: int) -> Array:
        at = self._check_shared(at, width, line)
        self._mark(self.shared, at, thread, width, line, None)
        return self.shared.gather(at, width)

    def _write_shared(self, at: Array, thread: Array, data: Array, line: int) -> None:
        width = data.shape[1]
        at = self._check_shared(at, width, line)
        self._mark(self.shared, at, thread, width, line, data)
        self.shared.data[at[:, None] + np.arange(width)] = data

    def load_shared(self, at: Array, width: int, count: int, mask: Array | None, line: int) -> list[Array]:
        at, thread = self._lanes(at, mask)
        return self._numbers(self._read_shared(at, thread, width * count, line), thread, width)

    def store_shared(self, at: Array, width: int, count: int, mask: Array | None, line: int, *values: Array) -> None:
        at, thread = self._lanes(at, mask)
        self._write_shared(at, thread, self._values(values, thread, width), line)

    def copy_async(
        self, to: Array, from_: Array, size: int, present: Array | None, mask: Array | None, line: int
    ) -> None:
        """cp.async: reads now, writes when it is waited for; where `present` is 0, zeros without reading."""
        to, thread = self._lanes(to, mask)
        from_ = self._lanes(from_, mask)[0]
        data = np.zeros((len(to), size), np.uint8)
        there = np.ones(len(to), bool)
        if present is not None:
            count = self._lanes(present, mask)[0]
            if not ((count == 0) | (count == size)).all():
                raise NotImplementedError(f"line {line}: a part of an asynchronous copy")
            there = count > 0
        data[there] = self._read_global(from_[there], thread[there], size, line)
        at = self._check_shared(to, size, line)
        self._mark(self.shared, at, thread, size, line, data)
        if self.shared.written is not None:
            self.shared.written[at[:, None] + np.arange(size)] = IN_FLIGHT
        self.shared.data[at[:, None] + np.arange(size)] = 0xFF
        self.pending.append((at, thread, data))

    def commit(self) -> None:
        self.groups.append(self.pending)
        self.pending = []

    def wait_copies(self, left: int) -> None:
        """cp.async.wait_group: all but the last `left` groups arrive."""
        while len(self.groups) > left:
            for at, thread, data in self.groups.pop(0):
                places = at[:, None] + np.arange(data.shape[1])
                self.shared.data[places] = data
                if self.shared.written is not None:
                    me = ((self.block + 1) << 40) | (self.epoch << 16) | thread[:, None].astype(np.int64)
                    self.shared.written[places] = me

    def barrier(self, mask: Array | None, line: int) -> None:
        if mask is not None and (mask != self.live).any():
            raise self._fault("a barrier that some threads do not come to", line)
        self.epoch += 1

    # -- warps ---------------------------------------------------------------------------------------------------------

    def shuffle(self, how: str, a: Array, b: Array, clamp: Array) -> Array:
        a, b = self._full(a), self._full(b)
        segment = (self._full(clamp) >> np.uint32(8)) & np.uint32(31)
        limit = (self.lane & segment) | (clamp & np.uint32(31) & ~segment)
        if how == "bfly":
            lane = self.lane ^ b
            valid = lane <= limit
        elif how == "idx":
            lane = (self.lane & segment) | (b & np.uint32(31) & ~segment)
            valid = lane <= limit
        elif how == "up":
            lane = self.lane - b
            valid = lane.view(np.int32) >= limit.view(np.int32)
        else:
            lane = self.lane + b
            valid = lane <= limit
        source = np.where(valid, self.tid - self.lane + lane, self.tid)
        return a[source]

    def reduce_warp(self, how: str, a: Array, members: Array) -> Array:
        a, members = (self._full(x) for x in (a, members))
        rows, masks = a.reshape(-1, 32), members.reshape(-1, 32)
        function = {
            "add": np.sum,
            "min": np.min,
            "max": np.max,
            "and": np.bitwise_and.reduce,
            "or": np.bitwise_or.reduce,
        }[how]
        result = np.zeros_like(rows)
        for warp in range(len(rows)):
            for mask in np.unique(masks[warp]):
                inside = (int(mask) >> np.arange(32)) & 1 == 1
                result[warp, inside] = function(rows[warp, inside]).astype(a.dtype)
        return result.reshape(-1)

    # -- matrices ------------------------------------------------------------------------------------------------------

    def _matrix_rows(self, at: Array, count: int) -> tuple[Array, Array]:
        """Of each warp's `count` matrices of 8 x 16 bytes, the rows' addresses and the threads that gave them."""
        at = self._full(at).reshape(-1, 32)[:, : 8 * count]
        return at.reshape(-1), self.tid.reshape(-1, 32)[:, : 8 * count].reshape(-1)

    def load_matrices(self, at: Array, count: int, transposed: bool, line: int) -> list[Array]:
        """ldmatrix: thread 4 g + t gets elements 2 t and 2 t + 1 of row g (of column g if transposed)."""
        rows, thread = self._matrix_rows(at, count)
        data = self._read_shared(rows, thread, 16, line).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            data = np.ascontiguousarray(data.swapaxes(2, 3))
        registers = data.view(np.uint32)  # [W, count, 8, 4]
        return list(np.ascontiguousarray(registers.swapaxes(0, 1)).reshape(count, self.threads))

    def store_matrices(self, at: Array, transposed: bool, line: int, *values: Array) -> None:
        count = len(values)
        rows, thread = self._matrix_rows(at, count)
        data = matrix.stacked(list(values), self.threads).reshape(count, -1, 8, 4).swapaxes(0, 1)
        data = np.ascontiguousarray(data).view(np.uint16)  # [W, count, 8, 8]
        if transposed:
            data = np.ascontiguousarray(data.swapaxes(2, 3))
        self._write_shared(rows, thread, data.reshape(-1, 8).view(np.uint8), line)

    def multiply(self, a: list[Array], b: list[Array], c: list[Array], *types: str) -> list[Array]:
        return matrix.multiply(a, b, c, (types[0], types[1], types[2]), self.threads)

    def group_multiply(
        self, c: list[Array], a: Any, b: Array, add: Array, n: int, k: int, flip_a: bool, flip_b: bool,
        d_type: str, a_type: str, b_type: str, line: int,
    ) -> list[Array]:  # fmt: skip
        """wgmma of all warp groups: [64, k] times [k, n]. Its sums are there at once."""
        groups = self.threads // 128
        old = matrix.sums(c, d_type, self.threads).reshape(groups, 64, n)
        if isinstance(a, list):
            rows = matrix.rows_fragment(a, a_type, self.threads).reshape(groups, 64, k)
        else:
            rows = self._operands(a, 64, k, a_type, flip_a, line)
        columns = self._operands(b, n, k, b_type, flip_b, line).swapaxes(1, 2)
        keep = self._full(add)[::128]
        d = matrix.product(rows, columns, np.where(keep[:, None, None], old, old.dtype.type(0)))
        return matrix.spread(d.reshape(groups * 4, 16, n))

    def _operands(self, descriptors: Array, rows: int, k: int, type_: str, flipped: bool, line: int) -> Array:
        """[groups, rows, k]"""
        size = matrix._SIZES[type_]
        found = []
        for group, descriptor in enumerate(self._full(descriptors)[::128]):
            at = matrix.operand_addresses(int(descriptor), rows, k, size, flipped)
            flat = at.reshape(-1).astype(np.uint32)
            thread = np.full(len(flat), 128 * group, np.uint32)
            data = self._read_shared(flat, thread, size, line)
            found.append(matrix.decoded(np.ascontiguousarray(data).view(f"u{size}").reshape(rows, k), type_))
        return np.stack(found)
