"""The compressors' figures are sane where the answer is known."""

from __future__ import annotations

import builtins
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import BytesTokenizer
from mamba_pretrain.data.writer import ShardWriter
from mamba_pretrain.evaluate import baselines
from mamba_pretrain.evaluate.perplexity import EvaluationError

pytest.importorskip("pyppmd")
NAMES = ["xz -9", "PPMd order 5", "PPMd order 16"]


def measured(evaluation: bytes, training: bytes = b"") -> dict[str, float]:
    return {b.name: b.bits_per_byte for b in baselines.measure(evaluation, training)}


def sentences(n_words: int, seed: int) -> bytes:
    words = ["river", "sand", "mountain", "carries", "slowly", "night", "wind", "returns", "the", "from", "to", "sea"]
    return " ".join(random.Random(seed).choices(words, k=n_words)).encode()


def test_random_bytes_do_not_compress() -> None:
    found = measured(random.Random(0).randbytes(50_000))
    assert list(found) == NAMES
    assert all(8.0 <= bits < 8.3 for bits in found.values()), found


def test_xz_is_the_command_with_option_9() -> None:
    text = sentences(5000, seed=1)
    assert measured(text)["xz -9"] == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_repetition_costs_next_to_nothing() -> None:
    assert all(bits < 0.1 for bits in measured(b"all work and no play " * 1000).values())


def test_priming_helps_on_similar_text_and_the_order_of_strength_holds() -> None:
    found = measured(sentences(2000, seed=1), sentences(20_000, seed=2))
    assert list(found) == [name for n in NAMES for name in (n, f"{n}, primed")]
    for name in NAMES:
        assert found[f"{name}, primed"] <= found[name]
    assert found["PPMd order 5, primed"] < found["xz -9, primed"]


def test_priming_with_the_text_itself_leaves_little_to_say() -> None:
    text = random.Random(0).randbytes(20_000)
    assert measured(text, text)["xz -9, primed"] < 0.2


def test_how_it_was_measured_is_told() -> None:
    alone, primed, *_ = baselines.measure(b"evaluation", b"training")
    assert alone.how == "10 bytes of evaluation text"
    assert primed.how == "10 bytes of evaluation text after the last 8 bytes of training text"


def test_only_the_end_of_the_training_text_primes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PRIMING_BYTES", 100)
    noise, text = random.Random(0).randbytes(5000), sentences(100, seed=3)
    assert measured(text, noise + text[-100:]) == measured(text, text[-100:])


def test_texts_of_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BytesTokenizer()
    for split, documents in (("train", ["one ", "two ", "three "]), ("validation", ["four ", "five ", "six "])):
        with ShardWriter(tmp_path / split, vocab_size=tokenizer.vocab_size) as writer:
            for text in documents:
                writer.append(np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eod_id]))
    train, validation = Shard(tmp_path / "train"), Shard(tmp_path / "validation")
    assert baselines.texts(validation, train, tokenizer) == (b"four five six ", b"one two three ")
    monkeypatch.setattr(baselines, "PRIMING_BYTES", 8)
    assert baselines.texts(validation, train, tokenizer, max_documents=2) == (b"four five ", b"o three ")


def test_no_text_and_no_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="no evaluation text"):
        baselines.measure(b"", b"training")
    real_import = builtins.__import__

    def without_pyppmd(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pyppmd":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyppmd)
    with pytest.raises(EvaluationError, match=r"mamba-pretrain\[report\]"):
        baselines.measure(b"text", b"")
