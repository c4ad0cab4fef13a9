"""Latent rows of a batch out of coded pages, as bfloat16, for calls that read each of them many times.

A query of a prefill reads 2,048 rows, and its neighbours most of the same: 4,096 queries read each of 131,072 rows 64
times. Attention then multiplies rows that are numbers already, rounded as it would round them itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.rows import PAGE, Rows, latent_rows_reference, padded, read_part, times_scales, unit_stride
from heedful.kernels.slots import Batch
from heedful.kernels.target import Target

MOST_BYTES = 2**29
"""What rows may take as bfloat16: 466,000 tokens of DeepSeek-V3.2."""
READS = 4
"""How often a row must be read on average to be worth writing."""

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def _dequantize_kernel(
    kc, kr, ks, tables, seq_lens, out, table_row, pages, blocks, kc_row: tl.constexpr, kr_row: tl.constexpr,
    ks_row: tl.constexpr, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Some rows of one page of one sequence."""
    PARTS: tl.constexpr = 64 // ROWS
    place = tl.program_id(0)
    page, b = place // PARTS % pages, place // PARTS // pages
    first = page * 64 + place % PARTS * ROWS
    if first < tl.load(seq_lens + b):
        block = tl.load(tables + b.to(tl.int64) * table_row + page)
        offset = place % PARTS * ROWS + tl.arange(0, ROWS)
        there = (tl.zeros([ROWS], tl.int32) + block >= 0) & (block < blocks)
        slot = block.to(tl.int64) * 64 + offset
        to = out + ((b.to(tl.int64) * pages + page) * 64 + offset)[:, None] * (C + R)
        numbers = times_scales(
            read_part(kc, slot, kc_row, there, C, CP, False), ks, slot, ks_row, there, C, CP, ROWS, BYTES
        )
        columns = tl.arange(0, CP)
        tl.store(to + columns[None, :], numbers.to(tl.bfloat16), mask=there[:, None] & (columns < C)[None, :])
        if R > 0:
            columns = tl.arange(0, RP)
            rest = read_part(kr, slot, kr_row, there, R, RP, BYTES)
            tl.store(to + C + columns[None, :], rest, mask=there[:, None] & (columns < R)[None, :])


# -- launcher ----------------------------------------------------------------------------------------------------------


def is_worth_it(q: torch.Tensor, rows: Rows, K: int, tables: torch.Tensor) -> bool:
    """Whether queries [N, H, C + R] that read K rows each are better served by `dequantize_pages`."""
    tokens, reads = tables.numel() * PAGE, len(q) * min(K, tables.shape[1] * PAGE)
    fits = tokens * (rows.C + rows.R) * 2 <= MOST_BYTES and tokens < 2**31
    return rows.dtype == torch.uint8 and q.dtype == torch.bfloat16 and fits and reads >= READS * tokens > 0


def dequantize_pages(rows: Rows, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """The rows of a batch, one sequence after another.

    Args:
        rows: of a cache of coded pages.
        batch: block tables [B, M], sequence lengths [B], starts of their queries [B + 1], int32.

    Returns:
        bfloat16 [B * M * 64, C + R], of which rows beyond a sequence's length and of blocks that the cache does not
        have hold anything; and the batch, its block tables those of these rows, with -1 for such blocks.
    """
    tables, seq_lens, starts = batch
    launch = plan(rows, batch, Target.of(tables))
    launch.run()
    places = torch.arange(tables.numel(), dtype=torch.int32, device=tables.device).view(tables.shape)
    known = (tables >= 0) & (tables < rows.S // PAGE)
    out: torch.Tensor = launch.arguments["out"]
    return out, (torch.where(known, places, -1), seq_lens, starts)


def plan(rows: Rows, batch: Batch, target: Target) -> Launch:
    """The launch of `dequantize_pages`."""
    tables, seq_lens, _ = batch
    tables = unit_stride(tables)
    B, M = tables.shape
    out = torch.empty((B * M * PAGE, rows.C + rows.R), dtype=torch.bfloat16, device=tables.device)
    names = ("kc", "kr", "ks", "kc_row", "kr_row", "ks_row")
    arguments: dict[str, Any] = {name: rows.arguments[name] for name in names}
    if target.fp8_dot:
        arguments["kc"] = arguments["kc"].view(torch.float8_e4m3fn)
    arguments |= {"tables": tables, "seq_lens": seq_lens, "out": out, "table_row": tables.stride(0)}
    arguments |= {"pages": M, "blocks": rows.S // PAGE, "C": rows.C, "R": rows.R, "CP": padded(rows.C)}
    arguments |= {"RP": padded(rows.R), "ROWS": 16, "BYTES": rows.bytes}
    return Launch(_dequantize_kernel, (B * M * (PAGE // 16),), arguments, 4)


# -- reference ---------------------------------------------------------------------------------------------------------


def dequantize_pages_reference(cache: torch.Tensor, value_dim: int, tables: torch.Tensor) -> torch.Tensor:
    """Every row of the pages in `tables`, all of which are in the cache: bfloat16 [B * M * 64, C + R]."""
    rows = latent_rows_reference(cache, value_dim).to(torch.bfloat16)
    return rows.view(*cache.shape[:2], -1)[tables.long()].flatten(0, 2)


def compilations(target: Target) -> list[Compilation]:
    """Four sequences of 131,072 tokens with the sizes of DeepSeek-V3.2."""
    rows = Rows.pages(torch.empty((8192, PAGE, 656), dtype=torch.uint8, device="meta"), 576, 512)
    tables, lens, starts = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((4, 2048), (4,), (5,)))
    return [Compilation("4 x 131072 tokens, 576/512", plan(rows, (tables, lens, starts), target), main=True)]
