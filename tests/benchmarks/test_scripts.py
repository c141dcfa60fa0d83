"""Every benchmark runs, at sizes of no meaning, and leaves the figures it promises. Nothing here is about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = ["model.n_layer=3", "model.d_model=32", "model.vocab_size=101"]


def figures(script: str, *words: str, directory: Path) -> dict[str, Any]:
    """What a script leaves behind: the values by name, all of them positive, and some goals."""
    target = directory / f"{script}.json"
    command = [sys.executable, "-m", f"benchmarks.{script}", "--rounds", "1", "--threads", "1", "--json", str(target)]
    done = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | {"MAMBA_PRETRAIN_KERNELS": "auto"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"## {script}\n\n|")
    told = json.loads(target.read_text())
    assert told["benchmark"] == script
    assert told["goals"]
    measured = {name: figure["value"] for name, figure in told["figures"].items()}
    wrong = {name: value for name, value in measured.items() if value is None or not value > 0}
    assert not wrong
    return measured | {"kernels": told["kernels"]}


@pytest.mark.slow
def test_scan(tmp_path: Path) -> None:
    told = figures("scan", "--sizes", "1x40x32", "2x24x16", directory=tmp_path)
    assert "2x24x16 backward bf16 / exp" in told
    assert "1x40x32 reference forward fp32 / exp" in told
    assert any(line.startswith("selective_scan on cpu: ") for line in told["kernels"])


@pytest.mark.slow
def test_scan_on_chosen_kernels(tmp_path: Path) -> None:
    told = figures("scan", "--sizes", "1x40x32", "--kernels", "reference", directory=tmp_path)
    assert "selective_scan on cpu: reference, as was asked" in told["kernels"]


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    few = ["--peer-steps", "1", "--peer-whole-up-to", "32", "--peer-blocks", "1", "2"]
    told = figures("train_step", *TINY, *few, "--lengths", "32", "48", directory=tmp_path)
    for length in (32, 48):
        assert {f"{length} ours tokens / peer tokens", f"{length} ours / products"} <= told.keys()
        assert f"{length} ours peak / peer peak" in told
    assert any(line.startswith("selective_scan on cpu: ") for line in told["kernels"])  # said in another process


@pytest.mark.slow
def test_length(tmp_path: Path) -> None:
    sizes = ["--lengths", "32", "64", "--total-tokens", "128", "--layers", "1", "--vocab", "101", "model.d_model=32"]
    told = figures("length", *sizes, directory=tmp_path)
    assert {"32 us", "64 us", "32 KiB", "64 KiB", "time max / min", "memory max / min"} <= told.keys()


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    sizes = ["--tokens", "2", "--positions", "10", "40", "--prefill", "20"]
    told = figures("decode", *TINY, *sizes, directory=tmp_path)
    assert {"ours fp32 tokens", "peer loop bf16 autocast tokens", "fastest ours / fastest peer"} <= told.keys()
    assert {"prefill bf16 tokens", "position 40, position 10 apart"} <= told.keys()


@pytest.mark.slow
def test_loss(tmp_path: Path) -> None:
    told = figures("loss", "--tokens", "512", "--d-model", "32", "--vocab", "5000", directory=tmp_path)
    assert {"time / faster peer", "memory / float", "memory / plain"} <= told.keys()
    assert told["ours loss"] == pytest.approx(told["float loss"], rel=1e-2)
    assert told["plain loss"] == pytest.approx(told["float loss"], rel=1e-2)


@pytest.mark.slow
def test_distributed(tmp_path: Path) -> None:
    sizes = ["--length", "32", "--save-length", "32", "--save-overrides", "model.d_model=48", "--disk", str(tmp_path)]
    which = ["--engines", "zero-2", "fsdp", "--savers", "fsdp", "--"]
    told = figures("distributed", *sizes, *which, *TINY, "model.vocab_size=301", directory=tmp_path)
    assert {"one process, 2 threads s", "one process, 1 thread s", "zero-2 communicating s"} <= told.keys()
    assert "fsdp without communication / share" in told
    assert told["fsdp sent / minimum"] == pytest.approx(1, abs=0.1)
    assert told["fsdp sent / minimum, 2 micro-batches"] == pytest.approx(1, abs=0.1)
    assert {"fsdp on 2 ranks: save / dd write", "fsdp on 2 ranks: load / dd read"} <= told.keys()
    assert "fsdp on 2 ranks: stall / blocking save" in told
    assert [path.name for path in tmp_path.iterdir()] == ["distributed.json"]  # what was saved is gone
