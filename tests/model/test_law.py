"""Fresh models obey the laws of their parameters, mamba_ssm's formulas give them, and every known breach is caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_pretrain.config import ModelConfig, OptimConfig
from mamba_pretrain.model.law import LawError, audit, decays, initialize, kind_of
from mamba_pretrain.model.lm import Mamba, MambaLM
from mamba_pretrain.optim import param_groups

DECAY = 0.1


def shape(**options: Any) -> ModelConfig:
    return ModelConfig(**{"d_model": 128, "n_layer": 4, "vocab_size": 200, **options})


def groups(model: nn.Module, config: ModelConfig) -> dict[str, float]:
    return {name: DECAY * decays(name, config) for name, _ in model.named_parameters()}


def check(model: nn.Module, config: ModelConfig, *, fresh: bool = True) -> None:
    audit(model.named_parameters(), config, groups(model, config), decay=DECAY, fresh=fresh)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_model": 1, "n_layer": 1, "vocab_size": 1, "d_state": 1, "expand": 1, "d_conv": 2},
        {"d_model": 15, "n_layer": 3, "vocab_size": 11, "dt_rank": 1, "conv_bias": False},
        {"d_model": 16, "n_layer": 2, "linear_bias": True, "tie_embeddings": False},
        {"d_model": 32, "n_layer": 7, "d_state": 256, "dt_min": 1e-4, "dt_max": 1.0, "embedding_std": 0.5},
        {"d_model": 8, "dt_min": 0.01, "dt_init_floor": 0.01},
    ],
)
def test_fresh_models_pass(options: dict[str, Any]) -> None:
    config = shape(**options)
    model = MambaLM(config)
    for seed in range(10):
        initialize(model, config, seed)
        check(model, config)


def as_hugging_face(model: MambaLM) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)


def on_mixers(change: Callable[[Any], object]) -> Callable[[Any], object]:
    def apply(model: MambaLM) -> None:
        for block in model.backbone.layers:
            change(block.mixer)

    return apply


def uniform_dt(mixer: Any) -> None:
    dt = torch.empty_like(mixer.dt_proj.bias).uniform_(1e-3, 0.1)
    mixer.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def dt_without_inverse_softplus(mixer: Any) -> None:
    mixer.dt_proj.bias.copy_(F.softplus(mixer.dt_proj.bias))


def bf16(model: MambaLM) -> None:
    model.backbone.layers[0].to(torch.bfloat16)


BREACHES: dict[str, tuple[Callable[[Any], object], str]] = {
    "Linear as in Hugging Face's port": (as_hugging_face, "in_proj.weight breaks"),
    "dt drawn uniformly": (on_mixers(uniform_dt), "dt_proj.bias breaks"),
    "dt bias zeroed": (on_mixers(lambda m: m.dt_proj.bias.zero_()), "dt_proj.bias breaks"),
    "dt bias not inverted": (on_mixers(dt_without_inverse_softplus), "dt_proj.bias breaks"),
    "dt weight as a common Linear": (on_mixers(lambda m: m.dt_proj.weight.mul_(0.5)), "dt_proj.weight breaks"),
    "conv bias zeroed": (on_mixers(lambda m: m.conv1d.bias.zero_()), "conv1d.bias breaks"),
    "A_log zeros": (on_mixers(lambda m: m.A_log.zero_()), "A_log breaks"),
    "A_log counts from 0": (on_mixers(lambda m: m.A_log.copy_(m.A_log.exp().sub(1).clamp(1e-3).log())), "A_log breaks"),
    "D zeros": (on_mixers(lambda m: m.D.zero_()), "mixer.D breaks"),
    "out_proj not scaled": (on_mixers(lambda m: m.out_proj.reset_parameters()), "out_proj.weight breaks"),
    "embedding std": (lambda m: nn.init.normal_(m.backbone.embedding.weight, std=0.1), "embedding.weight"),
    "norm zeroed": (lambda m: m.backbone.norm_f.weight.zero_(), "norm_f.weight breaks"),
    "a NaN": (lambda m: m.backbone.layers[1].mixer.x_proj.weight[0, 0].fill_(math.nan), "x_proj.weight"),
    "bf16 parameters": (bf16, "bfloat16"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_breaches_are_caught(breach: str) -> None:
    config = shape()
    model = MambaLM(config, seed=3)
    apply, message = BREACHES[breach]
    with torch.no_grad():
        apply(model)
    with pytest.raises(LawError, match=message):
        check(model, config)


def test_values_are_free_once_trained_but_dtypes_are_not() -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    with torch.no_grad():
        as_hugging_face(model)
    check(model, config, fresh=False)
    bf16(model)
    with pytest.raises(LawError, match="bfloat16"):
        check(model, config, fresh=False)


@pytest.mark.parametrize("kind", ["A_log", "D", "dt_proj.bias", "conv1d.bias", "norm.weight"])
def test_what_must_not_decay_is_caught(kind: str) -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    name = f"backbone.layers.2.{'' if kind == 'norm.weight' else 'mixer.'}{kind}"
    with pytest.raises(LawError, match=f"{name} has weight decay"):
        audit(model.named_parameters(), config, groups(model, config) | {name: DECAY}, decay=DECAY, fresh=True)


def test_a_parameter_in_no_group_is_caught() -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    known = groups(model, config)
    del known["backbone.layers.1.mixer.D"]
    with pytest.raises(LawError, match=r"layers\.1\.mixer\.D is in no parameter group"):
        audit(model.named_parameters(), config, known, decay=DECAY, fresh=True)


def test_all_breaches_are_listed_at_once() -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    with torch.no_grad():
        on_mixers(lambda m: m.D.zero_())(model)
    with pytest.raises(LawError) as error:
        check(model, config)
    assert str(error.value).count("mixer.D breaks") == config.need("n_layer")


def test_an_unknown_parameter_has_no_law() -> None:
    with pytest.raises(LawError, match=r"adapter\.weight"):
        kind_of("backbone.adapter.weight", shape())


def test_only_matrices_decay() -> None:
    """By name and by dimensions at once, in a model of every option."""
    config = shape(linear_bias=True, tie_embeddings=False)
    for name, parameter in MambaLM(config).named_parameters():
        assert decays(name, config) == (parameter.dim() >= 2 and not name.endswith("A_log")), name


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = shape()
    whole = dict(MambaLM(config, seed=5).named_parameters())

    torch.manual_seed(99)  # the global generator has no say
    again = dict(MambaLM(config, seed=5).named_parameters())
    assert all(torch.equal(whole[name], p) for name, p in again.items())

    with torch.device("meta"):
        elsewhere = MambaLM(config)
    elsewhere = elsewhere.to_empty(device="cpu")
    initialize(elsewhere, config, 5)
    assert all(torch.equal(whole[name], p) for name, p in elsewhere.named_parameters())

    wider = dict(MambaLM(shape(vocab_size=300), seed=5).named_parameters())
    assert all(torch.equal(p, wider[name]) for name, p in whole.items() if "embedding" not in name)

    first, second = (f"backbone.layers.{i}.mixer.in_proj.weight" for i in (0, 1))
    other = dict(MambaLM(config, seed=6).named_parameters())
    assert not torch.equal(whole[first], other[first])
    assert not torch.equal(whole[first], whole[second])


def test_backbone_and_language_model_start_from_the_same_values() -> None:
    backbone = Mamba.from_variant("130m", seed=7, d_model=32, n_layer=2, vocab_size=50)
    model = MambaLM(backbone.config, seed=7)
    due = dict(model.backbone.named_parameters())
    assert all(torch.equal(p, due[name]) for name, p in backbone.named_parameters())


def test_values_are_those_of_mamba_ssm() -> None:
    """Its formulas written out: constants to the bit, random ones by range and spread over 10^5 draws and more."""
    config = ModelConfig(d_model=256, n_layer=8, vocab_size=1000)
    d, e, n, r, layers = 256, 512, 16, 16, 8
    by_kind: dict[str, list[torch.Tensor]] = {}
    for name, parameter in MambaLM(config, seed=0).named_parameters():
        by_kind.setdefault(name.split("mixer.")[-1], []).append(parameter.detach())
    values = {name: torch.stack(parts) for name, parts in by_kind.items() if len(parts) == layers}

    assert torch.equal(values["A_log"], torch.log(torch.arange(1, n + 1).float()).expand(layers, e, n))
    assert torch.equal(values["D"], torch.ones(layers, e))

    dt = F.softplus(values["dt_proj.bias"]).flatten().sort().values
    assert dt.min() >= 1e-3 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    grid = torch.linspace(math.log(1e-3), math.log(0.1), dt.numel())
    assert (dt.log() - grid).abs().max() < 0.2  # Kolmogorov-Smirnov distance from log-uniform, 4.1% of the range

    linear = {  # kaiming_uniform_(a=sqrt(5)) of nn.Linear and nn.Conv1d is U(+-fan_in^-0.5)
        "in_proj.weight": d**-0.5,
        "x_proj.weight": e**-0.5,
        "conv1d.weight": 4**-0.5,
        "conv1d.bias": 4**-0.5,
        "dt_proj.weight": r**-0.5,  # dt_init "random", dt_scale 1
        "out_proj.weight": e**-0.5 / math.sqrt(layers),  # rescale_prenorm_residual, one residual per block
    }
    for name, bound in linear.items():
        found = values[name]
        assert found.abs().max() <= bound, name
        assert found.abs().max() >= 0.99 * bound, name
        assert found.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    (embedding,) = by_kind["backbone.embedding.weight"]
    assert embedding.std().item() == pytest.approx(0.02, rel=0.01)


def trained_by(model: nn.Module, config: ModelConfig) -> dict[str, float]:
    """What the optimizer's own groups say."""
    found = param_groups(model.named_parameters(), config, OptimConfig(weight_decay=DECAY))
    return {name: group["weight_decay"] for group in found for name in group["names"]}


def test_a_matrix_that_does_not_decay_or_takes_no_gradient_is_caught() -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert trained_by(model, config) == groups(model, config)
    with pytest.raises(LawError, match=rf"{name} has weight decay 0.0: due is {DECAY}"):
        audit(model.named_parameters(), config, groups(model, config) | {name: 0.0}, decay=DECAY, fresh=True)
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(LawError, match=f"{name} is in no parameter group, or takes no gradient"):
        audit(model.named_parameters(), config, trained_by(model, config), decay=DECAY, fresh=True)


def test_values_that_are_not_finite_are_caught_in_a_resumed_model_too() -> None:
    config = shape()
    model = MambaLM(config, seed=0)
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    with pytest.raises(LawError, match="norm_f.weight holds values that are not finite"):
        check(model, config, fresh=False)


@pytest.mark.parametrize("floor", [1e-4, 5e-3, 5e-2])
def test_a_floor_under_dt_is_kept_and_lawful(floor: float) -> None:
    config = dataclasses.replace(shape(), d_model=128, dt_init_floor=floor)
    model = MambaLM(config, seed=3)
    check(model, config)
    dt = torch.nn.functional.softplus(model.backbone.layers[0].mixer.dt_proj.bias)
    assert dt.min() >= max(floor, config.dt_min) * (1 - 1e-4)
