"""nano-vllm's side of bench_scheduler.py: its bare schedule(). HEEDFUL_PEER_NANOVLLM is the folder of `nanovllm`."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

from scheduler_workload import PROMPT, RUNNING, SAMPLED, Clock, Rows, answer, prompt, steps

ROOT = Path(os.environ["HEEDFUL_PEER_NANOVLLM"])
# The package's own __init__ imports the GPU runner: bare packages stand in.
for name in ("nanovllm", "nanovllm.engine"):
    bare = types.ModuleType(name)
    bare.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules[name] = bare
config = types.ModuleType("nanovllm.config")
config.Config = object  # type: ignore[attr-defined]
sys.modules["nanovllm.config"] = config

from nanovllm.engine.scheduler import Scheduler  # noqa: E402
from nanovllm.engine.sequence import Sequence  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402

BLOCK = 256
"""Its default; 64 does not divide its settings."""


def decode(running: int) -> list[float]:
    """Seconds of each schedule() of decoding requests."""
    settings = types.SimpleNamespace(
        max_num_seqs=running,
        max_num_batched_tokens=16_384,
        eos=-1,
        hf_config=None,
        kvcache_block_size=BLOCK,
        num_kvcache_blocks=running * 16 + 64,
    )
    scheduler = Scheduler(settings)
    params = SamplingParams(temperature=1.0, max_tokens=1 << 30, ignore_eos=True)
    for i in range(running):
        scheduler.add(Sequence(prompt(PROMPT, seed=i), params))

    def one() -> float:
        with Clock() as clock:
            sequences, prefill = scheduler.schedule()
        tokens = [SAMPLED] * len(sequences)
        scheduler.postprocess(sequences, tokens) if two else scheduler.postprocess(sequences, tokens, prefill)
        return clock.seconds

    two = scheduler.postprocess.__code__.co_argcount == 3
    while scheduler.waiting:
        one()
    return list(steps(one))


def main() -> None:
    """Times schedule()."""
    rows: Rows = {f"schedule {running}": decode(running) for running in RUNNING}
    answer(os.environ.get("HEEDFUL_PEER_NANOVLLM_VERSION", "version unknown"), rows)


if __name__ == "__main__":
    main()
