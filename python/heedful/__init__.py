"""DeepSeek Sparse Attention on any machine.

Importing this package needs only NumPy. The names that need torch (`LLM`, `SamplingParams`, ...) are loaded
when they are first used, so that the tokenizer, the scheduler and the CPU operators serve a process that has
no torch.
"""

from heedful._core import __version__

__all__ = ["__version__"]
