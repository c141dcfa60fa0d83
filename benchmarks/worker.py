"""An alternative in a process of its own, so that its memory can be told from all other, and its failure too.

    with Worker("benchmarks.loss:Ours", {"tokens": 4096}) as worker:
        worker.call("run").seconds

The process makes the object once and then calls its methods on request: processes can take turns like functions. It
speaks JSON, one line for each call, over its standard input and output.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from benchmarks.common import KERNELS, listen
from benchmarks.machine import MIB, forget_peak, peak_mib, resident_mib
from mamba_pretrain.ops import dispatch

ROOT = Path(__file__).parent.parent


class WorkerError(RuntimeError):
    """A worker ran out of time or memory, or raised; the message says which."""


class Answer(NamedTuple):
    result: Any
    seconds: float  # of the call alone
    before_mib: float  # memory of the process when the call began
    peak_mib: float  # the most it held during the call, all included

    @property
    def above_mib(self) -> float:
        """What the call needed beside what was there."""
        return self.peak_mib - self.before_mib


class Worker:
    """`target` is "module:Class"; `limit_s` holds for its construction and for each call."""

    def __init__(
        self,
        target: str,
        arguments: dict[str, Any],
        *,
        limit_s: float = 600,
        memory_gib: float | None = None,
    ) -> None:
        self.target, self.limit_s = target, limit_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        start = {
            "target": target,
            "arguments": arguments,
            "threads": torch.get_num_threads(),
            "kernels": dispatch.selected(),
            "memory_gib": memory_gib,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        try:
            self._ask(start)
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Answer:
        """Calls a method there; raises WorkerError if it takes longer than the limit, raises, or dies."""
        return self._ask({"method": method, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> Answer:
        assert self._process.stdin and self._process.stdout, "both are pipes"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.target} died: {self._last_words()}") from None
        ready, _, _ = select.select([self._process.stdout], [], [], self.limit_s)
        if not ready:
            self._process.kill()
            raise WorkerError(f"{self.target} took more than {self.limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.target} died with {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        KERNELS.update(answer.pop("kernels"))
        if "error" in answer:
            raise WorkerError(f"{self.target}: {answer['error']}")
        return Answer(**answer)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing (out of memory?)"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve() -> None:
    """The other end: one JSON line in, one out, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    listen()
    target: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if target is None:
            _limit_memory(request["memory_gib"])
            torch.set_num_threads(request["threads"])
            dispatch.select(request["kernels"])
        forget_peak()
        before_mib, began = resident_mib(), time.perf_counter()
        answer: dict[str, Any]
        try:
            result = None
            if target is None:
                module, _, name = request["target"].partition(":")
                target = getattr(importlib.import_module(module), name)(**request["arguments"])
            else:
                result = getattr(target, request["method"])(**request["arguments"])
            seconds = time.perf_counter() - began
            answer = {"result": result, "seconds": seconds, "before_mib": before_mib, "peak_mib": peak_mib()}
        except Exception as error:  # the other end raises it
            traceback.print_exc()
            answer = {"error": (str(error) or repr(error)).strip().splitlines()[0]}
        print(json.dumps(answer | {"kernels": sorted(KERNELS)}), file=answers, flush=True)


def _limit_memory(gib: float | None) -> None:
    """An alternative that needs more gets an error of its own, instead of the machine's other processes killed."""
    if gib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 1024 * MIB), resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve()
