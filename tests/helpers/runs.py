"""Small training runs, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mamba_pretrain import config as config_module
from mamba_pretrain.config import Config

ROOT = Path(__file__).parent.parent.parent
OPTIONS = [
    "model.d_model=16",
    "model.n_layer=2",
    "model.d_state=4",
    "data.seq_len=32",
    "data.workers=0",
    "train.steps=12",
    "train.batch_tokens=256",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "eval.every_steps=0",
    "eval.max_windows=4",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=9",
    "log.every_steps=1",
    "log.sinks=[jsonl]",
]


def small_config(dataset: Path, run_dir: Path, *overrides: str) -> Config:
    return config_module.load([], [*OPTIONS, f"data.path={dataset}", f"run_dir={run_dir}", *overrides])


def start(dataset: Path, run_dir: Path, *words: str, prelude: str = "") -> subprocess.Popen[str]:
    """`mamba-pretrain train` as a process; `prelude` is Python that runs before it, to break things from inside."""
    arguments = ["train", *OPTIONS, f"data.path={dataset}", f"run_dir={run_dir}", *words]
    positional = [w for w in arguments if "=" in w]
    named = [w for w in arguments if "=" not in w]
    code = f"import sys\n{prelude}\nfrom mamba_pretrain.cli import main\nsys.exit(main({named + positional!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def records(run_dir: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """The run's metrics by step; of a repeated step the last."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, filter(None, lines)) if r["kind"] == kind}


def losses(directory: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in records(directory).items()}
