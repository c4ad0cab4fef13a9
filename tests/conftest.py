"""Kernels run in Triton's interpreter, on CPU tensors, unless TRITON_INTERPRET=0 says otherwise.

Triton reads the variable when it defines a kernel, its own library of them included, so it is set here, before
anything is imported, for the whole run: nothing else in the suite uses Triton. What compiles kernels runs in a process
of its own without it (`tests/kernels/test_kernel_compiled.py`). On a machine with a GPU,
`TRITON_INTERPRET=0 pytest tests/kernels` runs the same tests there.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("EMULATE") else "1")

if os.environ.get("EMULATE"):
    from emulator import driver

    driver.activate(int(os.environ["EMULATE"]))
