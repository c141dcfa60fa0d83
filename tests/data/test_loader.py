"""The batches depend on the seed and the sample counter, and on nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from ctypes import c_int64
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mamba_pretrain.data import loader
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.loader import Batch, LoaderError, MixedRows, WindowDataset, batches
from mamba_pretrain.data.mixture import Mixture, Stage
from mamba_pretrain.data.packing import Block, Outputs, Windows
from mamba_pretrain.data.shards import ShardError
from tests.helpers.corpora import make_dataset
from tests.helpers.marks import slow_but
from tests.helpers.order import window_at

SEQ_LEN = 128
KEYS = ("input_ids", "labels", "seq_idx", "samples", "padding")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    shard, _ = open_split(make_dataset(tmp_path_factory.mktemp("loader") / "data"), "train")
    return WindowDataset(shard, SEQ_LEN, seed=3, vocab_size=257)


def take(dataset: MixedRows, n: int, *, first: int = 0, size: int = 4, rank=0, world=1, workers=0) -> list[Batch]:
    found = batches(dataset, micro_batch_size=size, first_sample=first, rank=rank, world=world, workers=workers)
    return list(islice(found, n))


def test_batches_have_the_promised_shapes_and_types(dataset: WindowDataset) -> None:
    (batch,) = take(dataset, 1)
    assert {key: (tuple(x.shape), x.dtype) for key, x in batch.items()} == {
        "input_ids": ((4, SEQ_LEN), torch.int64),
        "labels": ((4, SEQ_LEN), torch.int64),
        "seq_idx": ((4, SEQ_LEN), torch.int32),
        **dict.fromkeys(("samples", "padding"), ((4,), torch.int64)),
    }


def test_rows_are_the_windows_of_the_order(dataset: WindowDataset) -> None:
    n = 3 * dataset.n_windows
    rows = torch.cat([batch["input_ids"] for batch in take(dataset, n, size=1)])
    for sample in range(n):
        _, index = window_at(sample, dataset.n_windows, 3)
        expected = dataset.shard.tokens(index * SEQ_LEN, (index + 1) * SEQ_LEN)
        assert rows[sample].tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", slow_but([1, 2], [1, 2, 4]))
def test_global_batches_are_the_same_for_any_world_and_workers(
    dataset: WindowDataset, world: int, workers: int
) -> None:
    reference = take(dataset, 16)  # 64 samples, over an epoch
    assert dataset.n_windows < 64
    ranks = [take(dataset, 16, size=4 // world, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, expected in enumerate(reference):
        merged = {key: torch.cat([rank[step][key] for rank in ranks]) for key in KEYS}
        order = merged["samples"].argsort()
        for key in KEYS:
            assert torch.equal(merged[key][order], expected[key])


@pytest.mark.parametrize("first", [4, 20, 60])
def test_resuming_at_a_counter_is_going_on(dataset: WindowDataset, first: int) -> None:
    whole = take(dataset, 20)
    for expected, found in zip(whole[first // 4 :], take(dataset, 20 - first // 4, first=first), strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in KEYS)


def test_resuming_on_another_number_of_ranks_loses_and_repeats_nothing(dataset: WindowDataset) -> None:
    first = 10  # not a multiple of the new world
    ranks = [take(dataset, 5, first=first, size=1, rank=rank, world=4) for rank in range(4)]
    samples = sorted(int(batch["samples"]) for rank in ranks for batch in rank)
    assert samples == list(range(first, first + 20))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MixedRows:
    """Two datasets, 1 to 3, in rows of 32 up to sample 48, then 3 to 1 in rows of 128."""
    directory = tmp_path_factory.mktemp("mixed")
    shards = [open_split(make_dataset(directory / name, seed=i), "train")[0] for i, name in enumerate("ab")]
    rows = [[Windows(shard, length, 257) for shard in shards] for length in (32, SEQ_LEN)]
    quarter = Fraction(1, 4)
    stages = [Stage(0, 32, SEQ_LEN, (quarter, 1 - quarter)), Stage(48, SEQ_LEN, SEQ_LEN, (1 - quarter, quarter))]
    return MixedRows(Mixture(["a", "b"], stages, [{SEQ_LEN: row.n_rows} for row in rows[1]], seed=1), rows)


def test_rows_of_a_mixture_are_those_of_their_sources(mixed: MixedRows) -> None:
    found = take(mixed, 6 + 20, size=8)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(8, 32)] * 6 + [(2, SEQ_LEN)] * 20
    for batch in found:
        places = mixed.mixture.locate(batch["samples"].numpy())
        for i, (stage, source, row) in enumerate(zip(places.stages, places.sources, places.rows, strict=True)):
            expected = mixed.rows[stage][source].read(np.array([row]))
            assert batch["input_ids"][i].tolist() == expected.input_ids[0].tolist()
            assert batch["labels"][i].tolist() == expected.labels[0].tolist()
            assert batch["seq_idx"][i].tolist() == expected.seq_idx[0].tolist()


@pytest.mark.parametrize(("world", "workers"), [(4, 0), (2, 2)])
def test_a_mixture_in_stages_is_the_same_for_any_world_and_workers(
    mixed: MixedRows, world: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "AHEAD", 24)  # as in a long run: places are computed many times
    reference = {int(c): b["input_ids"][i] for b in take(mixed, 96, size=4) for i, c in enumerate(b["samples"])}
    first = 16  # in the midst of the first stage
    for rank in range(world):
        found = take(mixed, 40 // world, first=first, size=4, rank=rank, world=world, workers=workers)
        assert all(int(c) % world == rank for batch in found for c in batch["samples"])
        for batch in found:
            for sample, row in zip(batch["samples"].tolist(), batch["input_ids"], strict=True):
                assert torch.equal(row, reference[sample])


class SlowRows:
    """Each takes as long to read as a batch takes to leave a loader process, and has a padding of its own."""

    seq_len, n_rows, unread_tokens = 8, 1000, 0

    def read(self, rows: NDArray[np.int64]) -> Block:
        raise AssertionError("rows of batches are written in place")

    def write(self, rows: int, count: int, outputs: Outputs) -> None:
        time.sleep(0.05)
        block = Block.at(outputs, count, self.seq_len)
        for part in block[:3]:
            part[:] = 1
        block.padding[:] = 1000 + np.ctypeslib.as_array((c_int64 * count).from_address(rows))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_is_read_while_a_batch_leaves_a_loader_process_arrives(workers: int) -> None:
    """torch moves the memory of what it sends to another process, in a thread of its own."""
    mixture = Mixture(["a"], [Stage(0, 8, 8, (Fraction(1),))], [{8: 1000}], seed=0)
    for batch in take(MixedRows(mixture, [[SlowRows()]]), 6, workers=workers):
        expected = 1000 + mixture.locate(batch["samples"].numpy()).rows
        assert batch["padding"].tolist() == expected.tolist()


def test_a_stage_that_ends_within_a_micro_batch_cuts_it(mixed: MixedRows) -> None:
    found = take(mixed, 3, first=30, size=12)
    assert [batch["samples"].tolist() for batch in found] == [list(range(30, 42)), list(range(42, 48)), [48, 49, 50]]


def test_too_little_data_for_one_window_is_an_error(dataset: WindowDataset) -> None:
    n = dataset.shard.n_tokens
    with pytest.raises(ShardError, match=f"{n:,} tokens, fewer than one window of {n:,} and its last label"):
        WindowDataset(dataset.shard, n, seed=0, vocab_size=257)
    assert WindowDataset(dataset.shard, n - 1, seed=0, vocab_size=257).n_windows == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_token_is_named_even_by_a_worker(dataset: WindowDataset, workers: int) -> None:
    small = WindowDataset(dataset.shard, SEQ_LEN, seed=0, vocab_size=200)
    with pytest.raises(ShardError, match=r"^\S*train\.bin has token id 256 at position [^\n]*$"):
        take(small, 1, workers=workers)


@pytest.mark.slow
def test_a_loader_process_that_ends_is_one_message(dataset: WindowDataset) -> None:
    others = {*multiprocessing.active_children()}  # of iterators that nothing has collected yet
    running = batches(dataset, micro_batch_size=1, first_sample=0, rank=0, world=1, workers=1)
    next(running)
    (worker,) = {*multiprocessing.active_children()} - others
    worker.kill()
    time.sleep(0.2)  # the trainer's own step goes on undisturbed
    with pytest.raises(LoaderError, match=r"a loader process ended .*Lower data.workers, and go on with --resume auto"):
        list(running)


def test_loader_processes_are_forked_when_the_threads_of_an_exchange_have_rested(
    dataset: WindowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else some of them never begin."""
    order: list[str] = []
    monkeypatch.setattr(loader.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(loader.time, "sleep", lambda seconds: order.append(f"rest {seconds}"))
    monkeypatch.setattr(loader, "DataLoader", lambda *_, **__: order.append("fork") or iter([{}]))
    next(batches(dataset, micro_batch_size=1, first_sample=0, rank=0, world=2, workers=1))
    assert order == ["rest 0.1", "fork"]


SCRIPT = """
import signal, sys
from mamba_pretrain.data.loader import WindowDataset, batches
from mamba_pretrain.data.dataset import open_split
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: stopped.append(1))
shard, _ = open_split(sys.argv[1], "train")
running = batches(WindowDataset(shard, 64, 0, 257), micro_batch_size=2, first_sample=0, rank=0, world=1, workers=2)
for i, _ in enumerate(running):
    if i == 3: print("ready", flush=True)
    if stopped: break
for _ in range(20): next(running)
print("finished", flush=True)
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_the_parents_alone(tmp_path: Path, number: signal.Signals) -> None:
    """As from a terminal or Slurm: workers stay, the parent finishes its step, and the iterator still alive at exit
    does not keep the interpreter from leaving."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, make_dataset(tmp_path / "data")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "finished\n", "")
