"""The timed cases of `gpu_all.py`: shapes of DeepSeek-V3.2, beside the limit that binds them, and beside peers.

A case yields rows. The limit is what the card needs at least for a case's FLOP and bytes, at the rates that it reached
on a product and on a copy: the larger of both.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from gpu_timing import Call, median_replayed_seconds, median_seconds, rotated
from heedful import ops

H, HI, DI, C, R, K, BLOCK = 128, 64, 128, 512, 64, 2048, 64
DK = C + R
SCALE = (128 + 64) ** -0.5
FP8 = torch.float8_e4m3fn


@dataclass
class Row:
    """One measured case."""

    case: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    products: str = "bfloat16"
    """Which product rate is the limit: "bfloat16" or "fp8"."""
    goal: str = ""
    met: bool | None = None
    peer: str = ""
    peer_seconds: float | None = None
    note: str = ""

    def limit(self, ceilings: dict[str, float]) -> float:
        """Seconds that the card needs at least."""
        rate = ceilings.get(f"{self.products}_flops", ceilings["bfloat16_flops"])
        return max(self.flops / rate, self.bytes / ceilings["copy_bytes_per_second"])

    def record(self, ceilings: dict[str, float]) -> dict[str, Any]:
        """As JSON holds it."""
        found = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        found["fraction_of_limit"] = self.limit(ceilings) / self.seconds
        if self.flops:
            found["tflops"] = self.flops / self.seconds / 1e12
        if self.bytes:
            found["gigabytes_per_second"] = self.bytes / self.seconds / 1e9
        if self.peer_seconds:
            found["times_faster_than_peer"] = self.peer_seconds / self.seconds
        return found


Case = Callable[[torch.device, dict[str, float]], Iterator[Row]]


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=device, generator=_generator(device, seed), dtype=torch.bfloat16).to(dtype)


def _selections(device: torch.device, seed: int, queries: int, keys: int, k: int = K) -> torch.Tensor:
    """Distinct keys of each query, in rising order: int32 [queries, k]."""
    stride = keys // k
    jitter = torch.randint(0, stride, (queries, k), device=device, generator=_generator(device, seed))
    return (torch.arange(k, device=device) * stride + jitter).int()


def sparse_prefill(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """4,096 queries of 128 heads over 2,048 chosen keys each."""
    T = 4096
    for S in (32768, 131072):

        def make(seed: int, S: int = S) -> Call:
            q, kv = _normal(device, seed, T, H, DK), _normal(device, seed + 1, S, DK)
            indices = _selections(device, seed, T, S)
            return lambda: ops.sparse_attention(q, kv, indices, scale=SCALE, value_dim=C)

        calls = rotated(make, T * H * DK * 2, device)
        seconds = median_seconds(calls)
        flops = 2.0 * T * H * K * (DK + C)
        row = Row(f"sparse prefill, 4096 x 128 heads, k 2048 of {S}", seconds, flops, goal="420 TFLOP/s")
        row.met = flops / seconds >= 420e12
        if importlib.util.find_spec("flash_mla"):
            row.peer, row.peer_seconds = "FlashMLA", _flash_mla_prefill(device, T, S)
        yield row


def _flash_mla_prefill(device: torch.device, T: int, S: int) -> float:
    import flash_mla

    def make(seed: int) -> Call:
        q, kv = _normal(device, seed, T, H, DK), _normal(device, seed + 1, S, 1, DK)
        indices = _selections(device, seed, T, S)[:, None]
        return lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, SCALE)

    return median_seconds(rotated(make, T * H * DK * 2, device))


def sparse_decode(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """A query a sequence over 2,048 chosen rows of 656 bytes, launched one by one and inside a CUDA graph."""
    for B in (1, 64, 128):
        blocks = 8192 if B > 1 else 2048

        def make(seed: int, B: int = B, blocks: int = blocks) -> Call:
            cache = _latent_pages(device, blocks)
            q, slots = _normal(device, seed, B, H, DK), _selections(device, seed, B, blocks * BLOCK)
            return lambda: ops.sparse_attention_paged(q, slots, scale=SCALE, value_dim=C, cache=cache)

        rows_bytes = B * K * 656.0
        calls = rotated(make, int(rows_bytes), device)
        launched, replayed = median_seconds(calls), median_replayed_seconds(calls)
        flops, moved = 2.0 * B * H * K * (DK + C), rows_bytes + 2.0 * B * H * (DK + C)
        row = Row(f"sparse decode FP8, batch {B}", replayed, flops, moved)
        row.note = f"{launched * 1e6:.1f} us launched one by one; this is a call inside a CUDA graph"
        if B == 1:
            row.goal, row.met = "under 25 us", replayed < 25e-6
        else:
            row.goal = "300 TFLOP/s or 75 % of copy bandwidth, whichever binds"
            wanted = max(flops / 300e12, moved / (0.75 * ceilings["copy_bytes_per_second"]))
            row.met = replayed <= wanted
        yield row


@functools.cache
def _latent_pages(device: torch.device, blocks: int) -> torch.Tensor:
    """A cache of 656-byte rows; shared, because calls read other rows of it."""
    cache = torch.zeros(blocks, BLOCK, 656, dtype=torch.uint8, device=device)
    for first in range(0, blocks, 1024):
        slots = torch.arange(first * BLOCK, min(first + 1024, blocks) * BLOCK, device=device)
        ops.write_latent_cache(_normal(device, first, len(slots), DK), cache, slots, value_dim=C)
    return cache


def index_prefill(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """Scores of 4,096 queries of 64 FP8 heads over 131,072 FP8 keys, all visible."""
    T, S = 4096, 131072

    def make(seed: int) -> Call:
        q, k = _normal(device, seed, T, HI, DI, dtype=FP8), _normal(device, seed + 1, S, DI, dtype=FP8)
        weights = _normal(device, seed, T, HI, dtype=torch.float32)
        scale = torch.ones(S, device=device)
        positions = torch.full((T,), S - 1, device=device)
        return lambda: ops.index_scores(q, k, weights, q_positions=positions, k_scale=scale)

    seconds = median_seconds(rotated(make, T * HI * DI + S * DI, device))
    flops = 2.0 * T * HI * DI * S
    row = Row("index scores FP8, 4096 x 131072, 64 heads", seconds, flops, T * S * 4.0, "fp8")
    row.goal = "55 % of the measured FP8 product rate"
    rate = ceilings.get("fp8_flops", ceilings["bfloat16_flops"])
    row.met = flops / seconds >= 0.55 * rate
    if importlib.util.find_spec("deep_gemm"):
        row.peer, row.peer_seconds = "DeepGEMM", _deep_gemm_logits(device, T, S)
    yield row


def _deep_gemm_logits(device: torch.device, T: int, S: int) -> float:
    import deep_gemm

    def make(seed: int) -> Call:
        q, k = _normal(device, seed, T, HI, DI, dtype=FP8), _normal(device, seed + 1, S, DI, dtype=FP8)
        weights, scale = _normal(device, seed, T, HI, dtype=torch.float32), torch.ones(S, device=device)
        start, end = (torch.full((T,), value, dtype=torch.int32, device=device) for value in (0, S))
        return lambda: deep_gemm.fp8_mqa_logits(q, (k, scale), weights, start, end, clean_logits=False)

    return median_seconds(rotated(make, T * HI * DI + S * DI, device))


def index_decode(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """Scores of one query a sequence over pages of FP8 keys: bound by reading them."""
    S = 131072
    for B in (1, 16, 64):
        blocks = B * S // BLOCK
        cache = torch.zeros(blocks, BLOCK * (DI + 4), dtype=torch.uint8, device=device)
        batch = {
            "block_tables": torch.randperm(blocks, device=device).int().view(B, -1),
            "seq_lens": torch.full((B,), S, dtype=torch.int32, device=device),
            "query_start_loc": torch.arange(B + 1, dtype=torch.int32, device=device),
        }

        def make(seed: int, B: int = B, cache: torch.Tensor = cache, batch: dict[str, torch.Tensor] = batch) -> Call:
            q = _normal(device, seed, B, HI, DI, dtype=FP8)
            weights = _normal(device, seed, B, HI, dtype=torch.float32)
            return lambda: ops.index_scores_paged(q, weights, cache=cache, max_seq_len=S, **batch)

        # One cache of B = 1 fits the second-level cache; what a server reads next does not lie there.
        calls = rotated(make, B * S * (DI + 4), device) if B > 1 else [make(seed) for seed in range(2)]
        seconds = median_replayed_seconds(calls)
        row = Row(f"index scores FP8 over pages, batch {B} x {S}", seconds, 2.0 * B * HI * DI * S, products="fp8")
        row.bytes = B * S * (DI + 4.0) + 4.0 * B * S
        row.goal = "75 % of copy bandwidth"
        row.met = row.bytes / seconds >= 0.75 * ceilings["copy_bytes_per_second"]
        if B == 1:
            row.note = "its 17 MB of keys may lie in the second-level cache"
        yield row


def top_k(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """2,048 of 131,072 scores in each of 4,096 rows, beside torch.topk."""
    T, S = 4096, 131072

    def scores(seed: int) -> torch.Tensor:
        return _normal(device, seed, T, S, dtype=torch.float32)

    one = scores(0)  # 2 GiB: no cache holds it
    for sorted_ in (True, False):
        seconds = median_seconds([lambda s=sorted_: ops.top_k(one, K, sorted=s)])
        row = Row(f"top_k 2048 of {S}, 4096 rows, sorted={sorted_}", seconds, bytes=4.0 * T * S)
        row.goal = "60 % of copy bandwidth, counting one read; 4 times torch.topk"
        row.peer = "torch.topk"
        row.peer_seconds = median_seconds([lambda s=sorted_: torch.topk(one, K, sorted=s)], seconds=0.2)
        fast = row.bytes / seconds >= 0.6 * ceilings["copy_bytes_per_second"]
        row.met = fast and row.peer_seconds >= 4 * seconds
        yield row
    few = one[:64]
    seconds = median_replayed_seconds([lambda: ops.top_k(few, K)])
    row = Row(f"top_k 2048 of {S}, 64 rows", seconds, bytes=4.0 * 64 * S, peer="torch.topk")
    row.peer_seconds = median_seconds([lambda: torch.topk(few, K)], seconds=0.2)
    yield row


def fused_top_k(device: torch.device, ceilings: dict[str, float]) -> Iterator[Row]:
    """Scoring and selection in one, beside the two calls with their 2 GiB of scores between."""
    T = 4096
    for S in (32768, 131072):

        def inputs(S: int = S) -> tuple[Any, ...]:
            q, k = _normal(device, 1, T, HI, DI, dtype=FP8), _normal(device, 2, S, DI, dtype=FP8)
            return q, k, _normal(device, 3, T, HI, dtype=torch.float32), torch.ones(S, device=device)

        q, k, weights, scale = inputs()
        fused = median_seconds([lambda: ops.index_top_k(q, k, weights, K, k_scale=scale, sorted=False)])  # noqa: B023
        two = median_seconds(
            [lambda: ops.top_k(ops.index_scores(q, k, weights, k_scale=scale), K, sorted=False)]  # noqa: B023
        )
        flops = 2.0 * T * HI * DI * (S - T / 2)
        row = Row(f"index_top_k FP8, 4096 x {S}, causal", fused, flops, products="fp8")
        row.goal, row.peer, row.peer_seconds = "not slower; 1.2 times at 131072", "the two calls", two
        row.met = two >= (1.2 if S == 131072 else 1.0) * fused
        yield row


CASES: tuple[Case, ...] = (sparse_prefill, sparse_decode, index_prefill, index_decode, top_k, fused_top_k)


# -- dense against sparse ----------------------------------------------------------------------------------------------


@dataclass
class Point:
    """Seconds of attention for a token, in one layer, at one context."""

    phase: str
    way: str
    context: int
    seconds_per_token: float


def dense_and_sparse(device: torch.device, contexts: list[int], left: Callable[[], float]) -> Iterator[Point]:
    """Attention of a layer, dense by torch's best ways and sparse with its index scoring, for prefill and decode.

    Prefill times the last 512 queries of the context; decode times 16 sequences of one query.
    """
    for S in contexts:
        if left() < 20:
            return
        yield from _prefill_points(device, S, min(512, S))
        yield from _decode_points(device, S, 16)
        torch.cuda.empty_cache()


def _try(call: Call) -> float | None:
    """Median seconds, or None where the way does not serve these shapes or this memory."""
    try:
        return median_seconds([call], seconds=0.15)
    except (RuntimeError, ValueError) as error:
        print(f"  not served: {str(error).partition(chr(10))[0][:140]}")
        torch.cuda.empty_cache()
        return None


def _prefill_points(device: torch.device, S: int, T: int) -> Iterator[Point]:
    q, kv = _normal(device, 1, T, H, DK), _normal(device, 2, S, DK)
    qi, ki = _normal(device, 3, T, HI, DI, dtype=FP8), _normal(device, 4, S, DI, dtype=FP8)
    weights, scale = _normal(device, 5, T, HI, dtype=torch.float32), torch.ones(S, device=device)

    def sparse() -> object:
        chosen = ops.index_top_k(qi, ki, weights, min(K, S), k_scale=scale, sorted=False)
        return ops.sparse_attention(q, kv, chosen, scale=SCALE, value_dim=C)

    ways: dict[str, Call] = {"sparse": sparse}
    if S <= 65536 or torch.cuda.mem_get_info(device)[0] > 40 * 2**30:
        ways["dense, MHA (SDPA)"] = _mha(device, S, T)
    ways["dense, absorbed (heedful)"] = lambda: ops.dense_attention(q, kv, scale=SCALE, value_dim=C)
    for way, call in ways.items():
        if (seconds := _try(call)) is not None:
            yield Point("prefill", way, S, seconds / T)


def _mha(device: torch.device, S: int, T: int) -> Call:
    """SDPA over keys and values expanded for each head, without the cost of expanding them."""
    q = _normal(device, 1, 1, H, T, 192)
    k, v = _normal(device, 2, 1, H, S, 192), _normal(device, 3, 1, H, S, 128)
    if T == S:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
    # The last rows of a causal mask see nearly everything: without a mask the quickest kernels serve.
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=SCALE)


def _decode_points(device: torch.device, S: int, B: int) -> Iterator[Point]:
    blocks = B * S // BLOCK
    batch = {
        "block_tables": torch.randperm(blocks, device=device).int().view(B, -1),
        "seq_lens": torch.full((B,), S, dtype=torch.int32, device=device),
        "query_start_loc": torch.arange(B + 1, dtype=torch.int32, device=device),
    }
    index_cache = torch.zeros(blocks, BLOCK * (DI + 4), dtype=torch.uint8, device=device)
    latent = torch.zeros(blocks, BLOCK, DK, dtype=torch.bfloat16, device=device)
    q, qi = _normal(device, 1, B, H, DK), _normal(device, 2, B, HI, DI, dtype=FP8)
    weights = _normal(device, 3, B, HI, dtype=torch.float32)
    common: dict[str, Any] = {"scale": SCALE, "value_dim": C, "cache": latent}

    def sparse() -> object:
        chosen = ops.index_top_k_paged(
            qi, weights, min(K, S), cache=index_cache, max_seq_len=S, sorted=False, **batch
        )  # fmt: skip
        return ops.sparse_attention_paged(q, chosen, **common, **batch)

    rows = latent.view(B, S, DK)

    def absorbed() -> object:
        logits = torch.einsum("bhd,bsd->bhs", q, rows).mul_(SCALE)
        return torch.einsum("bhs,bsc->bhc", logits.softmax(-1), rows[..., :C])

    ways: dict[str, Call] = {
        "sparse": sparse,
        "dense, absorbed (torch)": absorbed,
        "dense, absorbed (heedful)": lambda: ops.dense_attention_paged(q, **common, **batch),
    }
    for way, call in ways.items():
        if (seconds := _try(call)) is not None:
            yield Point("decode", way, S, seconds / B)


def crossovers(points: list[Point]) -> dict[str, str]:
    """The first context at which sparse is quicker than every dense way, for each phase."""
    found = {}
    for phase in ("prefill", "decode"):
        at: dict[int, dict[str, float]] = {}
        for point in points:
            if point.phase == phase:
                at.setdefault(point.context, {})[point.way] = point.seconds_per_token
        wins = [
            context
            for context, ways in sorted(at.items())
            if len(ways) > 1 and "sparse" in ways and ways["sparse"] <= min(t for w, t in ways.items() if w != "sparse")
        ]
        found[phase] = f"{wins[0]} tokens" if wins else "not reached"
    return found


# -- tuning ------------------------------------------------------------------------------------------------------------


def tune(device: torch.device, left: Callable[[], float]) -> Iterator[str]:
    """Measures configurations for the shapes above and keeps them, so that what follows is timed with the quickest."""
    from heedful.kernels import index_scores, index_top_k, sparse_attention
    from heedful.kernels import top_k as selection
    from heedful.kernels.rows import Rows

    def contiguous(T: int, S: int) -> index_scores.Scoring:
        q, k = _normal(device, 1, T, HI, DI, dtype=FP8), _normal(device, 2, S, DI, dtype=FP8)
        ends = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
        weights = _normal(device, 3, T, HI, dtype=torch.float32)
        return index_scores.Scoring.contiguous(q, k, weights, None, ends, torch.ones(S, device=device))

    def paged(B: int, S: int) -> index_scores.Scoring:
        cache = torch.zeros(B * S // BLOCK, BLOCK * (DI + 4), dtype=torch.uint8, device=device)
        tables = torch.randperm(len(cache), device=device).int().view(B, -1)
        lens, starts = torch.full((B,), S, dtype=torch.int32, device=device), torch.arange(B + 1, device=device).int()
        q, weights = _normal(device, 1, B, HI, DI, dtype=FP8), _normal(device, 2, B, HI, dtype=torch.float32)
        return index_scores.Scoring.paged(q, weights, cache, tables, lens, starts, S)

    steps: list[tuple[str, Call]] = [
        (f"index_top_k 4096 x {S}", lambda S=S: index_top_k.warm_up(contiguous(4096, S), K)) for S in (32768, 131072)
    ]
    steps.append(("index_scores 4096 x 131072", lambda: index_scores.warm_up(contiguous(4096, 131072))))
    for B in (1, 16, 64):
        steps.append((f"index_scores over pages, {B}", lambda B=B: index_scores.warm_up(paged(B, 131072))))
        steps.append((f"index_top_k over pages, {B}", lambda B=B: index_top_k.warm_up(paged(B, 131072), K)))

    def attention(T: int, rows: Rows) -> object:
        return sparse_attention.warm_up(_normal(device, 1, T, H, DK), rows, _selections(device, 2, T, 32768))

    steps.append(
        ("sparse_attention 4096", lambda: attention(4096, Rows.contiguous(_normal(device, 1, 32768, DK), C, None)))
    )
    steps += [
        (f"sparse_attention FP8, {B}", lambda B=B: attention(B, Rows.pages(_latent_pages(device, 512), DK, C)))
        for B in (1, 64, 128)
    ]
    for T in (4096, 64):
        scores = functools.partial(_normal, device, 1, T, 131072, dtype=torch.float32)
        steps.append((f"top_k of {T} rows", lambda scores=scores: selection.warm_up(scores(), K)))
    for name, measure in steps:
        if left() < 240:
            yield f"{name}: left out, for want of time"
            continue
        yield f"{name}: {measure()}"
        torch.cuda.empty_cache()
