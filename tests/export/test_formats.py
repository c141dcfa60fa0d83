"""Which shapes each format can tell, and which models are refused, with all reasons."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mamba_pretrain.config import VARIANTS, ModelConfig
from mamba_pretrain.export import formats
from mamba_pretrain.export.formats import FormatError

UNUSUAL = ModelConfig(
    d_model=24,
    n_layer=3,
    vocab_size=48,
    d_state=8,
    d_conv=3,
    expand=3,
    dt_rank=5,
    dt_min=2e-3,
    dt_max=0.2,
    dt_init_floor=1e-3,
    conv_bias=False,
    linear_bias=True,
    tie_embeddings=False,
)
RELEASED_130M = {  # config.json of state-spaces/mamba-130m
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def test_a_released_mamba_ssm_config_is_the_variant_of_that_name() -> None:
    found = formats.from_mamba_ssm(RELEASED_130M)
    assert found == ModelConfig(**VARIANTS["130m"])
    assert found.padded_vocab_size == 50280


@pytest.mark.parametrize(("rows", "multiple"), [(50280, 8), (50277, 1)])
def test_every_row_of_a_foreign_hugging_face_model_is_a_token(rows: int, multiple: int) -> None:
    found = formats.from_hf({"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": rows})
    assert found == ModelConfig(d_model=768, n_layer=24, vocab_size=rows, pad_vocab_to_multiple_of=multiple)
    assert found.padded_vocab_size == rows


@pytest.mark.parametrize("config", [UNUSUAL, ModelConfig(**VARIANTS["130m"])], ids=["unusual", "130m"])
def test_a_shape_survives_mamba_ssms_config(config: ModelConfig) -> None:
    assert formats.from_mamba_ssm(formats.to_mamba_ssm(config)) == config


def test_a_shape_survives_hugging_faces_config_but_for_the_padding() -> None:
    assert formats.from_hf(formats.to_hf(UNUSUAL)) == UNUSUAL
    padded = formats.from_hf(formats.to_hf(dataclasses.replace(UNUSUAL, vocab_size=41)))
    assert padded == UNUSUAL


def test_ssm_cfg_holds_only_what_differs_from_the_default() -> None:
    assert formats.to_mamba_ssm(ModelConfig(d_model=64, n_layer=2, vocab_size=101, d_state=8)) == {
        "d_model": 64,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 101,
        "ssm_cfg": {"d_state": 8},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }


def test_mamba_ssm_cannot_hold_another_norm_eps() -> None:
    with pytest.raises(FormatError, match=r"norm_eps is 1e-06: mamba_ssm's norm always has 1e-05"):
        formats.to_mamba_ssm(dataclasses.replace(UNUSUAL, norm_eps=1e-6))


HF_MINIMUM = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba': expected 'mamba'"),
        ({"model_type": "mamba2"}, "model_type is 'mamba2': expected 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': expected 'silu'"),
        ({"state_size": "16"}, "state_size is '16': expected a value of type int"),
        ({"use_bias": 1}, "use_bias is 1: expected a value of type bool"),
        ({"expand": 1.5}, "expand is 1.5: expected a value of type int"),
        ({"conv_kernel": 9}, "model.d_conv is 9"),
        ({"hidden_size": 0}, "model.d_model is 0: it must be at least 1"),
    ],
    ids=str,
)
def test_hugging_face_models_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    formats.from_hf(HF_MINIMUM)
    with pytest.raises(FormatError) as caught:
        formats.from_hf(HF_MINIMUM | changes)
    assert len(caught.value.problems) == 1
    assert reason in caught.value.problems[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 64}}, "ssm_cfg.layer is 'Mamba2': expected 'Mamba1'"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg has unknown keys headdim"),
        ({"ssm_cfg": [1]}, r"ssm_cfg is [1]: expected a mapping"),
        ({"ssm_cfg": {"d_state": 0}}, "model.d_state is 0"),
        ({"d_intermediate": 256}, "d_intermediate is 256: models with MLPs"),
        ({"attn_layer_idx": [9, 18]}, "attn_layer_idx is [9, 18]: models with attention"),
        ({"rms_norm": False}, "rms_norm is False: models with LayerNorm"),
        ({"n_layer": None}, "n_layer is None: expected a value of type int"),
    ],
    ids=str,
)
def test_mamba_ssm_models_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        formats.from_mamba_ssm(RELEASED_130M | changes)
    assert len(caught.value.problems) == 1
    assert reason in caught.value.problems[0]


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        formats.from_mamba_ssm({"d_model": 64, "rms_norm": False, "d_intermediate": 8, "ssm_cfg": {"layer": "Mamba2"}})
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "ssm_cfg.layer",
        "d_intermediate",
        "rms_norm",
        "n_layer",
        "vocab_size",
    ]


def test_unknown_initialisers_of_mamba_ssm_change_nothing() -> None:
    ssm_cfg = {"layer": "Mamba1", "dt_init": "constant", "dt_scale": 2.0, "use_fast_path": False, "dt_rank": "auto"}
    assert formats.from_mamba_ssm(RELEASED_130M | {"ssm_cfg": ssm_cfg}) == ModelConfig(**VARIANTS["130m"])
