"""SGLang's side of bench_scheduler.py: its Rust prefix tree, called through its binding without the Python above it.

HEEDFUL_PEER_SGLANG is a folder with an unzipped wheel; torch must be of the version that the wheel asks for, because
the extension is linked to it (HEEDFUL_PEER_PYTHON_SGLANG names an interpreter that has it).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from array import array
from pathlib import Path
from typing import Any

import torch  # makes the libraries resident that the extension is linked to

from scheduler_workload import BLOCK, LONG, Clock, Rows, answer, chat, prompt, timed

ROOT = Path(os.environ["HEEDFUL_PEER_SGLANG"])
(EXTENSION,) = ROOT.glob("sglang/srt/mem_cache/rust_tree_core/mem_cache.*.so")
(METADATA,) = ROOT.glob("sglang-*.dist-info")
FULL = 0
"""The component of plain attention."""


def load() -> Any:
    """The extension module."""
    name = "sglang.srt.mem_cache.rust_tree_core.mem_cache"
    loader = importlib.machinery.ExtensionFileLoader(name, str(EXTENSION))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


bindings = load()


def tree() -> Any:
    """An empty tree over pages of BLOCK tokens, least recently used first."""
    settings = bindings.TreeCoreInitParamsBinding(
        eviction_policy="lru",
        slru_protected_threshold=2,
        tlru_tail_budget=0,
        tlru_float_config=None,
        page_size=BLOCK,
        is_write_back=False,
        enable_hicache=False,
        write_through_threshold=256,
        device="cpu",
        swa_sliding_window_size=None,
        swa_req_ring=False,
        enable_kv_cache_events=False,
        dynamo_kv_event_format=False,
        mamba_cache_chunk_size=None,
        mamba_max_states_per_path=None,
    )
    return bindings.RustUnifiedTreeCoreBinding(settings, [FULL])


def match(target: Any, key: array[int]) -> Any:
    """Looks a prompt up."""
    return target.match_prefix(bindings.MatchParamsBinding(key=key, extra_key=None, cache_salt=None))


def insert(target: Any, key: array[int], value: torch.Tensor) -> None:
    """Puts a prompt in; `value` are the slots of its tokens."""
    target.begin_insert(
        bindings.InsertParamsBinding(
            key=key,
            value=value,
            extra_key=None,
            cache_salt=None,
            session_id=None,
            mamba_value=None,
            prev_prefix_len=0,
            swa_evicted_seqlen=0,
            swa_branching_seqlen=None,
            inserted_len=0,
            priority=0,
            track_adopted_ranges=False,
            rotation_base=None,
        )
    )
    while target.has_ongoing_insert():
        target.resume_insert()
    target.end_insert()


def main() -> None:
    """Times the rows that a tree has."""
    rows: Rows = {}
    key = array("q", prompt(LONG))
    long = tree()
    insert(long, key, torch.arange(LONG))

    def hit() -> float:
        with Clock() as clock:
            found = match(long, key)
        assert found.device_prefix_len == LONG
        return clock.seconds

    rows["match"] = timed(hit, 40)
    prompts = [(array("q", tokens), torch.arange(len(tokens))) for tokens in chat()]

    def turns() -> float:
        target = tree()
        with Clock() as clock:
            for tokens, slots in prompts:
                match(target, tokens)
                insert(target, tokens, slots)
        return clock.seconds / len(prompts)

    rows["chat"] = timed(turns)
    answer(METADATA.name.split("-")[1].removesuffix(".dist"), rows)


if __name__ == "__main__":
    main()
