"""What `LLM` refuses of a checkpoint and of its options before it takes memory, and how much it takes by itself."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from heedful import LLM, SamplingParams
from heedful.engine import llm as llm_module
from heedful.engine import placement
from heedful.engine.cache_layout import bytes_per_token

GREEDY = SamplingParams(temperature=0.0, max_tokens=5)
PROMPT = list(range(2, 70))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    oracle.save("glm_moe_dsa", directory, index_topk=500)
    return directory


def tokens(llm: LLM) -> list[int]:
    return llm.generate([PROMPT], GREEDY, progress=False)[0].outputs[0].token_ids


def rewritten(checkpoint: Path, directory: Path, **changes: Any) -> Path:
    """The same weights under a changed configuration."""
    values = json.loads((checkpoint / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))
    (directory / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    return directory


def test_a_selection_wider_than_any_context_takes_no_memory(checkpoint: Path, tmp_path: Path) -> None:
    expected = tokens(LLM(checkpoint, kv_cache_tokens=256))
    wide = LLM(rewritten(checkpoint, tmp_path, index_topk=2**31 - 1), kv_cache_tokens=256)
    tracemalloc.start()
    assert tokens(wide) == expected
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("width", [96, 256])
def test_fp8_index_keys_of_a_width_they_cannot_have_are_refused_before_the_weights(
    width: int, checkpoint: Path, tmp_path: Path
) -> None:
    directory = rewritten(checkpoint, tmp_path, index_head_dim=width)
    with pytest.raises(ValueError, match=rf"kv_cache_dtype: fp8 needs an index_head_dim .* this model's is {width}"):
        LLM(directory, kv_cache_dtype="fp8")


@pytest.mark.parametrize("name", ["kv_cache_tokens", "max_model_len", "max_batched_tokens", "max_num_seqs"])
def test_endless_options_are_named(name: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at most 2147483647, got 1{'0' * 30}"):
        LLM(checkpoint, **{name: 10**30})


def test_caches_larger_than_the_machine_are_refused_by_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "total_memory", lambda: 10**6)
    with pytest.raises(
        MemoryError, match=r"kv_cache_tokens: the caches would take \d+ bytes, this machine has 1000000"
    ):
        LLM(checkpoint, kv_cache_tokens=4096)


def test_caches_take_a_share_of_what_is_free_and_no_more_than_can_be_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LLM(checkpoint, kv_cache_tokens=64).config
    token = bytes_per_token(config, "float32")
    monkeypatch.setattr(placement, "available_memory", lambda: 1000 * token)
    assert LLM(checkpoint).caches.num_blocks == 400 // 64
    assert LLM(checkpoint, max_model_len=100, max_num_seqs=2).caches.num_blocks == -(-200 // 64)
    monkeypatch.setattr(placement, "available_memory", lambda: 100 * token)
    with pytest.raises(MemoryError, match=r"kv_cache_tokens: .* hold no block of 64 tokens"):
        LLM(checkpoint)
    monkeypatch.setattr(placement, "available_memory", lambda: None)
    with pytest.raises(ValueError, match="kv_cache_tokens: expected a number"):
        LLM(checkpoint)


@pytest.mark.parametrize("prompt", [[[1.5]], [["a"]], [[None]], [3.5], [object()]], ids=str)
def test_token_ids_that_are_no_integers_are_refused(prompt: Any, checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="prompt: expected text or token ids"):
        LLM(checkpoint, kv_cache_tokens=64).generate(prompt, GREEDY, progress=False)


def test_token_ids_may_be_an_array_of_any_kind(checkpoint: Path) -> None:
    llm = LLM(checkpoint, kv_cache_tokens=256)
    expected = tokens(llm)
    for ids in (torch.tensor(PROMPT), torch.tensor(PROMPT).numpy(), tuple(PROMPT)):
        assert llm.generate([ids], GREEDY, progress=False)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("stored", "capability", "memory", "expected"),
    [
        ("bfloat16", "AVX512", 2**40, torch.bfloat16),
        ("bfloat16", "AVX2", 2**40, torch.float32),
        ("bfloat16", "AVX2", 2**20, torch.bfloat16),
        ("bfloat16", "AVX2", None, torch.bfloat16),
        ("float32", "AVX512", 2**20, torch.float32),
    ],
)
def test_dtype_auto_is_the_checkpoints_unless_the_cpu_lacks_bfloat16_and_memory_is_ample(
    stored: str,
    capability: str,
    memory: int | None,
    expected: torch.dtype,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    path = rewritten(checkpoint, tmp_path, dtype=stored)
    with monkeypatch.context() as patch:
        patch.setattr(llm_module, "total_memory", lambda: memory)
        patch.setattr(llm_module, "check_fits", lambda *_: None)
        llm = LLM(path, kv_cache_tokens=64)
    assert llm.dtype == expected
