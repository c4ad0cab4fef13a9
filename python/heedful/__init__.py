"""DeepSeek Sparse Attention on any machine.

Importing this package needs only NumPy. The names that need torch (`LLM`, `LLMEngine`) are loaded when they are
first used, so that the tokenizer, the scheduler and the CPU operators serve a process that has no torch.
"""

from typing import TYPE_CHECKING

from heedful._core import (
    BlockPool,
    PrefixCache,
    Scheduler,
    SchedulerConfig,
    Step,
    Tokenizer,
    TokenStream,
    __version__,
    push_batch,
)
from heedful.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from heedful.engine.sampling_params import SamplingParams
from heedful.ops import (
    dense_attention,
    get_num_threads,
    index_scores,
    index_top_k,
    set_num_threads,
    sparse_attention,
    top_k,
)

if TYPE_CHECKING:
    from heedful.engine.engine import LLMEngine
    from heedful.engine.llm import LLM

__all__ = [
    "LLM",
    "BlockPool",
    "CompletionOutput",
    "LLMEngine",
    "Logprob",
    "PrefixCache",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "TokenStream",
    "Tokenizer",
    "__version__",
    "dense_attention",
    "get_num_threads",
    "index_scores",
    "index_top_k",
    "push_batch",
    "set_num_threads",
    "sparse_attention",
    "top_k",
]

_NEEDS_TORCH = {"LLM": "heedful.engine.llm", "LLMEngine": "heedful.engine.engine"}


def __getattr__(name: str) -> object:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'heedful' has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "heedful":
            raise
        raise ModuleNotFoundError(
            f"heedful.{name} needs {error.name}: pip install 'heedful[torch]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEEDS_TORCH})
