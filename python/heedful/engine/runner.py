"""Runs the model over one scheduled step."""

from __future__ import annotations

import numpy as np
import torch

from heedful import Step
from heedful.engine.cache_layout import BLOCK_SIZE
from heedful.engine.caches import KVCaches, table_tensor
from heedful.engine.fetches import PlanFetch, StepRows
from heedful.engine.graphs import NO_SLOT, DecodeGraphs, Recorder, buckets, whole_blocks
from heedful.engine.host_tier import HostTier
from heedful.engine.paged_attention import AttentionMode, PagedAttention, StepLayout
from heedful.engine.placement import Backend, to_device
from heedful.models import DSAForCausalLM


class ModelRunner:
    """The model and its caches.

    Args:
        model: in evaluation mode, on the caches' device.
        caches: paged caches of all layers.
        attention: "sparse" or "dense".
        backend: what computes attention.
        tier: the host's part of the caches; None where they are on the device whole.
    """

    def __init__(
        self,
        model: DSAForCausalLM,
        caches: KVCaches,
        attention: AttentionMode,
        backend: Backend = "cpu",
        tier: HostTier | None = None,
    ) -> None:
        self.model = model
        self.caches = caches
        self.attention = attention
        self.backend = backend
        self.tier = tier
        self.device = model.lm_head.weight.device
        self.graphs: DecodeGraphs | None = None

    def record_decoding(self, recorder: Recorder, *, max_num_seqs: int, max_model_len: int) -> DecodeGraphs:
        """From now on decoding steps replay recordings, which are made when a size first comes, or by `warm_up`.

        Not with a host tier, where each layer asks the scheduler for its rows.
        """
        assert self.tier is None, "a step that asks the host cannot be replayed"
        self.graphs = DecodeGraphs(
            self._compute, recorder, max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=self.device
        )
        return self.graphs

    def warm_up(self, max_tokens: int) -> None:
        """Compiles what prompts need, by computing some that write no row: the longest, and shorter ones down to an odd
        length, because sizes of tiles follow lengths.

        Args:
            max_tokens: of the longest prompt (or part of one) that a step can have.
        """
        for N in reversed(buckets(17, max_tokens, 2)):
            blocks = np.zeros((1, -(-N // BLOCK_SIZE)), dtype=np.int32)
            places = torch.arange(N, dtype=torch.int32, device=self.device)
            layout = StepLayout(
                slot_mapping=torch.full((N,), NO_SLOT, dtype=torch.int64, device=self.device),
                query_start_loc=torch.tensor([0, N], dtype=torch.int32, device=self.device),
                seq_lens=torch.tensor([N], dtype=torch.int32, device=self.device),
                block_tables=table_tensor(blocks, self.device, self.backend),
                max_seq_len=whole_blocks(N),
            )
            self._compute(torch.zeros_like(places), places, layout)
        if self.tier is not None:
            self.tier.warm_up()

    @torch.inference_mode()
    def run(self, step: Step, plan_fetch: PlanFetch | None = None) -> torch.Tensor:
        """Makes the step's moves, computes its N tokens and writes their cache rows: hidden states [N, D].

        They are valid until the next step.

        Args:
            step: what a scheduler planned.
            plan_fetch: that scheduler's, if there is a host tier.
        """
        rows = None
        if self.tier is not None:
            assert plan_fetch is not None, "a scheduler with a host tier plans its fetches"
            self.tier.move(step)
            rows = StepRows(self.tier, step, plan_fetch)
        self.caches.copy_blocks(step.copies, step.latent_copies)
        if self.graphs is not None and (hidden := self.graphs.run(step)) is not None:
            return hidden
        longest = int(step.seq_lens.max())
        layout = StepLayout(
            slot_mapping=self._tensor(step.slot_mapping),
            query_start_loc=self._tensor(step.query_start_loc),
            seq_lens=self._tensor(step.seq_lens),
            block_tables=table_tensor(step.block_tables, self.device, self.backend),
            # Whole blocks: kernels are compiled apart for lengths that 16 divides, and no other length comes.
            max_seq_len=whole_blocks(longest) if self.backend == "triton" else longest,
        )
        return self._compute(self._tensor(step.token_ids), self._tensor(step.positions), layout, rows)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Logits of some rows of `run`'s result: float32 [len(rows), V]."""
        return self.model.lm_head(hidden[self._tensor(rows)]).float()

    @torch.inference_mode()
    def _compute(
        self, token_ids: torch.Tensor, positions: torch.Tensor, layout: StepLayout, rows: StepRows | None = None
    ) -> torch.Tensor:
        # No query can read more keys than its sequence has: a wider selection would be padding.
        index_topk = min(self.model.config.index_topk, layout.max_seq_len)
        attention = PagedAttention(
            self.caches, layout, mode=self.attention, index_topk=index_topk, backend=self.backend, rows=rows
        )
        return self.model.model(token_ids, positions, attention)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
