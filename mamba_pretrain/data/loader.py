"""Batches for one rank, from any sample on, in an order that depends on nothing but the seed.

The state is one counter of consumed samples over all ranks, and the caller holds it. B micro-batch, L row length.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Final

import numpy as np
import numpy.random  # torch seeds it in every loader process, each of which would import it anew
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mamba_pretrain.data.mixture import Mixture, Stage
from mamba_pretrain.data.packing import Block, Outputs, Rows, Windows, row_of
from mamba_pretrain.data.shards import Shard, ShardError

SETTLE_S: Final = 0.1  # 0.005 is enough where cores are idle
INT64, INT32 = np.dtype(np.int64), np.dtype(np.int32)
AHEAD: Final = 4096  # samples whose places are computed at once: one by one that would take longer than to read them


class LoaderError(RuntimeError):
    """A loader process is gone."""


Batch = dict[str, Tensor]


class MixedRows:
    """The rows of a run by its sample counter: 0, 1, ... over all ranks, stages and epochs, without end."""

    def __init__(self, mixture: Mixture, rows: Sequence[Sequence[Rows | None]]) -> None:
        """`rows`: of each stage and source, None where the stage reads none of the source."""
        self.mixture, self.rows = mixture, rows
        only = ([r for r in of_stage if r is not None] for of_stage in rows)
        self.alone = [given[0] if len(given) == 1 else None for given in only]

    def read(self, stage: int, sources: NDArray[np.int64], rows: NDArray[np.int64]) -> Block:
        """These rows (B,) of their sources, all of one stage."""
        rows = np.ascontiguousarray(rows, np.int64)
        block = Block.empty(len(rows), self.mixture.stages[stage].seq_len)
        self.write(stage, sources.tolist(), rows.ctypes.data, block.outputs())
        return block

    def write(self, stage: int, sources: Sequence[int], rows: int, outputs: Outputs) -> None:
        """As `read`, with the rows' numbers at an address, into memory that the caller has (see `Rows.write`)."""
        alone = self.alone[stage]
        if alone is not None:
            alone.write(rows, len(sources), outputs)
            return
        length = self.mixture.stages[stage].seq_len
        for b, source in enumerate(sources):
            self._of(stage, source).write(rows + 8 * b, 1, row_of(outputs, b, length))

    def _of(self, stage: int, source: int) -> Rows:
        rows = self.rows[stage][source]
        assert rows is not None, "a source with a share has rows"
        return rows


class WindowDataset(MixedRows):
    """One split alone, in windows."""

    def __init__(self, shard: Shard, seq_len: int, seed: int, vocab_size: int) -> None:
        windows = Windows(shard, seq_len, vocab_size)
        self.shard, self.n_windows = shard, windows.n_rows
        stage = Stage(0, seq_len, seq_len, (Fraction(1),))
        super().__init__(Mixture([shard.path.parent.name], [stage], [{seq_len: windows.n_rows}], seed), [[windows]])


def batches(
    dataset: MixedRows, *, micro_batch_size: int, first_sample: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """Micro-batches without end: ascending samples c >= first_sample with c % world == rank.

    Each has B = micro_batch_size rows, in later stages as many as hold the same number of tokens; never of two stages.
    Yields input_ids (B, L) int64, labels (B, L) int64, seq_idx (B, L) int32, and for each row (B,) int64 its padding
    and its sample. `workers` processes read ahead, 0 reads in this one; the batches are the same.
    Raises ShardError for damaged data, LoaderError for a process that ended.
    """
    before = signal.getsignal(signal.SIGCHLD)
    micro_batches = _MicroBatches(dataset, micro_batch_size, first_sample + (rank - first_sample) % world, world)
    if not workers and not torch.cuda.is_available():  # a DataLoader would only add its own time
        yield from micro_batches.read()
    if workers and torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads drop the tensors of an exchange some time after it, and Python gives them a lock for it. A
        # process that is forked meanwhile waits for that lock for ever (CPython 3.11; one fork of 1,600 in a loop).
        time.sleep(SETTLE_S)
    running: Iterator[Batch | ShardError] = iter(
        DataLoader(
            micro_batches,
            batch_size=None,
            num_workers=workers,
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


class _MicroBatches(IterableDataset[Batch | ShardError]):
    """The rank's micro-batches; of several loader processes each takes every n-th, and torch merges them in turn."""

    def __init__(self, dataset: MixedRows, micro_batch_size: int, first: int, stride: int) -> None:
        self.dataset, self.first, self.stride = dataset, first, stride
        stages = dataset.mixture.stages
        self.sizes = [micro_batch_size * stages[0].seq_len // stage.seq_len for stage in stages]

    def __iter__(self) -> Iterator[Batch | ShardError]:
        info = get_worker_info()
        try:
            yield from self.read() if info is None else self.read(info.id, info.num_workers)
        except ShardError as error:
            yield error  # torch would wrap what a loader process raises in its traceback

    def read(self, worker: int = 0, workers: int = 1) -> Iterator[Batch]:
        mine = islice(self._counters(), worker, None, workers)
        lengths = [stage.seq_len for stage in self.dataset.mixture.stages]
        while True:
            # Not for all the ranks' micro-batches, nor for those of the other loader processes.
            ahead = list(islice(mine, -(-AHEAD // max(self.sizes))))
            numbers, sizes = np.concatenate(ahead), list(map(len, ahead))
            places = self.dataset.mixture.locate(numbers)
            stages, sources = places.stages.tolist(), places.sources.tolist()
            rows = np.ascontiguousarray(places.rows)
            at, end = rows.ctypes.data, 0
            # Where a batch is one long row, Python takes a fourth of the time: parts of a tensor are made in half the
            # time of tensors of arrays of their own, and a Block would take two microseconds more.
            samples = torch.from_numpy(numbers)
            paddings = torch.empty_like(samples)
            if get_worker_info() is not None:  # else a thread that sends a batch moves it while the next is written
                paddings.untyped_storage().share_memory_()
            for size, of_batch, padding in zip(
                sizes, torch.split(samples, sizes), torch.split(paddings, sizes), strict=True
            ):
                begin, end = end, end + size
                stage = stages[begin]
                length = lengths[stage]
                both = np.empty((2, size, length), INT64)  # one allocation, as a Block's
                ids, labels = torch.from_numpy(both[0]), torch.from_numpy(both[1])
                seq_idx = torch.from_numpy(np.empty((size, length), INT32))
                outputs = ids.data_ptr(), labels.data_ptr(), seq_idx.data_ptr(), padding.data_ptr()
                self.dataset.write(stage, sources[begin:end], at + 8 * begin, outputs)
                yield {
                    "input_ids": ids,
                    "labels": labels,
                    "seq_idx": seq_idx,
                    "padding": padding,
                    "samples": of_batch,
                }

    def _end(self, stage: int) -> int:
        stages = self.dataset.mixture.stages
        return stages[stage + 1].first if stage + 1 < len(stages) else sys.maxsize

    def _counters(self) -> Iterator[NDArray[np.int64]]:
        """first, first + stride, ... in arrays of the stage's size, shorter where a stage ends within one."""
        first, stride = self.first, self.stride
        for s, size in enumerate(self.sizes):
            steps = stride * np.arange(-(-AHEAD // size) * size, dtype=np.int64).reshape(-1, size)
            while (left := -((first - self._end(s)) // stride)) > 0:
                whole = min(left // size, len(steps))
                yield from first + steps[:whole]
                rest = left % size if whole < len(steps) else 0
                if rest:
                    yield first + whole * size * stride + steps[0, :rest]
                first += (whole * size + rest) * stride


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
