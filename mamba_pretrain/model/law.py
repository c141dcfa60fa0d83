"""The laws of Mamba's parameters, one row for each kind: initial values, weight decay, dtype.

Initial values are mamba_ssm's (modules/mamba_simple.py, models/mixer_seq_simple.py::_init_weights). Ports keep breaking
them: every Linear drawn from N(0, 0.1), dt drawn uniformly instead of log-uniformly, dt_proj.bias zeroed by a generic
"biases are zero" pass. None of these crashes; the runs are only worse. So `audit` measures the values at start-up.

Decay cannot be told from the number of dimensions: A_log has two and must not decay (it would pull the time
constants), and a parameter sharded by ZeRO-3 has one whatever it holds. It goes by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamba_pretrain.config import ModelConfig

# A correct draw fails a check of its mean or spread with a probability below 1e-14.
SIGMAS = 8.0


class LawError(ValueError):
    """Parameters break the laws of this module; the message lists every breach."""


@dataclass(frozen=True)
class Kind:
    """A kind of parameter. `draw` fills a CPU tensor; `breaches` says what is wrong with initial values."""

    suffix: str
    decays: bool
    initial: str
    draw: Callable[[Tensor, torch.Generator], Tensor]
    breaches: Callable[[Tensor], Iterator[str]]


def kinds(config: ModelConfig) -> list[Kind]:
    """Every kind of parameter of a MambaLM of this shape; a name belongs to the first whose suffix it ends with."""
    d_model, inner, rank, layers = config.need("d_model"), config.d_inner, config.rank, config.need("n_layer")
    conv_bound = config.d_conv**-0.5
    A_log_N = torch.log(torch.arange(1, config.d_state + 1, dtype=torch.float32))
    return [
        _constant("mixer.A_log", A_log_N, "log(1..N) in every channel (S4D-real)"),
        _constant("mixer.D", torch.ones(()), "1"),
        _dt_bias(config),
        _uniform("mixer.dt_proj.weight", rank**-0.5, f"U(+-R^-0.5), R = {rank}"),
        _uniform("mixer.in_proj.weight", d_model**-0.5, "U(+-fan_in^-0.5)"),
        _uniform("mixer.x_proj.weight", inner**-0.5, "U(+-fan_in^-0.5)"),
        _uniform("mixer.out_proj.weight", (inner * layers) ** -0.5, f"U(+-fan_in^-0.5) / sqrt({layers} blocks)"),
        _uniform("mixer.conv1d.weight", conv_bound, "U(+-K^-0.5)"),
        _uniform("mixer.conv1d.bias", conv_bound, "U(+-K^-0.5)", decays=False),
        _constant("proj.bias", torch.zeros(()), "0"),
        _constant("norm.weight", torch.ones(()), "1"),
        _constant("norm_f.weight", torch.ones(()), "1"),
        _normal("embedding.weight", config.embedding_std),
        _uniform("lm_head.weight", d_model**-0.5, "U(+-fan_in^-0.5)"),
    ]


def kind_of(name: str, config: ModelConfig) -> Kind:
    for kind in kinds(config):
        if name.endswith(kind.suffix):
            return kind
    raise LawError(f"no law for parameter {name!r}: add its kind to mamba_pretrain/model/law.py")


def decays(name: str, config: ModelConfig) -> bool:
    """Whether weight decay applies to the parameter: matrices only, never A_log, D, biases and norms."""
    return kind_of(name, config).decays


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Sets every parameter to its initial value.

    Each is drawn from a generator of its own, seeded by (seed, name) and run on the CPU: the value does not depend on
    the device, on the other parameters, or on which rank draws it. A backbone and the language model around it agree.
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter: a CPU tensor, drawn as `initialize` says."""
    key = hashlib.blake2b(f"{seed}/{name.removeprefix('backbone.')}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    with torch.device("cpu"):
        return kind_of(name, config).draw(torch.empty(shape), generator)


def audit(
    parameters: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    decay_of: dict[str, float],
    *,
    decay: float,
    fresh: bool,
) -> None:
    """Fails (LawError, all breaches at once) where parameters break the laws of dtype, decay or, if `fresh`, of init.

    `decay_of` is what the optimizer will do to each name, `decay` what it should do to the kinds that decay; a
    parameter that would not be trained, or that is not finite, is a breach too.
    """
    found: list[str] = []
    for name, parameter in parameters:
        kind = kind_of(name, config)
        if parameter.dtype != torch.float32:
            found.append(f"{name} is {parameter.dtype}: parameters are fp32, autocast makes the bf16 copies")
        due = decay if kind.decays else 0.0
        if name not in decay_of:
            found.append(f"{name} is in no parameter group, or takes no gradient: it would never be trained")
        elif decay_of[name] != due:
            found.append(f"{name} has weight decay {decay_of[name]}: due is {due}")
        if not torch.isfinite(parameter).all():
            found.append(f"{name} holds values that are not finite")
        elif fresh:
            found += [f"{name} breaks its initial law, {kind.initial}: {b}" for b in kind.breaches(parameter.detach())]
    if found:
        raise LawError("the parameters break the model's laws:\n" + "\n".join(f"- {f}" for f in found))


def summary(
    parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, decay_of: dict[str, float]
) -> Iterator[tuple[str, str, str]]:
    """One row for each kind of parameter: name and shape, dtype and weight decay, initial law."""
    seen = set()
    for name, parameter in parameters:
        kind = kind_of(name, config)
        if kind.suffix not in seen:
            seen.add(kind.suffix)
            decay = f"decay {decay_of[name]:g}" if decay_of[name] else "no decay"
            dtype = str(parameter.dtype).removeprefix("torch.")
            yield f"{kind.suffix} {tuple(parameter.shape)}", f"{dtype}, {decay}", kind.initial


def _constant(suffix: str, value: Tensor, initial: str) -> Kind:
    def breaches(p: Tensor) -> Iterator[str]:
        worst = (p.float().cpu() - value).abs().max().item() if p.numel() else 0.0
        if not worst <= 1e-6:
            yield f"off by up to {worst:.3g}"

    return Kind(suffix, False, initial, lambda p, _: p.copy_(value.expand_as(p)), breaches)


def _uniform(suffix: str, bound: float, initial: str, *, decays: bool = True) -> Kind:
    def breaches(p: Tensor) -> Iterator[str]:
        if not p.abs().max().item() <= bound * (1 + 1e-6):
            yield f"a value of {p.abs().max().item():.4g} where the bound is {bound:.4g}"
        yield from _moments(p, 0.0, bound / math.sqrt(3), kurtosis=1.8)

    return Kind(suffix, decays, initial, lambda p, g: p.uniform_(-bound, bound, generator=g), breaches)


def _normal(suffix: str, std: float) -> Kind:
    return Kind(
        suffix,
        True,
        f"N(0, {std})",
        lambda p, g: p.normal_(0.0, std, generator=g),
        lambda p: _moments(p, 0.0, std, kurtosis=3.0),
    )


def _dt_bias(config: ModelConfig) -> Kind:
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    floor = max(low, math.log(config.dt_init_floor))
    below = (floor - low) / (high - low)  # the share of the draws that the floor lifts; none by default
    mean = below * floor + (1 - below) * (floor + high) / 2
    variance = below * (floor - mean) ** 2
    variance += (1 - below) * ((high - floor) ** 2 / 12 + ((floor + high) / 2 - mean) ** 2)

    def draw(p: Tensor, generator: torch.Generator) -> Tensor:
        dt = torch.exp(p.uniform_(low, high, generator=generator).clamp(min=floor))
        return dt + torch.log(-torch.expm1(-dt))  # softplus^-1(dt)

    def breaches(p: Tensor) -> Iterator[str]:
        log_dt = torch.log(nn.functional.softplus(p.float()))
        if log_dt.min().item() < floor - 1e-3 or log_dt.max().item() > high + 1e-3:
            yield f"softplus of it spans {math.exp(log_dt.min()):.3g} to {math.exp(log_dt.max()):.3g}"
        yield from _moments(log_dt, mean, math.sqrt(variance), kurtosis=1.8 if below == 0 else 9.0)

    initial = f"softplus^-1 of dt, log-uniform in [{config.dt_min:g}, {config.dt_max:g}], >= {config.dt_init_floor:g}"
    return Kind("mixer.dt_proj.bias", False, initial, draw, breaches)


def _moments(values: Tensor, mean: float, std: float, *, kurtosis: float) -> Iterator[str]:
    """Compares sample mean and spread with those of the law, within SIGMAS standard errors."""
    n = values.numel()
    found_mean, found_std = values.float().mean().item(), values.float().std(correction=0).item()
    if not abs(found_mean - mean) <= SIGMAS * std / math.sqrt(n):
        yield f"mean {found_mean:.4g} where {mean:.4g} is due"
    if not abs(found_std / std - 1) <= SIGMAS * 0.5 * math.sqrt((kurtosis - 1) / n) + 1 / n:
        yield f"standard deviation {found_std:.4g} where {std:.4g} is due"
