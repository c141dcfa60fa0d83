"""The engines on GPUs over NCCL: the same curve as on one. For a machine with two or more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.engines import CURVE, ENGINES
from tests.helpers.launchers import Launched, train_words
from tests.helpers.runs import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_several_gpus_follow_the_curve_of_one(name: str, precision: str, dataset: Path, tmp_path: Path) -> None:
    world, engine = ENGINES[name]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} NVIDIA GPUs")
    curves = []
    for ranks, options in ((1, []), (world, engine)):
        run_dir = tmp_path / f"of-{ranks}"
        words = train_words(dataset, run_dir, *CURVE, *options, f"train.precision={precision}", "train.device=cuda")
        torchrun = [sys.executable, "-m", "launch.torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        with Launched(
            [*torchrun, "-m", "launch.train", *words], tmp_path / f"log-{ranks}", {"DS_ACCELERATOR": "cuda"}
        ) as launched:
            assert launched.wait(600) == 0, launched.said[-3000:]
        curves.append(losses(run_dir))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5 if precision == "fp32" else 1e-3)
