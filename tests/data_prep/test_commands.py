"""The commands, end to end: what they write and what they refuse."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import build_shards, show_shards, train_tokenizer, verify_shards
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.tokenizer import load_tokenizer
from tests.helpers.corpora import make_dataset, make_documents, write_jsonl
from tests.helpers.inputs import jsonl_bytes

ROOT = Path(__file__).parents[2]
FRACTIONS = ["--split-fractions", "0.7", "0.2", "0.1"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))


def build(corpus: Path, output: Path, *options: str, tokenizer: str | Path = "bytes") -> int:
    return build_shards.main([str(corpus), "--tokenizer", str(tokenizer), "--output", str(output), *options])


def texts(dataset: Path, split: str) -> list[str]:
    shard, _ = open_split(dataset, split)
    tokenizer = load_tokenizer(dataset)
    return [tokenizer.decode(shard.tokens(*shard.document_bounds(j)).tolist()) for j in range(shard.n_documents)]


def test_every_document_is_in_one_split_between_bos_and_eod(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    assert build(corpus, output, *FRACTIONS) == 0
    found = {split: texts(output, split) for split in ("train", "validation", "test")}
    assert sorted(itertools.chain(*found.values())) == sorted(make_documents(200))
    manifest = Manifest.read(output)
    for split, documents in found.items():
        info, (shard, _) = manifest.splits[split], open_split(output, split)
        assert info.documents == len(documents) > 0
        assert info.text_bytes == sum(len(text.encode()) for text in documents)
        assert info.words == sum(len(text.split()) for text in documents)
        assert info.tokens == info.text_bytes + 2 * info.documents
        assert shard.tokens(0, 1).tolist() == [256]
        for name, file in info.files.items():
            assert hashlib.sha256((output / name).read_bytes()).hexdigest() == file.sha256
    table = capsys.readouterr().out
    assert "documents" in table and f"{manifest.splits['train'].tokens:,}" in table


def test_without_bos_documents_only_end(corpus: Path, tmp_path: Path) -> None:
    assert build(corpus, tmp_path / "data", "--no-bos", *FRACTIONS) == 0
    shard, manifest = open_split(tmp_path / "data", "train")
    ends = shard.tokens(0, shard.n_tokens).tolist().count(256)
    assert (manifest.adds_bos, ends) == (False, shard.n_documents)


def test_identical_documents_share_a_split(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(50) * 3)
    build(corpus, tmp_path / "data", *FRACTIONS)
    found = [set(texts(tmp_path / "data", split)) for split in ("train", "validation", "test")]
    assert sum(map(len, found)) == len(set.union(*found)) == 50


def test_inputs_that_are_set_apart_keep_their_split(tmp_path: Path) -> None:
    """Those of a directory and of a saved dataset, whose documents have names of their own, too."""
    import datasets

    documents = make_documents(60)
    (tmp_path / "held").mkdir()
    for i in (0, 1):
        write_jsonl(tmp_path / "held" / f"{i}.jsonl", documents[i * 10 : i * 10 + 10])
    datasets.DatasetDict({"x": datasets.Dataset.from_dict({"text": documents[20:30]})}).save_to_disk(tmp_path / "saved")
    rest = write_jsonl(tmp_path / "rest.jsonl", documents[30:])
    apart = ["--split-files", f"validation={tmp_path / 'held'}", f"test={tmp_path / 'saved'}"]
    assert build(rest, tmp_path / "data", *apart) == 0
    found = {split: texts(tmp_path / "data", split) for split in ("train", "validation", "test")}
    assert found == {"train": documents[30:], "validation": documents[:20], "test": documents[20:30]}
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.split_rule.inputs[str(tmp_path / "saved")] == "test"
    assert f"validation={tmp_path / 'held'}" in manifest.command
    assert build(rest, tmp_path / "divided", *apart[:2], "--split-fractions", "0.5", "0", "0.5") == 0
    found = {split: set(texts(tmp_path / "divided", split)) for split in ("train", "validation", "test")}
    assert found["validation"] == set(documents[:20]) and found["train"] | found["test"] == set(documents[30:])
    assert min(map(len, found.values())) > 0


def test_what_lies_in_the_place_for_parts_and_is_not_of_a_build_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(5))
    (tmp_path / "x.work").mkdir()
    (tmp_path / "x.work" / "notes").write_text("kept")
    assert build(corpus, tmp_path / "x") == 2
    assert "x.work holds notes, which no build made" in capsys.readouterr().err
    inside = write_jsonl(tmp_path / "x.work" / "corpus.jsonl", make_documents(5))
    assert build(inside, tmp_path / "x") == 2
    assert "x.work holds the input" in capsys.readouterr().err
    assert (tmp_path / "x.work" / "notes").read_text() == "kept" and inside.exists()


def test_a_dataset_of_inputs_that_are_all_set_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (write_jsonl(tmp_path / f"{i}.jsonl", make_documents(5 + i)) for i in range(2))
    options = ["--tokenizer", "bytes", "--output", str(tmp_path / "data")]
    words = ["--split-files", f"train={one}", "--split-files", f"test={other}"]
    assert build_shards.main([*options, *words, "--split-fractions", "1", "0", "0"]) == 2
    assert "--split-fractions are of INPUT, and there is none" in capsys.readouterr().err
    assert build_shards.main([*options, *words]) == 0
    assert {name: split.documents for name, split in Manifest.read(tmp_path / "data").splits.items()} == {
        "train": 5,
        "test": 6,
    }
    capsys.readouterr()
    assert build_shards.main([str(one), *options, "--overwrite", "--split-files", f"test={one}"]) == 2
    assert "among the inputs twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_shards.main([*options, "--split-files", f"valid={one}"])
    assert "expected SPLIT=INPUT, with one of train, validation, test" in capsys.readouterr().err
    assert build_shards.main(options) == 2
    assert "no input: name files" in capsys.readouterr().err


def test_the_same_input_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(corpus, tmp_path / name, *FRACTIONS)
    for path in (tmp_path / "a").iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_records_that_are_no_documents_are_counted_over_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    others = jsonl_bytes(["", "x", "x", *["y" * 500] * 3]) + b"{bad\n" * 4
    corpus.write_bytes(b"".join(jsonl_bytes(make_documents(20, seed)) + others for seed in range(3)))
    options = ("--min-bytes", "2", "--max-bytes", "499", *FRACTIONS)
    assert build(corpus, tmp_path / "data", *options) == 2
    assert "corpus.jsonl:27: not JSON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [corpus]
    assert build(corpus, tmp_path / "data", "--on-error", "skip", "--unit-bytes", "2000", *options) == 0
    manifest = Manifest.read(tmp_path / "data")
    assert sum(info.documents for info in manifest.splits.values()) == 60
    assert (manifest.skipped_records, manifest.empty_documents) == (12, 3)
    assert (manifest.selection.too_short, manifest.selection.too_long) == (6, 9)
    assert "12 invalid records were left out" in capsys.readouterr().out


def test_a_lossy_tokenizer_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers  # a byte-level model that composes accents, as GPT-NeoX's does

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    documents = [f"{i}: {letter}" for i in range(30) for letter in ("\u00e9", "e\u0301", "n\u0303")]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*documents, *documents[:9]])
    options = ("--unit-bytes", "500", "--drop-duplicates", *FRACTIONS)
    assert build(corpus, tmp_path / "data", *options, tokenizer=tmp_path / "tokenizer.json") == 0
    splits = Manifest.read(tmp_path / "data").splits.values()
    assert sum(split.not_round_trip for split in splits) == 60  # of those that are in it
    assert all(0 < split.not_round_trip <= split.documents for split in splits)
    assert "the tokenizer loses text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split-fractions", "0.5", "0.1", "0.1"], "add up to 1"),
        (["--tokenizer", "gone.model"], "gone.model does not exist"),
        (["--text-key", "body"], "no key 'body'"),
    ],
)
def test_user_errors_are_one_message(
    corpus: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(corpus, tmp_path / "data", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("python -m data_prep.build_shards: error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [corpus]


def test_an_existing_output_is_replaced_only_on_request(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = make_dataset(tmp_path / "data")
    before = Manifest.read(output)
    assert build(corpus, output, *FRACTIONS) == 2
    assert "exists; choose another output, or pass --overwrite" in capsys.readouterr().err
    assert Manifest.read(output) == before
    assert build(corpus, output, "--overwrite", *FRACTIONS) == 0
    assert Manifest.read(output).sources[0].path == str(corpus)


@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_output_that_holds_an_input_is_never_replaced(
    corpus: Path, tmp_path: Path, tokenizer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    output = make_dataset(tmp_path / "data")
    inside = write_jsonl(output / "corpus.jsonl", make_documents(50))
    before = sorted(output.iterdir())
    chosen, name = (corpus, str(output)) if tokenizer else (inside, "bytes")
    assert build(chosen, output, "--overwrite", *FRACTIONS, tokenizer=name) == 2
    assert f"{output} holds the input {output if tokenizer else inside}" in capsys.readouterr().err
    assert sorted(output.iterdir()) == before


def test_an_empty_split_warns_and_an_empty_train_split_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["one document"])
    codes = [
        build(corpus, tmp_path / f"{i}", "--seed", str(i), "--split-fractions", "0.5", "0.5", "0") for i in range(8)
    ]
    captured = capsys.readouterr()
    assert set(codes) == {0, 2}
    assert captured.out.count("warning: the validation split is empty") == codes.count(0)
    assert captured.err.count("the train split is empty, the documents fell like this") == codes.count(2)
    assert [(tmp_path / f"{i}").exists() for i in range(8)] == [code == 0 for code in codes]


def test_no_documents_at_all_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(write_jsonl(tmp_path / "corpus.jsonl", ["", ""]), tmp_path / "data") == 2
    assert "no documents in the input (1 files): 2 records are empty" in capsys.readouterr().err


def run(*command: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_verify_lists_problems_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "data")
    assert verify_shards.main([str(dataset)]) == 0
    content = bytearray((dataset / "train.bin").read_bytes())
    content[10] ^= 4
    (dataset / "train.bin").write_bytes(content)
    (dataset / "validation.idx").unlink()
    capsys.readouterr()
    assert verify_shards.main([str(dataset)]) == 1
    out = capsys.readouterr().out
    assert "train.bin has sha256" in out and "validation.idx is missing" in out
    assert verify_shards.main([str(dataset), "--split", "train"]) == 1
    assert verify_shards.main([str(tmp_path / "gone")]) == 2


def test_show_prints_table_documents_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = ["alpha", "beta " * 10, "gamma"]
    dataset = str(make_dataset(tmp_path / "data", documents=documents, fractions=(1, 0, 0)))
    assert show_shards.main([dataset]) == 0
    assert "tokenizer: bytes, 257 ids, bos 256, eod 256" in capsys.readouterr().out
    assert show_shards.main([dataset, "--document", "1", "--count", "5"]) == 0
    out = capsys.readouterr().out
    assert "train document 1, tokens 7 to 59 (52)\n" + documents[1] in out and "gamma" in out and "alpha" not in out
    assert show_shards.main([dataset, "--lengths"]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["4", "-", "7", "2"], ["8", "-", "15", "0"], ["16", "-", "31", "0"], ["32", "-", "63", "1"]]
    assert show_shards.main([dataset, "--document", "3"]) == 2
    assert "it has 3, from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_trained_tokenizer_is_the_same_every_time_and_builds_shards(corpus: Path, tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        options = ["--vocab-size", "300", "--model-type", kind, "--output", str(tmp_path / name / "t.model")]
        assert train_tokenizer.main([str(corpus), *options, *FRACTIONS]) == 0
    assert (tmp_path / "a" / "t.model").read_bytes() == (tmp_path / "b" / "t.model").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["t.model", "t.vocab"]
    assert build(corpus, tmp_path / "data", *FRACTIONS, tokenizer=tmp_path / "a" / "t.model") == 0
    manifest = Manifest.read(tmp_path / "data")
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.bos_id, manifest.tokenizer.eod_id) == (300, 1, 2)
    assert {split.not_round_trip for split in manifest.splits.values()} == {0}
    assert set(texts(tmp_path / "data", "test")) <= set(make_documents(200))


def test_the_tokenizer_learns_from_the_train_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(200))
    seen: list[str] = []

    def spy(texts: list[str], **_: object) -> bytes:
        seen.extend(texts)
        raise train_tokenizer.TokenizerError("seen enough")

    monkeypatch.setattr(train_tokenizer, "train", spy)
    arguments = [str(corpus), "--vocab-size", "300", "--output", str(tmp_path / "t.model"), *FRACTIONS]
    assert train_tokenizer.main(arguments) == 2
    build(corpus, tmp_path / "data", *FRACTIONS)
    assert sorted(seen) == sorted(texts(tmp_path / "data", "train"))
    seen.clear()
    train_tokenizer.main([*arguments, "--sample-bytes", "10000"])
    assert 10 < len(seen) < 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--vocab-size", "50000", "--output", "t.model"],
            "Vocabulary size too high (50000). Please set it to",
        ),
        (["--vocab-size", "100", "--output", "t.model"], "Vocabulary size is smaller than required_chars"),
        (["--vocab-size", "300", "--output", "t.txt"], "expected NAME.model (SentencePiece) or NAME.json"),
        (["--vocab-size", "0", "--output", "t.model"], "--vocab-size 0: expected 1 or more"),
        (["--vocab-size", "300", "--output", "t.model", "--sample-bytes", "0"], "--sample-bytes 0: expected 1"),
        (["--vocab-size", "300", "--output", "t.model", "--sample-bytes", "9"], "or more --sample-bytes"),
        (["--vocab-size", "300", "--output", "t.json", "--model-type", "bpe"], "of SentencePiece, and a .json is"),
        (["--vocab-size", "9000", "--output", "t.json"], "passages of text yield"),
        (["--vocab-size", "100", "--output", "t.json"], "--vocab-size 100: the smallest is 257"),
        (["--vocab-size", "9000", "--output", "t.json"], "ids. Use more text, or another size; the smallest is 257"),
        (["--vocab-size", "300", "--output", "corpus.jsonl/t.model"], "File exists: 'corpus.jsonl'"),
    ],
)
def test_tokenizer_errors_are_one_message(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_tokenizer.main([str(corpus), *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize("name", ["t.model", "t.vocab"])
def test_neither_file_of_a_tokenizer_is_replaced_unasked(
    corpus: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("precious")
    arguments = [str(corpus), "--vocab-size", "300", "--output", str(tmp_path / "t.model")]
    assert train_tokenizer.main(arguments) == 2
    assert f"{name} exists; choose another output, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "precious"
    assert train_tokenizer.main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / name).read_bytes() != b"precious"


COMMANDS = ["adopt_shards", "build_shards", "merge_shards", "show_shards", "train_tokenizer", "verify_shards"]


def test_the_commands_never_import_torch() -> None:
    names = ", ".join(f"data_prep.{name}" for name in COMMANDS)
    process = run("-c", f"import sys, {names}; sys.exit('torch' in sys.modules)")
    assert (process.wait(timeout=300), process.communicate()[1]) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"data_prep.{name}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert f"    python -m data_prep.{name} " in capsys.readouterr().out


def test_the_vendored_corpora_build(tmp_path: Path) -> None:
    for name, documents, text_bytes in (("sotu.jsonl.gz", 78, 2_845_390), ("lambda_phage.fa.gz", 1, 48_502)):
        assert build(ROOT / "corpora" / name, tmp_path / name, "--split-fractions", "1", "0", "0") == 0
        info = Manifest.read(tmp_path / name).splits["train"]
        assert (info.documents, info.text_bytes) == (documents, text_bytes)
