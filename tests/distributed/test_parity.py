"""One loss curve, whichever engine trains, on real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.engines import ENGINES, Curve, alone, train
from tests.helpers.marks import slow_but
from tests.helpers.processes import on_ranks


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return alone(dataset, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", slow_but(["fsdp-2", "zero-3"], ENGINES))
def test_losses_norms_and_weights_are_those_of_one_process(
    name: str, dataset: Path, tmp_path: Path, reference: Curve
) -> None:
    world, options = ENGINES[name]
    curves = on_ranks(world, train, dataset, tmp_path, *options)
    assert all(curve.losses == curves[0].losses and curve.norms == curves[0].norms for curve in curves)
    assert sum(norm > 0.5 for norm in reference.norms) >= 10, "clipping should happen"
    assert len(curves[0].losses) == 20
    apart = curves[0].apart(reference)
    print(f"{name}, fp32: {apart}")
    assert max(apart) < 1e-5, apart


@pytest.mark.slow
def test_so_far_apart_are_two_runs_of_one_process(dataset: Path, tmp_path: Path, reference: Curve) -> None:
    """Which add up the same gradients in other micro-batches: what rounding alone does."""
    apart = alone(dataset, tmp_path, "train.micro_batch_size=1").apart(reference)
    print(f"one process, other micro-batches, fp32: {apart}")
    assert 0 < max(apart) < 1e-5, apart
