"""Types of the compiled module `heedful._core` (checked against it in tests/test_stubs.py)."""

__version__: str
