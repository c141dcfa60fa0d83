"""Measured figures of a run, and where they go."""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from mamba_pretrain.config import Config
from mamba_pretrain.plan.gpus import peak_flops


def mfu(flops_per_token: float, tokens_per_s: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is unknown."""
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else flops_per_token * tokens_per_s / peak


def peak_memory_gib(device: torch.device) -> float:
    """Highest use so far: of the GPU's allocator, or of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Sink(Protocol):
    """Takes records: flat dictionaries with "kind" ("train" or "eval") and "step"."""

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Console:
    """A progress bar on a terminal, plain lines elsewhere (a Slurm log); both with speed and time left."""

    def __init__(self, config: Config, first_step: int, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.total, self.first, self.began = config.steps, first_step, time.monotonic()
        self.bar = (
            tqdm(total=self.total, initial=first_step, unit="step", file=self.stream, dynamic_ncols=True)
            if self.stream.isatty()
            else None
        )

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if record["kind"] == "eval":
            self._line(f"step {step}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}")
            return
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}"
        speed = f"{record['tokens_per_s']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{figures}  {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.total - step)
            self._line(f"step {step}/{self.total}  {figures}  {speed}  {_clock(left)} left")

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Jsonl:
    """One JSON object a line, appended. A resumed run repeats the steps after its checkpoint: the later line counts."""

    def __init__(self, path: Path) -> None:
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"  # a kill within a line
        self.file = path.open("a")
        if torn:
            self.file.write("\n")

    def write(self, record: dict[str, Any]) -> None:
        # NaN is no JSON: other readers refuse it. A loss that is not a number is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, run_dir: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run of wandb for the run directory, however often it is resumed."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=config.log.wandb_project,
            mode="online" if config.log.wandb_mode == "online" else "offline",
            dir=str(run_dir),
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, record: dict[str, Any]) -> None:
        self.run.log({f"{record['kind']}/{k}": v for k, v in _numbers(record).items()}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


class Sinks:
    """All sinks of a run as one."""

    def __init__(self, config: Config, run_dir: Path, first_step: int, *, writes: bool = True) -> None:
        """With `writes` false, on all ranks but one, there are none."""
        self._stack = ExitStack()
        self._sinks: list[Sink] = []
        make: dict[str, Any] = {
            "console": lambda: Console(config, first_step),
            "jsonl": lambda: Jsonl(run_dir / "metrics.jsonl"),
            "tensorboard": lambda: TensorBoard(run_dir, first_step),
            "wandb": lambda: WandB(config, run_dir),
        }
        for name in config.log.sinks if writes else ():
            sink: Sink = make[name]()
            self._stack.callback(sink.close)
            self._sinks.append(sink)

    def write(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        self._stack.close()


def append_ledger(
    path: Path, *, step: int, samples: Sequence[int], loss: float, loss_by_rank: Sequence[float], result: Any
) -> None:
    """Notes a skipped step and syncs it: what the batch was (global sample positions), what was not finite."""
    with path.open("a") as file:
        entry = {"step": step, "samples": list(samples), "loss": str(loss), "grad_norm": str(result.grad_norm)}
        entry["loss_by_rank"] = [str(part) for part in loss_by_rank]
        file.write(json.dumps({**entry, "loss_scale": result.loss_scale, "time": time.time()}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _missing(package: str) -> ImportError:
    return ImportError(
        f"log.sinks names {package}, which is not installed: pip install 'mamba-pretrain[track]', or leave it out"
    )
