"""A recorder of decoding steps that needs no GPU: what it records is computed anew, into the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class StandInRecording:
    """Computes anew at each replay, into the place of the first result, as a CUDA graph does."""

    compute: Callable[[], torch.Tensor]
    result: torch.Tensor

    def replay(self) -> None:
        self.result.copy_(self.compute())


@dataclass
class StandInRecorder:
    """Holds what it recorded, in order."""

    recordings: list[StandInRecording] = field(default_factory=list)

    def record(self, compute: Callable[[], torch.Tensor]) -> StandInRecording:
        self.recordings.append(StandInRecording(compute, compute().clone()))
        return self.recordings[-1]
