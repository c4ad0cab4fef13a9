"""Codes of e4m3fn, converted by shifting bits, are the numbers of the definition."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from heedful.kernels.compilation import Launch
from heedful.kernels.e4m3 import e4m3_to_float16
from heedful.ops import reference


@triton.jit
def _convert(codes_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, e4m3_to_float16(tl.load(codes_ptr + at)))


def test_every_code_is_converted_exactly(device: torch.device) -> None:
    codes, out = torch.arange(256, device=device).to(torch.uint8), torch.empty(256, dtype=torch.float16, device=device)
    Launch(_convert, (1,), {"codes_ptr": codes, "out_ptr": out, "N": 256}).run()
    np.testing.assert_array_equal(out.cpu().double().numpy(), reference.e4m3_values())
