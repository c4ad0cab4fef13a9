"""Triton's interpreter (3.6), mended.

It holds scalars in arrays of one element and turns them into Python's integers by `int(array)`, which NumPy 2.4
refuses: a loop whose bounds were computed would stop the kernel. And at each call of a kernel's function, inner ones
too, it looks through the whole of Triton's library for what to replace, which took half of the time; the names do not
change.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def mend() -> None:
    """Replaces both; a second call does nothing, nor does one for an interpreter that is built otherwise."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, patch_builtin, patch_attr = (
        getattr(interpreter, name, None) for name in ("_patch_lang_tensor", "_patch_builtin", "_patch_attr")
    )
    if patch_tensor is None or patch_builtin is None or patch_attr is None:
        return

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_known_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # an outer function may have replaced it
                patch_attr(package, name, member, builder, scope)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._patch_builtin = patch_known_builtins
