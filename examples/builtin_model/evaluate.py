"""Measures a model on held-out documents at full context: perplexity by position, and what the selection keeps.

Windows are whole pieces of one document, so the last token of a window has all the earlier ones to read. In sparse
mode the attention of every 64th query is also computed over all earlier tokens: recall is its mass on the selected
set, beside the mass on the K latest tokens and on the best K there are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from attention import SparseStageAttention, expanded
from model import CONFIG, CONTEXT, new_model
from torch.nn import functional as F

from heedful.config import ModelConfig
from heedful.models import DSAForCausalLM, load_model
from heedful.nn import MLA, Attention, FullSequenceAttention, IndexProjection, LatentProjection

BUCKETS = (0, 128, 512, 1024, 2048, 4096, 6144, 8192, CONTEXT)
PROBE_EVERY = 64


class RecallProbe(SparseStageAttention):
    """Sparse attention that also measures what the selection keeps.

    Attributes:
        kept: for each layer, for each window, [queries, 3]: attention mass on the selected, latest and best tokens.
    """

    def __init__(self, index_topk: int) -> None:
        super().__init__(index_topk)
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(CONFIG["num_hidden_layers"])]

    def __call__(
        self,
        layer: int,
        mla: MLA,
        projection: LatentProjection,
        index: IndexProjection | None,
        shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads, selection = super().__call__(layer, mla, projection, index, shared)
        assert selection is not None
        query, key, _ = expanded(mla, projection)
        probed = torch.arange(PROBE_EVERY - 1, query.shape[1], PROBE_EVERY)
        age = probed[:, None] - torch.arange(key.shape[1])
        logits = query[:, probed] @ key.mT * mla.scale
        p = logits.masked_fill(age < 0, float("-inf")).softmax(-1).mean(0)  # [queries, T]
        chosen = selection[0, probed]
        selected = p.gather(1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, 0).sum(-1)
        latest = p.masked_fill(age >= self.index_topk, 0).sum(-1)
        best = p.topk(self.index_topk).values.sum(-1)
        self.kept[layer].append(torch.stack((selected, latest, best), dim=-1))
        return heads, selection


def load(path: Path) -> DSAForCausalLM:
    """A checkpoint folder or the saved state of a training stage, in float32."""
    if path.is_dir():
        return load_model(path, ModelConfig.from_file(path), torch.float32, torch.device("cpu"))
    model = new_model()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()


def windows(corpus: Path, most: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Source and CONTEXT + 1 tokens of each window; at most `most` of a document, its first."""
    tokens = torch.from_numpy(np.load(corpus / "heldout.npy").astype(np.int64))
    for name, start, stop in json.loads((corpus / "heldout_spans.json").read_text()):
        for begin in range(start, min(stop - CONTEXT, start + most * CONTEXT), CONTEXT):
            yield name.split("/")[0], tokens[begin : begin + CONTEXT + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder that tokenizer.py wrote to")
    parser.add_argument("model", type=Path, help="checkpoint folder, or a stage's .pt file")
    parser.add_argument("--attention", choices=("dense", "sparse"), default="sparse")
    parser.add_argument("--windows", type=int, default=5, help="most windows of a document")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    probe = RecallProbe(CONFIG["index_topk"])
    attention: Attention = probe if args.attention == "sparse" else FullSequenceAttention()
    sources, losses = [], []
    for source, tokens in windows(args.corpus, args.windows):
        with torch.no_grad():
            logits = model(tokens[None, :-1], torch.arange(CONTEXT)[None], attention)[0]
        losses.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
        sources.append(source)
    loss = torch.stack(losses)  # [windows, CONTEXT]
    print(f"{args.model.name}, {args.attention}: {loss.numel()} tokens, perplexity {math.exp(loss.mean()):.2f}")
    for source in dict.fromkeys(sources):
        rows = torch.tensor([s == source for s in sources])
        print(f"  {source:12} {int(rows.sum()):3} windows, perplexity {math.exp(loss[rows].mean()):.2f}")
    for start, stop in pairwise(BUCKETS):
        print(f"  positions {start:5} to {stop:5}: perplexity {math.exp(loss[:, start:stop].mean()):.2f}")
    if args.attention == "sparse":
        kept = torch.stack([torch.stack(layer) for layer in probe.kept])  # [layers, windows, queries, 3]
        at = torch.arange(PROBE_EVERY - 1, CONTEXT, PROBE_EVERY)
        for start, stop in ((128, 1024), (1024, 4096), (4096, 8192), (8192, CONTEXT)):
            mass = kept[:, :, (at >= start) & (at < stop)].mean((1, 2))
            cells = "; ".join("/".join(f"{value:.3f}" for value in layer) for layer in mass.tolist())
            print(f"  attention mass selected/latest/best, positions {start} to {stop}, by layer: {cells}")


if __name__ == "__main__":
    main()
