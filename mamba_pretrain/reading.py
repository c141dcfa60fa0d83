"""What a run reads: opens its datasets, lays out which rows of them it takes, and holds that against what is allowed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mamba_pretrain.config import Config, ConfigError
from mamba_pretrain.config.data import exact_shares
from mamba_pretrain.data.dataset import open_split, verify_up_to
from mamba_pretrain.data.loader import MixedRows
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.mixture import RESOLUTION, Mixture, Stage, shares_by_size
from mamba_pretrain.data.order import ORDER_VERSION
from mamba_pretrain.data.packing import Rows, make_rows, n_windows
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, dataset_tokenizer, load_tokenizer

log = logging.getLogger("mamba_pretrain")


@dataclass(frozen=True)
class Source:
    """One dataset of a run."""

    name: str
    path: Path
    train: Shard
    validation: Shard | None  # None, too, where the split has no window
    manifest: Manifest
    max_epochs: float | None


@dataclass(frozen=True)
class Reading:
    """All that a run reads, and in which order. Sources are sorted by name, so their order in a file has no meaning."""

    sources: list[Source]
    dataset: MixedRows
    tokenizer: Tokenizer

    @property
    def mixture(self) -> Mixture:
        return self.dataset.mixture

    @property
    def manifest(self) -> Manifest:
        """Of the first source: all have the same tokenizer."""
        return self.sources[0].manifest

    def epoch(self, sample: int) -> int:
        """Whole epochs of the source that was read most often."""
        return int(max(self.mixture.epochs(sample)))

    def identity(self, config: Config, sample: int) -> dict[str, Any]:
        """What decided the data up to `sample`. Stages that begin later, and their sources, are free to change.

        A run of one dataset has the plain form that it had before there were mixtures.
        """
        stages = self.mixture.stages
        begun = [s for s, stage in enumerate(stages) if stage.first < sample or s == 0]
        read = [k for k in range(len(self.sources)) if any(stages[s].shares[k] for s in begun)]
        prints = {self.sources[k].name: self.sources[k].manifest.fingerprint(config.data.train_split) for k in read}
        packing = {} if config.data.packing == "windows" else {"packing": config.data.packing}
        common = {
            "reset_documents": config.data.reset_documents,
            "seed": config.train.seed,
            "order_version": ORDER_VERSION,
            "seq_len": stages[0].grid,
            **packing,
        }
        if len(begun) == len(read) == 1 and stages[0].seq_len == stages[0].grid:
            return {"data": prints[self.sources[read[0]].name], **common}
        told = {}
        for s in begun:
            stage = stages[s]
            told[str(s)] = {
                "first_sample": stage.first,
                "seq_len": stage.seq_len,
                "shares": {self.sources[k].name: str(stage.shares[k]) for k in read if stage.shares[k]},
            }
            # Pieces of coarse rows are permuted up to the stage's end.
            if stage.seq_len < stage.grid and s + 1 < len(stages):
                told[str(s)]["end_sample"] = stages[s + 1].first
        return {"data": prints, "stages": told, **common}

    def unread_tokens(self, samples: int) -> list[int]:
        """Of each source's split: in no row that it is cut into."""
        longest = max(stage.grid for stage in self.mixture.stages)
        found = []
        for k in range(len(self.sources)):
            of_longest = [
                r[k] for r, stage in zip(self.dataset.rows, self.mixture.stages, strict=True) if stage.grid == longest
            ]
            rows = next((row for row in of_longest if row is not None), None)
            found.append(0 if rows is None else rows.unread_tokens)
        return found
