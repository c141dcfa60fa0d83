"""A mixture in stages reads the same on any number of ranks, across a stop in its midst, over gloo."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain import train
from mamba_pretrain.build import TrainState, build
from mamba_pretrain.config import load
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.saver import Saver
from tests.helpers.corpora import make_dataset
from tests.helpers.engines import CURVE
from tests.helpers.processes import on_ranks
from tests.helpers.runs import OPTIONS

STOP, STEPS = 5, 9  # of 512 tokens; the second stage begins with step 3


@dataclass
class Read:
    """What a run read on all ranks: every sample's tokens and labels as a checksum, the state after every step."""

    rows: dict[int, int] = field(default_factory=dict)
    states: list[TrainState] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def read(ranks: Ranks, directory: Path, run_dir: Path, n_steps: int, *words: str) -> Read:
    torch.set_num_threads(1)
    sources = f"data.sources=[{{path: {directory / 'web'}, weight: 3}}, {{path: {directory / 'code'}, weight: 1}}]"
    stages = "data.stages=[{}, {from_tokens: 1500, seq_len: 64, weights: {code: 4}}]"
    common = [*OPTIONS, *CURVE, "train.micro_batch_size=4", f"train.steps={STEPS}", f"run_dir={run_dir}"]
    run = build(load([], [*common, sources, stages, *words], world=ranks.world), ranks)
    found, clean = Read(), train._loss_sum

    def loss_sum(run: Any, batch: Any) -> Any:
        for sample, ids, labels in zip(batch["samples"].tolist(), batch["input_ids"], batch["labels"], strict=True):
            assert sample not in found.rows
            found.rows[sample] = zlib.crc32(labels.numpy().tobytes(), zlib.crc32(ids.numpy().tobytes()))
        return clean(run, batch)

    train._loss_sum = loss_sum
    try:
        for step in islice(train.steps(run), n_steps):
            found.losses.append(step.loss)
            found.states.append(TrainState(**vars(run.state) | {"source_tokens": {**run.state.source_tokens}}))
    finally:
        train._loss_sum = clean
    Saver(run).save()
    per_rank = ranks.gather(found.rows)
    found.rows = {sample: row for rows in per_rank for sample, row in rows.items()}
    assert len(found.rows) == sum(map(len, per_rank)), "no rank reads what another one does"
    return found


@pytest.mark.parametrize(("first", "then"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_stop_on_other_ranks_changes_neither_what_is_read_nor_what_is_counted(
    first: int, then: int, tmp_path: Path
) -> None:
    for name, n in (("web", 70), ("code", 40)):
        make_dataset(tmp_path / name, n_documents=n, seed=n)
    alone = read(ALONE, tmp_path, tmp_path / "alone", STEPS)
    assert sorted(alone.rows) == list(range(3 * 16 + 6 * 8))
    fsdp = "train.engine=fsdp"
    before = on_ranks(first, read, tmp_path, tmp_path / "run", STOP, fsdp)[0]
    after = on_ranks(then, read, tmp_path, tmp_path / "run", STEPS, fsdp, "checkpoint.resume=auto")[0]
    assert before.rows | after.rows == alone.rows
    assert before.rows.keys().isdisjoint(after.rows)
    assert before.states + after.states == alone.states
    last = alone.states[-1]
    assert last.tokens == 512 * STEPS == last.trained_tokens + last.masked_tokens == sum(last.source_tokens.values())
    assert before.losses + after.losses == pytest.approx(alone.losses, rel=1e-5)
