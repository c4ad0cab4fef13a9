"""The Hadamard transform and the codecs of the Triton kernels give the bits of the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.kernels.hadamard import hadamard, hadamard_reference
from heedful.kernels.quantize import (
    e4m3_reference,
    quantize_fp8,
    quantize_fp8_reference,
    quantize_int8,
    quantize_int8_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
some = settings(deadline=None, max_examples=50)


@st.composite
def arrays(draw: st.DrawFn, powers: bool = False) -> torch.Tensor:
    """Numbers of many sizes, with zeros, halves of codes, infinities and NaN in places."""
    lead = draw(st.lists(st.integers(0, 5), max_size=2))
    D = 2 ** draw(st.integers(0, 8)) if powers else draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((*lead, D)) * 10.0 ** (rng.integers(-3, 3, (*lead, D)) * (1 if powers else 2))
    if draw(st.booleans()):
        x = rng.integers(-1000, 1000, (*lead, D)) / 2.0
    if draw(st.booleans()) and not powers:
        x[rng.random(x.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0])
    return torch.from_numpy(x.astype(np.float32)).to(draw(st.sampled_from(DTYPES)))


@some
@given(arrays(powers=True))
@pytest.mark.filterwarnings("ignore:overflow")
def test_hadamard_gives_the_bits_of_the_cpu(device: torch.device, x: torch.Tensor) -> None:
    got = hadamard(x.to(device)).cpu()
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, ops.hadamard(x), rtol=0, atol=0, equal_nan=True)
    size = x.double().abs().amax().item() if x.numel() else 0.0
    exact = hadamard_reference(x)
    finite = got.isfinite()  # float16 overflows
    error = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
    assert ((got.double() - exact).abs()[finite] <= error * (exact.abs()[finite] + size) + 1e-7).all()


@some
@given(arrays(), st.sampled_from([1, 7, 32, 128, 500]))
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_fp8_gives_the_bits_of_the_cpu(device: torch.device, x: torch.Tensor, group: int) -> None:
    codes, scales = (part.cpu() for part in quantize_fp8(x.to(device), group_size=group))
    want_codes, want_scales = ops.quantize_fp8(x, group_size=group)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)
    for got, want in zip((codes, scales), quantize_fp8_reference(x, group_size=group), strict=True):
        # torch gives one NaN of the two
        assert torch.equal(got, torch.where((got & 0x7F) == 0x7F, got, want) if got.dtype == torch.uint8 else want)


@some
@given(arrays())
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_int8_gives_the_bits_of_the_cpu(device: torch.device, x: torch.Tensor) -> None:
    codes, scales = (part.cpu() for part in quantize_int8(x.to(device)))
    for want_codes, want_scales in (ops.quantize_int8(x), quantize_int8_reference(x)):
        assert torch.equal(codes, want_codes)
        torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


def test_every_code_and_every_middle_of_two(device: torch.device) -> None:
    values = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([448.0] * 3)])
    x = torch.cat([x, -x]).view(-1, 512)  # 448 is the largest of each group, so the scale is one
    codes, scales = (part.cpu() for part in quantize_fp8(x.to(device), group_size=512))
    assert scales.tolist() == [[1.0]]
    assert torch.equal(codes, e4m3_reference(x))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 128)])
def test_nothing_is_quantised_to_nothing(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=device)
    codes, scales = quantize_fp8(x)
    want = ops.quantize_fp8(torch.zeros(shape))
    assert (codes.shape, scales.shape) == (want[0].shape, want[1].shape)
    codes, scales = quantize_int8(x)
    want = ops.quantize_int8(torch.zeros(shape))
    assert (codes.shape, scales.shape) == (want[0].shape, want[1].shape)
    assert torch.equal(scales.cpu(), want[1])
