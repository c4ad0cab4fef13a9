"""Correctness of the operators on a GPU (or, small, in Triton's interpreter) against float64 in plain torch.

Each check goes through `heedful.ops`, as users do, and returns the largest error beside the bound it must keep.
`GPU_CHECKS` need a GPU: products in bfloat16, CUDA graphs, waiting, addresses past 2^31. Bounds are those of the
arithmetic: for scores, float32 sums of exact products (FP8 matrix units keep some 14 bits of a sum); for attention, a
probability and a value rounded to bfloat16 each, 2^-8 together, of values that are below 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from heedful import ops

BLOCK = 64
FAR = 2**31
"""What 32 bits hold no number of: sizes of `check_far_...`."""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs of the checks are."""

    T: int
    S: int
    H: int
    Hi: int
    Di: int
    C: int
    R: int
    K: int
    lens: tuple[int, ...]
    next_n: int

    @property
    def blocks(self) -> int:
        """Blocks that the batch of `lens` needs, and one that nobody uses."""
        return 1 + sum(-(-n // BLOCK) for n in self.lens)


SMALL = Sizes(T=5, S=300, H=4, Hi=4, Di=32, C=128, R=16, K=40, lens=(150, 64, 3), next_n=2)
FULL = Sizes(T=96, S=9000, H=128, Hi=64, Di=128, C=512, R=64, K=2048, lens=(9000, 4096, 1, 700, 65), next_n=2)


@dataclass(frozen=True)
class Result:
    """What a check found."""

    name: str
    error: float
    bound: float
    detail: str = ""
    left_out: bool = False
    """Whether the check was not made, for want of memory."""

    @property
    def passed(self) -> bool:
        """Whether the error keeps the bound; NaN does not."""
        return self.error <= self.bound


Check = Callable[["Inputs"], Result]


class Inputs:
    """Random inputs of one size on one device."""

    def __init__(self, sizes: Sizes, device: torch.device, backend: str) -> None:
        self.sizes, self.device, self.backend = sizes, device, backend
        self._generator = torch.Generator().manual_seed(0)
        # The interpreter has no bfloat16 products.
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self._generator).to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int32 numbers from low to high - 1."""
        return torch.randint(low, high, shape, generator=self._generator, dtype=torch.int32).to(self.device)

    def batch(self) -> dict[str, torch.Tensor]:
        """A ragged batch over shuffled blocks: next_n queries a sequence, or as many as it has tokens."""
        lens, next_n = self.sizes.lens, self.sizes.next_n
        blocks = torch.randperm(self.sizes.blocks, generator=self._generator).int()
        tables = torch.full((len(lens), max(-(-n // BLOCK) for n in lens)), -1, dtype=torch.int32)
        used = 0
        for row, n in zip(tables, lens, strict=True):
            count = -(-n // BLOCK)
            row[:count] = blocks[used : used + count]
            used += count
        starts = torch.tensor([0, *torch.tensor([min(n, next_n) for n in lens]).cumsum(0).tolist()], dtype=torch.int32)
        on = {"block_tables": tables, "seq_lens": torch.tensor(lens, dtype=torch.int32), "query_start_loc": starts}
        return {name: tensor.to(self.device) for name, tensor in on.items()}

    def sequences(self, batch: dict[str, torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the queries and slots of the keys of each sequence."""
        starts = batch["query_start_loc"].tolist()
        for b, n in enumerate(self.sizes.lens):
            positions = torch.arange(n, device=self.device)
            blocks = batch["block_tables"][b].long()
            yield slice(starts[b], starts[b + 1]), blocks[positions // BLOCK] * BLOCK + positions % BLOCK

    def latent_cache(self, codes: bool) -> torch.Tensor:
        """A cache with every slot written."""
        s = self.sizes
        width, dtype = s.C + s.R, self.dtype
        if codes:
            width, dtype = s.C + 4 * -(-s.C // 128) + 2 * s.R, torch.uint8
        cache = torch.zeros(s.blocks, BLOCK, width, dtype=dtype, device=self.device)
        slots = torch.arange(s.blocks * BLOCK, device=self.device)
        rows = self.normal(s.blocks * BLOCK, s.C + s.R, dtype=self.dtype)
        ops.write_latent_cache(rows, cache, slots, value_dim=s.C, backend=self.backend)
        return cache

    def index_cache(self, codes: bool) -> torch.Tensor:
        """The same of index keys."""
        s = self.sizes
        width, dtype = (s.Di + 4, torch.uint8) if codes else (s.Di, self.dtype)
        cache = torch.zeros(s.blocks, BLOCK, width, dtype=dtype, device=self.device)
        slots = torch.arange(s.blocks * BLOCK, device=self.device)
        keys = self.normal(s.blocks * BLOCK, s.Di, dtype=self.dtype)
        ops.write_index_cache(keys, cache, slots, hadamard=codes, backend=self.backend)
        return cache

    def latent_rows(self, cache: torch.Tensor) -> torch.Tensor:
        """Every slot's row in float64, by the CPU's reader."""
        s = self.sizes
        if cache.dtype != torch.uint8:
            return cache.flatten(0, 1).double()
        slots = torch.arange(s.blocks * BLOCK)
        return ops.read_latent_cache(cache.cpu(), slots, value_dim=s.C, rope_dim=s.R).double().to(self.device)

    def index_rows(self, cache: torch.Tensor) -> torch.Tensor:
        """The same of index keys."""
        slots = torch.arange(self.sizes.blocks * BLOCK)
        return ops.read_index_cache(cache.cpu(), slots, dim=self.sizes.Di).double().to(self.device)


def true_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[T, S] float64, -inf from `ends` on."""
    rows = [w.double() @ (one.double() @ k.double().T).relu() for one, w in zip(q, weights, strict=True)]
    place = torch.arange(len(k), device=k.device)
    return torch.stack(rows).masked_fill(place >= ends[:, None], -math.inf)


def true_attention(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, C: int, sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H, C] and lse [T, H] in float64, a query at a time."""
    out, lse = [], []
    for one, row in zip(q.double(), indices.long(), strict=True):
        keys = kv[row[(row >= 0) & (row < len(kv))]].double()
        logits = one @ keys.T * scale
        total = logits.logsumexp(-1) if len(keys) else torch.full((len(one),), -math.inf, device=q.device).double()
        below = total if sink is None else torch.logaddexp(total, sink.double())
        weights = (logits - below[:, None]).exp() if len(keys) else logits
        out.append(weights @ keys[:, :C])
        lse.append(total)
    return torch.stack(out), torch.stack(lse)


def difference(ours: torch.Tensor, true: torch.Tensor) -> float:
    """Largest difference, infinite where one is infinite and the other is not, or is NaN."""
    gap = (ours.double() - true).abs().masked_fill(ours.double() == true, 0.0)
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()) if gap.numel() else 0.0


def check_scores(inputs: Inputs) -> Result:
    """Scores of FP8 codes with a scale a key, of ragged ranges."""
    s = inputs.sizes
    q = inputs.normal(s.T, s.Hi, s.Di).to(torch.float8_e4m3fn)
    k = inputs.normal(s.S, s.Di).to(torch.float8_e4m3fn)
    weights, scale = inputs.normal(s.T, s.Hi), inputs.normal(s.S).abs()
    positions = inputs.integers(-1, s.S, s.T)
    ours = ops.index_scores(q, k, weights, q_positions=positions, k_scale=scale, backend=inputs.backend)
    true = true_scores(q.float(), k.float(), weights, positions + 1) * scale.double()
    largest = float(true[true.isfinite()].abs().max()) if true.isfinite().any() else 1.0
    return Result("index_scores, FP8", difference(ours, true) / largest, _score_bound(inputs))


def check_paged_scores(inputs: Inputs) -> Result:
    """Scores over pages of FP8 keys."""
    s, batch = inputs.sizes, inputs.batch()
    cache = inputs.index_cache(codes=True)
    N = int(batch["query_start_loc"][-1])
    q, weights = inputs.normal(N, s.Hi, s.Di).to(torch.float8_e4m3fn), inputs.normal(N, s.Hi)
    ours = ops.index_scores_paged(
        q, weights, cache=cache, max_seq_len=max(s.lens), backend=inputs.backend, **batch
    )  # fmt: skip
    keys = inputs.index_rows(cache)
    true = torch.full(ours.shape, -math.inf, dtype=torch.float64, device=inputs.device)
    for rows, slots in inputs.sequences(batch):
        count = rows.stop - rows.start
        ends = len(slots) - count + 1 + torch.arange(count, device=inputs.device)
        true[rows, : len(slots)] = true_scores(q[rows].float(), keys[slots], weights[rows], ends)
    largest = float(true[true.isfinite()].abs().max())
    return Result("index_scores over pages, FP8", difference(ours, true) / largest, _score_bound(inputs))


def check_top_k(inputs: Inputs) -> Result:
    """Selection of rows full of ties, NaN and -inf: exactly the definition's."""
    s = inputs.sizes
    scores = inputs.integers(-4, 5, s.T, s.S).float()
    scores[::3, ::7], scores[1::3, ::5] = math.nan, -math.inf
    lengths = inputs.integers(0, s.S + 1, s.T)
    ours = ops.top_k(scores, s.K, lengths=lengths, backend=inputs.backend)
    true = ops.top_k(scores.cpu(), s.K, lengths=lengths.cpu(), backend="cpu")
    wrong = int((ours.cpu() != true).sum())
    return Result("top_k, ties and NaN", wrong, 0.0, f"{wrong} of {true.numel()} places differ")


def check_fused(inputs: Inputs) -> Result:
    """The fused selection: that of the two calls, place by place."""
    s = inputs.sizes
    q, k = (inputs.integers(-3, 4, *shape).to(inputs.dtype) for shape in ((s.T, s.Hi, s.Di), (s.S, s.Di)))
    weights = inputs.integers(-2, 3, s.T, s.Hi).float()  # whole numbers: every sum is exact, and ties are many
    ours = ops.index_top_k(q, k, weights, s.K, backend=inputs.backend)
    two = ops.top_k(ops.index_scores(q, k, weights, backend=inputs.backend), s.K, backend=inputs.backend)
    wrong = int((ours != two).sum())
    return Result("index_top_k, as the two calls", wrong, 0.0, f"{wrong} of {two.numel()} places differ")


def _score_bound(inputs: Inputs) -> float:
    """Of scores of FP8 codes, against the largest of them."""
    return 1e-5 if inputs.device.type == "cpu" else 2e-3


def _attention_bound(inputs: Inputs) -> float:
    return 1e-4 if inputs.dtype == torch.float32 else 5 * 2**-8


def check_sparse_attention(inputs: Inputs) -> Result:
    """Prefill with sinks, indices outside the keys and a row without any."""
    s = inputs.sizes
    q, kv = inputs.normal(s.T, s.H, s.C + s.R, dtype=inputs.dtype), inputs.normal(s.S, s.C + s.R, dtype=inputs.dtype)
    indices, sink = inputs.integers(-s.S // 10, s.S + s.S // 10, s.T, s.K), inputs.normal(s.H)
    indices[1] = -1
    scale = (s.C + s.R) ** -0.5
    ours = ops.sparse_attention(q, kv, indices, scale=scale, value_dim=s.C, sink=sink, backend=inputs.backend)
    true = true_attention(q, kv, indices, scale, s.C, sink)
    error = max(map(difference, ours, true))
    return Result("sparse_attention", error, _attention_bound(inputs))


def _check_paged_attention(inputs: Inputs, codes: bool) -> Result:
    s, batch = inputs.sizes, inputs.batch()
    cache = inputs.latent_cache(codes)
    N, scale = int(batch["query_start_loc"][-1]), (s.C + s.R) ** -0.5
    q = inputs.normal(N, s.H, s.C + s.R, dtype=inputs.dtype)
    indices = inputs.integers(-1, max(s.lens), N, s.K)
    common: dict[str, Any] = {"scale": scale, "value_dim": s.C, "cache": cache, "backend": inputs.backend}
    ours = ops.sparse_attention_paged(q, indices, **common, **batch)
    rows = inputs.latent_rows(cache)
    true: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    slots_of = torch.full_like(indices, -1)
    for part, slots in inputs.sequences(batch):
        for kept, one in zip(
            true, true_attention(q[part], rows[slots], indices[part], scale, s.C), strict=True
        ):  # fmt: skip
            kept.append(one)
        inside = (indices[part] >= 0) & (indices[part] < len(slots))
        slots_of[part] = slots[indices[part].clamp(0, len(slots) - 1).long()].int().where(inside, -1)
    error = max(difference(a, torch.cat(b)) for a, b in zip(ours, true, strict=True))
    by_slot = ops.sparse_attention_paged(q, slots_of, **common)
    error = max(error, *(difference(a, torch.cat(b)) for a, b in zip(by_slot, true, strict=True)))
    name = "FP8" if codes else str(inputs.dtype).removeprefix("torch.")
    return Result(f"sparse_attention over pages and slots, {name}", error, _attention_bound(inputs))


def check_paged_attention(inputs: Inputs) -> Result:
    """Decoding over pages of numbers."""
    return _check_paged_attention(inputs, codes=False)


def check_fp8_attention(inputs: Inputs) -> Result:
    """Decoding over rows of codes, scales and rotary numbers (656 bytes for 576/512)."""
    return _check_paged_attention(inputs, codes=True)


def check_coded_prefill(inputs: Inputs) -> Result:
    """Prefill over FP8 rows, each read so often that they become bfloat16 first; queries over slots read the codes."""
    s = inputs.sizes
    often = Inputs(replace(s, lens=(s.S, s.S // 3), next_n=s.T // 2), inputs.device, inputs.backend)
    often.dtype = inputs.dtype
    return replace(_check_paged_attention(often, codes=True), name="prefill over FP8 pages, rows as bfloat16")


def check_writes(inputs: Inputs) -> Result:
    """Rows as the CPU writes them: byte for byte, and slot -1 untouched."""
    s = inputs.sizes
    wrong = 0
    for codes in (False, True):
        cache = inputs.latent_cache(codes)
        rows, slots = inputs.normal(3, s.C + s.R, dtype=inputs.dtype), torch.tensor([5, -1, 2 * BLOCK])
        cpu = cache.cpu()
        ops.write_latent_cache(rows, cache, slots.to(inputs.device), value_dim=s.C, backend=inputs.backend)
        ops.write_latent_cache(rows.cpu(), cpu, slots, value_dim=s.C, backend="cpu")
        wrong += int((cache.cpu().view(torch.uint8) != cpu.view(torch.uint8)).sum())
    return Result("cache writes, as the CPU's", wrong, 0.0, f"{wrong} bytes differ")


def check_repeats(inputs: Inputs) -> Result:
    """The same call gives the same bits."""
    s = inputs.sizes
    q, kv = inputs.normal(s.T, s.H, s.C + s.R, dtype=inputs.dtype), inputs.normal(s.S, s.C + s.R, dtype=inputs.dtype)
    k, weights = inputs.normal(s.S, s.Di, dtype=inputs.dtype), inputs.normal(s.T, s.Hi)
    qi = inputs.normal(s.T, s.Hi, s.Di, dtype=inputs.dtype)

    def run() -> list[torch.Tensor]:
        chosen = ops.index_top_k(qi, k, weights, s.K, backend=inputs.backend)
        return [chosen, *ops.sparse_attention(q, kv, chosen, scale=0.05, value_dim=s.C, backend=inputs.backend)]

    first, second = run(), run()
    wrong = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    return Result("two runs, the same bits", wrong, 0.0, f"{wrong} numbers differ")


CHECKS: tuple[Check, ...] = (
    check_writes,
    check_scores,
    check_paged_scores,
    check_top_k,
    check_fused,
    check_sparse_attention,
    check_paged_attention,
    check_fp8_attention,
    check_repeats,
)


def decode_arguments(device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything that an attention layer's decoding step of four sequences takes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    tables = {"block_tables": [[0], [2], [3], [0]], "seq_lens": [41, 3, 9, 1], "query_start_loc": [0, 1, 2, 3, 4]}
    return {
        "q": normal(4, 16, FULL.C + FULL.R),
        "index_q": normal(4, 8, FULL.Di).to(torch.float8_e4m3fn),
        "weights": torch.rand(4, 8, device=device, generator=generator),
        "rows": normal(4, FULL.C + FULL.R),
        "keys": normal(4, FULL.Di),
        "slots": torch.tensor([40, 130, 200, -1], device=device),
        "latent": torch.zeros(4, BLOCK, 656, dtype=torch.uint8, device=device),
        "index": torch.zeros(4, BLOCK, FULL.Di + 4, dtype=torch.uint8, device=device),
        **{name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in tables.items()},
    }


def decode_step(a: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the layer does: writes, selection, attention."""
    batch = {name: a[name] for name in ("block_tables", "seq_lens", "query_start_loc")}
    ops.write_latent_cache(a["rows"], a["latent"], a["slots"], value_dim=FULL.C)
    ops.write_index_cache(a["keys"], a["index"], a["slots"], hadamard=True)
    chosen = ops.index_top_k_paged(
        a["index_q"], a["weights"], 32, cache=a["index"], max_seq_len=BLOCK, sorted=False, **batch
    )
    return ops.sparse_attention_paged(a["q"], chosen, scale=0.05, value_dim=FULL.C, cache=a["latent"], **batch)[0]


def check_graph(inputs: Inputs) -> Result:
    """A decoding step waits for nothing, and inside a CUDA graph it follows its inputs."""
    placed = decode_arguments(inputs.device)
    decode_step(placed)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_step(placed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode_step(placed)
    wrong = 0
    for seed in (1, 2):
        new = decode_arguments(inputs.device, seed)
        for name, tensor in placed.items():
            tensor.copy_(new[name])
        graph.replay()
        wrong += int((result != decode_step(new)).sum()) + int((placed["latent"] != new["latent"]).sum())
    return Result("a step without waiting, and in a CUDA graph", wrong, 0.0, f"{wrong} numbers differ")


def _without_room(name: str, inputs: Inputs, gigabytes: int) -> Result | None:
    """What a check of so much memory finds where it is not free."""
    if torch.cuda.mem_get_info(inputs.device)[0] >= gigabytes * 2**30:
        return None
    return Result(name, 0.0, 0.0, f"left out: needs {gigabytes} GiB of free memory", left_out=True)


def check_far_rows(inputs: Inputs) -> Result:
    """Latent rows past 2^31 numbers are written and attended to."""
    if left_out := _without_room("rows past 2^31 numbers", inputs, 7):
        return left_out
    C, width, device = FULL.C, FULL.C + FULL.R, inputs.device
    blocks = FAR // (BLOCK * width) + 3
    cache = torch.zeros(blocks, BLOCK, width, dtype=torch.bfloat16, device=device)
    rows, q = inputs.normal(100, width, dtype=torch.bfloat16), inputs.normal(3, 16, width, dtype=torch.bfloat16)
    slots = torch.arange(blocks * BLOCK - 100, blocks * BLOCK, device=device)
    ops.write_latent_cache(rows, cache, slots, value_dim=C)
    wrong = int((cache.view(-1, width)[-100:] != rows).sum())
    far = ops.sparse_attention_paged(q, slots.int().expand(3, -1), scale=0.05, value_dim=C, cache=cache)
    true = true_attention(q, rows, torch.arange(100, device=device).expand(3, -1), 0.05, C)
    error = max(map(difference, far, true)) + wrong
    return Result("rows past 2^31 numbers", error, 5 * 2**-8, f"{wrong} numbers written wrong")


def check_far_scores(inputs: Inputs) -> Result:
    """Scores past 2^31 numbers are written and selected from."""
    if left_out := _without_room("scores past 2^31 numbers", inputs, 12):
        return left_out
    T, S = FAR // 131072 + 8, 131072
    q, k = inputs.normal(T, 1, 32, dtype=torch.bfloat16), inputs.normal(S, 32, dtype=torch.bfloat16)
    weights, positions = torch.ones(T, 1, device=inputs.device), torch.full((T,), S - 1, device=inputs.device)
    scores = ops.index_scores(q, k, weights, q_positions=positions)
    last = ops.index_scores(q[-3:], k, weights[-3:], q_positions=positions[-3:])
    wrong = int((scores[-3:] != last).sum()) + int((ops.top_k(scores, 50)[-3:] != ops.top_k(last, 50)).sum())
    return Result("scores past 2^31 numbers", wrong, 0.0, f"{wrong} numbers differ")


def check_far_pages(inputs: Inputs) -> Result:
    """Pages of index keys past 2^31 bytes are written and scored."""
    if left_out := _without_room("pages past 2^31 bytes", inputs, 5):
        return left_out
    Di, device = FULL.Di, inputs.device
    blocks = FAR // (BLOCK * (Di + 4)) + 5
    cache, few = (torch.zeros(n, BLOCK, Di + 4, dtype=torch.uint8, device=device) for n in (blocks, 2))
    keys, slots = inputs.normal(100, Di), torch.arange(100, device=device)
    ops.write_index_cache(keys, cache, slots + (blocks - 2) * BLOCK)
    ops.write_index_cache(keys, few, slots)
    q, weights = inputs.normal(1, 8, Di, dtype=torch.bfloat16), torch.ones(1, 8, device=device)
    rest: dict[str, Any] = {"seq_lens": [100], "query_start_loc": [0, 1], "max_seq_len": 100}
    far = ops.index_scores_paged(q, weights, cache=cache, block_tables=[[blocks - 2, blocks - 1]], **rest)
    wrong = int((far != ops.index_scores_paged(q, weights, cache=few, block_tables=[[0, 1]], **rest)).sum())
    return Result("pages past 2^31 bytes", wrong, 0.0, f"{wrong} numbers differ")


GPU_CHECKS: tuple[Check, ...] = (check_coded_prefill, check_graph, check_far_rows, check_far_scores, check_far_pages)


def check_engine(inputs: Inputs) -> Result:
    """The built-in model: greedy tokens of the engine there and of the engine on the CPU, both in float32.

    What follows a near-tie broken the other way is another text, so a fifth of the tokens may come after one.
    """
    from heedful import LLM, SamplingParams

    prompts = ["The value of", "A file is a place where", "1 2 3"]
    device, backend = inputs.device, inputs.backend
    count = 2 if device.type == "cpu" else 24
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    prompts = prompts[:1] if device.type == "cpu" else prompts
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 1024, "max_num_seqs": 4}
    there = LLM(device=str(device), backend=backend, **options).generate(prompts, params, progress=False)
    here = LLM(device="cpu", backend="cpu", **options).generate(prompts, params, progress=False)
    pairs = [(a.outputs[0].token_ids, b.outputs[0].token_ids) for a, b in zip(there, here, strict=True)]
    after = sum(next((count - i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), 0) for a, b in pairs)
    share = after / (count * len(pairs))
    return Result("engine, as on the CPU", share, 0.2, f"{after} of {count * len(pairs)} tokens after a difference")
