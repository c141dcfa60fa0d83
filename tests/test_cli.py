"""The commands as a user types them. What they compute is tested where it is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mamba_pretrain.cli import main
from tests.helpers.runs import OPTIONS


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*OPTIONS, f"data.path={dataset}", f"run_dir={run}", "train.steps=4", "eval.every_steps=2"]
    assert main(["train", *overrides]) == 0
    return run / "checkpoints/step_00000004"


def test_describe_prints_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--config", "configs/pretrain/130m.yaml", "train.micro_batch_size=1"]) == 0
    printed = capsys.readouterr().out
    for part in ("total: 129,135,360", "total: 0.783 G", "572,205", "300,000,215,040", "mixer.A_log (1536, 16)"):
        assert part in printed
    line = next(line for line in printed.splitlines() if "mixer.A_log" in line)
    assert "float32, no decay" in line


def test_describe_takes_the_vocabulary_from_the_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", *OPTIONS, f"data.path={dataset}"]) == 0
    assert "vocabulary 257 padded to 264" in capsys.readouterr().out
    assert main(["describe", *OPTIONS]) == 2
    assert "model.vocab_size is not set" in capsys.readouterr().err


def test_perplexity_is_printed_and_written(
    trained: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ppl.json"
    assert main(["eval", "perplexity", "--model", str(trained), "--data", str(dataset), "--json", str(out)]) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 4 and rows[2].startswith(f"| {trained} |")
    documents, windows = json.loads(out.read_text())
    assert documents["protocol"].startswith("whole documents") and documents["bits_per_byte"] > 0
    assert windows["protocol"].startswith("1") or "windows of 32 tokens" in windows["protocol"]
    assert documents["config_hash"] in rows[2]


def test_a_model_goes_out_and_comes_back_and_speaks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(model: Path) -> str:
        words = ["--prompt", "the river", "--max-tokens", "20", "--seed", "5", "--temperature", "0.7"]
        assert main(["generate", "--model", str(model), *words]) == 0
        return capsys.readouterr().out

    expected = text(trained)
    assert expected.startswith("the river")
    for form in ("hf", "mamba_ssm"):
        assert main(["export", str(trained), str(tmp_path / form), "--to", form]) == 0
        assert main(["import", str(tmp_path / form), str(tmp_path / f"back_{form}"), "--from", form]) == 0
        capsys.readouterr()
        assert text(tmp_path / form) == text(tmp_path / f"back_{form}") == expected


def test_plot_names_its_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(trained.parent.parent), "--output", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [p.name for p in paths] == ["loss.png", "perplexity.png"] and all(p.is_file() for p in paths)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "optim.lrr=1"], "unknown key optim.lrr: did you mean optim.lr?"),
        (["train", "--config", "absent.yaml"], "no such configuration file: absent.yaml"),
        (["train", *OPTIONS], "data.path is not set"),
        (["train", *OPTIONS, "data.path=/absent"], "no dataset in /absent"),
        (["train", *OPTIONS, "train.device=cuda"], "torch sees no GPU here"),
        (["generate", "--model", "/absent"], "no such directory"),
        (["plot", "/absent"], "does not exist"),
        (["export", "/absent", "/tmp/never", "--to", "hf"], "no such directory"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_a_run_directory_that_cannot_be_made_is_a_message(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file/below"):
        assert main(["train", *OPTIONS, f"data.path={dataset}", f"run_dir={run_dir}"]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err


def test_options_may_come_before_and_after_flags(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["describe", f"data.path={dataset}", "--config", "configs/pretrain/quickstart.yaml", "model.n_layer=3"]
    assert main(words) == 0
    assert "3 blocks of d_model 192" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--nonsense"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_run_from_other_weights_is_described_in_their_shape(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["model.d_model=null", "model.n_layer=null"]
    assert main(["describe", *OPTIONS, *shape, f"train.init_from={trained}"]) == 0
    assert "2 blocks of d_model 16" in capsys.readouterr().out


def test_generation_refuses_impossible_sampling(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(trained), "--top-p", "0"]) == 2
    assert "top_p is 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "describe", "eval", "plot", "export", "import", "generate"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  mamba-pretrain {command} " in capsys.readouterr().out
