"""The timed cases of `gpu_all.py`: shapes of DeepSeek-V3.2, beside the limit that binds them, and beside peers.

A case yields rows. The limit is what the card needs at least for a case's FLOP and bytes, at the rates that it reached
on a product and on a copy: the larger of both. Inputs are random: on zeros a card draws less power and runs faster.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gpu_timing import Call, Timer
from heedful import ops

BLOCK = 64
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shapes:
    """Sizes of the cases: heads and widths as in `heedful.ops`, T queries of a prefill, S its keys."""

    H: int
    HI: int
    DI: int
    C: int
    R: int
    K: int
    T: int
    S: tuple[int, int]
    batches: tuple[int, ...]
    index_batches: tuple[int, ...]
    contexts: tuple[int, ...]
    """Of the curve of dense against sparse: queries of its prefill, and sequences of its decode, follow."""
    curve_queries: int
    curve_batch: int
    engine: tuple[tuple[int, ...], int, int]
    """Batches, tokens of a prompt, tokens that are generated."""

    @property
    def DK(self) -> int:  # noqa: N802
        """Width of a key."""
        return self.C + self.R

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return (128 + self.R) ** -0.5


FULL = Shapes(
    128, 64, 128, 512, 64, 2048, 4096, (32768, 131072), (1, 64, 128), (1, 16, 64),
    (4096, 8192, 16384, 32768, 65536, 131072), 512, 16, ((1, 64), 1000, 128),
)  # fmt: skip
SMALL = Shapes(4, 4, 32, 128, 16, 32, 8, (128, 256), (1, 2), (1, 2), (128,), 8, 2, ((1, 2), 20, 2))


@dataclass(frozen=True)
class Bench:
    """Where and how cases run, and their inputs."""

    timer: Timer
    shapes: Shapes
    ceilings: dict[str, float]
    backend: str = "auto"

    @property
    def device(self) -> torch.device:
        """Of the inputs."""
        return self.timer.device

    @property
    def numbers(self) -> torch.dtype:
        """What is not FP8: bfloat16, which Triton's interpreter does not multiply."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, by default those of `numbers`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        found = torch.randn(shape, device=self.device, generator=generator, dtype=torch.bfloat16)
        return found.to(dtype or self.numbers)

    def integers(self, seed: int, high: int, *shape: int) -> torch.Tensor:
        """int64 numbers below `high`."""
        return torch.randint(high, shape, device=self.device, generator=torch.Generator(self.device).manual_seed(seed))

    def ones(self, *shape: int) -> torch.Tensor:
        """float32."""
        return torch.ones(shape, device=self.device)

    def selections(self, seed: int, queries: int, keys: int) -> torch.Tensor:
        """Distinct keys of each query, in rising order: int32 [queries, K]."""
        k = self.shapes.K
        stride = keys // k
        jitter = self.integers(seed, stride, queries, k)
        return (torch.arange(k, device=self.device) * stride + jitter).int()

    def latent_pages(self, blocks: int) -> torch.Tensor:
        """A cache of FP8 rows (656 bytes for 576/512)."""
        s = self.shapes
        width = s.C + 4 * -(-s.C // 128) + 2 * s.R
        cache = torch.zeros(blocks, BLOCK, width, dtype=torch.uint8, device=self.device)
        for first in range(0, blocks, 1024):
            part = cache[first : first + 1024]
            slots = torch.arange(len(part) * BLOCK, device=self.device)
            rows = self.normal(first, len(slots), s.DK)
            ops.write_latent_cache(rows, part, slots, value_dim=s.C, backend=self.backend)
        return cache

    def index_pages(self, blocks: int) -> torch.Tensor:
        """A cache of FP8 index keys with their scales: [blocks, 64 * (DI + 4)] bytes."""
        width = BLOCK * self.shapes.DI
        cache = torch.zeros(blocks, width + BLOCK * 4, dtype=torch.uint8, device=self.device)
        for first in range(0, blocks, 4096):
            part = cache[first : first + 4096]
            part[:, :width] = self.normal(first, len(part), width, dtype=FP8).view(torch.uint8)
            scales = self.normal(first + 1, len(part), BLOCK, dtype=torch.float32).abs() + 0.5
            part[:, width:] = scales.view(torch.uint8)
        return cache

    def sequences(self, count: int, tokens: int) -> torch.Tensor:
        """Block tables of sequences that share nothing: int32 [count, tokens / 64], blocks shuffled."""
        generator = torch.Generator(self.device).manual_seed(0)
        blocks = torch.randperm(count * tokens // BLOCK, device=self.device, generator=generator)
        return blocks.int().view(count, -1)

    def batch(self, tables: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
        """Sequences of one query each, all of as many tokens."""
        B = len(tables)
        lens = torch.full((B,), tokens, dtype=torch.int32, device=self.device)
        starts = torch.arange(B + 1, dtype=torch.int32, device=self.device)
        return {"block_tables": tables.contiguous(), "seq_lens": lens, "query_start_loc": starts}

    def rate(self, name: str) -> float:
        """A product rate of the ceilings; that of bfloat16 where a card has no FP8."""
        return self.ceilings.get(f"{name}_flops", self.ceilings["bfloat16_flops"])


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
        found = {name: value for name, value in asdict(self).items() if value is not None and value != ""}
        if self.flops or self.bytes:
            found["fraction_of_limit"] = self.limit(ceilings) / self.seconds
        if self.flops:
            found["tflops"] = self.flops / self.seconds / 1e12
        if self.bytes:
            found["gigabytes_per_second"] = self.bytes / self.seconds / 1e9
            found["share_of_copy"] = self.bytes / self.seconds / ceilings["copy_bytes_per_second"]
        if self.peer_seconds:
            found["times_faster_than_peer"] = self.peer_seconds / self.seconds
        return found


def gathered_attention(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, C: int) -> torch.Tensor:
    """Sparse attention as torch computes it: gather, product, softmax, product."""
    keys = kv[indices.long()]  # [T, K, DK]
    logits = torch.bmm(q, keys.transpose(1, 2)).mul_(scale)
    return torch.bmm(logits.softmax(-1), keys[..., :C])


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


def sparse_prefill(bench: Bench) -> Iterator[Row]:
    """T queries over K chosen keys each."""
    s, timer = bench.shapes, bench.timer
    for S in s.S:

        def inputs(seed: int, T: int, S: int = S) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return bench.normal(seed, T, s.H, s.DK), bench.normal(seed + 1, S, s.DK), bench.selections(seed, T, S)

        def ours(seed: int, inputs: Any = inputs) -> Call:
            q, kv, chosen = inputs(seed, s.T)
            return partial(
                ops.sparse_attention, q, kv, chosen, scale=s.scale, value_dim=s.C, backend=bench.backend
            )  # fmt: skip

        def gathered(seed: int, inputs: Any = inputs) -> Call:
            return partial(gathered_attention, *inputs(seed, max(1, s.T // 64)), s.scale, s.C)

        def flash_mla(seed: int, inputs: Any = inputs) -> Call:
            from flash_mla import flash_mla_sparse_fwd

            q, kv, chosen = inputs(seed, s.T)
            return partial(flash_mla_sparse_fwd, q, kv[:, None], chosen[:, None], s.scale)

        read = s.T * s.H * s.DK * 2.0
        seconds = timer.median(timer.rotated(ours, read))
        row = Row(f"sparse prefill, {s.T} x {s.H} heads, k {s.K} of {S}", seconds, 2.0 * s.T * s.H * s.K * (s.DK + s.C))
        row.goal, row.met = "420 TFLOP/s", row.flops / seconds >= 420e12
        if installed("flash_mla"):
            row.peer, row.peer_seconds = "FlashMLA", timer.median(timer.rotated(flash_mla, read))
        else:
            row.peer = "torch: gather, bmm, softmax, bmm (a 64th of the queries, times 64)"
            row.peer_seconds = 64 * timer.median(timer.rotated(gathered, read / 64), seconds=0.2)
        yield row


def coded_prefill(bench: Bench) -> Iterator[Row]:
    """T queries over K chosen FP8 rows each, which become numbers once, beside reading them as codes."""
    from heedful.kernels import dequantize

    s, timer = bench.shapes, bench.timer
    S = s.S[0]
    batch = {
        "cache": bench.latent_pages(S // BLOCK),
        "block_tables": torch.arange(S // BLOCK, dtype=torch.int32, device=bench.device)[None],
        "seq_lens": torch.full((1,), S, dtype=torch.int32, device=bench.device),
        "query_start_loc": torch.arange(2, dtype=torch.int32, device=bench.device) * s.T,
    }

    def ours(seed: int) -> Call:
        q, chosen = bench.normal(seed, s.T, s.H, s.DK), bench.selections(seed, s.T, S)
        return partial(
            ops.sparse_attention_paged, q, chosen, scale=s.scale, value_dim=s.C, backend=bench.backend, **batch
        )

    calls = timer.rotated(ours, s.T * s.H * s.DK * 2.0)
    seconds = timer.median(calls)
    row = Row(f"sparse prefill FP8, {s.T} x {s.H} heads, k {s.K} of {S}", seconds)
    row.flops = 2.0 * s.T * s.H * s.K * (s.DK + s.C)
    most, dequantize.MOST_BYTES = dequantize.MOST_BYTES, 0
    try:
        row.peer, row.peer_seconds = "the same, rows read as codes", timer.median(calls)
    finally:
        dequantize.MOST_BYTES = most
    yield row


def sparse_decode(bench: Bench) -> Iterator[Row]:
    """A query a sequence over K chosen FP8 rows, launched one by one and inside a CUDA graph."""
    s, timer = bench.shapes, bench.timer
    blocks = max(-(-s.K // BLOCK), max(s.batches) * s.S[0] // 8 // BLOCK)
    cache = bench.latent_pages(blocks)
    rows_of_numbers = bench.normal(0, blocks * BLOCK, s.DK)
    for B in s.batches:

        def inputs(seed: int, B: int = B) -> tuple[torch.Tensor, torch.Tensor]:
            return bench.normal(seed, B, s.H, s.DK), bench.selections(seed, B, blocks * BLOCK)

        def ours(seed: int, inputs: Any = inputs) -> Call:
            common: dict[str, Any] = {"scale": s.scale, "value_dim": s.C, "cache": cache, "backend": bench.backend}
            return partial(ops.sparse_attention_paged, *inputs(seed), **common)

        def gathered(seed: int, inputs: Any = inputs) -> Call:
            q, slots = inputs(seed)
            return partial(gathered_attention, q, rows_of_numbers, slots, s.scale, s.C)

        rows_bytes = float(B * s.K * cache.shape[2])
        calls = timer.rotated(ours, rows_bytes)
        launched, replayed = timer.median(calls), timer.replayed(calls)
        row = Row(f"sparse decode FP8, batch {B}", replayed, 2.0 * B * s.H * s.K * (s.DK + s.C))
        row.bytes = rows_bytes + 2.0 * B * s.H * (s.DK + s.C)
        row.note = f"{launched * 1e6:.1f} us launched one by one; this is a call inside a CUDA graph"
        if B == 1:
            row.goal, row.met = "under 25 us", replayed < 25e-6
        else:
            row.goal = "300 TFLOP/s or 75 % of copy bandwidth, whichever binds"
            wanted = max(row.flops / 300e12, row.bytes / (0.75 * bench.ceilings["copy_bytes_per_second"]))
            row.met = replayed <= wanted
        row.peer = "torch: gather, bmm, softmax, bmm (bfloat16 rows)"
        row.peer_seconds = timer.replayed(timer.rotated(gathered, B * s.K * s.DK * 2.0))
        yield row


def index_prefill(bench: Bench) -> Iterator[Row]:
    """Scores of T queries of FP8 heads over S FP8 keys, all visible."""
    s, timer, S = bench.shapes, bench.timer, bench.shapes.S[-1]

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        q, k = bench.normal(seed, s.T, s.HI, s.DI, dtype=FP8), bench.normal(seed + 1, S, s.DI, dtype=FP8)
        return q, k, bench.normal(seed, s.T, s.HI, dtype=torch.float32), bench.ones(S)

    def ours(seed: int) -> Call:
        q, k, weights, scale = inputs(seed)
        last = torch.full((s.T,), S - 1, device=bench.device)
        return partial(ops.index_scores, q, k, weights, q_positions=last, k_scale=scale, backend=bench.backend)

    def deep_gemm(seed: int) -> Call:
        from deep_gemm import fp8_mqa_logits

        q, k, weights, scale = inputs(seed)
        start, end = (torch.full((s.T,), value, dtype=torch.int32, device=bench.device) for value in (0, S))
        return partial(fp8_mqa_logits, q, (k, scale), weights, start, end, clean_logits=False)

    read = float(s.T * s.HI * s.DI + S * s.DI)
    seconds = timer.median(timer.rotated(ours, read))
    row = Row(f"index scores FP8, {s.T} x {S}, {s.HI} heads", seconds, 2.0 * s.T * s.HI * s.DI * S, products="fp8")
    row.bytes, row.goal = s.T * S * 4.0, "55 % of the measured FP8 product rate"
    row.met = row.flops / seconds >= 0.55 * bench.rate("fp8")
    row.note = f"{row.flops / seconds / bench.rate('fp8'):.0%} of the measured FP8 product rate"
    if installed("deep_gemm"):
        row.peer, row.peer_seconds = "DeepGEMM", timer.median(timer.rotated(deep_gemm, read))
    yield row


def index_decode(bench: Bench) -> Iterator[Row]:
    """Scores of one query a sequence over pages of FP8 keys: bound by reading them."""
    s, timer, S = bench.shapes, bench.timer, bench.shapes.S[-1]
    most = max(s.index_batches)
    cache, sequences = bench.index_pages(most * S // BLOCK), bench.sequences(most, S)
    for B in s.index_batches:
        groups = sequences.split(B)

        def ours(seed: int, B: int = B, groups: Any = groups) -> Call:
            q, weights = bench.normal(seed, B, s.HI, s.DI, dtype=FP8), bench.normal(seed, B, s.HI, dtype=torch.float32)
            batch = bench.batch(groups[seed % len(groups)], S)
            common: dict[str, Any] = {"cache": cache, "max_seq_len": S, "backend": bench.backend}
            return partial(ops.index_scores_paged, q, weights, **common, **batch)

        read = B * S * (s.DI + 4.0)
        seconds = timer.replayed(timer.rotated(ours, read))
        row = Row(f"index scores FP8 over pages, batch {B} x {S}", seconds, 2.0 * B * s.HI * s.DI * S, products="fp8")
        row.bytes, row.goal = read + 4.0 * B * S, "75 % of copy bandwidth"
        row.met = row.bytes / seconds >= 0.75 * bench.ceilings["copy_bytes_per_second"]
        yield row


def top_k(bench: Bench) -> Iterator[Row]:
    """K of S scores in each of T rows, beside torch.topk and the time of reading them once."""
    s, timer, S = bench.shapes, bench.timer, bench.shapes.S[-1]
    one = bench.normal(0, s.T, S, dtype=torch.float32)  # 2 GiB: no cache holds it
    for sorted_ in (True, False):
        ours = partial(ops.top_k, one, s.K, sorted=sorted_, backend=bench.backend)
        seconds = timer.median([ours])
        row = Row(f"top_k {s.K} of {S}, {s.T} rows, sorted={sorted_}", seconds, bytes=4.0 * s.T * S)
        row.goal, row.peer = "60 % of copy bandwidth, counting one read; 4 times torch.topk", "torch.topk"
        row.peer_seconds = timer.median([partial(torch.topk, one, s.K, sorted=sorted_)], seconds=0.2)
        fast = row.bytes / seconds >= 0.6 * bench.ceilings["copy_bytes_per_second"]
        row.met = fast and row.peer_seconds >= 4 * seconds
        yield row
    for few in (1, 64):
        parts = one[: 8 * few].split(few)
        seconds = timer.replayed([partial(ops.top_k, part, s.K, backend=bench.backend) for part in parts])
        row = Row(f"top_k {s.K} of {S}, {few} rows", seconds, bytes=4.0 * few * S, peer="torch.topk")
        row.peer_seconds = timer.median([partial(torch.topk, part, s.K) for part in parts], seconds=0.2)
        yield row


def fused_top_k(bench: Bench) -> Iterator[Row]:
    """Scoring and selection in one, beside the two calls with their scores between."""
    s, timer = bench.shapes, bench.timer
    for S in s.S:

        def inputs(seed: int, S: int = S) -> tuple[torch.Tensor, ...]:
            q, k = bench.normal(seed, s.T, s.HI, s.DI, dtype=FP8), bench.normal(seed + 1, S, s.DI, dtype=FP8)
            return q, k, bench.normal(seed + 2, s.T, s.HI, dtype=torch.float32)

        def fused(seed: int, inputs: Any = inputs, S: int = S) -> Call:
            common: dict[str, Any] = {"k_scale": bench.ones(S), "sorted": False, "backend": bench.backend}
            return partial(ops.index_top_k, *inputs(seed), s.K, **common)

        def two(seed: int, inputs: Any = inputs, S: int = S) -> Call:
            scoring = partial(ops.index_scores, *inputs(seed), k_scale=bench.ones(S), backend=bench.backend)
            return lambda: ops.top_k(scoring(), s.K, sorted=False, backend=bench.backend)

        read = float(s.T * s.HI * s.DI + S * s.DI)
        seconds = timer.median(timer.rotated(fused, read))
        flops = 2.0 * s.T * s.HI * s.DI * (S - s.T / 2)
        row = Row(f"index_top_k FP8, {s.T} x {S}, causal", seconds, flops, products="fp8")
        last = s.S[-1]
        row.goal, row.peer = f"not slower; 1.2 times at {last}", "the two calls"
        row.peer_seconds = timer.median(timer.rotated(two, read))
        row.met = row.peer_seconds >= (1.2 if last == S else 1.0) * seconds
        yield row


def decode_layer(bench: Bench) -> Iterator[Row]:
    """All that an attention layer of a decoding step does with the caches, in a CUDA graph: writes, selection over the
    whole context and attention, with FP8 caches."""
    s, timer, S = bench.shapes, bench.timer, bench.shapes.S[-1]
    most = max(s.index_batches)
    blocks = most * S // BLOCK
    latent, index, sequences = bench.latent_pages(blocks), bench.index_pages(blocks), bench.sequences(most, S)
    for B in s.index_batches:
        groups = sequences.split(B)

        def step(seed: int, B: int = B, groups: Any = groups) -> Call:
            q, qi = bench.normal(seed, B, s.H, s.DK), bench.normal(seed, B, s.HI, s.DI, dtype=FP8)
            weights = bench.normal(seed, B, s.HI, dtype=torch.float32)
            rows, keys = bench.normal(seed, B, s.DK), bench.normal(seed, B, s.DI)
            batch = bench.batch(groups[seed % len(groups)], S)
            slots = batch["block_tables"][:, -1].long() * BLOCK + BLOCK - 1
            on: dict[str, Any] = {"backend": bench.backend}
            pages = index.view(blocks, BLOCK, -1)

            def run() -> object:
                ops.write_latent_cache(rows, latent, slots, value_dim=s.C, **on)
                ops.write_index_cache(keys, pages, slots, hadamard=True, **on)
                chosen = ops.index_top_k_paged(
                    qi, weights, s.K, cache=index, max_seq_len=S, sorted=False, **batch, **on
                )  # fmt: skip
                return ops.sparse_attention_paged(
                    q, chosen, scale=s.scale, value_dim=s.C, cache=latent, **batch, **on
                )  # fmt: skip

            return run

        read = B * S * (s.DI + 4.0)
        seconds = timer.replayed(timer.rotated(step, read))
        row = Row(f"attention layer of a decoding step, batch {B} x {S}", seconds, 2.0 * B * s.HI * s.DI * S)
        row.products, row.bytes = "fp8", read + float(B * s.K * latent.shape[2])
        row.note = "cache writes, selection and attention, in a CUDA graph"
        yield row


def engine_decode(bench: Bench) -> Iterator[Row]:
    """Decoding with the built-in model: launches dominate it, so it shows what graphs save."""
    from heedful import LLM, SamplingParams

    batches, prompt_tokens, generated = bench.shapes.engine
    params = SamplingParams(temperature=0.0, max_tokens=generated + 1, ignore_eos=True)
    options: dict[str, Any] = {"kv_cache_tokens": max(batches) * (prompt_tokens + generated + 65)}
    options |= {"max_num_seqs": max(batches), "max_model_len": prompt_tokens + generated + 1}
    options |= {"device": str(bench.device), "backend": bench.backend, "enable_prefix_caching": False}
    options["dtype"] = "float32" if bench.device.type == "cpu" else "bfloat16"
    for eager in (False, True):
        llm = LLM(enforce_eager=eager, **options)
        for B in batches:
            prompts = bench.integers(B, 1000, B, prompt_tokens).add_(10).tolist()
            rates: list[float] = []
            for _ in range(2):  # the first run warms up
                outputs = llm.generate(prompts, params, progress=False)
                rates = [output.metrics.decode_tokens_per_second or 0.0 for output in outputs]
            rate = statistics.median(rates)
            kind = "launched kernel by kernel" if eager else "CUDA graphs"
            row = Row(f"engine decode, built-in model, batch {B}, {kind}", 1 / rate)
            row.note = f"a step; {B * rate:,.0f} tokens/s in all"
            yield row


Case = Callable[[Bench], Iterator[Row]]
CASES: tuple[Case, ...] = (
    sparse_prefill,
    index_prefill,
    sparse_decode,
    index_decode,
    fused_top_k,
    top_k,
    coded_prefill,
    decode_layer,
    engine_decode,
)


# -- tuning ------------------------------------------------------------------------------------------------------------


def tuning_steps(bench: Bench) -> dict[str, Call]:
    """Measurements of configurations for the shapes above, by name; each keeps the quickest in the tables."""
    from heedful.kernels import index_scores, index_top_k, sparse_attention
    from heedful.kernels import top_k as selection
    from heedful.kernels.rows import Rows

    s, device, long = bench.shapes, bench.device, bench.shapes.S[-1]

    def contiguous(S: int) -> index_scores.Scoring:
        q, k = bench.normal(1, s.T, s.HI, s.DI, dtype=FP8), bench.normal(2, S, s.DI, dtype=FP8)
        ends = torch.arange(S - s.T + 1, S + 1, dtype=torch.int32, device=device)
        weights = bench.normal(3, s.T, s.HI, dtype=torch.float32)
        return index_scores.Scoring.contiguous(q, k, weights, None, ends, bench.ones(S))

    def paged(B: int) -> index_scores.Scoring:
        cache, batch = bench.index_pages(B * long // BLOCK), bench.batch(bench.sequences(B, long), long)
        q, weights = bench.normal(1, B, s.HI, s.DI, dtype=FP8), bench.normal(2, B, s.HI, dtype=torch.float32)
        return index_scores.Scoring.paged(q, weights, cache, *batch.values(), long)

    def attention(T: int, coded: bool) -> object:
        S = s.S[0]
        rows = bench.latent_pages(S // BLOCK) if coded else bench.normal(1, S, s.DK)
        held = Rows.pages(rows, s.DK, s.C) if coded else Rows.contiguous(rows, s.C, None)
        return sparse_attention.warm_up(bench.normal(2, T, s.H, s.DK), held, bench.selections(2, T, S))

    steps: dict[str, Call] = {f"sparse_attention {s.T}": lambda: attention(s.T, False)}
    steps |= {f"sparse_attention FP8, {B}": lambda B=B: attention(B, True) for B in s.batches}
    steps[f"index_scores {s.T} x {long}"] = lambda: index_scores.warm_up(contiguous(long))
    steps |= {f"index_top_k {s.T} x {S}": lambda S=S: index_top_k.warm_up(contiguous(S), s.K) for S in s.S}
    for B in s.index_batches:
        steps[f"index_scores over pages, {B}"] = lambda B=B: index_scores.warm_up(paged(B))
        steps[f"index_top_k over pages, {B}"] = lambda B=B: index_top_k.warm_up(paged(B), s.K)
    for T in (s.T, 64):
        rows = partial(bench.normal, 1, T, long, dtype=torch.float32)
        steps[f"top_k of {T} rows"] = lambda rows=rows: selection.warm_up(rows(), s.K)
    return steps
