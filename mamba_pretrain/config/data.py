"""Which tokens a run reads: one dataset or several with weights, and stages in which weights and row length change."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Optional

from mamba_pretrain.config.checks import at_least, did_you_mean

PACKINGS = ("windows", "best_fit", "documents")
MAX_PERIOD = 1 << 17  # samples after which the order of sources repeats: the common denominator of their shares


@dataclass
class SourceConfig:
    path: Optional[str] = None  # a directory made by data_prep.build_shards
    name: Optional[str] = None  # None: the directory's name
    weight: Optional[float] = None  # its share of the samples is weight / sum; null for all: by their sizes in tokens
    max_epochs: Optional[float] = None  # a run that would read more of it is refused; null: no bound


@dataclass
class StageConfig:
    """What a stage leaves out stays as it was before."""

    from_tokens: int = 0  # the stage begins with the first step at or after so many tokens of the run; 0 for the first
    weights: dict[str, float] = field(default_factory=dict)  # by source name; 0: nothing is read of it
    seq_len: Optional[int] = None  # the first stage's is data.seq_len


@dataclass
class DataConfig:
    path: Optional[str] = None  # a directory made by data_prep.build_shards: one dataset, or see `sources`
    sources: list[SourceConfig] = field(default_factory=list)  # several: a list of {path, name, weight, max_epochs}
    stages: list[StageConfig] = field(default_factory=list)  # a list of {from_tokens, weights, seq_len}
    train_split: str = "train"
    validation_split: Optional[str] = "validation"  # null: no evaluation during training
    tokenizer: Optional[str] = None  # when given, the dataset must have been made with this very tokenizer
    seq_len: int = 2048
    packing: str = "windows"  # slices of the token stream | best_fit: whole documents | documents: one in a row
    reset_documents: bool = True  # scan and convolution start anew at each document; False: state flows across
    workers: int = 1  # loader processes; the order of samples does not depend on it
    verify_gib: float = 1.0  # splits up to this size are hashed against the manifest at start-up; 0: never

    @property
    def named_sources(self) -> list[SourceConfig]:
        """`sources`, or the one of `path`, with their names filled in; empty where no dataset is named."""
        given = self.sources or ([SourceConfig(path=self.path)] if self.path is not None else [])
        return [replace(s, name=s.name or (Path(os.path.abspath(s.path)).name if s.path else "")) for s in given]

    @property
    def seq_lens(self) -> list[int]:
        """Of each stage, one stage where none are given."""
        lengths = [self.seq_len]
        for stage in self.stages[1:]:
            lengths.append(lengths[-1] if stage.seq_len is None else stage.seq_len)
        return lengths

    @property
    def longest_seq_len(self) -> int:
        """That of validation, too, so that its loss compares across stages."""
        return max(self.seq_lens)

    @property
    def weights(self) -> list[dict[str, Optional[float]]]:
        """Of each stage, by source name; all None: by size."""
        before: dict[str, Optional[float]] = {str(s.name): s.weight for s in self.named_sources}
        found = []
        for stage in self.stages or [StageConfig()]:
            before = {**before, **stage.weights}
            found.append(before)
        return found

    def problems(self) -> Iterator[str]:
        yield from at_least(1, self, "data", "seq_len")
        yield from at_least(0, self, "data", "workers", "verify_gib")
        if self.packing not in PACKINGS:
            yield f"data.packing is {self.packing!r}: {did_you_mean(self.packing, PACKINGS)}"
        if self.path is not None and self.sources:
            yield "data.path and data.sources are both given: name one dataset by the first, or several by the second"
        for i, source in enumerate(self.sources):
            if not source.path:
                yield f"data.sources[{i}].path is not set: name a directory made by python -m data_prep.build_shards"
            if source.weight is not None and not 0 <= source.weight < math.inf:
                yield f"data.sources[{i}].weight is {source.weight}: it must be a number of at least 0"
            if source.max_epochs is not None and not 0 < source.max_epochs < math.inf:
                yield f"data.sources[{i}].max_epochs is {source.max_epochs}: it must be a number above 0"
        names = [str(s.name) for s in self.named_sources]
        for name, count in Counter(names).items():
            if count > 1 and name:
                yield f"{count} of data.sources are called {name!r}: give each a name of its own"
        for i, (source, name) in enumerate(zip(self.sources, names, strict=False)):
            if source.path and not name:
                yield f"data.sources[{i}] has no name: {source.path} is no directory to be called by, give it a name"
        if all(names):
            yield from self._stage_problems(names)

    def _stage_problems(self, names: list[str]) -> Iterator[str]:
        for i, stage in enumerate(self.stages):
            where = f"data.stages[{i}]"
            if i == 0 and stage.from_tokens != 0:
                yield f"{where}.from_tokens is {stage.from_tokens}: the first stage begins at 0"
            elif i > 0 and stage.from_tokens <= self.stages[i - 1].from_tokens:
                yield f"{where}.from_tokens is {stage.from_tokens}: it must be above that of the stage before it"
            if i == 0 and stage.seq_len not in (None, self.seq_len):
                yield f"{where}.seq_len is {stage.seq_len}, the first stage's is data.seq_len ({self.seq_len}): drop it"
            yield from at_least(1, stage, where, "seq_len")
            for name, weight in stage.weights.items():
                if name not in names:
                    hint = did_you_mean(name, names) if names else "no source is named"
                    yield f"{where}.weights names {name}: {hint}"
                if not 0 <= weight < math.inf:
                    yield f"{where}.weights.{name} is {weight}: it must be a number of at least 0"
        for i, weights in enumerate(self.weights if names else ()):
            where = f"data.stages[{i}].weights" if self.stages else "the weights of data.sources"
            numbers = [w for w in weights.values() if w is not None and 0 <= w < math.inf]
            missing = [name for name, weight in weights.items() if weight is None]
            if missing and numbers:
                yield f"{where}: {', '.join(missing)} without a weight, the others with one: give all of them, or none"
            elif numbers and not sum(numbers):
                yield f"{where} are all 0: nothing would be read"
            elif numbers and (found := period(exact_shares(numbers))) > MAX_PERIOD:
                yield (
                    f"{where} are {', '.join(f'{n} {w}' for n, w in weights.items())}: as fractions of their sum they "
                    f"have the common denominator {found:,}, more than {MAX_PERIOD:,}. Round them, best so that they "
                    "add up to 1, 100 or 10000"
                )
        longest = self.longest_seq_len
        for seq_len in dict.fromkeys(self.seq_lens):
            if self.packing == "windows" and seq_len >= 1 and longest % seq_len:
                yield f"data.stages: the row length {seq_len} does not divide the longest, {longest}"


@dataclass(frozen=True)
class StagePlan:
    """A stage as it is run: `Config.stages`."""

    first_step: int  # counted from 0
    first_sample: int
    seq_len: int
    sequences_per_step: int
    micro_batch_size: int  # as many tokens as in the first stage
    weights: dict[str, Optional[float]]


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """Each weight's part of their sum, taken at its decimal text: 0.1 is a tenth."""
    parts = [Fraction(repr(weight)) for weight in weights]
    return [part / sum(parts) for part in parts]


def period(shares: Sequence[Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares))
