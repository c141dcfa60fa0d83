"""`mamba-pretrain data --dry-run` says what the run then reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep import pack_shards
from mamba_pretrain import preview as preview_module
from mamba_pretrain.cli import main
from mamba_pretrain.config import load
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.packing import IGNORE, Packed
from mamba_pretrain.preview import document_lengths, measure
from mamba_pretrain.reading import open_reading, table
from tests.helpers.corpora import make_dataset
from tests.helpers.rows import foreign_shard
from tests.helpers.runs import OPTIONS, small_config

STAGES = "data.stages=[{}, {from_tokens: 1024, weights: {code: 3}, seq_len: 64}]"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("sources")
    paths = [make_dataset(directory / name, n_documents=n, seed=n) for name, n in (("web", 70), ("code", 40))]
    sources = ", ".join(f"{{path: {path}, weight: {3 - i}}}" for i, path in enumerate(paths))
    return [*OPTIONS, f"data.sources=[{sources}]", STAGES, f"run_dir={directory / 'run'}"]


def test_it_counts_what_the_run_reads(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--dry-run", "--json", str(tmp_path / "reading.json"), *words]) == 0
    printed = capsys.readouterr().out
    assert "12 steps of 256 tokens, 64 samples, 3,072 tokens; packing windows" in printed
    found = json.loads((tmp_path / "reading.json").read_text())
    reading = open_reading(load([], words))
    places = reading.mixture.locate(np.arange(64))
    for part in found["stages"]:
        chosen = (places.stages == part["stage"]) & (places.sources == ["code", "web"].index(part["source"]))
        assert (part["samples"], part["tokens"]) == (chosen.sum(), chosen.sum() * part["seq_len"])
    for source, shard in zip(found["sources"], [source.train for source in reading.sources], strict=True):
        read = sum(part["tokens"] for part in found["stages"] if part["source"] == source["name"])
        epoch = source["rows"] * source["row_tokens"]
        assert source["read_tokens"] == read and source["epochs"] == read / epoch
        assert source["repeated_tokens"] == max(0, read - epoch)
        assert source["unread_tokens"] == shard.n_tokens - epoch
        assert source["left_over_tokens"] in (0, 32)
    assert not Path(load([], words).run_dir).exists()
    assert main(["data", *words]) == 0
    assert capsys.readouterr().out == printed


def test_packs_of_several_lengths_are_expected_to_repeat_what_independent_orders_do(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", n_documents=400)
    for length in (32, 64):
        assert pack_shards.main([str(path), "--seq-len", str(length)]) == 0
    options = [option for option in OPTIONS if not option.startswith("train.steps")]
    stages = "data.stages=[{}, {from_tokens: 12800, seq_len: 64}]"
    words = [*options, f"data.path={path}", "data.packing=best_fit", "train.steps=100", stages, f"run_dir={tmp_path}/r"]
    reading = open_reading(load([], words))
    samples = 12800 // 32 + 12800 // 64
    (found,) = reading.figures(samples)["sources"]
    assert found["read_tokens"] == 25600 and found["epochs"] < 1
    times = np.zeros(reading.sources[0].train.n_tokens, np.int64)
    places = reading.mixture.locate(np.arange(samples))
    for stage, row in zip(places.stages.tolist(), places.rows.tolist(), strict=True):
        packed = reading.dataset.rows[stage][0]
        assert isinstance(packed, Packed)
        for piece in packed._pieces(row):
            times[piece.start : piece.start + piece.tokens] += 1
    assert found["repeated_tokens"] == pytest.approx(np.maximum(times - 1, 0).sum(), rel=0.05)
    assert f"about {found['repeated_tokens']:,} of them again" in table(reading.figures(samples))
    (none,) = reading.figures(0)["sources"]
    assert (none["read_tokens"], none["repeated_tokens"], none["epochs"]) == (0, 0, 0)
    (first,) = reading.figures(400)["sources"]  # one length until here
    assert first["repeated_tokens"] == 0 and first["repeated_tokens_are_exact"]


def test_shares_are_those_of_the_rows(words: list[str]) -> None:
    reading = open_reading(load([], words))
    (expected,) = [part for part in measure(reading, 64, 4096) if (part["stage"], part["source"]) == (1, "code")]
    places = reading.mixture.locate(np.arange(64))
    rows = places.rows[(places.stages == 1) & (places.sources == 0)]
    shard = reading.sources[0].train
    masked = several = 0
    for row in rows.tolist():
        begins = shard.document_starts(row * 64 + 1, (row + 1) * 64 + 1)
        masked += len(begins)
        several += bool((begins < (row + 1) * 64).any())
    assert expected["all_rows"] and expected["rows"] == len(rows)
    assert expected["masked_share"] == masked / (64 * len(rows))
    assert expected["rows_across_a_boundary_share"] == several / len(rows)
    assert expected["padding_share"] == 0
    block = reading.dataset.read(1, np.zeros_like(rows), rows)
    assert (block.labels == IGNORE).sum() == masked


@pytest.mark.parametrize(
    ("how", "rows", "padding", "several"),
    # Documents of 40, 31, 20, 10 and 8 tokens: 32 of the first alone, its other 8 are packed as a document.
    [("best_fit", 4, 0 + 1 + (32 - 20 - 10) + (32 - 8 - 8), 2), ("documents", 6, 0 + 1 + 12 + 22 + 24 + 24, 0)],
)
def test_padding_is_told_apart_from_what_has_no_target(
    tmp_path: Path, how: str, rows: int, padding: int, several: int
) -> None:
    documents = [letter * (n - 2) for letter, n in zip("abcde", (10, 40, 8, 31, 20), strict=True)]  # and bos, eod
    path = make_dataset(tmp_path / "data", documents=documents, fractions=(1.0, 0.0, 0.0))
    assert pack_shards.main([str(path), "--seq-len", "32", "--how", how]) == 0
    reading = open_reading(small_config(path, tmp_path / "run", f"data.packing={how}", "data.validation_split=null"))
    assert reading.figures(rows)["sources"][0]["rows"] == rows
    (found,) = measure(reading, rows, rows)
    assert (found["rows"], found["all_rows"]) == (rows, True)
    assert found["padding_share"] == padding / (32 * rows)
    assert found["masked_share"] == len(documents) / (32 * rows)  # the last token of each
    assert found["rows_across_a_boundary_share"] == several / rows


def test_a_sample_of_the_rows_is_said_to_be_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--rows", "20", *words]) == 0
    assert "rows drawn at random from the run's)" in capsys.readouterr().out


def test_a_sample_of_the_rows_is_of_all_stages_and_always_the_same(words: list[str]) -> None:
    """Each of the two stages has 32 of the run's 64 rows."""
    reading = open_reading(load([], words))
    found = measure(reading, 64, 40)
    rows = [sum(part["rows"] for part in found if part["stage"] == stage) for stage in (0, 1)]
    assert sum(rows) == 40 and min(rows) > 10
    assert not any(part["all_rows"] for part in found)
    assert all(measure(reading, 64, 40) == found for _ in range(3))


def test_the_histogram_is_of_all_documents_or_says_of_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, _ = open_split(make_dataset(tmp_path / "data", fractions=(1.0, 0.0, 0.0), n_documents=90), "train")
    lengths = [stop - start for start, stop in map(shard.document_bounds, range(90))]
    monkeypatch.setattr(preview_module, "BLOCK", 8)
    found = document_lengths(shard)
    assert (found["of"], found["looked_at"]) == (90, 90)
    counts = Counter(length.bit_length() for length in lengths)
    for row in found["histogram"]:
        inside = [length for length in lengths if row["from"] <= length < row["below"]]
        assert row["documents"] == len(inside) == counts[(row["below"] - 1).bit_length()]
        assert row["tokens"] == sum(inside)
    assert sum(row["documents"] for row in found["histogram"]) == 90
    monkeypatch.setattr(preview_module, "DOCUMENTS", 32)
    assert document_lengths(shard)["looked_at"] == 32


def test_the_histogram_counts_empty_documents(tmp_path: Path) -> None:
    shard = foreign_shard(tmp_path, [[1, 2], [], [3], []], [0, 0, 1, 2, 3, 4])
    found = document_lengths(shard)
    assert (found["of"], found["looked_at"]) == (5, 5)
    assert [(row["documents"], row["tokens"]) for row in found["histogram"]] == [(3, 0), (1, 1), (1, 2)]


def test_a_missing_directory_for_the_figures_is_said_at_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "--json", str(tmp_path / "absent/x.json"), *words]) == 2
    assert "there is no directory" in capsys.readouterr().err
