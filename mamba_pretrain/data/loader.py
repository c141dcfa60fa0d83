"""Batches for one rank, from any sample on, in an order that depends on nothing but the seed.

The state is one counter of consumed samples over all ranks, and the caller holds it. B micro-batch, L window length.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mamba_pretrain.data.order import window_at
from mamba_pretrain.data.packing import n_windows, window
from mamba_pretrain.data.shards import Shard, ShardError


class LoaderError(RuntimeError):
    """A loader process is gone."""


Batch = dict[str, Tensor]
Sample = dict[str, Any]  # the tensors of one row, as numpy arrays


class WindowDataset(Dataset[Sample]):
    """Windows of one split, indexed by the run's sample counter: 0, 1, ... over all ranks and epochs, without end."""

    def __init__(self, shard: Shard, seq_len: int, seed: int, vocab_size: int) -> None:
        self.shard, self.seq_len, self.seed, self.vocab_size = shard, seq_len, seed, vocab_size
        self.n_windows = n_windows(shard, seq_len)
        if self.n_windows == 0:
            raise ShardError(
                f"{shard.path} has {shard.n_tokens:,} tokens, fewer than one window of {seq_len:,} and its last label: "
                "use more data, or a shorter sequence length"
            )

    def __getitem__(self, sample: int) -> Sample:
        _, index = window_at(sample, self.n_windows, self.seed)
        input_ids, labels, seq_idx = window(self.shard, index, self.seq_len, vocab_size=self.vocab_size)
        return {"input_ids": input_ids, "labels": labels, "seq_idx": seq_idx, "samples": sample}


def batches(
    dataset: WindowDataset, *, micro_batch_size: int, first_sample: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """Micro-batches without end: ascending samples c >= first_sample with c % world == rank, B = micro_batch_size each.

    Yields input_ids (B, L) int64, labels (B, L) int64, seq_idx (B, L) int32, samples (B,) int64: the counters
    themselves. `workers` processes read ahead, 0 reads in this one; the batches are the same. Raises ShardError for
    damaged data, LoaderError for a process that ended.
    """
    before = signal.getsignal(signal.SIGCHLD)
    running = iter(
        DataLoader(
            _Outcomes(dataset),
            batch_sampler=_Counters(first_sample + (rank - first_sample) % world, world, micro_batch_size),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )
    )
    if workers and threading.current_thread() is threading.main_thread():
        # torch's handler raises in whatever code happens to run when a worker ends; next() sees it within 5 s anyway.
        signal.signal(signal.SIGCHLD, before)
    while True:
        try:
            batch = next(running)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise LoaderError(
                f"a loader process ended ({error}), out of memory? Lower data.workers, and go on with --resume auto"
            ) from error
        if isinstance(batch, ShardError):
            raise batch
        yield batch


class _Outcomes(Dataset[Sample | ShardError]):
    """A dataset's samples, or the error in place of one: torch would wrap what a worker raises in its traceback."""

    def __init__(self, dataset: WindowDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, sample: int) -> Sample | ShardError:
        try:
            return self.dataset[sample]
        except ShardError as error:
            return error


class _Counters:
    """first, first + stride, ... in lists of `size`, without end."""

    def __init__(self, first: int, stride: int, size: int) -> None:
        self.first, self.stride, self.size = first, stride, size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield [first + i * self.stride for i in range(self.size)]
            first += self.size * self.stride


def _collate(outcomes: list[Sample | ShardError]) -> Batch | ShardError:
    samples: list[Sample] = []
    for outcome in outcomes:
        if isinstance(outcome, ShardError):
            return outcome
        samples.append(outcome)
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def _leave_signals_to_parent(_: int) -> None:
    # Ctrl-C and Slurm signal every process of a job. A worker that died of it would take the trainer, which means to
    # finish its step and save, down with it. Workers end when the trainer tells them to, or when it is gone (torch
    # watches for that). SIGTERM is how the trainer tells a worker of an iterator that was never closed, so the sender
    # counts, which only sigwaitinfo knows.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_parents_sigterm, daemon=True).start()


def _end_on_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
