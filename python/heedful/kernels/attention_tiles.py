"""Sizes of the programs of attention: how many heads and keys one of them holds, by what a chip has room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from heedful.kernels.rows import Rows, padded
from heedful.kernels.target import KIB, Target


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program.

    Attributes:
        BH: heads of a query.
        BK: keys at a time.
        num_warps, stages: as Triton has them.
        branches: how many steps of a tile stand behind a branch that is always taken, of the softmax and the product
            with the values. The compiler gives the rows of a product to all warps if it sees that another product
            depends on it, which makes the two warp groups of Hopper compute the same logits; behind the first branch it
            does not see it, and each computes half. With the second the next tile is asked for before the softmax.
        turned: whether keys are the rows of the first product and heads its columns. Before Hopper the compiler deals
            the columns of a product out to warps if it has more of them than rows; 64 heads give 8 columns to each of 8
            warps, where 32 keys leave half of the warps to compute again what the others do.
    """

    BH: int
    BK: int
    num_warps: int
    stages: int
    branches: int = 0
    turned: bool = False


def operand_type(q: torch.dtype, rows: torch.dtype, target: Target) -> torch.dtype:
    """The type in which products are taken: 16 bits where both sides have it. Codes times their scales are rounded to
    bfloat16, as their published kernels do, if the queries are bfloat16."""
    if target.interpreted:
        return torch.float32
    same = q == (torch.bfloat16 if rows == torch.uint8 else rows)
    return q if same and q != torch.float32 else torch.float32


def tiles_for(group: int, rows: Rows, dot: torch.dtype, gathered: bool, target: Target) -> Tiles:
    """The sizes that are taken unless a table of measurements says otherwise.

    Hopper: 64 heads and 64 keys are its warp groups' matrices; the queries, two tiles of 576 numbers and the weights on
    their way between the warp groups fill the shared memory, sums of 64 x 512 values half of the registers of 8 warps.
    Their indices are read while the logits are computed, so they need no stage. Elsewhere a tile of 32 keys is
    multiplied while the next is read, and as many heads share it as the shared memory holds. Stages are those of
    Triton's pipeline, of which an index that leads to a row takes one more each.

    Raises:
        ValueError: rows so wide that not even 16 of them fit the shared memory.
    """
    CP, RP, VP = padded(rows.C), padded(rows.R), padded(rows.DV)
    coded, narrow = rows.dtype == torch.uint8, dot == torch.float32
    wide = target.hopper and not narrow and group > 32 and VP <= 512
    branches = 2 if wide and not rows.apart else 0
    room = target.shared_memory - (2 if branches else 4) * KIB
    if wide:
        BH, BK, stages = 64, 64, 2 if branches else 3
    elif target.backend == "hip":
        BH, BK, stages = 16, 16, 3
    elif narrow or coded or target.shared_memory < 160 * KIB:
        BH, BK, stages = 16, 16 if narrow else 32, 5
    else:
        BH, BK, stages = min(64, max(16, triton.next_power_of_2(group))), 32, 5
    while BH > 16 and BH * VP > 32 * 1024:
        BH //= 2

    def needed() -> int:
        buffers = max(1, (stages - 1) // 2) + (wide and not coded)
        number = dot.itemsize
        row = (CP + RP + (VP if rows.apart else 0)) * number
        if coded:
            row = CP + 2 * RP + 16
        converted = BK * CP * number if coded else 0
        queries, keys = BH * (CP + RP) * number, buffers * BK * row + converted
        keys += BH * BK * number if branches else 0
        # AMD's matrix instructions take queries from registers: shared memory holds them on the way there alone.
        return max(queries, keys) if target.backend == "hip" else queries + keys

    while needed() > room and (BH, BK, stages) != (16, 16, 1):
        if stages > 3:
            stages -= 2
        elif BK > 16:
            BK //= 2
        elif BH > 16:
            BH //= 2
        else:
            stages = 1
    if needed() > room:
        widths = f"{rows.C + rows.R}" + (f" and {rows.DV}" if rows.apart else "")
        raise ValueError(f"kv: rows of {widths} numbers do not fit the shared memory of {target.name}, {room} bytes")
    if not gathered and stages > 2:
        stages = (stages + 1) // 2
    if target.backend == "hip":
        stages = min(stages, 2)
    turned = BH == 64 and not (coded or narrow) and target.backend == "cuda" and target.capability < 90
    return Tiles(BH, BK, 8 if VP >= 256 else 4, stages, branches, turned)


def tile_candidates(group: int, rows: Rows, dot: torch.dtype, gathered: bool, target: Target) -> list[Tiles]:
    """The default of `tiles_for`, then what a warm-up measures beside it; not all of them need run on the device."""
    default = tiles_for(group, rows, dot, gathered, target)
    ahead = default.stages | 1  # with a stage for the indices
    deeper, step = ahead + 2 if gathered else default.stages + 1, Tiles(16, 32, 4, 5 if gathered else 3)
    found = [default, *(replace(default, stages=stages) for stages in (ahead, deeper))]
    found += [replace(default, BK=max(16, default.BK // 2), stages=deeper)]
    found += [replace(default, BH=max(16, default.BH // 2)), replace(step, num_warps=8), step]
    found += [replace(step, BH=32, num_warps=8), replace(default, num_warps=4)]
    found += [replace(default, BK=min(64, 2 * default.BK))]
    found += [replace(default, branches=branches) for branches in range(default.branches)]
    found += [replace(default, turned=False)]
    return list(dict.fromkeys(found))
