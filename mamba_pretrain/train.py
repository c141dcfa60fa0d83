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
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain import config as config_module
from mamba_pretrain.build import Run, build
from mamba_pretrain.config import Config, ConfigError
from mamba_pretrain.data.loader import Batch, batches
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.distributed.engine import StepResult
from mamba_pretrain.distributed.env import EXIT_PREEMPTED, Preemption, autocast, resolve_device
from mamba_pretrain.distributed.ranks import Ranks, connected, find_ranks
from mamba_pretrain.distributed.watch import SLOWLY, Watch
from mamba_pretrain.evaluate.perplexity import evaluate_windows
from mamba_pretrain.files import naming
from mamba_pretrain.metrics import Sinks, append_ledger, mfu, peak_memory_gib
from mamba_pretrain.model.flops import training_flops_per_token
from mamba_pretrain.model.lm import LMOutput
from mamba_pretrain.optim import lr_at
from mamba_pretrain.saver import Saver

OUTCOME = "outcome.json"

log = logging.getLogger("mamba_pretrain")


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


@dataclass
class Step:
    """What one step did."""

    loss: float  # nats per target token, mean over the global batch
    lr: float
    result: StepResult
    samples: range  # global positions of the batch
    loss_by_rank: list[float]  # of a skipped step: what each rank adds to the loss
    seconds: float
    data_seconds: float  # of those, waiting for the loader


def run(config: Config) -> int:
    """Trains to the end (exit code 0) or to a signal (EXIT_PREEMPTED, saved). Raises what a user must see."""
    ranks, directory = find_ranks(), Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        if ranks.world > 1 or config.train.engine != "single":
            stack.enter_context(connected(ranks, resolve_device(config.train.device, ranks.local_rank)))
        with ranks.together():
            if ranks.first:
                stack.enter_context(only_run_in(directory))
        require_shared(directory, ranks)
        preemption = stack.enter_context(Preemption(stay=ranks.world > 1))
        watch = stack.enter_context(Watch(ranks, config.train.hang_minutes, directory, preemption))
        watch.beat(SLOWLY)
        this = build(config, ranks)
        watch.beat()
        config, state = this.config, this.state
        with ranks.together():
            if ranks.first:
                with naming(directory / "config.yaml") as path:
                    config_module.save(config, path)
        log.info("from step %d to %d, %d tokens each", state.step, config.steps, config.train.batch_tokens)
        sinks = stack.enter_context(contextlib.closing(Sinks(config, directory, state.step, writes=ranks.first)))
        saver = stack.enter_context(contextlib.closing(Saver(this)))
        recent, skipped_in_a_row = Recent(), 0
        _evaluate_if_due(this, sinks, watch)  # what a stop may have kept the checkpoint's step from
        for step in steps(this):
            watch.beat()
            recent.add(step)
            skipped_in_a_row = _note_skip(this, step, skipped_in_a_row) if step.result.skipped else 0
            # What any rank was told, all do: stop, save by rank 0's clock, commit a save when all have written theirs.
            reason = preemption.reason  # read once: a signal from here on is the next step's
            told = ranks.sum(reason is not None, ranks.first and saver.due_by_time(), saver.written)
            stop, saving_by_time, written = told[0] > 0, told[1] > 0, told[2] == ranks.world
            if written or saver.due_by_step() or saving_by_time or stop:
                watch.beat(SLOWLY)
            if written:
                saver.commit()
            saving = state.step == config.steps or saver.due_by_step() or saving_by_time or stop
            if saving or state.step % config.log.every_steps == 0:
                # Also before every save: what is not logged by then would be missing after a resume.
                sinks.write(recent.record(this))
                recent = Recent()
            if saving:
                saver.save()
            watch.beat()
            if stop and state.step < config.steps:
                saver.commit()
                _leave(this, reason)
                return EXIT_PREEMPTED
            _evaluate_if_due(this, sinks, watch)
        watch.beat(SLOWLY)
        saver.commit()
        write_outcome(this, "finished")
    return 0


def steps(run: Run) -> Iterator[Step]:
    """Trains to the last step, one optimizer step at a time; `run.state` is up to date at each yield."""
    config, engine, state, ranks = run.config, run.engine, run.state, run.ranks
    loader = batches(
        run.reading.dataset,
        micro_batch_size=config.train.micro_batch_size,
        first_sample=state.samples,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.data.workers,
    )
    accumulation = config.accumulation(ranks.world)
    engine.module.train()
    while state.step < config.steps:
        began = time.perf_counter()
        micro_batches = [next(loader) for _ in range(accumulation)]
        data_seconds = time.perf_counter() - began
        # The loss is a mean over the whole batch's targets, however unevenly packing spreads them over the ranks.
        targets, padding = map(int, ranks.sum(*_tally(micro_batches)))
        total = torch.zeros((), device=run.device)
        for i, batch in enumerate(micro_batches):
            loss = _loss_sum(run, batch) / max(1, targets)
            engine.backward(loss, last_micro_batch=i == accumulation - 1)
            total += loss.detach()
        lr = lr_at(state.step, config.steps, config.optim)
        result = engine.step(lr)

        seq_len = micro_batches[0]["input_ids"].shape[1]
        samples = range(state.samples, state.samples + config.train.batch_tokens // seq_len)
        state.step += 1
        state.samples = samples.stop
        state.epoch = run.reading.epoch(state.samples)
        state.source_tokens = run.reading.told_tokens(state.samples)
        state.count(config.train.batch_tokens, targets, padding, skipped=result.skipped)
        loss_by_rank = ranks.gather(total.item()) if result.skipped else ranks.sum(total.item())
        yield Step(
            math.fsum(loss_by_rank), lr, result, samples, loss_by_rank, time.perf_counter() - began, data_seconds
        )


def _tally(micro_batches: Sequence[Batch]) -> tuple[int, int]:
    """This rank's targets and padding."""
    targets = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
    return targets, sum(int(batch["padding"].sum()) for batch in micro_batches)


def _loss_sum(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """Forward pass of a micro-batch: nats summed over its target tokens."""
    on_device = {k: batch[k].to(run.device, non_blocking=True) for k in ("input_ids", "labels", "seq_idx")}
    seq_idx = on_device["seq_idx"] if run.config.data.reset_documents else None
    with autocast(run.config.train.precision, run.device, cache=False):
        output: LMOutput = run.engine.module(on_device["input_ids"], on_device["labels"], seq_idx, return_state=False)
    assert output.loss_sum is not None, "labels were given"
    return output.loss_sum


def _evaluate_if_due(run: Run, sinks: Sinks, watch: Watch) -> None:
    """Scores the validation split, where there is one, every n steps and at the end."""
    config, step = run.config, run.state.step
    every = config.eval.every_steps
    scored = {source.name: source.validation for source in run.reading.sources if source.validation is not None}
    if not scored or step == 0 or not (step == config.steps or (every and step % every == 0)):
        return
    # Rows of one length in all stages, the longest, so that the losses compare.
    seq_len = config.data.longest_seq_len
    results = {
        name: evaluate_windows(
            run.engine.module,
            shard,
            seq_len=seq_len,
            reset_documents=config.data.reset_documents,
            batch=config.train.micro_batch_size * config.data.seq_len // seq_len,
            max_windows=config.eval.max_windows,
            precision=config.train.precision,
            device=run.device,
            ranks=run.ranks,
            progress=watch.beat,
        )
        for name, shard in scored.items()
    }
    nats, tokens = (sum(getattr(result, name) for result in results.values()) for name in ("nats", "tokens"))
    loss = nats / tokens if tokens else math.nan
    figures = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if len(run.reading.sources) > 1:
        figures |= {f"loss/{name}": result.nats_per_token for name, result in results.items()}
    sinks.write({"kind": "eval", "step": step, "tokens": run.state.tokens, **figures})


class Recent:
    """The steps since the last record."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def record(self, run: Run) -> dict[str, Any]:
        """Means of loss and times over them, the last step's other figures."""
        losses = [step.loss for step in self.steps if not step.result.skipped]
        seconds = sum(step.seconds for step in self.steps)
        tokens_per_s = len(self.steps) * run.config.train.batch_tokens / seconds
        last = self.steps[-1]
        return {
            "kind": "train",
            **run.state.figures(),
            "loss": sum(losses) / len(losses) if losses else math.nan,
            "lr": last.lr,
            "grad_norm": last.result.grad_norm,
            "loss_scale": last.result.loss_scale,
            "averaged_steps": len(losses),
            "skipped_steps": len(self.steps) - len(losses),
            "tokens_per_s": tokens_per_s,
            "mfu": mfu(training_flops_per_token(run.config.model), tokens_per_s / run.ranks.world, run.device),
            "time/step_s": seconds / len(self.steps),
            "time/data_loading_s": sum(step.data_seconds for step in self.steps) / len(self.steps),
            "memory/peak_gib": peak_memory_gib(run.device),
        }


def _note_skip(run: Run, step: Step, in_a_row: int) -> int:
    """Writes the skipped step down and returns how many there are in a row now; too many end the run."""
    ledger = run.directory / "nonfinite.jsonl"
    if run.ranks.first:
        append_ledger(
            ledger,
            step=run.state.step,
            samples=step.samples,
            loss=step.loss,
            loss_by_rank=step.loss_by_rank,
            result=step.result,
        )
    culprits = [rank for rank, loss in enumerate(step.loss_by_rank) if not math.isfinite(loss)]
    where = f" (on rank {', '.join(map(str, culprits))})" if culprits and run.ranks.world > 1 else ""
    log.warning("step %s skipped: loss %s%s, gradient norm %s", run.state.step, step.loss, where, step.result.grad_norm)
    if in_a_row + 1 >= run.config.train.max_nonfinite:
        raise NonFiniteError(
            f"{in_a_row + 1} steps in a row had a loss or gradient that is not finite; the last is step "
            f"{run.state.step}, loss {step.loss}, gradient norm {step.result.grad_norm}. {ledger} names their samples. "
            "Resume from a checkpoint before them with a lower optim.lr, or in another train.precision"
        )
    return in_a_row + 1


def _leave(run: Run, reason: str | None) -> None:
    """Says, and writes down, on whose word the run saved itself and ends."""
    told = [f"{text} on rank {rank}" for rank, text in enumerate(run.ranks.gather(reason)) if text]
    why = ", ".join(dict.fromkeys(told)) if run.ranks.world > 1 else str(reason)
    log.warning("%s: saved step %s, leaving", why, run.state.step)
    write_outcome(run, "preempted", why)


def write_outcome(run: Run, outcome: str, why: str | None = None) -> None:
    """outcome.json tells how the last process ended, where a launcher swallows exit codes; absent after a failure."""
    if run.ranks.first:
        text = json.dumps({"outcome": outcome, "step": run.state.step, "why": why, "time": time.time()})
        with naming(run.directory / OUTCOME) as path:
            path.write_text(text + "\n")


def require_shared(directory: Path, ranks: Ranks) -> None:
    """Raises ConfigError where a rank does not see what rank 0 makes there: its first save would be in vain."""
    path = directory / f"shared-{ranks.broadcast(uuid.uuid4().hex)}"
    try:
        with ranks.together():
            if ranks.first:
                path.touch()
        with ranks.together():
            if not path.exists():
                raise ConfigError(
                    [
                        f"{directory} of rank {ranks.rank} on {socket.gethostname()} is another directory than rank "
                        "0's: run_dir must lie on a file system that all ranks share"
                    ]
                )
    finally:
        if ranks.first:
            path.unlink(missing_ok=True)


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
        (directory / OUTCOME).unlink(missing_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
    finally:
        os.close(descriptor)
