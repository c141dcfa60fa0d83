"""Searching, counting and drawing are right at the seams, and take memory that does not grow with the split."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep import find as find_module
from data_prep import show_shards, statistics
from data_prep.find import find
from data_prep.statistics import count_tokens, histogram, lower_edges, measure_lengths
from data_prep.train_tokenizer import train, train_json
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.shards import HEADER, MAGIC, Shard, ShardError
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.data.writer import ShardWriter
from tests.helpers.corpora import make_dataset, make_documents

DOCUMENTS = [
    "alpha beta",
    "the needle stands here, and the needle stands there",
    "caf\u00e9 \u4e2d\u6587 needle",
    "nee",
    "dle",
]


@pytest.fixture(scope="module", params=["bytes", "model", "json"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("show")
    texts = make_documents(60) + DOCUMENTS
    if request.param == "json":
        (directory / "t.json").write_bytes(train_json(texts, vocab_size=300))
    if request.param == "model":
        (directory / "t.model").write_bytes(train(texts, kind="unigram", vocab_size=300, character_coverage=0.99))
    tokenizer = "bytes" if request.param == "bytes" else directory / f"t.{request.param}"
    return make_dataset(directory / "data", documents=DOCUMENTS, tokenizer=tokenizer, fractions=(1, 0, 0))


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 18])
def test_a_string_is_found_across_tokens_and_pieces_but_not_across_documents(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(find_module, "PIECE_TOKENS", piece)
    shard, _ = open_split(dataset, "train")
    read: list[int] = []
    hits = list(find(shard, load_tokenizer(dataset), "needle", progress=read.append))
    assert [(hit.document, hit.at) for hit in hits] == [(1, 4), (1, 32), (2, 13)]
    assert (hits[1].before, hits[1].after) == ("the needle stands here, and the ", " stands there")
    assert hits[2].before == "caf\u00e9 \u4e2d\u6587 "
    assert sum(read) == shard.n_tokens
    assert [hit.at for hit in find(shard, load_tokenizer(dataset), "\u4e2d")] == [6]
    assert list(find(shard, load_tokenizer(dataset), "needle", first_document=3)) == []


def test_pieces_of_a_model_that_drops_the_first_space_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(60)), model_writer=model, vocab_size=50, minloglevel=2
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    text = "the river returns to the sea slowly"
    dataset = make_dataset(tmp_path / "data", documents=[text], tokenizer=tmp_path / "t.model", fractions=(1, 0, 0))
    shard, _ = open_split(dataset, "train")
    for piece in (1, 2, 3):
        monkeypatch.setattr(find_module, "PIECE_TOKENS", piece)
        assert [hit.at for hit in find(shard, load_tokenizer(dataset), "to the sea")] == [text.index("to the sea")]


def test_the_search_stops_at_the_hits_asked_for_and_says_so(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_shards.main([str(dataset), "--find", "needle", "--hits", "2"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "train document 1, byte 4: the >>>needle<<< stands here, and the needle stands there"
    assert "byte 32" in second and last.startswith("stopped after 2 places")
    assert show_shards.main([str(dataset), "--find", "needle", "--document", "2"]) == 0
    assert "1 places in documents 2 to 4 of train" in capsys.readouterr().out
    assert show_shards.main([str(dataset), "--find", "haystack"]) == 1
    assert show_shards.main([str(dataset), "--find", ""]) == 2
    empty = make_dataset(tmp_path / "empty", documents=["a"], fractions=(0.998, 0.001, 0.001))
    assert show_shards.main([str(empty), "--find", "a", "--split", "test"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "no places: test is empty"


def test_statistics_are_those_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [*("a" * 8 for _ in range(99)), "b" * 998]
    dataset = str(make_dataset(tmp_path / "data", documents=documents, fractions=(1, 0, 0)))
    assert show_shards.main([dataset, "--stats"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "train: 100 documents, 1,990 tokens"
    assert "shortest 10, 1% 10, 5% 10, 25% 10, median 10, 75% 10, 95% 10, 99% 10, longest 1,000, mean 19.9 (" in rows[1]
    assert rows[2] == "3 of 257 ids occur in all 1,990 tokens. Most frequent:"
    assert [row.split() for row in rows[4:7]] == [
        ["98", "998", "50.15%", "'b'"],
        ["97", "792", "39.80%", "'a'"],
        ["256", "200", "10.05%", "(a", "special", "token)"],
    ]
    assert rows[7].startswith("duplicates: ") and "of 100 documents of all splits" in rows[7]


def test_lengths_are_exact_when_short_and_close_when_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DOCUMENTS", 7)  # several blocks
    rng = np.random.default_rng(0)
    lengths = np.sort((rng.pareto(1.0, 400) * 20 + 1).astype(int))
    with ShardWriter(tmp_path / "train", vocab_size=2) as writer:
        for n in rng.permutation(lengths):
            writer.append(np.ones(n, np.int64))
    measured = measure_lengths(Shard(tmp_path / "train"))
    assert (measured.documents, measured.tokens) == (400, lengths.sum())
    assert (measured.shortest, measured.longest) == (lengths[0], lengths[-1])
    for share in (0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = lengths[max(int(np.ceil(share * 400)), 1) - 1]
        found = measured.quantile(share)
        assert found == exact if exact < 512 else exact * 0.996 <= found <= exact
    assert sum(count for *_, count in measured.octaves()) == 400
    for low, high, count in measured.octaves():
        assert count == ((lengths >= low) & (lengths <= high)).sum()


def test_every_length_falls_into_the_bin_that_begins_below_it() -> None:
    edges = lower_edges()
    assert (np.diff(edges) > 0).all() and edges[:512].tolist() == list(range(512))
    rng = np.random.default_rng(0)
    lengths = np.concatenate((np.arange(2000), 2 ** np.arange(9, 62), rng.integers(0, 2**31, 1000)))
    found = statistics._bins(lengths)
    assert (edges[found] <= lengths).all() and (edges[found + 1] > lengths).all()


def test_the_index_of_millions_is_measured_in_bounded_memory(tmp_path: Path) -> None:
    n, length = 3_000_000, 5
    with (tmp_path / "train.bin").open("wb") as stream:
        stream.truncate(2 * n * length)
    with (tmp_path / "train.idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, n, n + 1))
        np.full(n, length, "<i4").tofile(stream)
        np.arange(0, 2 * n * length, 2 * length, "<i8").tofile(stream)
        np.arange(n + 1, dtype="<i8").tofile(stream)
    shard = Shard(tmp_path / "train")
    tracemalloc.start()
    measured = measure_lengths(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (measured.documents, measured.quantile(0.5), measured.longest) == (n, length, length)
    assert peak < 64 << 20


def test_a_damaged_index_is_an_error_not_a_statistic(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", vocab_size=9) as writer:
        for n in (1, 2, 3):
            writer.append(np.ones(n, np.int64))
    content = bytearray((tmp_path / "train.idx").read_bytes())
    content[-24:-16] = (99).to_bytes(8, "little")
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(ShardError, match="the index is damaged, see python -m data_prep.verify_shards"):
        measure_lengths(Shard(tmp_path / "train"))


def test_tokens_are_counted_in_blocks_spread_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TOKENS", 100)
    with ShardWriter(tmp_path / "train", vocab_size=10) as writer:
        for i in range(10):
            writer.append(np.full(1000, i))
    shard = Shard(tmp_path / "train")
    whole = count_tokens(shard, 10, 10_000)
    assert whole.counts.tolist() == [1000] * 10 and whole.sample == "all 10,000 tokens"
    some = count_tokens(shard, 10, 2_000)
    assert some.sample == "2,000 tokens, 20 blocks spread evenly over the split"
    assert some.counts.min() > 0 and some.counts.sum() == 2000
    with pytest.raises(ShardError, match="outside the vocabulary of 9"):
        count_tokens(shard, 9, 10_000)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dataset = make_dataset(tmp_path / "data", documents=DOCUMENTS, fractions=(1, 0, 0))
    assert show_shards.main([str(dataset), "--plot", str(tmp_path / "pictures")]) == 0
    for name in ("document_lengths.png", "token_ranks.png"):
        assert (tmp_path / "pictures" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_lengths_need_neither_tokens_nor_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "data")
    (dataset / "tokenizer.bytes").unlink()
    assert show_shards.main([str(dataset), "--lengths"]) == 0
    assert capsys.readouterr().out.rstrip() == histogram(measure_lengths(Shard(dataset / "train")))


def test_a_split_that_is_not_there_is_named_always(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "data")
    for words in ([], ["--lengths"]):
        assert show_shards.main([str(dataset), "--split", "valid", *words]) == 2
        assert "has no split 'valid'; it has train, validation" in capsys.readouterr().err
