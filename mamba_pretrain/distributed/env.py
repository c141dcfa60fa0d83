"""What surrounds a process: its device, the precision it computes in, the signals it gets."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import NoReturn

import torch

from mamba_pretrain.config import AUTO, ConfigError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the run saved itself on a signal; start it again to go on
EXIT_HUNG = 4  # no progress for train.hang_minutes: every rank has written its stacks
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed CPU tensors for the next ones.

    By default it returns every large block to the system, and each step of training gets it back as new pages that are
    zeroed at the first touch: a tenth of a step of the 130m model on two cores. Does nothing where the C library is not
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of glibc's malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """auto takes a GPU where there is one; ranks of one host take one each. ConfigError where there are too few."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["train.device is cuda, and torch sees no GPU here: use train.device=cpu"])
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError([f"this is rank {local_rank} of its host, which has {torch.cuda.device_count()} GPU(s)"])
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def resolve_precision(name: str, device: torch.device) -> str:
    """auto is bf16 where the device has its products, else fp32, which is faster than emulation. May raise as below."""
    if name == AUTO:
        return "bf16" if bf16_is_native(device) else "fp32"
    check_precision(name, device)
    return name


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision in which the device has no matrix products (they would be emulated, many times slower)."""
    if precision == "fp16" and not fp16_is_native(device):
        raise ConfigError(["train.precision is fp16, which this CPU does not multiply in: use bf16 or fp32"])
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(["train.precision is bf16, which this GPU does not multiply in: use fp16 or fp32"])


def fp16_is_native(device: torch.device) -> bool:
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def bf16_is_native(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 here; elsewhere it is right, but emulated."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> torch.autocast:
    """Matrix products in `precision`; fp32 turns autocast off.

    `cache` keeps the narrow copies of weights until the context ends. A training step uses each weight once in a
    forward, and with recomputation the copies of all blocks, on every rank, would be held for nothing.
    """
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32", cache_enabled=cache)


class Preemption(AbstractContextManager["Preemption"]):
    """Turns SIGTERM, SIGINT and SIGUSR1 into a reason to stop that the trainer reads between steps.

    A second SIGINT raises KeyboardInterrupt at once, for someone who does not want to wait for the save. Earlier
    handlers come back at the end, but not where `stay`: a process that `leave` will end keeps these, as schedulers
    signal more than once, and what comes after the save must not change how the run is seen to end.
    """

    def __init__(self, *, stay: bool = False) -> None:
        self.reason: str | None = None
        self._stay = stay
        self._interrupted = False

    def request(self, reason: str) -> None:
        self.reason = reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.request(signal.Signals(number).name)

    def __enter__(self) -> Preemption:
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stay:
            for number, handler in self._earlier.items():
                signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends a process that may have been connected: as sys.exit does, but without the interpreter's finalization.

    gloo's threads need the interpreter to drop the tensors of an exchange, some time after it. One that comes to it
    during the finalization aborts the process, and a preemption looks like a failure (seen in one of seven runs of two
    ranks on busy cores, PyTorch 2.13).
    """
    for number in SIGNALS:  # the outcome is known
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # else it was closed when the process began
                stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, or its disk is full
            code = code or 120  # as Python itself says it
    os._exit(code)
