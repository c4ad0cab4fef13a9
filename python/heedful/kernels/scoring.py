"""What is scored, and in which tiles: the arguments that the kernels of index scoring share.

A `Scoring` holds the tensors of a call by the kernel's names, over contiguous keys or over the pages of a cache;
`Tiles` say how a program goes through them on a target, `operand_type` in which numbers products are taken there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels import tuning
from heedful.kernels.target import Target

PAGE = 64  # tokens of a page

MAX_KEYS = 2**31 - 2**16
"""Of a row: what is counted up to a block or two behind the last key still fits in 32 bits."""


@dataclass(frozen=True)
class Scoring:
    """The arguments of a scoring kernel that do not depend on the target, by the kernel's names."""

    arguments: dict[str, Any]
    q_dtype: torch.dtype
    k_dtype: torch.dtype
    heads: int
    dim: int
    T: int
    S: int
    num_seqs: int | None  # of a ragged batch over pages

    @staticmethod
    def contiguous(
        q: torch.Tensor,
        k: torch.Tensor,
        weights: torch.Tensor,
        starts: torch.Tensor | None,
        ends: torch.Tensor | None,
        k_scale: torch.Tensor | None,
    ) -> Scoring:
        """Over keys [S, Di]."""
        (T, heads, dim), S = q.shape, k.shape[0]
        check_keys("k", S)
        k = _rows(k)
        k = k if PAGE * k.stride(0) < 2**31 else k.contiguous()  # offsets within a tile are of 32 bits
        scale = None if k_scale is None else k_scale.contiguous()
        starts, ends = (None if x is None else x.contiguous() for x in (starts, ends))
        arguments = _query_arguments(q, weights) | {"keys": k, "scales": scale, "starts": starts, "ends": ends}
        arguments |= {"tables": None, "seq_lens": None, "query_start_loc": None, "num_seqs": 0, "num_blocks": 0}
        arguments |= {"table_stride": 0, "table_width": 0}
        arguments |= {"T": T, "S": S, "KEY_STRIDE": k.stride(0), "page_stride": 0, "scale_stride": 0}
        return Scoring(arguments, q.dtype, k.dtype, heads, dim, T, S, None)

    @staticmethod
    def paged(
        q: torch.Tensor,
        weights: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_seq_len: int,
    ) -> Scoring:
        """Over the pages of an index-key cache."""
        T, heads, dim = q.shape
        num_seqs = seq_lens.shape[0]
        check_keys("max_seq_len", max_seq_len)
        if T and not num_seqs:
            raise ValueError(f"seq_lens: expected sequences that the {T} queries belong to, got none")
        keys, scales = index_pages(cache, dim)
        block_tables = _rows(block_tables)
        arguments = _query_arguments(q, weights) | {"keys": keys, "scales": scales, "starts": None, "ends": None}
        arguments |= {"tables": block_tables, "seq_lens": seq_lens.contiguous()}
        arguments |= {"query_start_loc": query_start_loc.contiguous(), "num_seqs": num_seqs}
        arguments |= {"T": T, "S": max_seq_len, "num_blocks": len(keys), "KEY_STRIDE": keys.stride(1)}
        arguments |= {"table_stride": block_tables.stride(0), "table_width": block_tables.shape[1] if len(keys) else 0}
        arguments |= {"page_stride": keys.stride(0), "scale_stride": 0 if scales is None else scales.stride(0)}
        return Scoring(arguments, q.dtype, keys.dtype, heads, dim, T, max_seq_len, num_seqs)

    @property
    def bucket(self) -> tuple[int | str, ...]:
        """The key of this shape in tables of measurements."""
        rows = self.T if self.num_seqs is None else self.num_seqs
        form = "contiguous" if self.num_seqs is None else "paged"
        dtypes = self.q_dtype, self.k_dtype
        return tuning.bucket(form, rows, self.tokens_per_seq, self.S, str(self.heads), str(self.dim), *dtypes)

    @property
    def tokens_per_seq(self) -> int:
        """Queries that stand next to each other over the same keys, on average."""
        return self.T if not self.num_seqs else -(-self.T // self.num_seqs)

    def tiles(self, BT: int) -> int:
        """Programs that cover the queries, BT each."""
        return -(-self.T // BT) if self.num_seqs is None else self.T // BT + self.num_seqs


def check_keys(name: str, count: int) -> None:
    """ValueError if a row has more keys than kernels can count."""
    if count > MAX_KEYS:
        raise ValueError(f"{name}: expected at most {MAX_KEYS} keys, got {count}")


def index_pages(cache: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of a cache: keys [num_blocks, 64, Di] and, of codes, scales [num_blocks, 64] with the pages' stride."""
    if cache.dtype not in (torch.uint8, torch.int8):
        return cache, None
    pages = cache.flatten(1)
    keys, scales = pages[:, : PAGE * dim].unflatten(1, (PAGE, dim)), pages[:, PAGE * dim :].view(torch.float32)
    return keys.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else keys, scales


def _query_arguments(q: torch.Tensor, weights: torch.Tensor) -> dict[str, Any]:
    q, weights = _rows(q), _rows(weights)
    arguments = {"q": q, "weights": weights, "weight_stride": weights.stride(0)}
    return arguments | {"stride_t": q.stride(0), "stride_h": q.stride(1)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, with the last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
}


def operand_type(q: torch.dtype, k: torch.dtype, target: Target) -> torch.dtype:
    """The type in which products are taken: the narrowest that holds the numbers of both sides and that the target
    multiplies. Sums are float32, or int32 of int8."""
    kinds = {q, k}
    if target.interpreted or torch.float32 in kinds or kinds == {torch.float16, torch.bfloat16}:
        return torch.float32
    if kinds == {torch.float8_e4m3fn}:
        return torch.float8_e4m3fn if target.fp8_dot else torch.bfloat16
    if kinds == {torch.int8}:
        return torch.int8
    return torch.float16 if torch.float16 in kinds else torch.bfloat16


def bytes_if_needed(x: torch.Tensor, target: Target) -> torch.Tensor:
    """e4m3fn as bytes where the target has no such numbers."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn and not target.fp8_dot else x


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program: BT queries, BS keys at a time; heads and dims padded to powers of two."""

    BT: int
    BS: int
    HP: int
    DP: int
    num_warps: int
    stages: int
    max_registers: int | None = None


def tiles_for(scoring: Scoring, dot: torch.dtype, target: Target) -> Tiles:
    """The sizes that are taken unless a table of measurements says otherwise. ValueError if a query's heads alone are
    too large for the target.

    Two blocks are to share a multiprocessor, so that one multiplies while the other sums over heads: half of its shared
    memory is for the queries that a block holds and the keys that stream past them, half of its registers (128 a
    thread of 8 warps) for the product. wgmma reads the queries at full rate from 256 columns on.
    """
    HP, DP = triton.next_power_of_2(scoring.heads), max(32, triton.next_power_of_2(scoring.dim))
    room, row = target.shared_memory // 2, DP * scoring.k_dtype.itemsize + 4
    columns = 64 if dot == torch.float32 else 256 if target.hopper or target.interpreted else 128
    while columns > max(16, HP) and columns * DP * dot.itemsize > 2 * room // 3:
        columns //= 2
    BT = max(min(columns // HP, triton.next_power_of_2(scoring.tokens_per_seq)), 16 // HP, 1)
    held = BT * HP * DP * dot.itemsize
    BS = PAGE // 2 if dot == torch.float32 and not target.interpreted else PAGE
    while BS > 16 and (BS * BT * HP > 16384 or held + 2 * BS * row > 2 * room - 4096):
        BS //= 2
    if held + 2 * BS * row > target.shared_memory:
        raise ValueError(
            f"q: {scoring.heads} index heads of {scoring.dim} numbers do not fit in {target.shared_memory} bytes of "
            f"shared memory of {target.name}"
        )
    stages = min(max((room - held) // (BS * row), 2), 4)
    if scoring.num_seqs is not None:  # each tile is two loads, one after the other: the page's number, the page
        stages = 2 * stages - 1
    wide = BT * HP >= 128
    converted = dot not in (scoring.q_dtype, scoring.k_dtype) or scoring.q_dtype != scoring.k_dtype
    plain = wide and BT <= 8 and not converted and dot != torch.float32  # many queries of few heads need more
    limit = 128 if plain and target.hopper else None
    return Tiles(BT, BS, HP, DP, 8 if wide else 4, stages, limit)


def tile_candidates(scoring: Scoring, dot: torch.dtype, target: Target) -> list[Tiles]:
    """What a warm-up tries: the default first, then smaller tiles, and other numbers of reads under way."""
    default = tiles_for(scoring, dot, target)
    found = [default, *(replace(default, stages=n) for n in (default.stages - 1, default.stages + 1) if n > 1)]
    if default.BT > 1 and default.BT * default.HP > 32:
        narrow = replace(default, BT=default.BT // 2, max_registers=None)
        found += [narrow, replace(narrow, num_warps=4), replace(narrow, num_warps=4, stages=default.stages + 1)]
    return found


def scoring_arguments(scoring: Scoring, dot: torch.dtype, tiles: Tiles, target: Target) -> dict[str, Any]:
    """All arguments that the scoring kernels share."""
    arguments = dict(scoring.arguments)
    arguments["q"], arguments["keys"] = (bytes_if_needed(arguments[name], target) for name in ("q", "keys"))
    arguments |= {"HEADS": scoring.heads, "DIM": scoring.dim, "BT": tiles.BT, "BS": tiles.BS, "HP": tiles.HP}
    arguments |= {"DP": tiles.DP, "DOT": _TYPES[dot], "PAGED": scoring.num_seqs is not None}
    # float32 by three products of tensor cores, which loses the last bits of a float32 product, or by none of them
    precision = "tf32x3" if dot == torch.float32 and target.backend == "cuda" else "ieee"
    once = target.backend == "cuda" and dot.itemsize == 2
    return arguments | {"PRECISION": precision, "ONCE": once, "STAGES": tiles.stages}


def example(T: int, S: int, heads: int, q_dtype: torch.dtype, k_dtype: torch.dtype, dim: int = 128) -> Scoring:
    """Arguments of a prefill, without memory."""
    q = torch.empty((T, heads, dim), dtype=q_dtype, device="meta")
    k = torch.empty((S, dim), dtype=k_dtype, device="meta")
    weights, ends = torch.empty((T, heads), device="meta"), torch.empty(T, dtype=torch.int32, device="meta")
    scale = torch.empty(S, device="meta") if k_dtype.itemsize == 1 else None
    return Scoring.contiguous(q, k, weights, None, ends, scale)


def example_paged(num_seqs: int, next_n: int, heads: int, q_dtype: torch.dtype, k_dtype: torch.dtype) -> Scoring:
    """Arguments of a decode over pages, without memory."""
    q = torch.empty((num_seqs * next_n, heads, 128), dtype=q_dtype, device="meta")
    weights = torch.empty((num_seqs * next_n, heads), device="meta")
    codes = k_dtype.itemsize == 1
    stored = torch.int8 if k_dtype == torch.int8 else torch.uint8 if codes else k_dtype
    cache = torch.empty((4096, 64 * 132) if codes else (4096, 64, 128), dtype=stored, device="meta")
    tables, lens, starts = (
        torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((num_seqs, 2048), num_seqs, num_seqs + 1)
    )
    return Scoring.paged(q, weights, cache, tables, lens, starts, 131072)
