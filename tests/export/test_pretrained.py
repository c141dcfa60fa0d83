"""Reading models: the three forms, foreign directories as they are released, and everything that is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import ModelConfig
from mamba_pretrain.export.convert import export_checkpoint
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.export.pretrained import build_model, read_pretrained
from mamba_pretrain.model.lm import MambaLM
from tests.helpers.native import sentencepiece_model, small_model, tokenizer_facts, write_checkpoint

# As released: no d_intermediate, no attention keys, no tie_embeddings; 16-bit tensors; the head beside the embedding.
RELEASED = {
    "d_model": 8,
    "n_layer": 1,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def released_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    weights = MambaLM(ModelConfig(d_model=8, n_layer=1, vocab_size=50277), seed=0).state_dict()
    weights = {k: v if k.endswith(("A_log", "D")) else v.to(dtype) for k, v in weights.items()}
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def write_released(directory: Path, weights: Any, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(RELEASED | changes))
    torch.save(weights, directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_released_mamba_ssm_directory_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = released_weights(dtype)
    found = read_pretrained(write_released(tmp_path, weights))
    assert found.source_format == "mamba_ssm"
    assert found.config == ModelConfig(d_model=8, n_layer=1, vocab_size=50277)
    assert (found.tokenizer, found.tokenizer_file) == (None, None)
    parameters = dict(build_model(found).named_parameters())
    assert parameters.keys() == weights.keys() - {"lm_head.weight"}
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weights[name].float()), name


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    weights = released_weights(torch.float32)
    write_released(tmp_path, weights | {"backbone.norm_f.weight": torch.full((8,), 9.0)})
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "model.safetensors")
    assert read_pretrained(tmp_path).weights["backbone.norm_f.weight"].tolist() == [1.0] * 8


class MakesDirectory:
    """Unpickling this runs os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path, plain: bool) -> None:
    trap = tmp_path / "trap"
    evil = {"backbone.norm_f.weight": MakesDirectory(trap)}
    directory = write_released(tmp_path / "model", evil)
    if plain:
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
    with pytest.raises(FormatError, match=r"pytorch_model.bin:\n- refused: .* Nothing in it was run") as caught:
        read_pretrained(directory)
    assert "weights_only" not in str(caught.value), "torch's advice to run it after all"
    assert not trap.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"weights": 3}], ids=["list", "number"])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(FormatError, match="holds no state dict"):
        read_pretrained(write_released(tmp_path, content))


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = write_released(tmp_path, released_weights(torch.float16)) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FormatError, match="damaged"):
        read_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_all_named_with_both_shapes(tmp_path: Path) -> None:
    weights = released_weights(torch.float32)
    mixer = "backbone.layers.0.mixer."
    del weights[mixer + "D"]
    weights |= {
        mixer + "A_log": torch.zeros(16, 4),
        mixer + "dt_bias": torch.zeros(2),
        mixer + "conv1d.bias": torch.ones(16).int(),
    }
    with pytest.raises(FormatError) as caught:
        read_pretrained(write_released(tmp_path, weights))
    assert sorted(caught.value.problems) == [
        mixer + "A_log has shape (16, 4), expected (16, 16)",
        mixer + "D is missing, of shape (16,)",
        mixer + "conv1d.bias is of torch.int32, expected a floating point type",
        mixer + "dt_bias of shape (2,) is not expected",
    ]


def test_a_head_that_is_not_the_embedding_is_refused_where_both_are_tied(tmp_path: Path) -> None:
    weights = released_weights(torch.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(FormatError, match=r"lm_head.weight differs from backbone.embedding.weight"):
        read_pretrained(write_released(tmp_path / "tied", weights))
    untied = read_pretrained(write_released(tmp_path / "untied", weights, tie_embeddings=False))
    assert torch.equal(build_model(untied).lm_head.weight, weights["lm_head.weight"])


def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    directory = write_released(tmp_path, {}, ssm_cfg={"layer": "Mamba2"}, d_intermediate=8)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"mamba_ssm model that is not read:\n- ssm_cfg.layer .*\n- d_intermediate"):
        read_pretrained(directory)


@pytest.mark.parametrize("names", [[], ["notes.txt", "weights.bin"]], ids=["empty", "other files"])
def test_a_directory_without_a_model_is_told_what_was_expected(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FormatError) as caught:
        read_pretrained(tmp_path)
    assert f"holds no model: found {', '.join(names) or 'nothing'}; expected" in str(caught.value)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["native", "hf", "mamba_ssm"]


def test_no_directory_no_json_and_no_weights_are_said(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such directory"):
        read_pretrained(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="holds a list: expected a JSON object"):
        read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    with pytest.raises(FormatError, match="no weights: expected model.safetensors"):
        read_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(FormatError, match="damaged or not a safetensors file"):
        read_pretrained(tmp_path)


def test_a_native_checkpoint_is_read_with_its_tokenizer_and_run(tmp_path: Path) -> None:
    model, tokenizer = small_model(), sentencepiece_model()
    found = read_pretrained(write_checkpoint(tmp_path / "step_00000007", model, tokenizer))
    assert (found.source_format, found.config) == ("native", model.config)
    assert found.tokenizer_file == tmp_path / "step_00000007" / "tokenizer.model"
    assert found.tokenizer == tokenizer_facts(tokenizer)
    assert found.run is not None
    assert (found.run.train.seed, found.facts["step"]) == (3, 7)
    ids_BL = torch.arange(20)[None]
    assert torch.equal(build_model(found)(ids_BL).logits, model(ids_BL).logits)


def test_a_damaged_native_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "step_00000007", small_model())
    (directory / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="model.safetensors has 1 bytes"):
        read_pretrained(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_pretrained(directory)


def exported(tmp_path: Path, **options: Any) -> Path:
    source = write_checkpoint(tmp_path / "source", small_model(), sentencepiece_model())
    export_checkpoint(source, tmp_path / "hf", to="hf", **options)
    return tmp_path / "hf"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_our_own_entry_gives_way_to_a_config_that_was_edited_since(tmp_path: Path) -> None:
    directory = exported(tmp_path)
    assert read_pretrained(directory).config == small_model().config
    change_json(directory / "config.json", layer_norm_epsilon=1e-3)
    with pytest.warns(UserWarning, match="'mamba_pretrain' is ignored, it no longer agrees"):
        found = read_pretrained(directory).config
    assert (found.norm_eps, found.vocab_size, found.embedding_std) == (1e-3, 336, 0.02)


@pytest.mark.parametrize("entry", [3, {}, {"model": {"d_modell": 3}}, {"model": {"d_model": "x"}}], ids=str)
def test_an_entry_of_ours_that_cannot_be_read_is_ignored_aloud(tmp_path: Path, entry: Any) -> None:
    directory = exported(tmp_path)
    change_json(directory / "config.json", mamba_pretrain=entry)
    with pytest.warns(UserWarning, match="'mamba_pretrain' is ignored, it cannot be read"):
        assert read_pretrained(directory).config.vocab_size == 336


def test_ids_of_a_foreign_hugging_face_tokenizer_come_from_its_config(tmp_path: Path) -> None:
    directory = exported(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (directory / name).unlink()
    config = json.loads((directory / "config.json").read_bytes())
    del config["mamba_pretrain"]
    (directory / "config.json").write_text(json.dumps(config))
    found = read_pretrained(directory)
    assert found.tokenizer is not None
    assert {k: found.tokenizer[k] for k in ("kind", "vocab_size", "bos_id", "eod_id")} == {
        "kind": "huggingface",
        "vocab_size": 320,
        "bos_id": 1,
        "eod_id": 2,
    }


def test_shards_are_read_and_their_damages_named(tmp_path: Path) -> None:
    directory = exported(tmp_path, max_shard_gib=5e-6)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert read_pretrained(directory).weights.keys() == small_model().state_dict().keys()

    held = load_file(shards[1])
    shards[1].unlink()
    with pytest.raises(FormatError, match=f"names the shard '{shards[1].name}', which is no file beside it"):
        read_pretrained(directory)
    save_file({"other": torch.zeros(1)}, shards[1])
    with pytest.raises(FormatError, match=f"says {min(held)} is in {shards[1].name}, which does not hold it"):
        read_pretrained(directory)


def test_a_shard_outside_the_directory_is_refused(tmp_path: Path) -> None:
    directory = exported(tmp_path, max_shard_gib=5e-6)
    change_json(directory / "model.safetensors.index.json", weight_map={"a": "../source/model.safetensors"})
    with pytest.raises(FormatError, match="no file beside it"):
        read_pretrained(directory)
