"""The built-in model: what ships is whole, small, trained, and the same model to transformers and to heedful."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import DeepseekV32ForCausalLM

from heedful import builtin
from heedful.config import ModelConfig
from heedful.models import DSAForCausalLM, load_model
from heedful.nn import Attention, FullSequenceAttention

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples/documents/demo.txt"


@pytest.fixture(scope="module")
def model() -> DSAForCausalLM:
    path = builtin.path()
    return load_model(path, ModelConfig.from_file(path), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(builtin.path() / "tokenizer.json"))


def test_finding_it_needs_no_torch() -> None:
    code = "import sys, heedful.builtin as b; assert b.path().is_dir(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in builtin.path().iterdir() if file.is_file()) <= 20e6


def test_config_says_what_the_docs_say(model: DSAForCausalLM) -> None:
    rows = {
        cells[0].strip().strip("`"): cells[1].strip()
        for line in (ROOT / "docs/builtin-model.md").read_text().splitlines()
        if len(cells := line.strip("|").split("|")) == 2
    }
    values = json.loads((builtin.path() / "config.json").read_text())
    documented = [key for key in values if key in rows]
    assert len(documented) >= 20
    for key in documented:
        assert rows[key] == json.dumps(values[key]), key
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_the_demo_document_and_its_continuation_fit_the_context(model: DSAForCausalLM, tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode(DEMO.read_text()).ids)
    assert 8000 <= count <= model.config.max_position_embeddings - 256


def test_the_tokenizer_covers_the_embedding_and_every_byte(model: DSAForCausalLM, tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    assert [tokenizer.id_to_token(i) for i in range(3)] == [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
    ]
    text = "Zwölf Boxkämpfer: 東京 🙂\x00\r\n\t0123456789 " + "".join(map(chr, range(1, 300)))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@torch.no_grad()
@pytest.mark.parametrize("count", [50, 128, 400])  # 128 are selected
def test_transformers_reads_the_same_model(model: DSAForCausalLM, tokenizer: Tokenizer, count: int) -> None:
    theirs = DeepseekV32ForCausalLM.from_pretrained(builtin.path(), dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(DEMO.read_text()).ids[:count]])
    attention = FullSequenceAttention("sparse", index_topk=model.config.index_topk)
    ours = model(ids, torch.arange(count)[None], attention)
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_it_has_learnt(model: DSAForCausalLM, tokenizer: Tokenizer, mode: str) -> None:
    ids = torch.tensor([tokenizer.encode(DEMO.read_text()).ids[:1500]])
    attention: Attention = FullSequenceAttention(mode, index_topk=model.config.index_topk)  # type: ignore[arg-type]
    logits = model(ids[:, :-1], torch.arange(1499)[None], attention)
    assert math.exp(F.cross_entropy(logits[0], ids[0, 1:])) < 100  # random weights give about 4096
