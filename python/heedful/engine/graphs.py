"""Decoding steps as CUDA graphs: recorded once for each size, replayed with new numbers in the same places.

A decoding step (one token a sequence) launches the same kernels every time; what differs are its sequences' numbers and
how many there are. So the number of sequences and the longest of them are rounded up to buckets, the step's arrays are
copied to fixed buffers, and rows beyond the step are filled up: they read one key and write none (slot -1). What
records and replays is handed in; everything else here runs, and is tested, without a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from heedful import Step
from heedful.engine.cache_layout import BLOCK_SIZE
from heedful.engine.paged_attention import StepLayout

SHORTEST_CONTEXT = 4096
"""Tokens of the first bucket of contexts; each further one is four times as long."""

NO_SLOT = -1
"""Of the cache, which no row is written to."""

Compute = Callable[[torch.Tensor, torch.Tensor, StepLayout], torch.Tensor]
"""token_ids [N], positions [N] and the layout of a step -> hidden states [N, D]."""


class Recording(Protocol):
    """A recorded computation."""

    @property
    def result(self) -> torch.Tensor:
        """Its result, in the same place after each replay."""

    def replay(self) -> None:
        """Computes anew from what the inputs' places hold now."""


class Recorder(Protocol):
    """Records a computation over fixed places."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        """Runs and records it."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: each stream keeps memory of its own, and torch's own for recording is on the device it first saw.
        self._stream = torch.cuda.Stream(device)

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        """Runs it once for what is made on a first call (compiled kernels, workspaces), then records it."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                compute()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = compute()
        return _CudaRecording(graph, result)


@dataclass
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    result: torch.Tensor

    def replay(self) -> None:
        self.graph.replay()


class DecodeGraphs:
    """Runs decoding steps by replaying their recordings.

    Args:
        compute: what a step computes.
        recorder: what records it.
        max_num_seqs: sequences of the largest step.
        max_model_len: tokens of the longest sequence.
        device: where `compute` takes its arrays.
    """

    def __init__(
        self, compute: Compute, recorder: Recorder, *, max_num_seqs: int, max_model_len: int, device: torch.device
    ) -> None:
        self._compute = compute
        self._recorder = recorder
        self.batches = buckets(1, max_num_seqs, 2)
        self.contexts = buckets(SHORTEST_CONTEXT, whole_blocks(max_model_len), 4)
        rows, blocks = self.batches[-1], self.contexts[-1] // BLOCK_SIZE
        self._token_ids = _Buffer(rows, torch.int32, device)
        self._positions = _Buffer(rows, torch.int32, device)
        self._seq_lens = _Buffer(rows, torch.int32, device)
        self._slot_mapping = _Buffer(rows, torch.int64, device)
        self._block_tables = _Buffer(rows * blocks, torch.int32, device)
        self._query_start_loc = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def bucket(self, step: Step) -> tuple[int, int] | None:
        """Sequences and tokens of the recording that serves a step; None for a step that is no decoding."""
        B = len(step.seq_lens)
        if B == 0 or len(step.token_ids) != B:
            return None
        batch = next((size for size in self.batches if size >= B), None)
        longest = int(step.seq_lens.max())
        context = next((size for size in self.contexts if size >= longest), None)
        return None if batch is None or context is None else (batch, context)

    def run(self, step: Step) -> torch.Tensor | None:
        """Hidden states [N, D] of a decoding step, valid until the next one; None for a step of another kind."""
        bucket = self.bucket(step)
        if bucket is None:
            return None
        self._fill(step, bucket)
        self._recording(bucket).replay()
        return self._recordings[bucket].result[: len(step.seq_lens)]

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Records every bucket that is not yet recorded, one for each item that is taken; the largest first."""
        for bucket in itertools.product(reversed(self.batches), reversed(self.contexts)):
            self._fill(None, bucket)
            self._recording(bucket)
            yield bucket

    def _recording(self, bucket: tuple[int, int]) -> Recording:
        if bucket not in self._recordings:
            batch, context = bucket
            blocks = context // BLOCK_SIZE
            layout = StepLayout(
                slot_mapping=self._slot_mapping.there[:batch],
                query_start_loc=self._query_start_loc[: batch + 1],
                seq_lens=self._seq_lens.there[:batch],
                block_tables=self._block_tables.there[: batch * blocks].view(batch, blocks),
                max_seq_len=context,
            )
            arrays = (self._token_ids.there[:batch], self._positions.there[:batch])
            self._recordings[bucket] = self._recorder.record(lambda: self._compute(*arrays, layout))
        return self._recordings[bucket]

    def _fill(self, step: Step | None, bucket: tuple[int, int]) -> None:
        """Copies a step's arrays to their places; rows beyond it read the first key of block 0 and write nothing."""
        if self._sent is not None:
            self._sent.synchronize()  # the step before this one has read its arrays
        batch, context = bucket
        B = 0 if step is None else len(step.seq_lens)
        for buffer, name, filler in (
            (self._token_ids, "token_ids", 0),
            (self._positions, "positions", 0),
            (self._seq_lens, "seq_lens", 1),
            (self._slot_mapping, "slot_mapping", NO_SLOT),
        ):
            here = buffer.here[:batch]
            if step is not None:
                here[:B] = getattr(step, name)
            here[B:] = filler
            buffer.send(batch)
        blocks = context // BLOCK_SIZE
        tables = self._block_tables.here[: batch * blocks].reshape(batch, blocks)
        if step is not None:
            given = step.block_tables[:, :blocks]
            tables[:B, : given.shape[1]] = given
        tables[B:, 0] = 0
        self._block_tables.send(batch * blocks)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._block_tables.there.device))


def buckets(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... up to `last`, which is the largest."""
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return sizes


def whole_blocks(tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


class _Buffer:
    """Numbers here (in pinned memory, where there is a GPU) and in their place on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        host = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self._host = host
        self.here: np.ndarray = host.numpy()
        self.there = torch.zeros(size, dtype=dtype, device=device)

    def send(self, count: int) -> None:
        """Copies the first `count`, without waiting; they may be changed once the copy is done."""
        self.there[:count].copy_(self._host[:count], non_blocking=True)
