"""The sample is a fair one of bounded size; a byte-level BPE loses nothing and travels by its hash."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from data_prep import train_tokenizer
from data_prep.train_tokenizer import ENTRY_BYTES, passages, sample, sentences, train_json
from mamba_pretrain import checkpoint
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.export.convert import export_checkpoint
from mamba_pretrain.export.pretrained import read_pretrained
from mamba_pretrain.files import sha256_of
from mamba_pretrain.train import run
from tests.data.test_tokenizer import AWKWARD
from tests.helpers import hf
from tests.helpers.corpora import make_dataset, make_documents, write_jsonl
from tests.helpers.runs import small_config

ROOT = Path(__file__).parents[2]


def test_a_sample_fits_its_memory_keeps_the_order_and_depends_on_the_seed_alone() -> None:
    items = [f"{i:06d}" for i in range(10_000)]
    each = sys.getsizeof(items[0]) + ENTRY_BYTES
    one = sample(iter(items), 500 * each, seed=1)
    assert len(one) == 500 and one == sorted(one)
    assert sample(iter(items), 500 * each, seed=1) == one
    assert sample(iter(items), 500 * each, seed=2) != one
    assert sample(iter(items), 10_000 * each, seed=1) == items


def test_a_sample_is_spread_over_the_whole_corpus() -> None:
    items = [f"{i:06d}" for i in range(10_000)]
    chosen = sample(iter(items), 1000 * (sys.getsizeof(items[0]) + ENTRY_BYTES), seed=0)
    for tenth in range(10):  # 100 of each are expected, with a deviation of 9
        assert 60 < sum(int(item) // 1000 == tenth for item in chosen) < 140


def test_the_memory_of_a_sample_does_not_grow_with_the_corpus() -> None:
    at_most = 200_000

    def peak(n: int) -> int:
        tracemalloc.start()
        sample((f"{i:050d}\u4e2d" for i in range(n)), at_most, seed=0)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(4_000) < 1.2 * at_most and peak(40_000) < 1.2 * at_most


def test_lines_keep_their_ends_and_passages_hold_them_inside() -> None:
    from data_prep.records import Document

    document = Document("one\n\ntwo\n" + "x" * 2500, "a", 1)
    assert list(sentences([document])) == ["one\n", "\n", "two\n", "x" * 2000, "x" * 500]
    assert list(passages([document])) == ["one\n\ntwo\n" + "x" * 1991, "x" * 509]


def test_reading_may_end_early_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*make_documents(100), "\u4e2d" * 9999])
    options = [str(corpus), "--vocab-size", "280", "--split", "all"]
    assert train_tokenizer.main([*options, "--output", str(tmp_path / "all.json")]) == 0
    assert "warning" not in capsys.readouterr().out
    assert train_tokenizer.main([*options, "--output", str(tmp_path / "some.json"), "--read-bytes", "5000"]) == 0
    out = capsys.readouterr().out
    assert "warning: --read-bytes ended the reading, and the rest of the corpus is not in the sample" in out
    all_of_it, some = (load_tokenizer(tmp_path / f"{name}.json") for name in ("all", "some"))
    assert len(all_of_it.encode("\u4e2d" * 8)) < len(some.encode("\u4e2d" * 8)) == 24


def test_an_input_that_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", make_documents(100))
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(good.read_bytes())[:-20])
    options = [
        "--vocab-size",
        "280",
        "--split",
        "all",
        "--output",
        str(tmp_path / "x.json"),
        "--on-error",
        "skip-files",
    ]
    assert train_tokenizer.main([str(good), str(damaged), *options]) == 0
    said = f"left out, it could not be read: {damaged} is damaged"
    assert f"warning: {said}" in capsys.readouterr().out
    (tmp_path / "x.json").unlink()
    assert train_tokenizer.main([str(damaged), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_json_tokenizer_is_the_same_in_every_process(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    for name, threads in (("a", "1"), ("b", "2")):
        command = [sys.executable, "-m", "data_prep.train_tokenizer", str(corpus), "--vocab-size", "400"]
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([*command, "--output", str(tmp_path / f"{name}.json")], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "corpus.jsonl"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_before_the_end_leaves_nothing_that_stops_the_same_command(tmp_path: Path, at: int) -> None:
    """At the sync of either file, of which one is the tokenizer and the other is for people."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(60))
    words = [str(corpus), "--vocab-size", "300", "--output", str(tmp_path / "t.model")]
    code = (
        "import os, sys; from mamba_pretrain import files; from data_prep import train_tokenizer\n"
        "sync, calls = files.sync, []\n"
        "def die(path):\n"
        "    calls.append(path)\n"
        "    os._exit(9) if len(calls) == int(sys.argv[1]) else sync(path)\n"
        "files.sync = die\n"
        "train_tokenizer.main(sys.argv[2:])\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(at), *words], cwd=ROOT).returncode == 9
    whole = (tmp_path / "t.model").exists()
    assert whole == (at == 2) and not (tmp_path / "t.vocab").exists()
    assert train_tokenizer.main([*words, *["--overwrite"] * whole]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "t.model", "t.vocab"]


def test_the_locale_changes_nothing(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{text} Grüße aus Köln, 東京" for text in make_documents(200)])
    for name, locale in (("a", "C"), ("b", "C.UTF-8")):
        command = [sys.executable, "-m", "data_prep.train_tokenizer", str(corpus), "--vocab-size", "320"]
        environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([*command, "--output", str(tmp_path / f"{name}.model")], cwd=ROOT, env=environment, check=True)
    for end in ("model", "vocab"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()
    assert "東" in (tmp_path / "a.vocab").read_bytes().decode()


@pytest.mark.parametrize("text", [*AWKWARD, "<|endoftext|> is text", "\n\n\n  x"])
def test_a_json_tokenizer_loses_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_bytes(train_json(make_documents(60), vocab_size=300))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (300, 0, 0)
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode() and 0 not in ids


def test_a_json_tokenizer_travels_by_its_hash_to_shards_checkpoint_and_export(tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    made.write_bytes(train_json(make_documents(60), vocab_size=300))
    dataset = make_dataset(tmp_path / "data", tokenizer=made)
    assert run(small_config(dataset, tmp_path / "run", "train.steps=2")) == 0
    saved = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    export_checkpoint(saved, tmp_path / "hf", to="hf")
    expected = sha256_of(made)
    assert {sha256_of(d / "tokenizer.json") for d in (dataset, saved, tmp_path / "hf")} == {expected}
    assert Manifest.read(dataset).tokenizer.sha256 == expected
    for directory in (saved, tmp_path / "hf"):
        facts = read_pretrained(directory).tokenizer
        assert facts is not None and (facts["sha256"], facts["eod_id"]) == (expected, 0)
    loaded, ours = hf.AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(made)
    for text in (text for text in AWKWARD if "<|endoftext|>" not in text):
        assert loaded(text)["input_ids"] == ours.encode(text)
        assert loaded.decode(ours.encode(text)) == text
    assert loaded.eos_token == "<|endoftext|>"
