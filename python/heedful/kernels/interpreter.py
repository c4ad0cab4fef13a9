"""Triton's interpreter, mended.

The interpreter holds scalars in arrays of one element and turns them into Python's integers by `int(array)`, which
NumPy 2.4 refuses: a loop whose bounds were computed would stop the kernel (seen with triton 3.6).
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend() -> None:
    """Takes the one element by name; a second call does nothing."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
