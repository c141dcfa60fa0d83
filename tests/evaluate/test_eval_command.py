"""`mamba-pretrain eval perplexity`: which protocols run, on what, and what it refuses before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mamba_pretrain.cli import main
from mamba_pretrain.config import Config, ModelConfig, load
from mamba_pretrain.model.lm import MambaLM
from tests.helpers.corpora import make_dataset
from tests.helpers.native import write_checkpoint


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", n_documents=16)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Trained, it says, on windows of 2,048 tokens: more than the dataset has."""
    return write_checkpoint(tmp_path / "model", MambaLM(ModelConfig(d_model=8, n_layer=1, vocab_size=257), seed=0))


def evaluate(model: Path, dataset: Path, *words: str) -> int:
    return main(["eval", "perplexity", "--model", str(model), "--data", str(dataset), "--device", "cpu", *words])


def test_a_split_shorter_than_a_window_still_gives_whole_documents(
    model: Path, dataset: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluate(model, dataset) == 0
    assert "| whole documents" in capsys.readouterr().out.splitlines()[-1]
    assert "no window of 2,048 and one more to predict; fixed windows are left out" in caplog.text
    assert evaluate(model, dataset, "--protocol", "windows") == 2
    assert "Choose a smaller --window, or --protocol documents" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--window", "--batch", "--max-documents"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_below_one_are_refused(
    model: Path, dataset: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        evaluate(model, dataset, f"{option}={value}")
    assert done.value.code == 2
    assert f"argument {option}: '{value}' is not a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_damaged_split_is_not_evaluated(
    model: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "larger", n_documents=400)
    path = dataset / f"validation{suffix}"
    content = bytearray(path.read_bytes())
    content[34] ^= 1  # of the index, the length of the first of some documents
    path.write_bytes(content)
    assert evaluate(model, dataset) == 2
    printed = capsys.readouterr()
    assert f"validation{suffix} has sha256" in printed.err
    assert "perplexity |" not in printed.out


def test_a_tokenizer_that_loses_text_is_told(
    model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    manifest["splits"]["train"]["not_round_trip"] = 3  # which is not what is evaluated
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate(model, dataset) == 0
    assert not capsys.readouterr().out.splitlines()[-1].endswith("| - | - |")
    manifest["splits"]["validation"]["not_round_trip"] = 5
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate(model, dataset, "--json", str(tmp_path / "out.json")) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| - | - |")
    assert "5 documents of the split do not decode to their own bytes" in caplog.text
    result = json.loads((tmp_path / "out.json").read_bytes())[0]
    assert (result["bits_per_byte"], result["not_round_trip"]) == (None, 5)


@pytest.mark.parametrize("reset", [True, False])
def test_windows_are_read_as_the_model_was_trained(
    model: Path, dataset: Path, reset: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(files: list[Path], *overrides: object) -> Config:
        config = load(files)
        config.data.seq_len, config.data.reset_documents = 16, reset
        return config

    monkeypatch.setattr("mamba_pretrain.config.load", trained)
    assert evaluate(model, dataset, "--protocol", "windows") == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert "windows of 16 tokens" in row
    assert ("documents reset" if reset else "state flows across documents") in row
