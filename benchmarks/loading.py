"""Batches of packed, shuffled rows in a process of its own: the trainer's, and what bare numpy takes for the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import own_mib
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.loader import Batch, WindowDataset, batches
from mamba_pretrain.distributed.env import keep_freed_memory

SEED = 0


class Side:
    """What loading and starting ask of each alternative; `open` and `run` return the tokens that were read."""

    def own_mib(self) -> float:
        return own_mib()


class Ours(Side):
    """What `mamba_pretrain.train` iterates over, read in this process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()  # as in training
        self.batches: Iterator[Batch]
        self.batch: Batch

    def open(self, directory: str, length: int, rows: int) -> int:
        """Reads the first batch, too."""
        shard, manifest = open_split(directory, "train")
        dataset = WindowDataset(shard, length, SEED, manifest.tokenizer.vocab_size)
        self.batches = batches(dataset, micro_batch_size=rows, first_sample=0, rank=0, world=1, workers=0)
        return self.run(1)

    def run(self, count: int) -> int:
        tokens = 0
        for _ in range(count):
            self.batch = next(self.batches)  # the one before is there until now, as in a training step
            tokens += self.batch["input_ids"].numel()
        return tokens


class Gather(Side):
    """Inputs and labels of rows in shuffled order, copied from a memory map into two new arrays for each batch, as the
    training loops do that read token files with numpy alone: labels of one's own can be masked.

    It knows no documents, checks nothing, and has its order at hand. It slices a plain view of the map: slices of
    np.memmap itself take 3 us each, with which rows of 2048 come at half the rate.
    """

    def __init__(self) -> None:
        keep_freed_memory()  # as ours
        self.next = 0
        self.batch: tuple[NDArray[np.int64], NDArray[np.int64]]

    def open(self, directory: str, length: int, rows: int) -> int:
        self.tokens = np.asarray(np.memmap(Path(directory) / "train.bin", np.uint16, mode="r"))
        self.length = length
        self.rows = rows
        self.order = np.random.default_rng(SEED).permutation((self.tokens.size - 1) // length).tolist()
        return self.run(1)

    def run(self, count: int) -> int:
        tokens, length = self.tokens, self.length
        for _ in range(count):
            inputs, labels = np.empty((self.rows, length), np.int64), np.empty((self.rows, length), np.int64)
            for row in range(self.rows):
                start = self.order[self.next % len(self.order)] * length
                inputs[row] = tokens[start : start + length]
                labels[row] = tokens[start + 1 : start + length + 1]
                self.next += 1
            self.batch = inputs, labels  # until the next one is there, as a training step has it
        return count * self.rows * length


class GatherViews(Gather):
    """As `Gather`, but into one array a batch, of which inputs and labels are views: masking a label would change an
    input, and neither is contiguous."""

    def run(self, count: int) -> int:
        tokens, length = self.tokens, self.length
        for _ in range(count):
            both = np.empty((self.rows, length + 1), np.int64)
            for row in range(self.rows):
                start = self.order[self.next % len(self.order)] * length
                both[row] = tokens[start : start + length + 1]
                self.next += 1
            self.batch = both[:, :-1], both[:, 1:]
        return count * self.rows * length
