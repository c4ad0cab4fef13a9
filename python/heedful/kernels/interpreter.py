"""Triton's interpreter (3.4 to 3.9), mended.

It holds scalars in arrays of one element and turns them into Python's integers by `int(array)`, which NumPy 2.4
refuses: a loop whose bounds were computed would stop the kernel. It cuts off what float32 has beyond bfloat16, where
chips round to nearest, ties to even. And at each call of a kernel's function, inner ones too, it looks through the
whole of Triton's library for what to replace, which took half of the time; the names do not change.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


@functools.cache
def mend() -> None:
    """Replaces the three; a second call does nothing, nor does one for an interpreter that is built otherwise."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = getattr(builder, "cast_impl", None)
    if cast is not None:

        def cast_and_round(self: Any, source: Any, target: Any) -> Any:
            kinds = source.dtype.scalar.name, target.scalar.name
            if kinds != ("fp32", "bf16"):
                return cast(self, source, target)
            return interpreter.TensorHandle(_rounded(source.data), target.scalar)

        builder.cast_impl = cast_and_round

    patch_tensor, patch_builtin, patch_attr = (
        getattr(interpreter, name, None) for name in ("_patch_lang_tensor", "_patch_builtin", "_patch_attr")
    )
    if patch_tensor is None or patch_builtin is None or patch_attr is None:
        return

    # The scope, which undoes what it has set, came with Triton 3.6.
    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_known_builtins(package: Any, builder: Any, *scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # an outer function may have replaced it
                patch_attr(package, name, member, builder, *scope)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_builtin = patch_known_builtins


def _rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of the bfloat16 numbers nearest to float32 ones, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, near).astype(np.uint16)
