"""Checkpoints that DeepSpeed itself has written, from a run like a stranger's, go on here as they would have there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain.build import build
from mamba_pretrain.cli import main
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.packing import n_windows
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER
from mamba_pretrain.distributed.ranks import Ranks
from mamba_pretrain.export.deepspeed import translate
from mamba_pretrain.export.deepspeed_files import FormatError, Inert, convert, load_safely
from mamba_pretrain.export.pretrained import build_model, read_pretrained
from mamba_pretrain.train import steps
from tests.helpers.deepspeed_runs import RUN, run_cases
from tests.helpers.engines import relative
from tests.helpers.processes import on_ranks
from tests.helpers.runs import OPTIONS, small_config

pytestmark = pytest.mark.slow  # DeepSpeed takes ten seconds to import, and its converter more processes

CASES: dict[str, dict[str, Any]] = {
    "zero-1": {"stage": 1},
    "zero-2-bf16": {"stage": 2, "bf16": True, "prefix": "module."},
    "zero-3": {"stage": 3},
    "zero-1-bf16": {"stage": 1, "bf16": True, "options": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "zero-2": {"stage": 2, "prefix": "model."},
    "zero-3-bf16": {"stage": 3, "bf16": True},
}


@pytest.fixture(scope="module")
def theirs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return run_cases(dataset, tmp_path_factory.mktemp("deepspeed"), CASES)


@pytest.fixture(scope="module")
def universal(theirs: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DeepSpeed's converter leaves it."""
    made = tmp_path_factory.mktemp("converted") / "universal"
    convert(theirs[0] / "zero-1" / "global_step3", made)
    return made


@pytest.fixture
def editable(universal: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(universal, tmp_path / "universal"))


def words(dataset: Path) -> list[str]:
    return [*OPTIONS, *RUN, f"data.path={dataset}"]


def check_import(source: Path, run: Path, dataset: Path, expected: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """To the bit what DeepSpeed held; the manifest, and the run's own next step beside DeepSpeed's."""
    assert main(["import", str(source), str(run), "--from", "deepspeed", *words(dataset)]) == 0
    path = run / "checkpoints" / "step_00000003"
    manifest = checkpoint.verify(path)
    found = {
        name: pieces.tensor(name)
        for part in (MODEL, OPTIMIZER)
        for pieces in [checkpoint.open_part(path, manifest, part)]
        for name in pieces.shapes
    }
    assert found.pop("step").item() == 3
    saved, after = expected
    assert found.keys() == saved.keys()
    assert [name for name, value in saved.items() if not torch.equal(value, found[name])] == []
    state = json.loads((path / checkpoint.STATE).read_text())
    expected = {"step": 3, "samples": 24, "tokens": 768, "epoch": 24 // windows_of(dataset), "uncounted_tokens": 768}
    assert {name: state[name] for name in expected} == expected
    assert {p.name for p in run.parent.iterdir()} == {run.name}, "the scratch directory is removed"

    going_on = build(small_config(dataset, run, *RUN, "checkpoint.resume=auto"))
    next(steps(going_on))
    for name, whole in going_on.engine.full_parameters():
        rows = 257 if name == "backbone.embedding.weight" else None  # padding rows do not decay here
        assert relative(whole[:rows], after[name][:rows]) < TOLERANCE[source.name.endswith("bf16")], name


# DeepSpeed's bf16 computes with bf16 parameters and gradients, A_log too; this run goes on in fp32.
TOLERANCE = {False: 1e-6, True: 2e-3}


def windows_of(dataset: Path) -> int:
    return n_windows(open_split(dataset, "train")[0], 32)


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_from_deepspeeds_checkpoint(
    name: str, theirs: tuple[Path, dict[str, Any]], dataset: Path, tmp_path: Path
) -> None:
    check_import(theirs[0] / name, tmp_path / "run", dataset, theirs[1][name])


def test_the_zero_engine_goes_on_from_it_too(
    universal: Path, theirs: tuple[Path, dict[str, Any]], dataset: Path, tmp_path: Path
) -> None:
    assert main(["import", str(universal), str(tmp_path / "run"), "--from", "deepspeed", *words(dataset)]) == 0
    options = [*RUN, "checkpoint.resume=auto", "train.engine=zero", "zero.stage=3"]

    def one_step(ranks: Ranks) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        run = build(small_config(dataset, tmp_path / "run", *options), ranks)
        next(steps(run))
        return {name: whole.detach().clone() for name, whole in run.engine.full_parameters()}

    for name, whole in on_ranks(2, one_step)[0].items():
        rows = 257 if name == "backbone.embedding.weight" else None
        assert relative(whole[:rows], theirs[1]["zero-1"][1][name][:rows]) < TOLERANCE[False], name


def test_without_a_dataset_it_becomes_a_model(
    universal: Path, theirs: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", str(universal), str(tmp_path / "model"), "--from", "deepspeed"]
    assert main([*command, "model.norm_eps=1e-6"]) == 0
    found = read_pretrained(tmp_path / "model")
    shape = found.config
    assert (shape.d_model, shape.n_layer, shape.d_state, shape.vocab_size, shape.norm_eps) == (16, 2, 4, 264, 1e-6)
    assert shape.tie_embeddings and shape.conv_bias and not shape.linear_bias
    assert (found.facts["kind"], found.facts["from"], found.run) == ("model", "deepspeed", None)
    saved = theirs[1]["zero-1"][0]
    assert all(torch.equal(value, saved[name]) for name, value in found.weights.items())
    build_model(found)
    capsys.readouterr()

    assert main(command) == 2
    assert "exists; choose another output, or pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "model.vocab_size=257"]) == 0
    assert read_pretrained(tmp_path / "model").config.vocab_size == 257
    assert main([*command, "--overwrite", "model.d_state=8"]) == 2
    message = capsys.readouterr().err
    assert "its shapes tell model.d_model=16 model.n_layer=2 model.vocab_size=264 model.d_state=4" in message
    assert "mixer.A_log has shape (32, 4), the configuration's model (32, 8)" in message


def test_a_run_directory_is_not_written_twice(
    universal: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["import", str(universal), str(run), "--from", "deepspeed", *words(dataset)]
    assert main([*command, "--samples", "1000"]) == 0
    state = json.loads((run / "checkpoints" / "step_00000003" / checkpoint.STATE).read_text())
    expected = {"step": 3, "samples": 1000, "tokens": 32_000, "epoch": 1000 // windows_of(dataset)}
    assert {name: state[name] for name in expected} == expected
    assert main(command) == 2
    assert "holds checkpoints up to step_00000003: choose another run directory" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    (run / "checkpoints" / "step_00000003").rename(run / "checkpoints" / "step_00000009")
    assert main([*command, "--overwrite"]) == 2
    assert "holds step_00000009 too" in capsys.readouterr().err
    assert main([*command, "run_dir=elsewhere"]) == 2
    assert "run_dir is elsewhere, the target" in capsys.readouterr().err


def refusal(source: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `import` says; nothing is left of it."""
    target = source.parent / "refused"
    before = sorted(source.parent.iterdir())
    assert main(["import", str(source), str(target), "--from", "deepspeed", *more]) == 2
    assert sorted(source.parent.iterdir()) == before
    return capsys.readouterr().err


def test_a_directory_without_a_checkpoint_is_refused(
    theirs: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(theirs[0] / "zero-3", tmp_path / "source"))
    (source / "latest").write_text("global_step9")
    assert "its file latest names global_step9, which is not there" in refusal(source, capsys)
    (source / "latest").unlink()
    assert "it holds global_step3: name one of them" in refusal(source, capsys)
    for path in source.glob("global_step3/*_optim_states.pt"):
        path.unlink()
    assert "it has *_model_states.pt only: saved without ZeRO" in refusal(source / "global_step3", capsys)
    assert "no such directory" in refusal(tmp_path / "absent", capsys)


@pytest.mark.parametrize(
    ("name", "lost", "said"),
    [
        ("zero-1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "the optimizer shard of rank 1 is missing"),
        ("zero-2-bf16", "mp_rank_00_model_states.pt", "there are no *_model_states.pt"),
        ("zero-3", "zero_pp_rank_1_mp_rank_00_model_states.pt", "rank_1_mp_rank_00_model_states.pt is missing"),
    ],
)
def test_a_missing_shard_is_named(
    name: str,
    lost: str,
    said: str,
    theirs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(theirs[0] / name / "global_step3", tmp_path / "source"))
    (source / lost).unlink()
    assert said in refusal(source, capsys)


def test_a_damaged_shard_is_named(
    theirs: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(theirs[0] / "zero-1" / "global_step3", tmp_path / "source"))
    shard = source / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-2000])
    message = refusal(source, capsys)
    assert "DeepSpeed's converter failed on" in message and shard.name in message


def test_what_is_no_mamba_is_refused(editable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixer = editable / "zero" / "backbone.layers.1.mixer.D"
    mixer.rename(mixer.with_name("backbone.layers.1.mixer.E"))
    message = refusal(editable, capsys)
    assert "backbone.layers.1.mixer.D of shape (32,) is missing" in message
    assert "backbone.layers.1.mixer.E of shape (32,) is not expected" in message
    for path in editable.glob("zero/backbone.layers.*"):
        shutil.rmtree(path)
    assert "is not of a Mamba-1 language model" in refusal(editable, capsys)


def test_several_step_counts_are_refused_where_they_matter(
    editable: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.tensor(5.0), editable / "zero" / "backbone.layers.1.mixer.D" / "step.pt")
    message = refusal(editable, capsys, *words(dataset))
    assert "several step counts" in message and "step 5 for 1 of them" in message and "without data.path" in message
    assert main(["import", str(editable), str(tmp_path / "model"), "--from", "deepspeed"]) == 0


def test_a_step_count_that_deepspeed_inflated_is_kept_and_said(
    editable: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in editable.glob("zero/*/step.pt"):
        torch.save(torch.tensor(9.0), path)
    assert main(["import", str(editable), str(tmp_path / "run"), "--from", "deepspeed", *words(dataset)]) == 0
    path = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert checkpoint.open_part(path, checkpoint.verify(path), OPTIMIZER).tensor("step").item() == 9
    assert "Adam's step count is 9, though the run took 3" in caplog.text


def test_weights_without_moments_become_a_model_only(
    editable: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (editable / "zero" / "backbone.norm_f.weight" / "exp_avg.pt").unlink()
    assert "backbone.norm_f.weight has no optimizer state" in refusal(editable, capsys, *words(dataset))
    assert main(["import", str(editable), str(tmp_path / "model"), "--from", "deepspeed"]) == 0


def test_a_run_that_diverged_is_refused(editable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = editable / "zero" / "backbone.norm_f.weight" / "fp32.pt"
    torch.save({"param": torch.full((16,), torch.nan)}, path)
    assert "fp32 of backbone.norm_f.weight holds values that are not finite" in refusal(editable, capsys)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return shutil.rmtree, (str(self.path),)


def test_no_code_from_a_file_runs(editable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    torch.save({"note": Malice(victim), "weights": torch.ones(2)}, tmp_path / "file.pt")
    found = load_safely(tmp_path / "file.pt")
    assert isinstance(found["note"], Inert) and torch.equal(found["weights"], torch.ones(2))
    torch.save(Malice(victim), editable / "zero" / "backbone.norm_f.weight" / "fp32.pt")
    (editable / "mp_rank_00_model_states.pt").unlink()
    assert "holds a Inert: expected a tensor" in refusal(editable, capsys)
    assert victim.is_dir()
    torch.save({"note": os.getcwd}, tmp_path / "blocked.pt")
    with pytest.raises(FormatError, match="nothing in it was run"):
        load_safely(tmp_path / "blocked.pt")


def test_gpt_neoxs_names_are_read(
    editable: Path, tmp_path: Path, theirs: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(editable / "zero" / "lm_head.weight")
    for path in sorted(editable.glob("zero/backbone.*")):
        name = path.name.replace("backbone.embedding.weight", "sequential.0.word_embeddings.weight")
        name = name.replace("backbone.norm_f.weight", "sequential.5.norm.scale").replace("norm.weight", "norm.scale")
        name = name.replace("backbone.layers.0.", "sequential.2.").replace("backbone.layers.1.", "sequential.3.")
        path.rename(path.with_name(name))
    assert main(["import", str(editable), str(tmp_path / "model"), "--from", "deepspeed"]) == 0
    weights, saved = read_pretrained(tmp_path / "model").weights, theirs[1]["zero-1"][0]
    assert len(weights) == len(saved) // 3
    assert all(torch.equal(value, saved[name]) for name, value in weights.items())
    shutil.copytree(editable / "zero" / "sequential.2.norm.scale", editable / "zero" / "sequential.2.norm.bias")
    message = refusal(editable, capsys)
    assert "sequential.2.norm.bias has no place" in message and "LayerNorm" in message


def test_names_of_others_are_translated() -> None:
    names = ["module.model.backbone.embeddings.weight", "module.model.backbone.layers.10.mixer.A_log"]
    assert translate("x", names) == {"backbone.embedding.weight": names[0], "backbone.layers.10.mixer.A_log": names[1]}
    piped = ["tied_modules.embed.word_embeddings.weight", "12.mixer.D", "2.mixer.D", "2.norm.scale", "15.norm.scale"]
    assert list(translate("x", piped)) == [
        *("backbone.layers.1.mixer.D", "backbone.norm_f.weight", "backbone.layers.0.mixer.D"),
        *("backbone.layers.0.norm.weight", "backbone.embedding.weight"),
    ]
    with pytest.raises(FormatError, match="are both backbone.embedding.weight"):
        translate("x", ["backbone.embedding.weight", "backbone.embeddings.weight"])


def test_without_deepspeed_the_extra_is_named(
    theirs: tuple[Path, dict[str, Any]],
    universal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["import", str(theirs[0] / "zero-1"), str(tmp_path / "model"), "--from", "deepspeed"]) == 2
    assert "pip install 'mamba-pretrain[deepspeed]'" in capsys.readouterr().err
    assert main(["import", str(universal), str(tmp_path / "model"), "--from", "deepspeed"]) == 0


def test_the_options_of_a_run_are_for_deepspeed_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(tmp_path), str(tmp_path / "model"), "--from", "hf", "model.norm_eps=1e-6"]) == 2
    assert "are for --from deepspeed" in capsys.readouterr().err
    assert main(["import", str(tmp_path), str(tmp_path / "model"), "--from", "deepspeed", "--samples", "3"]) == 2
    assert "name its dataset with data.path too" in capsys.readouterr().err
