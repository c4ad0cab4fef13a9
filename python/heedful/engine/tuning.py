"""Measures the kernels' configurations for a model's own shapes, before it serves; `heedful.kernels.tuning` keeps them.

What is measured is the fused scoring and selection, whose sizes depend most on the card. Attention takes its static
choice. Nothing is measured while requests run: launches only look the tables up.
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
    from heedful.kernels import index_top_k
    from heedful.kernels.index_scores import Scoring

    config, device = runner.model.config, runner.device
    stored = next((cache.dtype for cache in runner.caches.index if cache is not None), None)
    if stored is None or runner.attention == "dense":
        return
    generator = torch.Generator(device).manual_seed(0)
    Hi, Di = config.index_n_heads, config.index_head_dim
    for B, queries, context in shapes:
        N, blocks = B * queries, -(-context // BLOCK_SIZE)
        # Random keys: equal ones, as a fresh cache holds, would all compete for the last place.
        width = Di + 4 if stored.itemsize == 1 else Di
        cache = torch.zeros(blocks, BLOCK_SIZE, width, dtype=stored, device=device)
        keys = torch.randn(blocks * BLOCK_SIZE, Di, device=device, generator=generator)
        slots = torch.arange(blocks * BLOCK_SIZE, device=device)
        ops.write_index_cache(keys, cache, slots, backend=runner.backend)
        query = torch.randn(N, Hi, Di, device=device, generator=generator)
        query = query.to(torch.float8_e4m3fn if stored.itemsize == 1 else stored)
        scoring = Scoring.paged(
            query,
            torch.rand(N, Hi, device=device, generator=generator),
            cache.flatten(1) if stored.itemsize == 1 else cache,
            torch.arange(blocks, dtype=torch.int32, device=device).repeat(B, 1),
            torch.full((B,), context, dtype=torch.int32, device=device),
            torch.arange(0, N + 1, queries, dtype=torch.int32, device=device),
            context,
        )
        index_top_k.warm_up(scoring, min(config.index_topk, context))
        yield B, queries, context
