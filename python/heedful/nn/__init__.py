"""The layers of a DSA model as torch modules, named and shaped as in its checkpoint.

`MLA` and `LightningIndexer` only project; what reads and writes keys is an `Attention` handed to the forward
pass, so the same weights run over paged caches (`heedful.engine`), over a full sequence, or in training.
Leading dimensions are free.
"""

from heedful.nn.attention import Attention, FullSequenceAttention
from heedful.nn.indexer import IndexProjection, LightningIndexer
from heedful.nn.mla import MLA, LatentProjection
from heedful.nn.mlp import MLP
from heedful.nn.moe import MoE, Router
from heedful.nn.norm import RMSNorm
from heedful.nn.rope import RotaryEmbedding, apply_rope

__all__ = [
    "MLA",
    "MLP",
    "Attention",
    "FullSequenceAttention",
    "IndexProjection",
    "LatentProjection",
    "LightningIndexer",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "apply_rope",
]
