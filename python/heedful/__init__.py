"""DeepSeek Sparse Attention on any machine.

Importing this package needs only NumPy. The names that need torch (`LLM`, `SamplingParams`, ...) are loaded
when they are first used, so that the tokenizer, the scheduler and the CPU operators serve a process that has
no torch.
"""

from heedful import ops
from heedful._core import __version__
from heedful.ops import *  # noqa: F403
from heedful.ops import __all__ as _operators

__all__ = ["__version__", "ops", *_operators]
