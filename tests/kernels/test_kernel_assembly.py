"""What the interpreter cannot show is read from the assembly: how products are shared out, what is fused and rounded.

Kernels are compiled in a process of its own, as in test_kernel_compiled.py.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, sys
from heedful.kernels.compilation import compile_for
from heedful.kernels.target import Target

module, capability, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
target = Target.cuda(capability)
found = importlib.import_module(f"heedful.kernels.{module}").compilations(target)
print(json.dumps({c.name: compile_for(c, target).assembly for c in found if not wanted or c.name in wanted}))
"""

SMALLEST = """
import torch
from heedful.kernels import fetch_rows, quantize, slots, sparse_attention, split, write_cache
from heedful.kernels.compilation import Compilation, compile_for
from heedful.kernels.rows import Rows
from heedful.kernels.target import Target

def empty(*shape, of=torch.int32):
    return torch.empty(shape, dtype=of, device="meta")

half, single, byte = torch.bfloat16, torch.float32, torch.uint8
for target in map(Target.cuda, (80, 90)):
    q, rows, pages = empty(1, 1, 1, of=half), Rows.contiguous(empty(1, 1, of=half), 1, None), empty(1, 64, 5, of=byte)
    batch, sink, positions = (empty(1, 1), empty(1), empty(2)), empty(1, of=single), empty(1, of=torch.int64)
    apart = Rows.contiguous(empty(1, 1, 1, of=half), 1, empty(1, 1, 1, of=half))
    attend = lambda rows, chosen, *others, **more: sparse_attention.plan(q, rows, chosen, 0.1, *others, target, **more)
    launches = [
        *attend(rows, empty(1, 1), sink, positions, None, None),
        *attend(apart, empty(1, 1), None, None, None, None),
        *attend(rows, None, None, None, positions, None, largest=True),
        *attend(Rows.pages(pages, 1, 1), None, None, None, None, batch),
        slots.plan_slots(empty(1, 1), batch, 1, positions),
        split.plan_merge(empty(1, 1, 1, 1, of=single), empty(1, 1, 1, of=single), sink, half),
        write_cache.plan_latent(empty(1, 1, of=half), pages, empty(1), 1, None, None, True),
        write_cache.plan_index(empty(1, 1, of=half), empty(1, 64, 5, of=byte), empty(1), True, None, False),
        quantize.plan_fp8(empty(1, 1, of=half), 128),
        quantize.plan_int8(empty(1, 1, of=half)),
        fetch_rows.plan(empty(1, 1, of=byte), empty(1, 1, of=byte), empty(1, of=torch.int64), empty(1, of=torch.int64)),
    ]
    for place, launch in enumerate(launches):
        compiled = compile_for(Compilation(str(place), launch), target)
        assert compiled.shared <= target.shared_memory, place
print("compiled")
"""


def run(script: str, *arguments: str) -> str:
    """What a script prints, outside Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def assemblies(module: str, capability: int, *names: str) -> dict[str, str]:
    """PTX of a module's compilations, or of those that are named."""
    found = json.loads(run(SCRIPT, module, str(capability), *names))
    assert set(names) <= set(found)
    return found


ATTENTION = (
    "prefill, 128 heads, 576/512, bfloat16",
    "prefill, pages, 128 heads, 576/512, uint8",
    "dense, 128 heads, 576/512, bfloat16",
)


@pytest.mark.parametrize("name", ATTENTION)
def test_each_warp_group_computes_half_of_the_logits(name: str) -> None:
    text = assemblies("sparse_attention", 90, *ATTENTION)[name]
    # 64 heads x 64 keys x 576 numbers, of which a warp group has 32 keys; then 64 keys x 256 of 512 columns.
    assert text.count("wgmma.mma_async.sync.aligned.m64n32k16") == 576 // 16
    assert text.count("wgmma.mma_async.sync.aligned.m64n256k16") == 64 // 16
    assert text.count("wgmma.mma_async") == 40


def test_no_warp_of_an_a100_computes_what_another_does() -> None:
    text = assemblies("sparse_attention", 80, ATTENTION[0])[ATTENTION[0]]
    # 8 warps share 64 heads x 32 keys x 576 numbers and 64 heads x 32 keys x 512 columns, 16 x 8 x 16 at a time.
    assert text.count("mma.sync.aligned.m16n8k16") == 64 * 32 * (576 + 512) // (16 * 8 * 16) // 8


@pytest.mark.parametrize("name", ATTENTION)
def test_the_next_tile_is_asked_for_before_the_softmax(name: str) -> None:
    text = assemblies("sparse_attention", 90, *ATTENTION)[name]
    loop = text[text.rindex("m64n32k16") :]
    asked, weighed, multiplied = (loop.index(what) for what in ("cp.async.cg", "ex2.approx", "m64n256k16"))
    assert asked < weighed < multiplied
    assert not re.search(r"\bbra\b", loop[:multiplied])  # the branches that part the two products are gone


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("index_scores", "decode, float8_e4m3fn x float8_e4m3fn, 64 heads"),
        ("index_scores", "decode, bfloat16 x bfloat16, 64 heads"),
        ("index_top_k", "prefill over pages, float8_e4m3fn, 64 heads"),
        ("index_top_k", "prefill over pages, bfloat16, 64 heads"),
        ("sparse_attention", "dense, pages, 128 heads, 576/512, bfloat16"),
    ],
)
def test_keys_of_pages_are_fetched_ahead(module: str, name: str, capability: int) -> None:
    """16 bytes at a time, before the loop and in it; without knowing alignment the compiler reads bytes when needed."""
    text = assemblies(module, capability, name)[name]
    fetches = [found.start() for found in re.finditer(r"cp\.async\.cg\.shared\.global.*0x10", text)]
    product = re.search(r"\b(wgmma\.mma_async|mma\.sync)", text)
    assert product
    assert fetches[0] < product.start() < fetches[-1]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_codecs_divide_as_the_cpu_and_fuse_nothing(capability: int) -> None:
    for text in assemblies("quantize", capability).values():
        assert "div.rn.f32" in text
        assert not re.search(r"\b(div\.full|div\.approx|rcp|fma)\b", text)
        assert ".ftz" not in text
    for name, text in assemblies("write_cache", capability).items():
        assert not re.search(r"\b(div\.full|div\.approx|rcp)\b", text), name
        assert ".ftz" not in text, name


def test_int8_codes_are_rounded_by_an_addition_that_stays() -> None:
    text = assemblies("quantize", 90)["int8, 64 heads of 128, bfloat16"]
    assert text.count("0f4B400000") == text.count("0fCB400000") > 0  # 1.5 * 2 ** 23 and its negative


def test_the_smallest_sizes_compile() -> None:
    """A size of one is a constant to the compiler, and no multiple of anything."""
    assert run(SMALLEST) == "compiled\n"
