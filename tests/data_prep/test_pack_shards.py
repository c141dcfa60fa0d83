"""Packing: best fit as defined, in blocks, the same every time; what it wastes; the command."""

from __future__ import annotations

import hashlib
import os
import socket
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import pack_shards
from data_prep.best_fit import best_fit
from data_prep.pack_shards import Waste, pack
from mamba_pretrain.data.packing import IGNORE, Block, make_rows
from mamba_pretrain.data.packs import pack_path
from tests.helpers.corpora import make_dataset
from tests.helpers.rows import dataset_of, numbered


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each row, by the definition."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [(capacity - sum(row), i) for i, row in enumerate(rows) if capacity - sum(row) >= length]
        if room:
            rows[min(room)[1]].append(length)
        else:
            rows.append([length])
    return rows


@settings(deadline=None, max_examples=80)
@given(capacity=st.integers(1, 40), data=st.data())
def test_best_fit_is_that_of_the_definition(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    order, counts = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    ends = np.cumsum(counts).tolist()
    rows = [[lengths[i] for i in order[end - count : end]] for count, end in zip(counts.tolist(), ends, strict=True)]
    # Of rows with the same room the definition takes any, so the sums are what is fixed.
    assert sorted(map(sum, rows)) == sorted(map(sum, one_by_one(lengths, capacity)))


def test_best_fit_wastes_less_than_a_thousandth_on_usual_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000).astype(np.int64), 2, 2048)
    order, counts = best_fit(lengths, 2048)
    filled = np.add.reduceat(lengths[order], np.cumsum(counts) - counts)
    assert filled.max() <= 2048
    assert 1 - filled.sum() / (len(counts) * 2048) < 1e-3


def counted(block: Block) -> tuple[int, int, int]:
    padding = int(block.padding.sum())
    return len(block.labels), padding, int((block.labels == IGNORE).sum()) - padding


@pytest.mark.parametrize("lengths", [[1, 8, 9], [16, 17, 15, 24, 25, 1, 1, 2], [3] * 20, [100], [16, 3]])
def test_the_waste_that_is_told_is_that_of_the_rows(tmp_path: Path, lengths: list[int]) -> None:
    dataset = dataset_of(tmp_path / "data", numbered(lengths), 1000)
    told: dict[str, Waste] = {}
    for how in ("best_fit", "documents"):
        told |= {how: pack(dataset, "train", 8, how)[how]}
        told |= {"windows": pack(dataset, "train", 8, how)["windows"]}
        assert pack(dataset, "train", 8, how)[how] == pack(dataset, "train", 8, "best_fit")[how]
    for how, waste in told.items():
        rows = make_rows(dataset, "train", seq_len=8, vocab_size=1000, packing=how)
        assert (waste.rows, waste.padding, waste.masked) == counted(rows.read(np.arange(rows.n_rows))), how
        assert waste.unread == rows.unread_tokens
    edges = np.cumsum([0, *lengths])
    assert told["windows"].cut == sum(a // 8 != (b - 1) // 8 for a, b in pairwise(edges.tolist()))
    assert told["best_fit"].cut == told["documents"].cut == sum(n > 9 for n in lengths)


def test_a_pack_is_the_same_every_time_and_depends_on_the_index_alone(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        documents = numbered([5, 3, 30, 8, 9, 2, 2, 7] * 40)
        dataset = dataset_of(tmp_path / name, documents, 10_000)
        for _ in range(2):
            pack(dataset, "train", 8, "best_fit")
            hashes.append(hashlib.sha256(pack_path(dataset, "train", "best_fit", 8).read_bytes()).hexdigest())
            (dataset / f"train.best_fit-8.pack.tmp-{socket.gethostname()}-4194305").touch()  # of a killed process
    assert len(set(hashes)) == 1
    pack(dataset, "train", 8, "best_fit")
    assert sorted(path.name for path in dataset.iterdir() if "pack" in path.name) == ["train.best_fit-8.pack"]


def test_a_document_of_many_rows_takes_no_more_memory_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_shards, "BLOCK", 1000)
    dataset = dataset_of(tmp_path / "data", [[1] * 500_000, [2, 3]])
    tracemalloc.start()
    wastes = pack(dataset, "train", 2, "best_fit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert wastes["best_fit"].rows == 250_001
    assert peak < 500_000  # the pack itself has 5 MB


def test_the_command_tells_the_waste_of_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "data")
    assert pack_shards.main([str(dataset), "--seq-len", "64", "--split", "validation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["windows", "best_fit", "documents"]
    assert lines[1].split()[2] == "0.00%"
    assert lines[4].startswith(f"{dataset}/validation.best_fit-64.pack: ")


@pytest.mark.parametrize(
    ("lengths", "seq_len", "message"),
    [
        ([], "64", "no document of two tokens or more"),
        ([1, 1], "64", "no document of two tokens or more"),
        ([5], "1", "--seq-len is 1: a row has at least two tokens"),
    ],
)
def test_what_cannot_be_packed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lengths: list[int], seq_len: str, message: str
) -> None:
    dataset = dataset_of(tmp_path / "data", numbered(lengths))
    assert pack_shards.main([str(dataset), "--seq-len", seq_len]) == 2
    assert message in capsys.readouterr().err


def test_a_pack_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = dataset_of(tmp_path / "data", numbered([5, 6, 7]))
    assert pack_shards.main([str(dataset), "--seq-len", "8"]) == 0
    path = pack_path(dataset, "train", "best_fit", 8)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert pack_shards.main([str(dataset), "--seq-len", "8"]) == 2
    assert f"No space left on device: '{path}'" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not list(dataset.glob("*tmp*"))
