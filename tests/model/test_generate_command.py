"""`mamba-pretrain generate`: what is printed, and what is refused in one message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain import cli, commands
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.model.lm import MambaLM
from tests.helpers.native import sentencepiece_model, small_model, write_checkpoint


def write_model(directory: Path, model: MambaLM | None = None, **tokenizer: Any) -> Path:
    return write_checkpoint(directory / "model", model or small_model(), sentencepiece_model(**tokenizer))


def generate(model: Path, *words: str) -> int:
    return cli.main(["generate", "--model", str(model), "--device", "cpu", "--max-tokens", "20", *words])


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_spaces_between_tokens_are_printed(
    tmp_path: Path, dummy_prefix: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path, add_dummy_prefix=dummy_prefix)
    tokenizer = load_tokenizer(model)
    prompt, text = "the end", "the end and no end"
    continued = tokenizer.encode(text)[len(tokenizer.encode(prompt)) :]
    assert tokenizer.decode(tokenizer.encode(prompt) + continued) == text

    def tokens(*_: object, **__: object) -> Iterator[int]:
        yield from continued

    monkeypatch.setattr(commands, "generate", tokens)
    assert generate(model, "--prompt", prompt) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(vocab_size=336, tie_embeddings=False)
    with torch.no_grad():
        model.head_weight_VD[320:] *= 1000  # what a sampler would take, were these rows tokens
    assert generate(write_model(tmp_path, model), "--prompt", "a") == 0
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "-1"], "seed is -1"),
        (["--seed", "99999999999999999999"], "below 2**63"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "--prompt is not UTF-8"),
    ],
    ids=["negative", "huge", "latin-1"],
)
def test_mistakes_get_one_message(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(write_model(tmp_path), *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""


def test_weights_that_are_not_finite_get_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    assert generate(write_model(tmp_path, model)) == 2
    assert "the logits are not finite" in capsys.readouterr().err
