"""MLA attention over paged caches: write this step's rows, score, select, attend. One object a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from heedful import ops
from heedful.engine.caches import KVCaches
from heedful.engine.fetches import StepRows
from heedful.engine.placement import Backend
from heedful.nn import MLA, IndexProjection, LatentProjection

AttentionMode = Literal["sparse", "dense"]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's N tokens of B sequences lie, as the scheduler planned it."""

    slot_mapping: torch.Tensor
    """[N] int64: the cache row each token is written to (block * 64 + offset)."""
    query_start_loc: torch.Tensor
    """[B + 1] int32: each sequence's first token among the N."""
    seq_lens: torch.Tensor
    """[B] int32: keys of each sequence, this step's included."""
    block_tables: torch.Tensor
    """[B, M] int32: blocks of each sequence, -1 past its end."""
    max_seq_len: int
    """At least the largest of seq_lens, known without asking the device."""


class PagedAttention:
    """The `heedful.nn.Attention` of one engine step.

    Args:
        caches: cache tensors of all layers.
        layout: where this step's tokens lie.
        mode: "sparse" reads the selected keys, "dense" all of them (the baseline, on the same caches and code path).
        index_topk: K, keys a query reads in sparse mode.
        backend: what computes it.
        rows: where latent rows are, with a host tier; None where `layout` tells that too.
    """

    def __init__(
        self,
        caches: KVCaches,
        layout: StepLayout,
        *,
        mode: AttentionMode,
        index_topk: int,
        backend: Backend,
        rows: StepRows | None = None,
    ) -> None:
        self.caches = caches
        self.layout = layout
        self.mode = mode
        self.index_topk = index_topk
        self.backend = backend
        self.rows = rows
        self.latent_slots = layout.slot_mapping if rows is None else rows.slot_mapping
        self.pages: dict[str, Any] = {
            "block_tables": layout.block_tables,
            "seq_lens": layout.seq_lens,
            "query_start_loc": layout.query_start_loc,
            "backend": backend,
        }
        self.latent_pages = self.pages if rows is None else {**self.pages, "block_tables": rows.tables}

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._write_latent(layer, mla, projection)
        query = mla.absorb_query(projection)
        cache = self.caches.latent[layer]
        attend: dict[str, Any] = {"scale": mla.scale, "value_dim": mla.kv_lora_rank, "cache": cache}
        if self.mode == "dense":
            attended, _ = ops.dense_attention_paged(query, **attend, **self.latent_pages)
            return mla.expand_value(attended), None
        selection = shared if index is None else self._select(layer, mla, projection, index)
        if selection is None:
            raise ValueError(f"layer {layer} has no indexer and no earlier layer's selection to share")
        if self.rows is None or self.rows.on_device:
            attended, _ = ops.sparse_attention_paged(query, selection, **attend, **self.latent_pages)
        else:
            if index is not None:
                self.rows.plan(layer, selection)
            parts = [
                ops.sparse_attention_paged(query[queries], chosen, **attend, backend=self.backend)[0]
                for queries, chosen in self.rows.fetched(layer)
            ]
            attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return mla.expand_value(attended), selection

    @property
    def rotates_keys(self) -> bool:
        """Whether keys come before RoPE: Triton's kernels turn them while they write them."""
        return self.backend == "triton"

    def _write_latent(self, layer: int, mla: MLA, projection: LatentProjection) -> None:
        """Writes this step's latent rows."""
        cache, value_dim = self.caches.latent[layer], mla.kv_lora_rank
        if projection.rope is None:
            rows = torch.cat((projection.latent, projection.k_pe), dim=-1)
            ops.write_latent_cache(rows, cache, self.latent_slots, value_dim=value_dim, backend=self.backend)
            return
        from heedful.kernels.write_cache import write_latent_cache

        # The parts as they are: they need not be put together either.
        latent, k_pe, rope = projection.latent, projection.k_pe, projection.rope
        write_latent_cache(latent, cache, self.latent_slots, value_dim=value_dim, k_pe=k_pe, rope=rope)

    def _write_index(
        self, cache: torch.Tensor, mla: MLA, projection: LatentProjection, key: torch.Tensor, hadamard: bool
    ) -> None:
        """Writes this step's index keys."""
        slots = self.layout.slot_mapping
        if projection.rope is None:
            ops.write_index_cache(key, cache, slots, hadamard=hadamard, backend=self.backend)
            return
        from heedful.kernels.write_cache import write_index_cache

        assert mla.indexer is not None
        interleaved = mla.indexer.rope_interleaved
        write_index_cache(key, cache, slots, hadamard=hadamard, rope=projection.rope, interleaved=interleaved)

    def _select(self, layer: int, mla: MLA, projection: LatentProjection, index: IndexProjection) -> torch.Tensor:
        """Writes this step's index keys and picks each query's keys: int32 [N, K]."""
        cache = self.caches.index[layer]
        assert cache is not None, f"layer {layer} has an indexer and no cache for its keys"
        query, key, weights = index.query, index.key, index.weights
        # The rotation leaves exact dot products unchanged and spreads outliers before they are rounded to bytes.
        in_bytes = cache.dtype.itemsize == 1
        if in_bytes:
            query, scales = self._quantize(ops.hadamard(query, backend=self.backend), cache.dtype)
            weights = weights * scales
        self._write_index(cache, mla, projection, key, in_bytes)
        # In rising order, which is how the rows lie in the pages that are read next.
        return ops.index_top_k_paged(
            query,
            weights,
            self.index_topk,
            cache=cache,
            sorted=False,
            max_seq_len=self.layout.max_seq_len,
            **self.pages,
        )

    def _quantize(self, query: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, Hi, Di] as the keys' are, and their scales [N, Hi]."""
        if dtype == torch.int8:
            return ops.quantize_int8(query, backend=self.backend)
        codes, scales = ops.quantize_fp8(query, group_size=query.shape[-1], backend=self.backend)
        return codes.view(torch.float8_e4m3fn), scales[..., 0]
