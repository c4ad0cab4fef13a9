"""What the functions over torch tensors ask of their arguments before they look at them."""

from __future__ import annotations

import torch


def expect_tensors(**arguments: object) -> None:
    """Raises ValueError for the first argument that is neither a torch tensor nor None."""
    for name, value in arguments.items():
        if not (value is None or isinstance(value, torch.Tensor)):
            raise ValueError(f"{name}: expected a torch tensor, got {type(value).__name__}")
