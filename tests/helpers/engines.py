"""A small packed corpus and model, trained by any engine on any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_pretrain.build import Run, build
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.saver import Saver
from mamba_pretrain.train import steps
from tests.helpers.runs import small_config

# Twenty steps in which something happens: accumulation, clipping on most steps, two decay groups, a padded vocabulary
# (the tokenizer's is odd), documents shorter than a window, which spread the targets unevenly.
CURVE = [
    *("model.d_model=32", "model.n_layer=3", "train.steps=20", "train.micro_batch_size=2", "train.batch_tokens=512"),
    *("optim.lr=1e-3", "optim.clip_norm=0.5", "optim.weight_decay=0.3", "data.validation_split=null"),
    *("checkpoint.every_steps=0", "checkpoint.every_minutes=0"),
]
ENGINES = {  # name: (ranks, options)
    "fsdp-2": (2, ["train.engine=fsdp"]),
    "fsdp-4": (4, ["train.engine=fsdp"]),
    "hsdp-2x2": (4, ["train.engine=fsdp", "fsdp.replicas=2"]),
    "zero-1": (2, ["train.engine=zero", "zero.stage=1"]),
    "zero-2": (2, ["train.engine=zero", "zero.stage=2"]),
    "zero-3": (2, ["train.engine=zero", "zero.stage=3"]),
}


@dataclass
class Curve:
    """What a run did."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # steps
    weights: dict[str, Tensor] = field(default_factory=dict)
    targets: list[list[int]] = field(default_factory=list)  # by step, by rank

    def apart(self, expected: Curve) -> Apart:
        assert self.weights.keys() == expected.weights.keys()
        return Apart(
            max(abs(a / b - 1) for a, b in zip(self.losses, expected.losses, strict=True)),
            max(abs(a / b - 1) for a, b in zip(self.norms, expected.norms, strict=True)),
            max(relative(self.weights[name], whole) for name, whole in expected.weights.items()),
        )


class Apart(NamedTuple):
    """The largest relative differences; a test that prints them shows them with `pytest -rP`."""

    losses: float
    norms: float
    weights: float

    def __str__(self) -> str:
        return f"losses {self.losses:.1e}, norms {self.norms:.1e}, weights {self.weights:.1e} apart"


def train(
    ranks: Ranks,
    dataset: Path,
    run_dir: Path,
    *overrides: str,
    n_steps: int | None = None,
    save: bool = False,
    prepare: Callable[[Run], None] = lambda run: None,
) -> Curve:
    """Takes `n_steps` (default: all that are left) on these ranks; every rank returns the same Curve."""
    torch.set_num_threads(1)
    config = small_config(dataset, run_dir, *CURVE, *overrides)
    run = build(config, ranks)
    prepare(run)
    curve = Curve()
    for step in itertools.islice(steps(run), n_steps):
        curve.losses.append(step.loss)
        curve.norms.append(step.result.grad_norm)
        if step.result.skipped:
            curve.skipped.append(run.state.step)
    curve.weights = {name: whole.detach().cpu().clone() for name, whole in run.engine.full_parameters()}
    if save:
        Saver(run).save()
    return curve


def alone(dataset: Path, run_dir: Path, *overrides: str, n_steps: int | None = None, save: bool = False) -> Curve:
    """The same by the engine for one process, in this one."""
    return train(ALONE, dataset, run_dir, *overrides, n_steps=n_steps, save=save)


def relative(found: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference over that of what is expected.

    Of whole parameters, not of elements: in Adam's first steps an update is lr x gradient / |gradient|, so an element
    whose gradient is a sum that all but cancels moves with the order of that sum, on one process too.
    """
    return float((found - expected).norm() / expected.norm())
