"""Trains the built-in model's byte-level BPE, with the pre-tokenizer and the special tokens of DeepSeek-V3.2.

Reads `train.jsonl` (see corpus.py), writes tokenizer.json and tokenizer_config.json, and encodes both parts of the
corpus to `train.npy` and `heldout.npy` (uint16, an end-of-sentence token after each document).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
REPEATS = {"novels": 3}  # the only narrative prose, so it counts three times, here and in training

_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def read_documents(path: Path) -> Iterator[dict[str, str]]:
    """Documents of a .jsonl file."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)


def train(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config(context: int) -> dict[str, object]:
    """Contents of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": context,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def encode(tokenizer: Tokenizer, documents: Iterator[dict[str, str]]) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """All documents' ids in a row, and each one's name, start and end."""
    eos = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    spans = []
    for document in documents:
        start = len(ids)
        ids += [*tokenizer.encode(document["text"], add_special_tokens=False).ids, eos]
        spans.append((document["name"], start, len(ids)))
    return np.array(ids, dtype=np.uint16), spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder that corpus.py wrote to")
    parser.add_argument("model", type=Path, help="folder that gets tokenizer.json and tokenizer_config.json")
    parser.add_argument("--context", type=int, default=10240, help="the model's trained context")
    args = parser.parse_args()

    def texts() -> Iterator[str]:
        for document in read_documents(args.corpus / "train.jsonl"):
            for _ in range(REPEATS.get(document["source"], 1)):
                yield document["text"]

    tokenizer = train(texts())
    args.model.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.model / "tokenizer.json"))
    config = json.dumps(tokenizer_config(args.context), indent=2, ensure_ascii=False)
    (args.model / "tokenizer_config.json").write_text(config + "\n")
    for part in ("train", "heldout"):
        ids, spans = encode(tokenizer, read_documents(args.corpus / f"{part}.jsonl"))
        np.save(args.corpus / f"{part}.npy", ids)
        (args.corpus / f"{part}_spans.json").write_text(json.dumps(spans))
        print(f"{part}: {len(ids)} tokens in {len(spans)} documents")


if __name__ == "__main__":
    main()
