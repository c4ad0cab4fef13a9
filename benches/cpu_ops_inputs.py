"""What bench_cpu_ops.py runs: the inputs of V3.2's sizes, our operators, and the same work in torch and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from heedful import ops

HI, DI = 64, 128
H, C, R = 128, 512, 64
DK = C + R
K = 2048
PAGE = 64
SCALE = DK**-0.5
DISTINCT = 131_072
"""Rows that are drawn; longer contexts repeat them."""
SELECTIONS = 64
"""Selections that runs take turns with, so that chosen rows come from memory as they do in a model of many layers."""

Run = Callable[[int], Any]
"""One run; the number tells it which selection to take."""


@dataclass
class Family:
    """One piece of work in several ways."""

    name: str
    ours: dict[str, Run]
    peers: dict[str, Run]
    base: dict[str, str] = field(default_factory=dict)
    """The peer that each of ours is compared with first."""
    goals: dict[str, float] = field(default_factory=dict)
    """The ratio to that peer that each of ours should reach."""
    work: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Of each of ours, the ceiling that bounds it and how much of it one run takes: operations or bytes."""


class Inputs:
    """Random tensors for contexts up to `longest`; every context is a prefix."""

    def __init__(self, longest: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.generator = np.random.default_rng(seed)
        drawn = min(longest, DISTINCT)

        def repeat(x: torch.Tensor) -> torch.Tensor:
            copies = -(-longest // drawn)
            return x if copies == 1 else x.repeat(copies, *[1] * (x.ndim - 1))[: longest * len(x) // drawn].contiguous()

        kv = torch.randn(drawn, DK).bfloat16()
        pages = torch.zeros(drawn // PAGE, PAGE, C + 4 * (C // 128) + 2 * R, dtype=torch.uint8)
        ops.write_latent_cache(kv, pages, range(drawn), value_dim=C)
        keys = torch.randn(drawn, DI)
        key_pages = torch.zeros(drawn // PAGE, PAGE * (DI + 4), dtype=torch.uint8)
        ops.write_index_cache(keys, key_pages, range(drawn))
        scale = keys.abs().amax(1) / 127
        self.kv, self.pages = repeat(kv), repeat(pages)
        self.keys, self.key_pages = repeat(keys), repeat(key_pages)
        self.half_keys = self.keys.bfloat16()
        self.byte_keys = repeat((keys / scale[:, None]).round().to(torch.int8))
        self.byte_scale = repeat(scale)
        self.scores = torch.randn(longest)
        self.table = torch.arange(longest // PAGE, dtype=torch.int32)[None]

    def queries(self, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index queries [T, Hi, Di], their weights [T, Hi] and attention queries [T, H, Dk], float32."""
        torch.manual_seed(T)
        return torch.randn(T, HI, DI), torch.rand(T, HI) / HI, torch.randn(T, H, DK)

    def selections(self, S: int, T: int) -> list[torch.Tensor]:
        """Selections int32 [T, K] of S keys in rising order, as `index_top_k(..., sorted=False)` gives them."""
        k = min(K, S)
        first = np.stack([self.generator.choice(S, k, replace=False) for _ in range(T)])
        shifts = self.generator.integers(0, S, max(1, SELECTIONS // T))
        return [torch.from_numpy(np.sort((first + shift) % S, axis=1).astype(np.int32)) for shift in shifts]

    def paged(self, S: int, T: int) -> dict[str, torch.Tensor]:
        """The block table, length and queries of one sequence."""
        lens, starts = torch.tensor([S], dtype=torch.int32), torch.tensor([0, T], dtype=torch.int32)
        return {"block_tables": self.table[:, : S // PAGE], "seq_lens": lens, "query_start_loc": starts}


def top_k(inputs: Inputs, S: int) -> Family:
    """The 2,048 highest of a row of scores."""
    scores, k = inputs.scores[:S], min(K, S)
    row, array = scores[None], scores.numpy()
    return Family(
        "top_k",
        ours={"f32": lambda _: ops.top_k(row, k, sorted=False), "f32 sorted": lambda _: ops.top_k(row, k)},
        peers={
            "torch f32": lambda _: torch.topk(scores, k, sorted=False),
            "numpy f32": lambda _: np.argpartition(array, S - k)[S - k :],
        },
        base=dict.fromkeys(("f32", "f32 sorted"), "torch f32"),
        goals={"f32": 25.0},
        work={"f32": ("l2_read", 4.0 * S)},
    )


def index(inputs: Inputs, S: int, T: int) -> Family:
    """Scores of T queries over S keys."""
    q, w, _ = inputs.queries(T)
    half_q, half_w = q.bfloat16(), w.bfloat16()
    q_scale = q.abs().amax(-1, keepdim=True) / 127
    byte_q, byte_w = (q / q_scale).round().to(torch.int8), w * q_scale[..., 0]
    keys, half_keys, byte_keys = inputs.keys[:S], inputs.half_keys[:S], inputs.byte_keys[:S]
    byte_scale, key_pages = inputs.byte_scale[:S], inputs.key_pages[: S // PAGE]
    flat, array_q, array_w, array = byte_q.view(-1, DI), q.numpy(), w.numpy(), keys.numpy()
    paged = inputs.paged(S, T)

    def by_torch(q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        logits = (q.view(-1, DI) @ keys.T).relu_().view(T, HI, S)
        return torch.bmm(w[:, None], logits)[:, 0]

    def by_torch_bytes(_: int) -> torch.Tensor:
        logits = torch._int_mm(flat, byte_keys.T).clamp_min_(0).float().view(T, HI, S)
        return torch.bmm(byte_w[:, None], logits)[:, 0] * byte_scale

    def by_numpy(_: int) -> np.ndarray[Any, Any]:
        logits = np.maximum(array_q.reshape(-1, DI) @ array.T, 0).reshape(T, HI, S)
        return np.matmul(array_w[:, None], logits)[:, 0]

    operations = 2.0 * T * HI * DI * S
    ours: dict[str, Run] = {
        "bf16": lambda _: ops.index_scores(half_q, half_keys, w),
        "int8": lambda _: ops.index_scores(byte_q, byte_keys, byte_w, k_scale=byte_scale),
        "FP8 pages": lambda _: ops.index_scores_paged(half_q, w, cache=key_pages, **paged),
        "f32": lambda _: ops.index_scores(q, keys, w),
    }
    return Family(
        f"index scores, T = {T}",
        ours=ours,
        peers={
            "torch bf16": lambda _: by_torch(half_q, half_w, half_keys),
            "torch int8": by_torch_bytes,
            "torch f32": lambda _: by_torch(q, w, keys),
            "numpy f32": by_numpy,
        },
        base=dict.fromkeys(ours, "torch bf16"),
        goals={"bf16": 2.5, "int8": 8.0} if T == 1 else {},
        work={
            "bf16": ("bf16", operations),
            "int8": ("int8", operations),
            "FP8 pages": ("bf16", operations),
            "f32": ("f32", operations),
        },
    )


def _attend(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Two products and a softmax; q [T, H, Dk], rows [T, K, Dk]."""
    weights = torch.softmax(q @ rows.mT * SCALE, -1)
    return weights @ rows[..., :C]


def _attend_one(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The same for q [H, Dk] and rows [K, Dk]: a matrix product is quicker than a batch of one."""
    return torch.softmax((q @ rows.T) * SCALE, -1) @ rows[:, :C]


def _decode(rows: torch.Tensor) -> torch.Tensor:
    """bfloat16 of FP8 latent rows."""
    codes = rows[..., :C].contiguous().view(torch.float8_e4m3fn).bfloat16()
    scales = rows[..., C : C + 16].contiguous().view(torch.float32).bfloat16()
    values = (codes.view(*rows.shape[:-1], C // 128, 128) * scales[..., None]).flatten(-2)
    return torch.cat((values, rows[..., C + 16 :].contiguous().view(torch.bfloat16)), -1)


def sparse(inputs: Inputs, S: int, T: int) -> Family:
    """Attention of T queries over 2,048 keys each."""
    _, _, q = inputs.queries(T)
    half_q = q.bfloat16()
    kv, pages = inputs.kv[:S], inputs.pages[: S // PAGE]
    rows_of_pages = pages.view(S, -1)
    chosen = inputs.selections(S, T)
    wide = [c.long() for c in chosen]
    paged = inputs.paged(S, T)

    def by_torch(q: torch.Tensor, i: int, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        index = wide[i % len(wide)]
        if T == 1:
            return _attend_one(q[0], read(index[0]))
        return torch.cat([_attend_one(q[t], read(index[t])) for t in range(T)])

    def by_torch_batch(i: int) -> torch.Tensor:
        index = wide[i % len(wide)]
        return _attend(half_q, kv.index_select(0, index.flatten()).view(T, -1, DK))

    operations = 2.0 * T * H * (DK + C) * min(K, S)
    peers: dict[str, Run] = {
        "torch bf16": lambda i: by_torch(half_q, i, lambda index: kv.index_select(0, index)),
        "torch FP8": lambda i: by_torch(half_q, i, lambda index: _decode(rows_of_pages.index_select(0, index))),
        "torch f32": lambda i: by_torch(q, i, lambda index: kv.index_select(0, index).float()),
    }
    if T > 1:
        peers["torch bf16 batch"] = by_torch_batch
    return Family(
        f"sparse attention, T = {T}",
        ours={
            "bf16": lambda i: ops.sparse_attention(half_q, kv, chosen[i % len(chosen)], scale=SCALE, value_dim=C)[0],
            "FP8 pages": lambda i: ops.sparse_attention_paged(
                half_q, chosen[i % len(chosen)], scale=SCALE, value_dim=C, cache=pages, **paged
            )[0],
        },
        peers=peers,
        base={"bf16": "torch bf16", "FP8 pages": "torch FP8"},
        goals={"bf16": 3.0, "FP8 pages": 3.0} if T == 1 else {},
        work={"bf16": ("bf16", operations), "FP8 pages": ("bf16", operations)},
    )


def step(inputs: Inputs, S: int) -> Family:
    """The attention step of one decoded token: score, select, attend; and dense attention, which it replaces."""
    index_q, w, q = inputs.queries(1)
    half_index, half_w, half_q = index_q.bfloat16(), w.bfloat16(), q.bfloat16()
    q_scale = index_q.abs().amax(-1, keepdim=True) / 127
    byte_q, byte_w = (index_q / q_scale).round().to(torch.int8), w * q_scale[..., 0]
    byte_keys, byte_scale = inputs.byte_keys[:S], inputs.byte_scale[:S]
    kv, half_keys = inputs.kv[:S], inputs.half_keys[:S]
    pages, key_pages = inputs.pages[: S // PAGE], inputs.key_pages[: S // PAGE]
    paged, k = inputs.paged(S, 1), min(K, S)
    options = {"scale": SCALE, "value_dim": C}

    def half(_: int) -> Any:
        return ops.sparse_attention(half_q, kv, ops.index_top_k(half_index, half_keys, w, k, sorted=False), **options)[
            0
        ]

    def byte(_: int) -> Any:
        chosen = ops.index_top_k(byte_q, byte_keys, byte_w, k, k_scale=byte_scale, sorted=False)
        return ops.sparse_attention_paged(half_q, chosen, cache=pages, **paged, **options)[0]

    def fp8(_: int) -> Any:
        chosen = ops.index_top_k_paged(half_index, w, k, cache=key_pages, **paged, sorted=False)
        return ops.sparse_attention_paged(half_q, chosen, cache=pages, **paged, **options)[0]

    def sparse_by_torch(_: int) -> Any:
        scores = (half_w @ (half_index[0] @ half_keys.T).relu_())[0]
        return _attend_one(half_q[0], kv.index_select(0, torch.topk(scores, k, sorted=False).indices))

    ours: dict[str, Run] = {
        "bf16": half,
        "int8 keys, FP8 rows": byte,
        "FP8 keys and rows": fp8,
        "dense bf16": lambda _: ops.dense_attention(half_q, kv, **options)[0],
    }
    return Family(
        "decode step",
        ours=ours,
        peers={
            "torch dense bf16": lambda _: _attend_one(half_q[0], kv),
            "torch sparse bf16": sparse_by_torch,
        },
        base=dict.fromkeys(ours, "torch dense bf16"),
        goals={"bf16": 25.0, "int8 keys, FP8 rows": 25.0, "FP8 keys and rows": 25.0},
        work={
            "bf16": ("bf16", 2.0 * HI * DI * S + 2.0 * H * (DK + C) * k),
            "dense bf16": ("bf16", 2.0 * H * (DK + C) * S),
        },
    )
