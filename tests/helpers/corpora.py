"""Small corpora and datasets for tests, the same on every machine."""

from __future__ import annotations

import json
import random
from pathlib import Path

from data_prep.build_shards import build
from data_prep.corpus import Corpus, split_rule
from mamba_pretrain.data.tokenizer import load_tokenizer

WORDS = ["the", "river", "carries", "sand", "from", "mountain", "to", "sea", "and", "wind", "returns", "it", "slowly"]


def make_documents(n_documents: int, seed: int = 0) -> list[str]:
    """Documents of one to forty words, all different."""
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 40))) + ".\n" for i in range(n_documents)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def make_dataset(
    directory: Path,
    *,
    documents: list[str] | None = None,
    tokenizer: str | Path = "bytes",
    n_documents: int = 64,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.75, 0.25, 0.0),
) -> Path:
    """A dataset in our shard format in `directory` (made, must not exist), of `documents` or of generated text.

    Which document falls in which split follows from its text. fractions=(1, 0, 0) puts all in train, in order.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    corpus = directory.with_name(directory.name + ".jsonl")
    write_jsonl(corpus, make_documents(n_documents, seed) if documents is None else documents)
    build(Corpus([corpus]), load_tokenizer(tokenizer), directory, rule=split_rule(fractions, seed))
    return directory
