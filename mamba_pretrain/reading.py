"""What a run reads: opens its datasets, lays out which rows of them it takes, and holds that to what is allowed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_pretrain.config import Config, ConfigError, SourceConfig
from mamba_pretrain.config.data import exact_shares
from mamba_pretrain.data.dataset import open_split, verify_up_to
from mamba_pretrain.data.loader import MixedRows
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.mixture import RESOLUTION, Mixture, Stage, shares_by_size
from mamba_pretrain.data.order import ORDER_VERSION
from mamba_pretrain.data.packing import Packed, Rows, Windows, make_rows, n_windows
from mamba_pretrain.data.shards import Shard, ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, dataset_tokenizer, load_tokenizer

log = logging.getLogger("mamba_pretrain")


@dataclass(frozen=True)
class Source:
    """One dataset of a run."""

    name: str
    path: Path
    train: Shard
    validation: Shard | None  # None, too, where only other sources have a window to validate on
    manifest: Manifest
    max_epochs: float | None


@dataclass(frozen=True)
class Reading:
    """All that a run reads, and in which order."""

    sources: list[Source]  # sorted by name: their order in a file has no meaning
    dataset: MixedRows
    tokenizer: Tokenizer

    @property
    def mixture(self) -> Mixture:
        return self.dataset.mixture

    @property
    def manifest(self) -> Manifest:
        """Of the first source, for what all have in common."""
        return self.sources[0].manifest

    def epoch(self, sample: int) -> int:
        """Whole epochs of the source that was read most often."""
        return int(max(self.mixture.epochs(sample)))

    def source_tokens(self, sample: int) -> dict[str, int]:
        """Tokens of each source in the run's first `sample` samples."""
        found = dict.fromkeys((source.name for source in self.sources), 0)
        for stage, taken in zip(self.mixture.stages, self.mixture.taken(sample), strict=True):
            for source, n in zip(self.sources, taken, strict=True):
                found[source.name] += n * stage.seq_len
        return found

    def told_tokens(self, sample: int) -> dict[str, int]:
        """`source_tokens` where there are several sources; of one they would say nothing new."""
        return self.source_tokens(sample) if len(self.sources) > 1 else {}

    def identity(self, config: Config, sample: int) -> dict[str, Any]:
        """What decided the data up to `sample`. Stages that begin later, and their sources, are free to change.

        While a run reads one dataset in rows of one length, this is as plain as it was before there were mixtures.
        """
        stages = self.mixture.stages
        begun = [s for s, stage in enumerate(stages) if stage.first < sample or s == 0]
        read = [k for k in range(len(self.sources)) if any(stages[s].shares[k] for s in begun)]
        prints = {self.sources[k].name: self.sources[k].manifest.fingerprint(config.data.train_split) for k in read}
        common = {
            "seq_len": stages[0].grid,
            "reset_documents": config.data.reset_documents,
            "seed": config.train.seed,
            "order_version": ORDER_VERSION,
            **({} if config.data.packing == "windows" else {"packing": config.data.packing}),
            **({} if config.data.packing == "windows" else {"packs": self.packs(begun)}),
        }
        if len(begun) == len(read) == 1 and stages[0].seq_len == stages[0].grid:
            return {"data": prints[self.sources[read[0]].name], **common}
        told = {}
        for s in begun:
            shares = {self.sources[k].name: str(stages[s].shares[k]) for k in read if stages[s].shares[k]}
            told[str(s)] = {"first_sample": stages[s].first, "seq_len": stages[s].seq_len, "shares": shares}
            if stages[s].seq_len < stages[s].grid and s + 1 < len(stages):  # its rows are permuted up to its end
                told[str(s)]["end_sample"] = stages[s + 1].first
        return {"data": prints, "stages": told, **common}

    def packs(self, stages: Sequence[int]) -> dict[str, str]:
        """Hashes of the packs that these stages read; of windows there are none."""
        return {
            f"{self.sources[k].name} in rows of {rows.seq_len}": rows.pack.sha256
            for s in stages
            for k, rows in enumerate(self.dataset.rows[s])
            if isinstance(rows, Packed)
        }

    def figures(self, samples: int) -> dict[str, Any]:
        """What the run's first `samples` are, by stage and by source, in plain numbers."""
        mixture, tokens = self.mixture, self.source_tokens(samples)
        parts = []
        for s, (stage, taken) in enumerate(zip(mixture.stages, mixture.taken(samples), strict=True)):
            end = mixture.stages[s + 1].first if s + 1 < len(mixture.stages) else samples
            before, after = (mixture.epochs(min(sample, samples)) for sample in (stage.first, end))
            for k, source in enumerate(self.sources):
                parts.append(
                    {
                        "stage": s,
                        "first_sample": stage.first,
                        "seq_len": stage.seq_len,
                        "source": source.name,
                        "share": float(stage.shares[k]),
                        "samples": taken[k],
                        "tokens": taken[k] * stage.seq_len,
                        "epochs_before": float(before[k]),
                        "epochs_after": float(after[k]),
                    }
                )
        sources = []
        rows_of = zip(*self.dataset.rows, strict=True)
        left_over, epochs = mixture.left_over(samples), mixture.epochs(samples)
        distinct, grids = mixture.distinct(samples), mixture.grids(samples)
        for k, (source, rows) in enumerate(zip(self.sources, rows_of, strict=True)):
            coarsest = max((r for r in rows if r is not None), key=lambda r: r.seq_len, default=None)
            if isinstance(coarsest, Windows):  # of several lengths, the longest of all stages are what an epoch is of
                coarsest = Windows(source.train, mixture.stages[0].grid, coarsest.vocab_size)
            read = tokens[source.name]
            once = int(read * distinct[k] / epochs[k]) if epochs[k] else 0
            sources.append(
                {
                    "name": source.name,
                    "path": str(source.path),
                    "documents": source.train.n_documents,
                    "tokens": source.train.n_tokens,
                    "rows": None if coarsest is None else coarsest.n_rows,
                    "row_tokens": None if coarsest is None else coarsest.seq_len,
                    "unread_tokens": source.train.n_tokens if coarsest is None else coarsest.unread_tokens,
                    "left_over_tokens": left_over[k],
                    "read_tokens": read,
                    "repeated_tokens": read - once,
                    "repeated_tokens_are_exact": len(grids[k]) <= 1 and not left_over[k],
                    "epochs": float(epochs[k]),
                    "max_epochs": source.max_epochs,
                }
            )
        return {"samples": samples, "tokens": sum(tokens.values()), "stages": parts, "sources": sources}

    def check(self, config: Config, step: int, sample: int) -> int:
        """The samples that the run, at `step` and `sample` now, will have read at its end.

        Raises ConfigError where that is more of a source than its max_epochs, or a stage would begin within a step.
        """
        plans = config.stages
        current = max(s for s, plan in enumerate(plans) if plan.first_sample <= sample)
        if current + 1 < len(plans):
            left, size = plans[current + 1].first_sample - sample, plans[current].sequences_per_step
            if left % size or left // size != plans[current + 1].first_step - step:
                raise ConfigError(
                    [
                        f"data.stages[{current + 1}] begins with step {plans[current + 1].first_step} and sample "
                        f"{plans[current + 1].first_sample}, which steps of {size} from step {step}, sample {sample} "
                        "on do not meet: keep the run's train.batch_tokens"
                    ]
                )
        end = max(sample, sample + config.samples_at(config.steps) - config.samples_at(step))
        problems = [
            f"data.sources: the run reads {float(epochs):.3f} epochs of {source.name} in {config.steps:,} steps, its "
            f"max_epochs is {source.max_epochs:g}: lower its weight or the number of steps, or raise max_epochs"
            for source, epochs in zip(self.sources, self.mixture.epochs(end), strict=True)
            if source.max_epochs is not None and epochs > source.max_epochs
        ]
        if problems:
            raise ConfigError(problems)
        for s, plan in enumerate(plans):
            if plan.first_sample >= end > 0:
                log.warning(
                    "data.stages[%d] begins at sample %d, the run ends before it, at %d", s, plan.first_sample, end
                )
        return end


def open_reading(config: Config) -> Reading:
    """Raises ConfigError, ShardError or TokenizerError."""
    data = config.data
    given = sorted(data.named_sources, key=lambda source: str(source.name))
    if not given:
        raise ConfigError(["data.path is not set: name a directory made by python -m data_prep.build_shards"])
    wanted = None if data.tokenizer is None else load_tokenizer(data.tokenizer).sha256
    sources, missing = list[Source](), list[str]()
    for each in given:
        try:
            sources.append(_open_source(config, each, wanted, alone=len(given) == 1))
        except ShardError as error:
            missing.append(str(error))
    if missing:
        raise ShardError("\n".join(missing))
    first, *others = sources
    problems = [
        f"{source.path} was made with another tokenizer (sha256 {source.manifest.tokenizer.sha256[:12]}) than "
        f"{first.path} (sha256 {first.manifest.tokenizer.sha256[:12]}): build all sources with the same one"
        for source in others
        if source.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256
    ]
    by_print: dict[str, Source] = {}
    for source in sources:
        same = by_print.setdefault(source.manifest.fingerprint(data.train_split), source)
        if same is not source:
            problems.append(
                f"data.sources: {same.name} and {source.name} are the same data, whose epochs would be counted apart: "
                "name it once, with the sum of the weights"
            )
    if problems:
        raise ConfigError(problems)
    if len({source.manifest.adds_bos for source in sources}) > 1:
        said = ", ".join(f"{s.name} {'has' if s.manifest.adds_bos else 'has none'}" for s in sources)
        log.warning("the sources differ in whether documents begin with a bos token: %s", said)
    if data.validation_split is not None and all(source.validation is None for source in sources):
        raise ConfigError(
            [
                f"no source has a window of {data.longest_seq_len:,} tokens in its split {data.validation_split!r}: "
                "build one with it, or set data.validation_split=null"
            ]
        )
    return Reading(sources, _mixed_rows(config, sources), dataset_tokenizer(first.path, first.manifest))


def _open_source(config: Config, given: SourceConfig, wanted: str | None, *, alone: bool) -> Source:
    data, path, name = config.data, Path(str(given.path)), str(given.name)
    length = data.longest_seq_len
    train, manifest = open_split(path, data.train_split, tokenizer_sha256=wanted)
    validation = None
    if data.validation_split is not None and (alone or data.validation_split in manifest.splits):
        validation = open_split(path, data.validation_split)[0]
        if not alone and n_windows(validation, length) == 0:
            validation = None
    if validation is None and data.validation_split is not None:
        log.warning("%s: no window of %d in a split %r: it is not validated on", name, length, data.validation_split)
    splits = [data.train_split] + ([str(data.validation_split)] if validation is not None else [])
    verify_up_to(path, splits, data.verify_gib)
    for split, shard in (("train", train), ("validation", validation)):
        needed = split == "validation" or data.packing == "windows"
        if needed and shard is not None and n_windows(shard, length) == 0:
            cure = ", or data.validation_split=null" if split == "validation" else ""
            raise ConfigError(
                [
                    f"{shard.path} has {shard.n_tokens:,} tokens, fewer than one window of {length:,} and its "
                    f"last label: use more data, a shorter data.seq_len{cure}"
                ]
            )
    return Source(name, path, train, validation, manifest, given.max_epochs)


def _mixed_rows(config: Config, sources: Sequence[Source]) -> MixedRows:
    data = config.data
    opened: dict[tuple[int, int], Rows] = {}
    stages: list[Stage] = []
    rows: list[list[Rows | None]] = []
    for plan in config.stages:
        weights = [plan.weights[source.name] for source in sources]
        known = [weight for weight in weights if weight is not None]
        by_size = len(known) < len(weights)
        if by_size and len(sources) > 1:
            log.info("shares by size in tokens, in parts of 1/%d", RESOLUTION)
        shares = shares_by_size([source.train.n_tokens for source in sources]) if by_size else exact_shares(known)
        # Packs of different lengths have nothing in common: each length has epochs of its own.
        grid = data.longest_seq_len if data.packing == "windows" else plan.seq_len
        stages.append(Stage(plan.first_sample, plan.seq_len, grid, tuple(shares)))
        rows.append([])
        for k, (source, share) in enumerate(zip(sources, shares, strict=True)):
            key = (k, plan.seq_len)
            if share and key not in opened:
                vocab_size = source.manifest.tokenizer.vocab_size
                opened[key] = made = make_rows(
                    source.path, data.train_split, seq_len=plan.seq_len, vocab_size=vocab_size, packing=data.packing
                )
                if isinstance(made, Packed) and made.pack.n_bytes <= data.verify_gib * 2**30:
                    for problem in made.pack.problems():
                        raise ShardError(problem)
            rows[-1].append(opened[key] if share else None)
    epoch_rows = []
    for k, source in enumerate(sources):
        if data.packing == "windows":
            epoch_rows.append({data.longest_seq_len: n_windows(source.train, data.longest_seq_len)})
        else:
            lengths = {stage.grid for stage in stages}
            epoch_rows.append({grid: opened[k, grid].n_rows if (k, grid) in opened else 0 for grid in lengths})
    return MixedRows(Mixture([source.name for source in sources], stages, epoch_rows, config.train.seed), rows)


def table(figures: dict[str, Any]) -> str:
    """`Reading.figures` for people: one line for each stage and source, and what is not read."""
    lines = [
        f"stage {part['stage']} from sample {part['first_sample']:,}, rows of {part['seq_len']:,}: {part['source']} "
        f"{part['share']:.4%}, {part['samples']:,} samples, {part['tokens']:,} tokens, epochs "
        f"{part['epochs_before']:.3f} to {part['epochs_after']:.3f}"
        for part in figures["stages"]
    ]
    for source in figures["sources"]:
        bound = "" if source["max_epochs"] is None else f" of at most {source['max_epochs']:g}"
        left_over = source["left_over_tokens"]
        lines.append(
            f"{source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens; read "
            f"{source['read_tokens']:,}, {source['epochs']:.3f} epochs{bound}, "
            f"{'' if source['repeated_tokens_are_exact'] else 'about '}{source['repeated_tokens']:,} of them again; "
            f"{source['unread_tokens']:,} tokens of the split are in no row"
            + (f", {left_over:,} left over where stages of shorter rows end" if left_over else "")
        )
    return "\n".join(lines)
