"""What any engine saves on any number of ranks, any other goes on from, on real ranks over gloo."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mamba_pretrain import checkpoint
from mamba_pretrain.build import build
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.saver import Saver
from mamba_pretrain.train import steps
from tests.helpers.engines import CURVE, ENGINES, Curve, alone, train
from tests.helpers.marks import slow_but
from tests.helpers.processes import on_ranks
from tests.helpers.runs import small_config

LAYOUTS = {
    **{name: ENGINES[name] for name in ("fsdp-2", "fsdp-4", "hsdp-2x2", "zero-1", "zero-2", "zero-3")},
    "single": (1, ["train.engine=single"]),
    "fsdp-1": (1, ["train.engine=fsdp"]),
    "zero-1-of-4": (4, ["train.engine=zero", "zero.stage=1"]),
    "zero-3-of-4": (4, ["train.engine=zero", "zero.stage=3"]),
    "zero-3-offloaded": (
        2,
        ["train.engine=zero", "zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"],
    ),
}
MOVES = [
    *(("single", to) for to in ("fsdp-4", "zero-1", "zero-3-of-4", "fsdp-1")),
    *(("fsdp-2", to) for to in ("single", "hsdp-2x2", "zero-2")),
    *(("hsdp-2x2", to) for to in ("fsdp-2", "zero-3")),
    *(("zero-1", to) for to in ("zero-1-of-4", "zero-3-offloaded", "fsdp-4")),
    *(("zero-2", to) for to in ("zero-1", "single")),
    *(("zero-3", to) for to in ("zero-3-of-4", "zero-2", "single")),
]
STOP = 6  # the step that is saved


@dataclass
class Resumed:
    """What a run did after it was resumed."""

    losses: list[float]
    samples: list[range]
    step: int


def go_on(ranks: Ranks, dataset: Path, run_dir: Path, source: Path, *options: str) -> Resumed:
    """Resumes from `source`, saves at once what it has loaded, and takes two steps."""
    torch.set_num_threads(1)
    run = build(small_config(dataset, run_dir, *CURVE, *options, f"checkpoint.resume={source}"), ranks)
    Saver(run).save()
    found = Resumed([], [], run.state.step)
    for step in itertools.islice(steps(run), 2):
        found.losses.append(step.loss)
        found.samples.append(step.samples)
    return found


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return alone(dataset, tmp_path_factory.mktemp("alone"), n_steps=STOP + 2)


@pytest.fixture(scope="module")
def saved(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by each engine, made when it is first asked for."""

    @functools.cache
    def saved_by(name: str) -> Path:
        world, options = LAYOUTS[name]
        directory = tmp_path_factory.mktemp(name)

        def work(ranks: Ranks) -> Curve:
            return train(ranks, dataset, directory, *options, n_steps=STOP, save=True)

        on_ranks(world, work) if world > 1 else work(ALONE)
        return directory / f"checkpoints/step_{STOP:08d}"

    return saved_by


FAST = [("single", "fsdp-4")]


@pytest.mark.parametrize(("source", "target"), slow_but(FAST, MOVES), ids=lambda name: name)
def test_a_checkpoint_moves_without_the_loss_of_a_bit_and_the_run_goes_on(
    source: str, target: str, saved: Callable[[str], Path], dataset: Path, tmp_path: Path, reference: Curve
) -> None:
    world, options = LAYOUTS[target]
    found = on_ranks(world, go_on, dataset, tmp_path, saved(source), *options)[0]
    assert found.step == STOP
    assert found.samples == [range(16 * step, 16 * (step + 1)) for step in (STOP, STOP + 1)]
    assert found.losses == pytest.approx(reference.losses[STOP:], rel=1e-5)
    there, back = saved(source), tmp_path / f"checkpoints/step_{STOP:08d}"
    for part in (MODEL, OPTIMIZER):
        before, after = (checkpoint.open_part(path, checkpoint.verify(path), part) for path in (there, back))
        assert before.shapes == after.shapes
        for name in before.shapes:
            assert torch.equal(before.tensor(name), after.tensor(name)), name


@pytest.mark.parametrize(
    "name", slow_but(["fsdp-2"], ["fsdp-2", "hsdp-2x2", "zero-1", "zero-2", "zero-3", "zero-3-offloaded"])
)
def test_the_same_engine_on_as_many_ranks_goes_on_to_the_bit(name: str, dataset: Path, tmp_path: Path) -> None:
    world, options = LAYOUTS[name]
    options = [*options, "train.steps=8"]
    whole = on_ranks(world, train, dataset, tmp_path / "whole", *options)[0]

    def first_half(ranks: Ranks) -> Curve:
        return train(ranks, dataset, tmp_path / "halves", *options, n_steps=4, save=True)

    first = on_ranks(world, first_half)[0]
    rest = on_ranks(world, train, dataset, tmp_path / "halves", *options, "checkpoint.resume=auto")[0]
    assert first.losses + rest.losses == whole.losses
    assert first.norms + rest.norms == whole.norms
    assert all(torch.equal(rest.weights[key], value) for key, value in whole.weights.items())


@pytest.mark.parametrize("name", slow_but(["fsdp-2"], ["fsdp-2", "hsdp-2x2", "zero-1", "zero-2", "zero-3"]))
def test_every_rank_writes_its_part_and_no_more(name: str, saved: Callable[[str], Path]) -> None:
    tensors = []
    for path in sorted(saved(name).glob("optimizer*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.append(sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys()))  # noqa: SIM118
    assert len(tensors) == LAYOUTS[name][0]
    assert max(tensors) < 1.35 * sum(tensors) / len(tensors)
    model = checkpoint.open_part(saved(name), checkpoint.verify(saved(name)), MODEL)
    parameters = sum(math.prod(shape) for shape in model.shapes.values())
    assert sum(tensors) == 2 * parameters + 1, "nothing twice, but for two moments; and Adam's step"
