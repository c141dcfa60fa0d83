"""The training loop: `steps` takes them one by one, `run` is a run's life from start to exit.

    batch -> forward, backward -> clip and step -> log -> evaluate -> save

Everything that varies enters through the model, the engine and the configuration (`build.py`). What a run needs to go
on after any interruption is four integers (TrainState), the engine's tensors and the seed: the order of the data comes
from (seed, epoch, position), the learning rate from the step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain import config as config_module
from mamba_pretrain.build import Run, build
from mamba_pretrain.config import Config, ConfigError
from mamba_pretrain.data.loader import WindowDataset, batches
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.distributed.engine import StepResult
from mamba_pretrain.distributed.env import EXIT_PREEMPTED, Preemption, autocast
from mamba_pretrain.evaluate.perplexity import evaluate_windows
from mamba_pretrain.metrics import Sinks, append_ledger, mfu, peak_memory_gib
from mamba_pretrain.model.flops import training_flops_per_token
from mamba_pretrain.model.lm import LMOutput
from mamba_pretrain.optim import lr_at

log = logging.getLogger("mamba_pretrain")


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


@dataclass
class Step:
    """What one step did."""

    loss: float  # nats per target token, mean over the global batch
    lr: float
    result: StepResult
    samples: list[int]  # global positions of the batch
    seconds: float
    data_seconds: float  # of those, waiting for the loader


def run(config: Config) -> int:
    """Trains to the end (exit code 0) or to a signal (EXIT_PREEMPTED, saved). Raises what a user must see."""
    directory = Path(config.run_dir)
    with only_run_in(directory), Preemption() as preemption:
        this = build(config)
        config, state = this.config, this.state
        config_module.save(config, directory / "config.yaml")
        log.info("from step %d to %d, %d tokens each", state.step, config.steps, config.train.batch_tokens)
        sinks, saver, recent = Sinks(config, directory, state.step), Saver(this), Recent()
        skipped_in_a_row = 0
        try:
            _evaluate_if_due(this, sinks)  # what a stop may have kept the checkpoint's step from
            for step in steps(this):
                recent.add(step)
                skipped_in_a_row = _note_skip(this, step, skipped_in_a_row) if step.result.skipped else 0
                stop = preemption.received  # read once: a signal from here on is the next step's
                saving = state.step == config.steps or saver.due() or stop is not None
                if saving or state.step % config.log.every_steps == 0:
                    # Also before every save: what is not logged by then would be missing after a resume.
                    sinks.write(recent.record(this))
                    recent = Recent()
                if saving:
                    saver.save()
                if stop is not None and state.step < config.steps:
                    log.warning("%s: saved step %s, leaving", stop.name, state.step)
                    return EXIT_PREEMPTED
                _evaluate_if_due(this, sinks)
        finally:
            sinks.close()
    return 0


def steps(run: Run) -> Iterator[Step]:
    """Trains to the last step, one optimizer step at a time; `run.state` is up to date at each yield."""
    config, engine, state = run.config, run.engine, run.state
    dataset = WindowDataset(run.train, config.data.seq_len, config.train.seed, config.model.need("vocab_size"))
    loader = batches(
        dataset,
        micro_batch_size=config.train.micro_batch_size,
        first_sample=state.samples,
        rank=0,
        world=1,
        workers=config.data.workers,
    )
    accumulation = config.accumulation(world=1)
    engine.module.train()
    while state.step < config.steps:
        began = time.perf_counter()
        micro_batches = [next(loader) for _ in range(accumulation)]
        data_seconds = time.perf_counter() - began
        # The loss is a mean over the whole batch's targets, however unevenly packing spreads them.
        targets = max(1, sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches))
        total = torch.zeros((), device=run.device)
        for i, batch in enumerate(micro_batches):
            loss = _loss_sum(run, batch) / targets
            engine.backward(loss, last_micro_batch=i == accumulation - 1)
            total += loss.detach()
        lr = lr_at(state.step, config.steps, config.optim)
        result = engine.step(lr)

        state.step += 1
        state.samples += config.sequences_per_step
        state.tokens += config.train.batch_tokens
        state.epoch = state.samples // dataset.n_windows
        samples = [s for batch in micro_batches for s in batch["samples"].tolist()]
        yield Step(total.item(), lr, result, samples, time.perf_counter() - began, data_seconds)


def _loss_sum(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """Forward pass of a micro-batch: nats summed over its target tokens."""
    on_device = {k: v.to(run.device, non_blocking=True) for k, v in batch.items()}
    seq_idx = on_device["seq_idx"] if run.config.data.reset_documents else None
    with autocast(run.config.train.precision, run.device):
        output: LMOutput = run.engine.module(on_device["input_ids"], on_device["labels"], seq_idx, return_state=False)
    assert output.loss_sum is not None, "labels were given"
    return output.loss_sum


def _evaluate_if_due(run: Run, sinks: Sinks) -> None:
    """Scores the validation split, where there is one, every n steps and at the end."""
    config, step = run.config, run.state.step
    every = config.eval.every_steps
    if run.validation is None or step == 0 or not (step == config.steps or (every and step % every == 0)):
        return
    result = evaluate_windows(
        run.engine.module,
        run.validation,
        seq_len=config.data.seq_len,
        reset_documents=config.data.reset_documents,
        batch=config.train.micro_batch_size,
        max_windows=config.eval.max_windows,
        precision=config.train.precision,
    )
    figures = {"loss": result.nats_per_token, "perplexity": result.perplexity}
    sinks.write({"kind": "eval", "step": step, "tokens": run.state.tokens, **figures})


class Recent:
    """The steps since the last record."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        step.samples = step.samples if step.result.skipped else []
        self.steps.append(step)

    def record(self, run: Run) -> dict[str, Any]:
        """Means of loss and times over them, the last step's other figures."""
        losses = [step.loss for step in self.steps if not step.result.skipped]
        seconds = sum(step.seconds for step in self.steps)
        tokens_per_s = len(self.steps) * run.config.train.batch_tokens / seconds
        last = self.steps[-1]
        return {
            "kind": "train",
            **asdict(run.state),
            "loss": sum(losses) / len(losses) if losses else math.nan,
            "lr": last.lr,
            "grad_norm": last.result.grad_norm,
            "loss_scale": last.result.loss_scale,
            "averaged_steps": len(losses),
            "skipped_steps": len(self.steps) - len(losses),
            "tokens_per_s": tokens_per_s,
            "mfu": mfu(training_flops_per_token(run.config.model), tokens_per_s, run.device),
            "time/step_s": seconds / len(self.steps),
            "time/data_loading_s": sum(step.data_seconds for step in self.steps) / len(self.steps),
            "memory/peak_gib": peak_memory_gib(run.device),
        }


class Saver:
    """When to save, and what."""

    def __init__(self, run: Run) -> None:
        self.run, self.directory, self.saved_at = run, run.directory / "checkpoints", time.monotonic()
        checkpoint.clean(self.directory)

    def due(self) -> bool:
        options, step = self.run.config.checkpoint, self.run.state.step
        by_step = options.every_steps and step % options.every_steps == 0
        by_time = options.every_minutes and time.monotonic() - self.saved_at > 60 * options.every_minutes
        return bool(by_step or by_time)

    def save(self) -> None:
        run, options = self.run, self.run.config.checkpoint

        def write_files(directory: Path) -> None:
            run.engine.save(directory)
            run.tokenizer.save(directory)
            (directory / checkpoint.STATE).write_text(json.dumps(asdict(run.state), indent=1) + "\n")

        facts = {
            "kind": "checkpoint",
            "step": run.state.step,
            "identity": run.identity,
            "tokenizer": asdict(run.manifest.tokenizer),
            "adds_bos": run.manifest.adds_bos,
            "kernels": run.kernels,
            "config_digest": run.config.digest(),
        }
        target = checkpoint.step_directory(self.directory, run.state.step)
        checkpoint.write(target, run.config, facts, write_files)
        checkpoint.rotate(self.directory, keep_last=options.keep_last, keep_every_steps=options.keep_every_steps)
        self.saved_at = time.monotonic()


def _note_skip(run: Run, step: Step, in_a_row: int) -> int:
    """Writes the skipped step down and returns how many there are in a row now; too many end the run."""
    ledger = run.directory / "nonfinite.jsonl"
    append_ledger(ledger, step=run.state.step, samples=step.samples, loss=step.loss, result=step.result)
    log.warning("step %s skipped: loss %s, gradient norm %s", run.state.step, step.loss, step.result.grad_norm)
    if in_a_row + 1 >= run.config.train.max_nonfinite:
        raise NonFiniteError(
            f"{in_a_row + 1} steps in a row had a loss or gradient that is not finite; the last is step "
            f"{run.state.step}, loss {step.loss}, gradient norm {step.result.grad_norm}. {ledger} names their samples. "
            "Resume from a checkpoint before them with a lower optim.lr, or in another train.precision"
        )
    return in_a_row + 1


@contextlib.contextmanager
def only_run_in(directory: Path) -> Iterator[None]:
    """Makes the run directory and holds its lock: two runs must not write the same checkpoints.

    A run that ends before it has written anything leaves no directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError([f"another process trains in {directory}: stop it, or choose another run_dir"]) from None
        if not directory.exists() or not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise ConfigError([f"{directory} was removed by another process that ended just now: start again"])
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
    finally:
        os.close(descriptor)
