"""One rank of a training run, in a process of its own, that does on request what benchmarks/distributed.py times."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import shape
from benchmarks.traffic import Meter, Taken, tcp_bytes_sent
from benchmarks.worker import Worker
from mamba_pretrain import checkpoint
from mamba_pretrain.build import build
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER, StepResult
from mamba_pretrain.distributed.ranks import connected, find_ranks
from mamba_pretrain.saver import Saver
from mamba_pretrain.train import steps


class Rank:
    """A run that is ready to step, as `mamba_pretrain.train` makes it and takes its steps."""

    def __init__(
        self, preset: str, length: int, batch: int, overrides: list[str], environment: dict[str, str], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        os.environ.update(environment)
        self.ranks, self.stack = find_ranks(), contextlib.ExitStack()
        self.meter = self.stack.enter_context(Meter())
        if self.ranks.world > 1:
            self.stack.enter_context(connected(self.ranks, torch.device("cpu")))
        self.run = build(shape(preset, length, batch, overrides), self.ranks)
        self.updating = 0.0
        self._time_updates()
        self.steps = steps(self.run)
        self.saver = Saver(self.run)

    def _time_updates(self) -> None:
        """Notes the engine's `step`: its seconds without communication."""
        engine = self.run.engine
        original: Callable[[float], StepResult] = engine.step

        def step(lr: float) -> StepResult:
            began, talked = time.perf_counter(), self.meter.taken.seconds
            result = original(lr)
            self.updating += time.perf_counter() - began - (self.meter.taken.seconds - talked)
            return result

        engine.step = step  # type: ignore[method-assign]

    def threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def step(self) -> dict[str, Any]:
        self.meter.take()
        self.updating, sent, began, busy = 0.0, tcp_bytes_sent(), time.perf_counter(), time.thread_time()
        step = next(self.steps)
        seconds, busy = time.perf_counter() - began, time.thread_time() - busy
        taken: Taken = self.meter.take()
        assert not step.result.skipped, "the loss is finite"
        return {
            "seconds": seconds,
            "communicating": taken.seconds,
            "processor": busy,  # of this thread, which computes; gloo's own threads move the bytes
            "updating": self.updating,
            "sent": taken.sent,
            "operations": {kind: asdict(count) for kind, count in taken.operations.items()},
            "tcp": tcp_bytes_sent() - sent,
            "loss": step.loss,
        }

    @property
    def target(self) -> Path:
        return checkpoint.step_directory(self.saver.directory, self.run.state.step)

    def discard(self) -> None:
        """Removes the checkpoint of this step."""
        shutil.rmtree(self.target, ignore_errors=True)

    def save(self) -> float:
        self._asynchronous(False)
        began = time.perf_counter()
        self.saver.save()
        return time.perf_counter() - began

    def save_in_background(self) -> dict[str, Any]:
        """As the training loop does it: it goes on, asks after each step whether all have written, and commits."""
        self._asynchronous(True)
        began = time.perf_counter()
        self.saver.save()
        stall, seconds = time.perf_counter() - began, []
        written = False
        while not written:
            seconds.append(self.step()["seconds"])
            written = self.ranks.sum(self.saver.written)[0] == self.ranks.world
        waited = time.perf_counter()
        self.saver.commit()
        ended = time.perf_counter()
        return {"stall": stall + ended - waited, "snapshot": stall, "until committed": ended - began, "steps": seconds}

    def verify(self, directory: str) -> float:
        began = time.perf_counter()
        checkpoint.verify(Path(directory), self.ranks)
        return time.perf_counter() - began

    def load(self, directory: str) -> float:
        began, path = time.perf_counter(), Path(directory)
        manifest = checkpoint.read_manifest(path)
        self.run.engine.load({part: checkpoint.open_part(path, manifest, part) for part in (MODEL, OPTIMIZER)})
        seconds = time.perf_counter() - began
        gc.collect()  # the files are closed, and may leave the system's cache
        return seconds

    def newest(self) -> str:
        return str(checkpoint.checkpoints(self.saver.directory)[-1])

    def _asynchronous(self, value: bool) -> None:
        config = self.run.config
        self.run.config = dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, asynchronous=value)
        )


class Group:
    """The ranks of one alternative, that all do the same at the same time; or as many runs that do not talk."""

    def __init__(
        self,
        world: int,
        preset: str,
        length: int,
        batch: int,
        overrides: list[str],
        directory: Path,
        *,
        threads: int = 1,
        talk: bool = True,
    ) -> None:
        self.stack = contextlib.ExitStack()
        self.pool = self.stack.enter_context(ThreadPoolExecutor(world))
        self.started: dict[int, Worker] = {}
        port = free_port()

        def start(rank: int) -> None:
            together = talk and world > 1
            environment = launched(rank, world, port) if together else {}
            run_dir = directory / ("run" if together else f"run-{rank}")
            arguments = {
                "preset": preset,
                "length": length,
                "batch": batch,
                "overrides": [*overrides, f"run_dir={run_dir}"],
                "environment": {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **environment},
                "threads": threads,
            }
            self.started[rank] = Worker("benchmarks.rank:Rank", arguments)

        try:
            list(self.pool.map(start, range(world)))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """The answers by rank."""
        ranks = sorted(self.started)
        return list(self.pool.map(lambda rank: self.started[rank].call(method, **arguments).result, ranks))

    def slowest(self, method: str, **arguments: Any) -> float:
        return max(map(float, self.call(method, **arguments)))

    def first(self, method: str, **arguments: Any) -> Any:
        """Asks rank 0 alone, for what needs no other."""
        return self.started[0].call(method, **arguments).result

    def close(self) -> None:
        self.stack.close()
        for worker in self.started.values():
            worker.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launched(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set on one host."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, (str(rank), str(rank), str(world), str(world), "127.0.0.1", str(port)), strict=True))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
