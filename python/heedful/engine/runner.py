"""Runs the model over one scheduled step."""

from __future__ import annotations

import numpy as np
import torch

from heedful import Step
from heedful.engine.caches import KVCaches
from heedful.engine.paged_attention import AttentionMode, PagedAttention, StepLayout
from heedful.models import DSAForCausalLM


class ModelRunner:
    """The model and its caches.

    Args:
        model: in evaluation mode, on the caches' device.
        caches: paged caches of all layers.
        attention: "sparse" or "dense".
    """

    def __init__(self, model: DSAForCausalLM, caches: KVCaches, attention: AttentionMode) -> None:
        self.model = model
        self.caches = caches
        self.attention = attention
        self.device = model.lm_head.weight.device

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:
        """Makes the step's copies, computes its N tokens and writes their cache rows: hidden states [N, D]."""
        if len(step.copies):
            self.caches.copy_blocks(step.copies)
        layout = StepLayout(
            slot_mapping=self._tensor(step.slot_mapping),
            query_start_loc=self._tensor(step.query_start_loc),
            seq_lens=self._tensor(step.seq_lens),
            block_tables=self._tensor(step.block_tables),
        )
        # No query can read more keys than its sequence has: a wider selection would be padding.
        index_topk = min(self.model.config.index_topk, int(step.seq_lens.max()))
        attention = PagedAttention(self.caches, layout, mode=self.attention, index_topk=index_topk)
        return self.model.model(self._tensor(step.token_ids), self._tensor(step.positions), attention)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Logits of some rows of `run`'s result: float32 [len(rows), V]."""
        return self.model.lm_head(hidden[self._tensor(rows)]).float()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
