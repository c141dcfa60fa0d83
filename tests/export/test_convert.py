"""Exports load where they are meant to, come back unchanged, and are there completely or not at all."""

from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import ModelConfig
from mamba_pretrain.export.convert import export_checkpoint, import_pretrained
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.export.pretrained import build_model, read_pretrained
from mamba_pretrain.model.lm import MambaLM
from tests.helpers import hf
from tests.helpers.native import sentencepiece_model, small_model, tokenizer_facts, write_checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "biases": {"linear_bias": True, "conv_bias": False, "dt_rank": 3},
}
# state_dict of mamba_ssm 2.3.2's MambaLMHeadModel(d_model 64, n_layer 2, vocab_size 101), written out by hand.
MAMBA_SSM_BLOCK = {
    "norm.weight": (64,),
    "mixer.A_log": (128, 16),
    "mixer.D": (128,),
    "mixer.in_proj.weight": (256, 64),
    "mixer.conv1d.weight": (128, 1, 4),
    "mixer.conv1d.bias": (128,),
    "mixer.x_proj.weight": (36, 128),
    "mixer.dt_proj.weight": (128, 4),
    "mixer.dt_proj.bias": (128,),
    "mixer.out_proj.weight": (64, 128),
}
MAMBA_SSM_STATE = {
    "backbone.embedding.weight": (104, 64),
    **{f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in MAMBA_SSM_BLOCK.items()},
    "backbone.norm_f.weight": (64,),
    "lm_head.weight": (104, 64),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step_00000007", small_model(), sentencepiece_model())


def load_in_transformers(directory: Path, **options: Any) -> Any:
    model, report = hf.MambaForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def logits(model: MambaLM | Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(30).reshape(2, 15)).logits
    return found


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("to", ["hf", "mamba_ssm"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_unchanged(tmp_path: Path, options: dict[str, Any], to: str) -> None:
    model, tokenizer = small_model(**options), sentencepiece_model()
    source = write_checkpoint(tmp_path / "step_00000007", model, tokenizer)
    export_checkpoint(source, tmp_path / "away", to=to)
    import_pretrained(tmp_path / "away", tmp_path / "back", from_format=to)

    run, weights, manifest = checkpoint.load_model(tmp_path / "back")
    assert run.model == model.config
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert (manifest["kind"], manifest["from"]) == ("model", to)
    assert manifest["tokenizer"] == tokenizer_facts(tokenizer)
    assert contents(tmp_path / "back").keys() == {
        "model.safetensors",
        "config.yaml",
        "manifest.json",
        "tokenizer.model",
    }
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == tokenizer


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_transformers_loads_an_export_with_equal_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small_model(**options)
    export_checkpoint(write_checkpoint(tmp_path / "source", model), tmp_path / "hf", to="hf")
    theirs = load_in_transformers(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    tied = model.config.tie_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) is not tied


def test_an_export_that_transformers_saved_again_still_says_what_we_need(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "hf", to="hf")
    load_in_transformers(tmp_path / "hf").save_pretrained(tmp_path / "again")
    found = read_pretrained(tmp_path / "again")
    assert found.config == small_model().config
    assert all(torch.equal(found.weights[name], value) for name, value in small_model().state_dict().items())


def test_transformers_generates_real_tokens_and_knows_the_end(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "hf", to="hf")
    theirs = load_in_transformers(tmp_path / "hf")
    with torch.no_grad():
        theirs.lm_head.weight[320:] *= 1000  # what a sampler would take, were the padding rows tokens
    torch.manual_seed(0)
    text = theirs.generate(torch.tensor([[5, 6]]), do_sample=True, max_new_tokens=30)
    assert text.max() < 320
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]


def test_shards_load_in_transformers_and_here(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "hf", to="hf", max_shard_gib=2e-5)
    shards = sorted(tmp_path.glob("hf/model-*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    torch.testing.assert_close(logits(load_in_transformers(tmp_path / "hf")), logits(small_model()), rtol=0, atol=1e-6)
    assert torch.equal(logits(build_model(read_pretrained(tmp_path / "hf"))), logits(small_model()))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_mamba_ssm_finds_the_parameters_it_expects(tmp_path: Path, file: str) -> None:
    model = MambaLM(ModelConfig(d_model=64, n_layer=2, vocab_size=101), seed=0)
    export_checkpoint(write_checkpoint(tmp_path / "source", model), tmp_path / "ssm", to="mamba_ssm")
    path = tmp_path / "ssm" / file
    if file == "model.safetensors":  # there, as in transformers' files, a tied head is left out
        found = load_file(path)
        assert {k: tuple(v.shape) for k, v in found.items()} | {"lm_head.weight": (104, 64)} == MAMBA_SSM_STATE
        return
    found = torch.load(path, weights_only=True)
    assert {k: tuple(v.shape) for k, v in found.items()} == MAMBA_SSM_STATE
    assert found["lm_head.weight"].data_ptr() == found["backbone.embedding.weight"].data_ptr()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_mamba_ssms_config_has_its_own_keys_only(source: Path, tmp_path: Path) -> None:
    """It calls MambaConfig(**config): one key more is a TypeError."""
    export_checkpoint(source, tmp_path / "ssm", to="mamba_ssm")
    config = json.loads((tmp_path / "ssm" / "config.json").read_bytes())
    assert config.keys() == {
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
        *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
    }
    assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (320, 24)
    assert config["ssm_cfg"] == {"d_state": 4, "dt_min": 2e-3}


@pytest.mark.parametrize(("dtype", "kept"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("to", ["hf", "mamba_ssm"])
def test_in_16_bits_the_time_constants_stay_fp32(source: Path, tmp_path: Path, to: str, dtype: str, kept: Any) -> None:
    export_checkpoint(source, tmp_path / "out", to=to, dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored = {name.replace("embeddings.", "embedding."): tensor for name, tensor in stored.items()}
    back = read_pretrained(tmp_path / "out").weights
    for name, value in small_model().state_dict().items():
        exact = name.endswith(("A_log", ".D", "dt_proj.bias", "norm.weight", "norm_f.weight"))
        due = torch.float32 if exact else kept
        assert stored[name].dtype == due, name
        assert torch.equal(back[name], value.to(due).float()), name


def test_transformers_reads_16_bits_as_such_or_the_exact_time_constants_in_fp32(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "hf", to="hf", dtype="bf16")
    assert load_in_transformers(tmp_path / "hf").dtype == torch.bfloat16
    name = "backbone.layers.0.mixer.A_log"
    loaded = load_in_transformers(tmp_path / "hf", dtype=torch.float32).state_dict()
    assert torch.equal(loaded[name], small_model().state_dict()[name])


def test_a_value_that_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = 1e5
    source = write_checkpoint(tmp_path / "source", model)
    with pytest.raises(FormatError, match=r"in_proj.weight:\n- is not finite in torch.float16 \(largest .* 100000\)"):
        export_checkpoint(source, tmp_path / "out", to="hf", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_native_model_keeps_its_run_and_leaves_the_optimizer(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "model", to="native")
    assert contents(tmp_path / "model").keys() == {
        "model.safetensors",
        "config.yaml",
        "manifest.json",
        "tokenizer.model",
    }
    manifest = checkpoint.verify(tmp_path / "model")
    assert (manifest["kind"], manifest["step"]) == ("model", 7)
    assert (tmp_path / "model" / "config.yaml").read_bytes() == (source / "config.yaml").read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_model_without_tokenizer_is_exported_without(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", small_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_checkpoint(source, tmp_path / "hf", to="hf")
    assert contents(tmp_path / "hf").keys() == {"config.json", "generation_config.json", "model.safetensors"}
    for name in ("config.json", "generation_config.json"):
        assert not any("token_id" in key for key in json.loads((tmp_path / "hf" / name).read_bytes()))


def test_the_end_is_known_without_a_tokenizer_too(source: Path, tmp_path: Path) -> None:
    """A directory may hold the ids and no tokenizer; through our form they reach transformers again."""
    export_checkpoint(source, tmp_path / "hf", to="hf")
    for path in (tmp_path / "hf").glob("*token*"):
        path.unlink()
    import_pretrained(tmp_path / "hf", tmp_path / "native", from_format="hf")
    export_checkpoint(tmp_path / "native", tmp_path / "ssm", to="mamba_ssm")
    export_checkpoint(tmp_path / "ssm", tmp_path / "again", to="hf")
    assert contents(tmp_path / "again").keys() == {"config.json", "generation_config.json", "model.safetensors"}
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "again" / name).read_bytes())
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]
    assert load_in_transformers(tmp_path / "again").generation_config.eos_token_id == 2


@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "native"])
def test_a_damaged_source_is_refused_and_nothing_written(source: Path, tmp_path: Path, to: str) -> None:
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors has sha256"):
        export_checkpoint(source, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_an_existing_target_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "out", to="mamba_ssm")
    earlier = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists; choose another"):
        export_checkpoint(source, tmp_path / "out", to="hf")
    assert contents(tmp_path / "out") == earlier
    export_checkpoint(source, tmp_path / "out", to="hf", overwrite=True)
    assert contents(tmp_path / "out").keys() >= {"config.json", "generation_config.json"}
    assert "pytorch_model.bin" not in contents(tmp_path / "out")


def test_a_directory_with_other_content_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CheckpointError, match="not an earlier output"):
        export_checkpoint(source, tmp_path / "out", to="hf", overwrite=True)
    assert contents(tmp_path / "out").keys() == {"precious"}


@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_directory_that_holds_the_source_is_never_replaced(tmp_path: Path, to: str) -> None:
    run = tmp_path / "run"
    source = write_checkpoint(run / "checkpoints" / "step_00000007", small_model())
    before = contents(source)
    for target in (source, source.parent, run):
        with pytest.raises(FormatError, match="source is the target or lies in it"):
            export_checkpoint(source, target, to=to, overwrite=True)
    assert contents(source) == before


def test_impossible_options_are_all_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        export_checkpoint(source, source, to="gguf", dtype="int8", max_shard_gib=0, overwrite=True)
    assert [problem.split()[0] for problem in caught.value.problems] == ["to", "dtype", "max_shard_gib", "source"]
    with pytest.raises(FormatError, match="the native form is fp32"):
        export_checkpoint(source, tmp_path / "out", to="native", dtype="bf16")
    with pytest.raises(FormatError, match="is of the form native, not hf"):
        import_pretrained(source, tmp_path / "out", from_format="hf")


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """A full disk, as far as files above this size go."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "native"])
def test_a_full_disk_leaves_nothing_behind(source: Path, tmp_path: Path, to: str) -> None:
    with largest_file(20_000), pytest.raises(CheckpointError, match="was not written"):
        export_checkpoint(source, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_disk_that_fills_up_at_the_pickle_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    export_checkpoint(source, tmp_path / "whole", to="mamba_ssm")
    sizes = [(tmp_path / "whole" / name).stat().st_size for name in ("model.safetensors", "pytorch_model.bin")]
    assert sizes[0] < sizes[1]
    with largest_file(sizes[0]), pytest.raises(CheckpointError, match="was not written"):
        export_checkpoint(source, tmp_path / "out", to="mamba_ssm")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.tmp*"))
