"""FP8 e4m3fn codes to numbers, for chips and tools without the conversion (Micikevicius et al. 2022).

The bits of a code, moved to where float16 has its own, are the number times 2^-8: the bias of exponents is 7 in one
and 15 in the other, and subnormals stay subnormal. So shifts and one product convert exactly; NaN is set apart.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_float16(codes):
    """The numbers of e4m3fn codes (uint8, any shape), exactly, as float16."""
    wide = codes.to(tl.uint16)
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)
