"""The operators of DeepSeek Sparse Attention: score, select, attend, and the paged caches they read.

NumPy arrays in, NumPy arrays out, torch tensors in, torch tensors out; nothing is copied on the way if it is
contiguous. CUDA tensors are computed by the Triton kernels of `heedful.kernels`, all others in Rust.
`heedful.ops.reference` holds the same operators in float64 NumPy, ten lines each.
"""

from heedful.ops.attention import (
    dense_attention,
    dense_attention_paged,
    hadamard,
    sparse_attention,
    sparse_attention_paged,
)
from heedful.ops.indexer import index_scores, index_scores_paged, index_top_k, index_top_k_paged, top_k
from heedful.ops.pages import (
    dequantize_fp8,
    quantize_fp8,
    quantize_int8,
    read_index_cache,
    read_latent_cache,
    write_index_cache,
    write_latent_cache,
)
from heedful.ops.threads import get_num_threads, set_num_threads

__all__ = [
    "dense_attention",
    "dense_attention_paged",
    "dequantize_fp8",
    "get_num_threads",
    "hadamard",
    "index_scores",
    "index_scores_paged",
    "index_top_k",
    "index_top_k_paged",
    "quantize_fp8",
    "quantize_int8",
    "read_index_cache",
    "read_latent_cache",
    "set_num_threads",
    "sparse_attention",
    "sparse_attention_paged",
    "top_k",
    "write_index_cache",
    "write_latent_cache",
]
