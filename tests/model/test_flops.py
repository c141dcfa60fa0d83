"""Parameters and FLOPs by formula: the published models' figures, and agreement with the modules themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mamba_pretrain.config import VARIANTS, ModelConfig
from mamba_pretrain.model.flops import forward_flops_by_part, parameters_by_part, training_flops_per_token
from mamba_pretrain.model.lm import MambaLM


def variant(name: str) -> ModelConfig:
    return ModelConfig(variant=name, **VARIANTS[name])


@pytest.mark.parametrize(
    ("name", "parameters", "gflop_per_token"),
    [
        ("130m", 129_135_360, 0.783),
        ("370m", 371_516_416, 2.251),
        ("790m", 793_204_224, 4.792),
        ("1.4b", 1_372_178_432, 8.277),
        ("2.8b", 2_768_345_600, 16.683),
    ],
)
def test_published_models(name: str, parameters: int, gflop_per_token: float) -> None:
    config = variant(name)
    assert config.padded_vocab_size == 50280
    assert sum(parameters_by_part(config).values()) == parameters
    assert training_flops_per_token(config) / 1e9 == pytest.approx(gflop_per_token, abs=5e-4)


def test_head_is_a_third_of_the_smallest_model() -> None:
    parts = forward_flops_by_part(variant("130m"))
    assert parts["head"] / sum(parts.values()) == pytest.approx(0.296, abs=5e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_formula_counts_the_published_modules(name: str) -> None:
    config = variant(name)
    with torch.device("meta"):
        model = MambaLM(config)
    assert sum(p.numel() for p in model.parameters()) == sum(parameters_by_part(config).values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 1, "d_conv": 2, "expand": 1, "dt_rank": 1},
        {"d_model": 15, "d_state": 4, "d_conv": 3, "expand": 3, "pad_vocab_to_multiple_of": 1},
        {"linear_bias": True, "conv_bias": False},
        {"tie_embeddings": False, "vocab_size": 7},
    ],
)
def test_formula_counts_every_part_of_a_module(options: dict[str, Any]) -> None:
    config = ModelConfig(**{"d_model": 16, "n_layer": 2, "vocab_size": 11, **options})
    found: dict[str, int] = {}
    for name, parameter in MambaLM(config).named_parameters():
        parts = [p for p in name.split(".") if p not in ("backbone", "layers", "mixer", "weight", "bias", "0", "1")]
        found[parts[0]] = found.get(parts[0], 0) + parameter.numel()
    assert found == parameters_by_part(config)


def test_flops_are_twice_the_parameters_of_the_matrices() -> None:
    """What is not scan is one multiply-add a parameter: the two formulas cannot drift apart."""
    config = variant("370m")
    parameters, flops = parameters_by_part(config), forward_flops_by_part(config)
    biases = config.need("n_layer") * config.d_inner
    matrices = sum(parameters[name] for name in ("in_proj", "x_proj", "dt_proj", "out_proj")) - biases
    assert flops["projections"] == 2 * matrices
    assert flops["conv1d"] == 2 * (parameters["conv1d"] - biases)
    assert flops["head"] == 2 * parameters["embedding"]
