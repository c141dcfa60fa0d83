"""Checkpoints in our own form, as a run leaves them, and the tokenizers beside them."""

from __future__ import annotations

import functools
import hashlib
import io
import random
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors.torch import save_file

from mamba_pretrain import checkpoint
from mamba_pretrain.config import Config, ModelConfig, TrainConfig
from mamba_pretrain.distributed.engine import OPTIMIZER
from mamba_pretrain.model.lm import MambaLM


@functools.cache
def sentencepiece_model(kind: str = "unigram", **options: Any) -> bytes:
    """A lossless model of 320 pieces (byte fallback, no normalisation, no dummy prefix), unless `options` differ."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeghinorstuy", k=rng.randint(1, 7))) for _ in range(80)]
    lines = [" ".join(rng.choices(words, k=12)) + "." for _ in range(150)]
    settings = {
        "vocab_size": 320,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, **settings | options
    )
    return model.getvalue()


def tokenizer_facts(content: bytes, vocab_size: int = 320) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    ids = {"vocab_size": vocab_size, "bos_id": 1, "eod_id": 2}
    return {"kind": "sentencepiece", "file": "tokenizer.model", "sha256": digest, **ids}


def write_checkpoint(target: Path, model: MambaLM, tokenizer: bytes | None = None) -> Path:
    """A checkpoint with optimizer and state; `tokenizer` is a SentencePiece model's content."""

    def write_files(directory: Path) -> None:
        save_file(model.state_dict(), directory / checkpoint.MODEL)
        save_file(model.state_dict(), directory / OPTIMIZER)
        (directory / checkpoint.STATE).write_text('{"step": 7}\n')
        if tokenizer is not None:
            (directory / "tokenizer.model").write_bytes(tokenizer)

    run = Config(model=model.config, train=TrainConfig(steps=7, seed=3))
    facts = {"kind": "checkpoint", "step": 7, "tokenizer": tokenizer_facts(tokenizer) if tokenizer else None}
    checkpoint.write(target, run, facts, write_files)
    return target


def small_model(**options: Any) -> MambaLM:
    """Two blocks, 320 tokens padded to 336 rows, and values in fields that no other format has a place for."""
    shape = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 320,
        "pad_vocab_to_multiple_of": 24,
        "d_state": 4,
        "dt_min": 2e-3,
        "embedding_std": 0.03,
    }
    return MambaLM(ModelConfig(**shape | options), seed=1)
