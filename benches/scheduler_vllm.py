"""vLLM's side of bench_scheduler.py: its scheduler, block pool and cache manager alone, without a GPU or a model.

HEEDFUL_PEER_VLLM is a folder with an unzipped wheel; what it imports on the way must be importable, torch included.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from scheduler_workload import (
    BLOCK,
    LONG,
    POOL_CALL,
    POOL_CALLS,
    PROMPT,
    RUNNING,
    SAMPLED,
    VOCAB,
    Clock,
    Rows,
    answer,
    prompt,
    steps,
    timed,
)

sys.path.insert(0, os.environ["HEEDFUL_PEER_VLLM"])
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm.version
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils import hashing
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

MAX_LENGTH = 163_840
_numbers = itertools.count()
_sha256 = hashing.get_hash_fn_by_name("sha256")
kv_cache_utils.init_none_hash(_sha256)
_hasher = kv_cache_utils.get_request_block_hasher(BLOCK, _sha256)


def kv_cache(blocks: int) -> KVCacheConfig:
    """One group of full attention."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer.0"], spec)])


def request(tokens: list[int], max_tokens: int = 16, hasher: Any = _hasher) -> Request:
    """A request, its blocks hashed when it is made."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(
        request_id=str(next(_numbers)),
        prompt_token_ids=tokens,
        sampling_params=params,
        pooling_params=None,
        block_hasher=hasher,
    )


def scheduler(running: int, model: str) -> Scheduler:
    """A scheduler with room for that many requests."""
    blocks = (PROMPT // BLOCK + 24) * running + 1024
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = blocks
    config = VllmConfig(
        model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_LENGTH),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max(1024, running),
            max_num_batched_tokens=16_384,
            max_model_len=MAX_LENGTH,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    config.scheduler_config.async_scheduling = False
    return Scheduler(
        vllm_config=config,
        kv_cache_config=kv_cache(blocks),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )


def output(target: Scheduler, plan: Any) -> ModelRunnerOutput:
    """What a model would answer: one token for each request whose prompt is computed."""
    names = list(plan.num_scheduled_tokens)
    computed = [target.requests[name].num_computed_tokens >= target.requests[name].num_prompt_tokens for name in names]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[[SAMPLED] if done else [] for done in computed],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def decode(running: int, model: str, rows: Rows) -> None:
    """Steps of decoding requests."""
    target = scheduler(running, model)
    for i in range(running):
        target.add_request(request(prompt(PROMPT, seed=i), max_tokens=100_000))
    while len(target.running) < running or any(r.num_computed_tokens < r.num_prompt_tokens for r in target.running):
        plan = target.schedule()
        target.update_from_output(plan, output(target, plan))
    alone: list[float] = []

    def one() -> float:
        with Clock() as planning:
            plan = target.schedule()
        assert len(plan.num_scheduled_tokens) == running
        answer = output(target, plan)
        with Clock() as applying:
            target.update_from_output(plan, answer)
        alone.append(planning.seconds)
        return planning.seconds + applying.seconds

    rows[f"step {running}"] = list(steps(one))
    rows[f"schedule {running}"] = alone[-len(rows[f"step {running}"]) :]


def pool() -> float:
    """Blocks out and back in calls of POOL_CALL."""
    blocks = BlockPool(POOL_CALL * POOL_CALLS * 2, True, BLOCK)
    with Clock() as clock:
        held = [blocks.get_new_blocks(POOL_CALL) for _ in range(POOL_CALLS)]
        for some in held:
            blocks.free_blocks(some)
    return clock.seconds / (POOL_CALL * POOL_CALLS)


def manager(tokens: list[int]) -> KVCacheManager:
    """A cache manager in which a prompt is cached."""
    made = KVCacheManager(
        kv_cache(8192), max_model_len=MAX_LENGTH, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=True
    )
    first = request(tokens)
    made.get_computed_blocks(first)
    assert made.allocate_slots(first, len(tokens)) is not None
    made.free(first)
    return made


def main() -> None:
    """Times every row that vLLM has."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as model:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
        rest = {"num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": MAX_LENGTH}
        Path(model, "config.json").write_text(json.dumps({**kind, **sizes, **rest, "rms_norm_eps": 1e-5}))
        for running in RUNNING:
            decode(running, model, rows)
    rows["pool"] = timed(pool, 40)
    tokens = prompt(LONG)

    def hashing_alone() -> float:
        made = request(tokens, hasher=None)
        with Clock() as clock:
            _hasher(made)
        return clock.seconds

    rows["hash"] = timed(hashing_alone)
    cached = manager(tokens)

    def hit(made: Request | None) -> float:
        with Clock() as clock:
            target = request(tokens) if made is None else made
            found = cached.get_computed_blocks(target)
            cached.allocate_slots(
                target, LONG - found[1], num_new_computed_tokens=found[1], new_computed_blocks=found[0]
            )
            cached.free(target)
        assert found[1] >= LONG - BLOCK
        return clock.seconds

    rows["hit"] = timed(lambda: hit(None))
    rows["match"] = timed(lambda: hit(request(tokens)))
    answer(vllm.version.__version__, rows)


if __name__ == "__main__":
    main()
