"""megatron-core's GPTDataset under torch's DataLoader, with its options as they come but for the attention mask.

The mask would be length x length for each row. Documents in a row are not told from each other: that is an option
(reset_position_ids and others), off by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from benchmarks.loading import Side


class Tokenizer:
    """What the dataset asks of one: ids are in the files already."""

    vocab_size, eod = 257, 256
    unique_identifiers = {"class": "bytes"}  # noqa: RUF012 - Megatron's name, of its cache's key


class InOrder:
    """Lists of consecutive samples, from the first again after the last."""

    def __init__(self, samples: int, rows: int) -> None:
        self.samples, self.rows = samples, rows

    def __iter__(self) -> Iterator[list[int]]:
        first = 0
        while True:
            yield [(first + i) % self.samples for i in range(self.rows)]
            first += self.rows


class Megatron(Side):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.batches: Iterator[Any]

    def open(self, directory: str, length: int, rows: int, cache: str) -> int:
        """Builds the three indices as for a first run, into `cache`, and reads the first batch."""
        prefix = f"{directory}/train"
        config = GPTDatasetConfig(
            random_seed=0,
            sequence_length=length,
            blend=([prefix], None),
            split="1,0,0",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=Tokenizer(),
            path_to_cache=cache,
        )
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
        dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
        self.batches = iter(DataLoader(dataset, batch_sampler=InOrder(len(dataset), rows), num_workers=0))
        return self.run(1)

    def run(self, count: int) -> int:
        return sum(next(self.batches)["tokens"].numel() for _ in range(count))
