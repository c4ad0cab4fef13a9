"""Measures the kernels' configurations for a model's own shapes, before it serves; `heedful.kernels.tuning` keeps them.

Measured are scoring with selection, and sparse attention. Nothing is measured while requests run: launches only look
the tables up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from heedful import ops
from heedful.engine.cache_layout import BLOCK_SIZE
from heedful.engine.graphs import SHORTEST_CONTEXT, buckets
from heedful.engine.runner import ModelRunner

Shape = tuple[int, int, int]
"""Sequences, queries of each, and tokens of the longest."""


def shapes_of(max_num_seqs: int, max_tokens: int, max_model_len: int) -> list[Shape]:
    """The shapes of decoding steps by their buckets, and of a prompt by itself."""
    decoding = [
        (batch, 1, context)
        for batch in buckets(1, max_num_seqs, 2)
        for context in buckets(min(SHORTEST_CONTEXT, max_model_len), max_model_len, 4)
    ]
    return [*decoding, (1, min(max_tokens, max_model_len), max_model_len)]


@torch.inference_mode()
def tune(runner: ModelRunner, shapes: list[Shape]) -> Iterator[Shape]:
    """Measures one shape for each item that is taken.

    Args:
        runner: on the Triton backend.
        shapes: what it will be asked for.

    Raises:
        RuntimeError: no configuration of a kernel runs on the device; the message says why.
    """
    if runner.attention == "dense":
        return
    for B, queries, context in shapes:
        _tune_selection(runner, B, queries, context)
        _tune_attention(runner, B, queries, context)
        yield B, queries, context


def _tune_selection(runner: ModelRunner, B: int, queries: int, context: int) -> None:
    from heedful.kernels import index_top_k
    from heedful.kernels.index_scores import Scoring

    config, device = runner.model.config, runner.device
    stored = next((cache.dtype for cache in runner.caches.index if cache is not None), None)
    if stored is None:
        return
    N, Hi, Di, blocks = B * queries, config.index_n_heads, config.index_head_dim, -(-context // BLOCK_SIZE)
    generator = torch.Generator(device).manual_seed(0)
    # Random keys: equal ones, as a fresh cache holds, would all compete for the last place.
    coded = stored.itemsize == 1
    cache = torch.zeros(blocks, BLOCK_SIZE, Di + 4 if coded else Di, dtype=stored, device=device)
    keys = torch.randn(blocks * BLOCK_SIZE, Di, device=device, generator=generator)
    ops.write_index_cache(keys, cache, torch.arange(len(keys), device=device), backend=runner.backend)
    query = torch.randn(N, Hi, Di, device=device, generator=generator)
    scoring = Scoring.paged(
        query.to(torch.float8_e4m3fn if coded else runner.model.lm_head.weight.dtype),
        torch.rand(N, Hi, device=device, generator=generator),
        cache.flatten(1) if coded else cache,
        torch.arange(blocks, dtype=torch.int32, device=device).repeat(B, 1),
        torch.full((B,), context, dtype=torch.int32, device=device),
        torch.arange(0, N + 1, queries, dtype=torch.int32, device=device),
        context,
    )
    index_top_k.warm_up(scoring, min(config.index_topk, context))


def _tune_attention(runner: ModelRunner, B: int, queries: int, context: int) -> None:
    from heedful.kernels import sparse_attention
    from heedful.kernels.dequantize import is_worth_it
    from heedful.kernels.rows import Rows

    config, device, like = runner.model.config, runner.device, runner.caches.latent[0]
    N, blocks, K = B * queries, -(-context // BLOCK_SIZE), min(config.index_topk, context)
    value_dim, width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
    cache = torch.zeros(blocks, *like.shape[1:], dtype=like.dtype, device=device)
    dtype = runner.model.lm_head.weight.dtype
    query = torch.zeros(N, config.num_attention_heads, width, dtype=dtype, device=device)
    slots = torch.randint(0, context, (N, K), dtype=torch.int32, device=device)
    rows = Rows.pages(cache, width, value_dim)
    if is_worth_it(query, rows, K, torch.empty((B, blocks), device="meta")):  # then bfloat16 rows are what is read
        rows = Rows.contiguous(
            torch.zeros(blocks * BLOCK_SIZE, width, dtype=torch.bfloat16, device=device), value_dim, None
        )
    sparse_attention.warm_up(query, rows, slots)
