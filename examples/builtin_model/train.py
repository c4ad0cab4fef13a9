"""Trains the built-in model: dense language modelling, indexer warm-up, sparse stage. CPU, float32.

Each stage has a budget of wall-clock time, and its schedule follows the time spent, since a shared machine's speed
varies. State is saved every two minutes; a run that was cut off goes on from there. One line of log each ten steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attention import SparseStageAttention, WarmUpAttention
from model import CONFIG, CONTEXT, new_model, save
from optimizer import Muon
from tokenizer import REPEATS
from torch.nn import functional as F

from heedful.models import DSAForCausalLM
from heedful.nn import Attention, FullSequenceAttention, MoE, Router
from heedful.nn.moe import Routing

SAVE_EVERY = 120.0  # seconds
BIAS_STEP = 1e-2  # of the routers' balancing rule, times the schedule's rate
STAGES = ("dense", "warmup", "sparse")


@dataclass(frozen=True)
class Schedule:
    """What a stage does at a share of its time between 0 and 1."""

    learning_rate: float
    decay_from: float
    final: float  # of the learning rate
    batch_tokens: int  # of a step, but at least one sequence
    lengths: tuple[tuple[float, int], ...]  # (until this share, tokens of a sequence)

    def rate(self, share: float) -> float:
        """Factor on the optimizer's learning rates."""
        rise = min(1.0, (share + 0.002) / 0.02)
        fall = 1.0 - (1.0 - self.final) * max(0.0, share - self.decay_from) / (1.0 - self.decay_from)
        return self.learning_rate * rise * fall

    def length(self, share: float) -> int:
        """Tokens of a sequence."""
        return next(length for until, length in self.lengths if share <= until)


SCHEDULES = {
    "dense": Schedule(1.0, 0.35, 0.1, 4096, ((0.3, 256), (0.66, 512), (0.8, 2048), (math.inf, CONTEXT))),
    "warmup": Schedule(3e-3, 0.5, 0.1, 2048, ((0.45, 2048), (0.65, 4096), (math.inf, CONTEXT))),
    "sparse": Schedule(0.1, 0.0, 0.05, CONTEXT, ((math.inf, CONTEXT),)),
}


class Corpus:
    """Random windows of the training text.

    Args:
        folder: where tokenizer.py wrote train.npy.
    """

    def __init__(self, folder: Path) -> None:
        tokens = np.load(folder / "train.npy")
        spans = json.loads((folder / "train_spans.json").read_text())
        again = [
            tokens[start:stop] for name, start, stop in spans for _ in range(REPEATS.get(name.split("/")[0], 1) - 1)
        ]
        self.tokens = torch.from_numpy(np.concatenate([tokens, *again]).astype(np.int32))

    def batch(self, tokens: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each [tokens // length (at least 1), length]."""
        count = max(1, tokens // length)
        starts = torch.randint(len(self.tokens) - length - 1, (count,), generator=generator).tolist()
        windows = torch.stack([self.tokens[start : start + length + 1] for start in starts]).long()
        return windows[:, :-1], windows[:, 1:]


class Balance:
    """Balancing of the experts without an auxiliary loss: a router's bias rises for those that got too few tokens."""

    def __init__(self, model: DSAForCausalLM) -> None:
        self.routers = [module.gate for module in model.modules() if isinstance(module, MoE)]
        self.loads = [torch.zeros(CONFIG["n_routed_experts"]) for _ in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(partial(self._count, load))

    @staticmethod
    def _count(load: torch.Tensor, router: Router, args: object, routing: Routing) -> None:
        if torch.is_grad_enabled():
            load += routing.experts.flatten().bincount(minlength=len(load))

    def step(self, size: float) -> float:
        """Moves the biases by `size`; gives the heaviest load as a multiple of the mean."""
        worst = max(float(load.max() / load.mean()) for load in self.loads)
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias += size * (load.mean() - load).sign()
            load.zero_()
        return worst


@contextmanager
def without_indexers(model: DSAForCausalLM) -> Iterator[None]:
    """Dense training has no use for them."""
    layers = [layer.self_attn for layer in model.model.layers]
    indexers = [layer.indexer for layer in layers]
    for layer in layers:
        layer.indexer = None
    try:
        yield
    finally:
        for layer, indexer in zip(layers, indexers, strict=True):
            layer.indexer = indexer


def parameters(model: DSAForCausalLM) -> tuple[list[torch.nn.Parameter], ...]:
    """The model's matrices, its other parameters, and the indexer's."""
    matrices, others, indexer = [], [], []
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            indexer.append(parameter)
        elif parameter.ndim > 1 and "embed_tokens" not in name and ".gate.weight" not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others, indexer


def optimizers(model: DSAForCausalLM, stage: str) -> list[torch.optim.Optimizer]:
    """The optimizers of a stage; a schedule multiplies their learning rates."""
    matrices, others, indexer = parameters(model)
    main = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    if stage == "dense":
        return main
    adam = torch.optim.AdamW(indexer, lr=1.0 if stage == "warmup" else 0.01, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam] if stage == "warmup" else [*main, adam]


def language_loss(
    model: DSAForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, attention: Attention
) -> torch.Tensor:
    """Mean negative log-likelihood of the targets."""
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    hidden = model.model(inputs, positions, attention)
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())


def heldout_loss(model: DSAForCausalLM, folder: Path, length: int, attention: Attention) -> float:
    """Loss over 32,768 tokens of held-out text or a little more, always the same for a length."""
    tokens = torch.from_numpy(np.load(folder / "heldout.npy").astype(np.int64))
    count = -(-32768 // length)
    stride = (len(tokens) - length - 1) // count
    windows = torch.stack([tokens[i * stride : i * stride + length + 1] for i in range(count)])
    rows = max(1, 8192 // length)
    with torch.no_grad():
        losses = [float(language_loss(model, w[:, :-1], w[:, 1:], attention)) for w in windows.split(rows)]
    return sum(losses) / len(losses)


def run_stage(stage: str, model: DSAForCausalLM, corpus: Corpus, corpus_folder: Path, run: Path, budget: float) -> None:
    """Trains one stage until its time is spent.

    Args:
        stage: one of STAGES.
        model: trained in place.
        corpus: the training text.
        corpus_folder: where the held-out tokens are.
        run: folder of the stage's state.
        budget: seconds, those of earlier runs of the stage counted.
    """
    schedule, steppers = SCHEDULES[stage], optimizers(model, stage)
    base_rates = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    attention: Attention = {
        "dense": FullSequenceAttention(),
        "warmup": WarmUpAttention(),
        "sparse": SparseStageAttention(CONFIG["index_topk"]),
    }[stage]
    *main, _ = parameters(model)
    for parameter in (p for group in main for p in group):
        parameter.requires_grad_(stage != "warmup")
    balance = Balance(model)
    generator = torch.Generator().manual_seed(STAGES.index(stage))
    spent, step, seen = 0.0, 0, 0
    state_file = run / f"{stage}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        generator.set_state(state["generator"])
        spent, step, seen = state["spent"], state["step"], state["seen"]
        print(f"{stage}: goes on at step {step}, {spent:.0f} s spent", flush=True)
    started = time.monotonic() - spent
    saved_at = evaluated_at = spent
    while spent < budget:
        share = spent / budget
        for group, base in zip((g for s in steppers for g in s.param_groups), base_rates, strict=True):
            group["lr"] = base * schedule.rate(share)
        inputs, targets = corpus.batch(schedule.batch_tokens, schedule.length(share), generator)
        if stage == "warmup":
            loss = torch.zeros(())  # the indexer's losses are backpropagated in the layers
            for row in inputs.split(1):
                model.model(row, torch.arange(row.shape[1])[None], attention)
        elif stage == "dense":
            with without_indexers(model):
                loss = language_loss(model, inputs, targets, attention)
                loss.backward()
        else:
            loss = language_loss(model, inputs, targets, attention)
            loss.backward()
        norm = 0.0
        if stage != "warmup":
            norm = float(torch.nn.utils.clip_grad_norm_([p for group in main for p in group], 1.0))
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        worst = balance.step(BIAS_STEP * schedule.rate(share)) if stage != "warmup" else 0.0
        step, seen = step + 1, seen + inputs.numel()
        spent = time.monotonic() - started
        if step % 10 == 0 or spent >= budget:
            index_loss = " ".join(f"{value:.3f}" for value in getattr(attention, "losses", []))
            print(
                f"{stage} step {step} time {spent:.0f} tokens {seen} length {inputs.shape[1]}"
                f" loss {float(loss.detach()):.3f} norm {norm:.2f} load {worst:.2f} index_kl [{index_loss}]",
                flush=True,
            )
        if stage == "dense" and (spent - evaluated_at > 600 or spent >= budget):
            with without_indexers(model):
                value = heldout_loss(model, corpus_folder, inputs.shape[1], attention)
            print(f"{stage} step {step} time {spent:.0f} heldout {value:.4f} length {inputs.shape[1]}", flush=True)
            evaluated_at = spent = time.monotonic() - started
        if spent - saved_at > SAVE_EVERY or spent >= budget:
            state = {
                "model": model.state_dict(),
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "generator": generator.get_state(),
                "spent": spent,
                "step": step,
                "seen": seen,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            saved_at = spent
    for router in balance.routers:
        router._forward_hooks.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder that tokenizer.py wrote to")
    parser.add_argument("run", type=Path, help="folder of the run's state")
    parser.add_argument("--minutes", type=float, nargs=3, default=(50, 8, 15), metavar=STAGES)
    parser.add_argument("--export", type=Path, help="writes the checkpoint here at the end")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    model, corpus = new_model(), Corpus(args.corpus)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(corpus.tokens)} tokens of text", flush=True)
    for stage, minutes in zip(STAGES, args.minutes, strict=True):
        run_stage(stage, model, corpus, args.corpus, args.run, minutes * 60)
    if args.export:
        save(model, args.export)


if __name__ == "__main__":
    main()
