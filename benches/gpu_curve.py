"""Dense against sparse: seconds of attention for a token, in one layer, from short contexts to long ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_cases import BLOCK, FP8, Bench
from gpu_timing import Call
from heedful import ops

PHASES = ("prefill", "decode")
SECONDS = 0.15  # of one measurement


@dataclass
class Point:
    """Seconds of attention for a token, in one layer, at one context."""

    phase: str
    way: str
    context: int
    seconds_per_token: float


def curve(bench: Bench, context: int) -> Iterator[Point]:
    """Attention of a layer at one context, dense by torch's best ways and ours, and sparse with its index scoring.

    Prefill times the last queries of the context; decode times sequences of one query, inside a CUDA graph.
    """
    s, timer = bench.shapes, bench.timer
    tokens = {"prefill": min(s.curve_queries, context), "decode": s.curve_batch}
    measures = {"prefill": timer.median, "decode": timer.replayed}
    for phase, ways in (("prefill", _prefill), ("decode", _decode)):
        for way, call in ways(bench, context).items():
            try:
                seconds = measures[phase]([call], SECONDS)
            except (RuntimeError, ValueError) as error:  # these shapes or this memory are not served
                print(f"  {phase}, {way}, {context}: {str(error).partition(chr(10))[0][:140]}", flush=True)
                continue
            yield Point(phase, way, context, seconds / tokens[phase])


def _prefill(bench: Bench, S: int) -> dict[str, Call]:
    s, on = bench.shapes, bench.backend
    T = min(s.curve_queries, S)
    q, kv = bench.normal(1, T, s.H, s.DK), bench.normal(2, S, s.DK)
    qi, ki = bench.normal(3, T, s.HI, s.DI, dtype=FP8), bench.normal(4, S, s.DI, dtype=FP8)
    weights, scale = bench.normal(5, T, s.HI, dtype=torch.float32), bench.ones(S)

    def sparse() -> object:
        chosen = ops.index_top_k(qi, ki, weights, min(s.K, S), k_scale=scale, sorted=False, backend=on)
        return ops.sparse_attention(q, kv, chosen, scale=s.scale, value_dim=s.C, backend=on)

    absorbed = partial(ops.dense_attention, q, kv, scale=s.scale, value_dim=s.C, backend=on)
    return {"sparse": sparse, "dense, absorbed (heedful)": absorbed, **_heads(bench, S, T)}


def _heads(bench: Bench, S: int, T: int) -> dict[str, Call]:
    """SDPA over keys of 192 and values of 128 numbers for each head, without the cost of expanding them.

    The last rows of a causal mask see nearly everything: without a mask the quickest kernels serve.
    """
    H = bench.shapes.H
    if bench.timer.free_bytes() < H * S * 320 * 2 * 1.5:
        return {}
    q, k, v = (bench.normal(seed, 1, H, n, d) for seed, n, d in ((1, T, 192), (2, S, 192), (3, S, 128)))
    padded = F.pad(v, (0, 64))

    def run(backend: SDPBackend, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, values, is_causal=T == S, scale=bench.shapes.scale)

    if bench.device.type == "cpu":
        return {"dense, MHA (SDPA)": partial(run, SDPBackend.MATH, v)}
    return {
        "dense, MHA (SDPA, cuDNN)": partial(run, SDPBackend.CUDNN_ATTENTION, v),
        "dense, MHA (SDPA, flash)": partial(run, SDPBackend.FLASH_ATTENTION, padded),
    }


def _decode(bench: Bench, S: int) -> dict[str, Call]:
    s, B = bench.shapes, bench.shapes.curve_batch
    batch = bench.batch(bench.sequences(B, S), S)
    index = bench.index_pages(B * S // BLOCK)
    latent = bench.normal(6, B * S // BLOCK, BLOCK, s.DK)
    q, qi = bench.normal(1, B, s.H, s.DK), bench.normal(2, B, s.HI, s.DI, dtype=FP8)
    weights = bench.normal(3, B, s.HI, dtype=torch.float32)
    common: dict[str, Any] = {"scale": s.scale, "value_dim": s.C, "cache": latent, "backend": bench.backend}

    def sparse() -> object:
        chosen = ops.index_top_k_paged(
            qi, weights, min(s.K, S), cache=index, max_seq_len=S, sorted=False, backend=bench.backend, **batch
        )
        return ops.sparse_attention_paged(q, chosen, **common, **batch)

    rows = latent.view(B, S, s.DK)

    def absorbed() -> object:
        logits = torch.bmm(q, rows.transpose(1, 2)).mul_(s.scale)
        return torch.bmm(logits.softmax(-1), rows[..., : s.C])

    dense = partial(ops.dense_attention_paged, q, **common, **batch)
    return {"sparse": sparse, "dense, absorbed (torch)": absorbed, "dense, absorbed (heedful)": dense}


def crossovers(points: list[dict[str, Any]]) -> dict[str, str]:
    """The first context from which on sparse is quicker than every dense way, for each phase."""
    found = {}
    for phase in PHASES:
        at: dict[int, dict[str, float]] = {}
        for point in points:
            if point["phase"] == phase:
                at.setdefault(point["context"], {})[point["way"]] = point["seconds_per_token"]
        since = None
        for context, ways in sorted(at.items()):
            dense = [seconds for way, seconds in ways.items() if way != "sparse"]
            if not dense or "sparse" not in ways:
                continue
            if ways["sparse"] > min(dense):
                since = None
            elif since is None:
                since = context
        found[phase] = f"{since} tokens" if since else "not reached"
    return found


def plot(record: dict[str, Any], path: Any) -> None:
    """Seconds of a token's attention against the context, dense and sparse; the crossover is named."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for ax, phase in zip(axes, PHASES, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for point in record["points"]:
            if point["phase"] == phase:
                lines.setdefault(point["way"], []).append((point["context"], point["seconds_per_token"] * 1e6))
        for way, values in lines.items():
            ax.loglog(*zip(*sorted(values), strict=True), marker="o", label=way, base=2)
        since = record["crossover"][phase]
        ax.set_title(f"{phase}, {record['machine']['device']}\nsparse is quicker from: {since}", fontsize=10)
        ax.set(xlabel="context, tokens", ylabel="us a token and layer")
        ax.grid(True, which="both", alpha=0.3)
        if lines:
            ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
