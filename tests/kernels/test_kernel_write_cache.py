"""Rows that the Triton kernels write into caches are those of the CPU, byte by byte; what is not named stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.kernels.write_cache import (
    rotated_reference,
    write_index_cache,
    write_index_cache_reference,
    write_latent_cache,
    write_latent_cache_reference,
)
from heedful.nn.rope import apply_rope

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
some = settings(deadline=None, max_examples=50)


def rows_of(rng: np.random.Generator, N: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many sizes."""
    x = rng.standard_normal((N, D)) * 10.0 ** rng.integers(-4, 3, (N, D))
    return torch.from_numpy(x.astype(np.float32)).to(dtype)


def garbage(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache whose every byte must stay or be written."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.from_numpy(rng.integers(0, 100, size).astype(np.uint8)).view(dtype)


def slots_of(rng: np.random.Generator, N: int, blocks: int) -> torch.Tensor:
    """Different slots, some -1."""
    slots = rng.permutation(blocks * 64)[:N]
    return torch.from_numpy(np.where(rng.random(N) < 0.2, -1, slots).astype(rng.choice(["i4", "i8"])))


def angles(rng: np.random.Generator, N: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of drawn angles."""
    angle = torch.from_numpy(rng.uniform(-7, 7, (N, half)).astype(np.float32))
    return angle.cos(), angle.sin()


@st.composite
def latents(draw: st.DrawFn) -> dict[str, Any]:
    """Rows, a cache and slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    N, blocks = draw(st.integers(0, 70)), draw(st.integers(2, 3))
    C, R = draw(st.sampled_from([(16, 8), (12, 4), (9, 3), (40, 0), (130, 6), (256, 32)]))
    kind = draw(st.sampled_from(["float32", "bfloat16", "fp8"]))
    width = C + 4 * -(-C // 128) + 2 * R if kind == "fp8" else C + R
    return {
        "latent": rows_of(rng, N, C + R, FLOATS[draw(st.sampled_from(sorted(FLOATS)))]),
        "cache": garbage(rng, (blocks, 64, width), FLOATS.get(kind, torch.uint8)),
        "slot_mapping": slots_of(rng, N, blocks),
        "value_dim": C,
    }


@some
@given(latents())
def test_latent_rows_are_those_of_the_cpu(device: torch.device, given_: dict[str, Any]) -> None:
    want, own = given_["cache"].clone(), given_["cache"].clone()
    cache = given_["cache"].to(device)
    given_ |= {"cache": cache}
    write_latent_cache(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given_.items()})
    ops.write_latent_cache(**{**given_, "cache": want})
    assert torch.equal(cache.cpu().view(torch.uint8), want.view(torch.uint8))
    write_latent_cache_reference(**{**given_, "cache": own})
    assert torch.equal(own.view(torch.uint8), want.view(torch.uint8))


@some
@given(latents(), st.booleans(), st.integers(0, 2**32))
def test_rotation_is_fused(device: torch.device, given_: dict[str, Any], interleaved: bool, seed: int) -> None:
    C, latent, cache = given_["value_dim"], given_["latent"], given_["cache"]
    N, R = len(latent), latent.shape[1] - C
    assume(R % 2 == 0)
    rope = angles(np.random.default_rng(seed), N, R // 2)
    want, got = cache.clone(), cache.to(device)
    slots, rotary = given_["slot_mapping"], latent[:, C:]
    write_latent_cache(
        latent[:, :C].to(device), got, slots.to(device), value_dim=C, k_pe=rotary.contiguous().to(device),
        rope=(rope[0].to(device), rope[1].to(device)), interleaved=interleaved,
    )  # fmt: skip
    turned = apply_rope(rotary[:, None], rope, interleaved=interleaved)[:, 0] if R else rotary
    assert torch.equal(turned, rotated_reference(rotary, rope, interleaved))
    ops.write_latent_cache(torch.cat([latent[:, :C], turned], 1), want, slots, value_dim=C)
    if triton.knobs.runtime.interpret:  # a GPU fuses a product and a sum
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    else:
        read = (ops.read_latent_cache(x.cpu(), slots[slots >= 0], value_dim=C, rope_dim=R) for x in (got, want))
        torch.testing.assert_close(*read, rtol=1e-2, atol=1e-3)


@st.composite
def keys(draw: st.DrawFn) -> dict[str, Any]:
    """Index keys, a cache and slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    N, blocks, Di = (
        draw(st.integers(0, 70)),
        draw(st.integers(2, 3)),
        draw(st.sampled_from([1, 4, 12, 16, 64, 100, 128])),
    )
    kind = draw(st.sampled_from(["float32", "bfloat16", "uint8", "int8"]))
    if kind in FLOATS:
        cache = garbage(rng, (blocks, 64, Di), FLOATS[kind])
    else:
        shape = (blocks, 64 * (Di + 4)) if draw(st.booleans()) else (blocks, 64, Di + 4)
        cache = garbage(rng, shape, getattr(torch, kind))
    return {
        "keys": rows_of(rng, N, Di, FLOATS[draw(st.sampled_from(sorted(FLOATS)))]),
        "cache": cache,
        "slot_mapping": slots_of(rng, N, blocks),
    }


@some
@given(keys(), st.booleans(), st.sampled_from([None, False, True]), st.integers(0, 2**32))
def test_index_keys_are_those_of_the_cpu(
    device: torch.device, given_: dict[str, Any], rotate: bool, interleaved: bool | None, seed: int
) -> None:
    rows = given_["keys"]
    N, Di = rows.shape
    hadamard = rotate and Di & (Di - 1) == 0
    options: dict[str, Any] = {"hadamard": hadamard}
    if interleaved is not None and Di >= 4:
        options |= {"rope": angles(np.random.default_rng(seed), N, Di // 4), "interleaved": interleaved}
    want, own, cache = given_["cache"].clone(), given_["cache"].clone(), given_["cache"].to(device)
    on_device = {**options}
    if "rope" in options:
        on_device["rope"] = tuple(x.to(device) for x in options["rope"])
    write_index_cache(rows.to(device), cache, given_["slot_mapping"].to(device), **on_device)
    turned = rotated_reference(rows, options.get("rope"), bool(interleaved))
    ops.write_index_cache(ops.hadamard(turned) if hadamard else turned, want, given_["slot_mapping"])
    if triton.knobs.runtime.interpret or "rope" not in options:
        assert torch.equal(cache.cpu().view(torch.uint8), want.view(torch.uint8))
    slots = given_["slot_mapping"][given_["slot_mapping"] >= 0]
    got = ops.read_index_cache(cache.cpu(), slots, dim=Di)
    write_index_cache_reference(rows, own, given_["slot_mapping"], **options)
    size = got.abs().amax(1, keepdim=True) if len(got) else got
    assert ((got - ops.read_index_cache(own, slots, dim=Di)).abs() <= 0.13 * got.abs() + 0.01 * size).all()


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_slots_outside_the_cache_are_skipped(device: torch.device, kind: str) -> None:
    far = [2**31 - 1, -(2**31)] if kind == "int32" else [2**33 + 5, -(2**40)]
    slots = torch.tensor([128, 127, -1, 0, -64, *far], dtype=getattr(torch, kind))
    rows = rows_of(np.random.default_rng(1), len(slots), 144, torch.float32)
    for width, dtype in ((144, torch.float32), (164, torch.uint8), (132, torch.uint8), (132, torch.int8)):
        around = garbage(np.random.default_rng(2), (4, 64, width), dtype)
        got, own = around.to(device), around.clone()
        write, reference, D = write_index_cache, write_index_cache_reference, 128
        options: dict[str, Any] = {}
        if width != 132:
            write, reference, D, options = write_latent_cache, write_latent_cache_reference, 144, {"value_dim": 128}
        write(rows[:, :D].to(device), got[1:3], slots.to(device), **options)
        reference(rows[[1, 3], :D], own[1:3], slots[[1, 3]], **options)
        assert torch.equal(got.cpu().view(torch.uint8), own.view(torch.uint8))
        again = around.clone()
        reference(rows[:, :D], again[1:3], slots, **options)
        assert torch.equal(again.view(torch.uint8), own.view(torch.uint8))


def test_bad_numbers_stay_in_their_row(device: torch.device) -> None:
    rows = torch.ones((3, 128))
    rows[1, 5], rows[1, 6] = torch.nan, torch.inf
    for dtype in (torch.uint8, torch.int8):
        cache, want = (torch.zeros((1, 64 * 132), dtype=dtype) for _ in range(2))
        got = cache.to(device)
        slots = torch.arange(3)
        write_index_cache(rows.to(device), got, slots.to(device))
        ops.write_index_cache(rows, want, slots)
        read = (ops.read_index_cache(x.cpu(), slots, dim=128) for x in (got, want))
        torch.testing.assert_close(*read, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_the_published_sizes(device: torch.device, dtype: str) -> None:
    rng = np.random.default_rng(3)
    latent = rows_of(rng, 9, 576, torch.bfloat16)
    cache = garbage(rng, (2, 64, 656 if dtype == "uint8" else 576), getattr(torch, dtype))
    want, got, slots = cache.clone(), cache.to(device), slots_of(rng, 9, 2)
    write_latent_cache(latent.to(device), got, slots.to(device), value_dim=512)
    ops.write_latent_cache(latent, want, slots, value_dim=512)
    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
