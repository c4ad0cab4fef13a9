"""Triton kernels, one file an operator: the kernel, its launcher and its plain-torch reference."""
