"""Triton's interpreter, mended (seen with triton 3.6).

The interpreter holds scalars in arrays of one element and turns them into Python's integers by `int(array)`, which
NumPy 2.4 refuses: a loop whose bounds were computed would stop the kernel. And it cuts off what float32 has beyond
bfloat16, where chips round to nearest, ties to even.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def mend() -> None:
    """Takes the one element by name, and rounds; a second call does nothing."""
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, getattr(interpreter, "_patch_lang_tensor", None)
    if patch is not None:

        def patch_and_mend(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_and_mend

    cast = getattr(builder, "cast_impl", None)
    if cast is not None:

        def cast_and_round(self: Any, source: Any, target: Any) -> Any:
            kinds = source.dtype.scalar.name, target.scalar.name
            if kinds != ("fp32", "bf16"):
                return cast(self, source, target)
            return interpreter.TensorHandle(_rounded(source.data), target.scalar)

        builder.cast_impl = cast_and_round


def _rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of the bfloat16 numbers nearest to float32 ones, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, near).astype(np.uint16)
