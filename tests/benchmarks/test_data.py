"""Every way does the same work and is named in figures and goals; what has failed or is not there is a goal missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import data_load, data_tokenize
from benchmarks.common import Report
from benchmarks.data_tokenize import (
    CommandError,
    Text,
    Way,
    documents_of,
    measure_tokenizer,
    run_command,
    tell,
    write_parts,
)
from benchmarks.loading import Gather, Ours
from benchmarks.synthetic import write_holes, write_letters
from benchmarks.tokenize_library import texts_of
from benchmarks.worker import Answer, WorkerError
from mamba_pretrain.data.dataset import open_split, verify
from mamba_pretrain.data.tokenizer import BytesTokenizer

ROOT = Path(__file__).parent.parent.parent
TEXT = Text([Path("part-0.jsonl"), Path("part-1.jsonl")], 12_000_000, 100)
FEW = Text([Path("few-0.jsonl"), Path("few-1.jsonl")], 2_000_000, 2)
WIKI = "<mediawiki>\n" + "".join(f"  <page>\n    page {i}\n\n    more\n  </page>\n" for i in range(5))


def test_a_wiki_dump_is_its_pages_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "wiki"
    path.write_text(WIKI)
    documents = list(documents_of(path, 10_000))
    assert "".join(documents) == WIKI
    assert [document.count("<page>") for document in documents] == [0, 1, 1, 1, 1, 1]
    assert "".join(documents_of(path, 100)) == WIKI[:100]


def test_other_text_is_blocks_of_lines_and_a_jsonl_its_records(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one\nline\n\n\ntwo\n")
    assert list(documents_of(tmp_path / "text", 1000)) == ["one\nline\n", "two\n"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert list(documents_of(tmp_path / "a.jsonl", 6)) == ["one", "two"]


def test_documents_are_divided_evenly_and_none_is_lost(tmp_path: Path) -> None:
    documents = ["x" * n for n in (50, 10, 10, 10, 10, 10)] + ["\u2028 and \u00e9"]
    text = write_parts(tmp_path / "parts", documents, 2)
    assert sorted(texts_of([str(file) for file in text.files])) == sorted(documents)
    assert (text.bytes, text.documents) == (sum(len(one.encode()) for one in documents), len(documents))
    assert len(texts_of([str(text.files[0])])) < 3  # the long one, and at most one more


def test_a_command_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(CommandError, match="ended with 3: the reason"):
        run_command([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(CommandError, match="more than 0 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.1)


def test_a_way_that_does_less_work_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(tokens: int) -> None:
        def run(command: list[str]) -> tuple[float, str]:
            Path(command[5]).mkdir()
            return 1.5, f'progress\n{{"tokens": {tokens}}}\n'

        monkeypatch.setattr(data_tokenize, "run_command", run)

    text = Text(TEXT.files, 1000, 10, {"t.json": 5000})
    way = Way("megatron", tmp_path / "t.json", 1, tmp_path)
    made(5010)
    assert way.run(text) == 1.5
    made(4900)
    with pytest.raises(CommandError, match="made 4,890 tokens, another way made 5,000"):
        way.run(text)


SECONDS = {
    "bare loop, 1 process": [6.0, 12.0],
    "bare loop, 2 processes": [3.0, 6.0],
    "bare loop by the call for ids alone": [4.0, 8.0],
    "ours, 1 process": [9.0, 18.0],
    "ours, 1 process, start-up": [4.0, 8.0],
    "ours, 2 processes": [5.0, 9.0],
    "ours, 2 processes, start-up": [2.5, 4.0],
    "megatron, 1 process": [21.0, 42.0],
    "megatron, 1 process, start-up": [1.0, 2.0],
    "megatron, 2 processes": [11.0, 22.0],
    "megatron, 2 processes, start-up": [1.0, 2.0],
}


def told(seconds: dict[str, list[float]]) -> Report:
    report = Report("data", {}, columns=["what", "", "", "", ""])
    tell(report, "neox", seconds, TEXT, FEW, ["megatron"], [1, 2])
    assert {len(row) for row in report.rows} == {5}
    return report


def test_rates_are_without_start_up_and_ratios_say_how_much_faster_ours_is() -> None:
    report = told(SECONDS)
    values = {name: figure.value for name, figure in report.figures.items()}
    assert values["neox: bare loop, 1 process"] == pytest.approx(1.5)  # of 2 and 1 MB/s
    assert values["neox: ours, 1 process"] == pytest.approx(1.5)
    assert values["neox: ours, 1 process, with start-up"] == pytest.approx((12 / 9 + 12 / 18) / 2)
    assert values["neox: ours / bare loop, 1"] == 1.0
    assert values["neox: ours / bare loop by the call for ids alone, 1"] == pytest.approx(2 / 3)
    assert values["neox: ours / megatron, 1"] == 4.0
    assert values["neox: ours, 2 / 1"] == 2.0
    assert values["neox: megatron, 2 / 1"] == 2.0
    assert {goal.name: (goal.limit, goal.holds) for goal in report.goals} == {
        "neox: ours / bare loop, 1": (0.9, True),
        "neox: ours, 2 / 1": (1.8, True),
        "neox: ours / megatron, 1": (1.0, True),
        "neox: ours / megatron, 2": (1.0, True),
    }


def test_a_way_without_figures_misses_its_goals() -> None:
    report = told({label: values for label, values in SECONDS.items() if not label.startswith("megatron, 2")})
    missed = [goal.name for goal in report.goals if not goal.holds]
    assert missed == ["neox: ours / megatron, 2"]


def test_a_text_that_takes_no_longer_than_the_start_up_gives_no_rate() -> None:
    report = told(SECONDS | {"ours, 1 process, start-up": [10.0, 8.0]})
    assert any("ours, 1 process: its start-up takes as long as the text" in note for note in report.notes)
    assert {goal.name for goal in report.goals if not goal.holds} == {
        "neox: ours / bare loop, 1",
        "neox: ours, 2 / 1",
        "neox: ours / megatron, 1",
    }
    assert not [text for text in (*report.notes, report.as_markdown()) if "failed" in text]


def test_a_peer_that_is_not_installed_is_noted_and_misses_its_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Way, "run", lambda self, text, _=None: run_command([sys.executable, "-m", "benchmarks.absent"])[0]
    )
    monkeypatch.setattr(data_tokenize, "loops", lambda *_, **__: lambda _: 1.0)
    report = Report("data", {})
    measure_tokenizer(
        report, "neox", tmp_path / "t.json", TEXT, FEW, ways=["absent"], processes=[1], rounds=1, scratch=tmp_path
    )
    assert any("absent, 1 process failed: ended with 1: " in note and "No module" in note for note in report.notes)
    assert [goal.name for goal in report.goals if not goal.holds] == [
        "neox: ours / bare loop, 1",
        "neox: ours / absent, 1",
    ]


def test_a_peer_that_fails_later_spoils_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[str] = []

    def run(self: Way, text: Text, _: object = None) -> float:
        runs.append(self.name)
        if self.name == "megatron" and runs.count("megatron") == 3:
            raise CommandError("the disk is full")
        return 2.0 if text is TEXT else 1.0

    monkeypatch.setattr(Way, "run", run)
    monkeypatch.setattr(data_tokenize, "loops", lambda *_, **__: lambda _: 1.0)
    report = Report("data", {})
    measure_tokenizer(
        report, "neox", tmp_path / "t", TEXT, FEW, ways=["megatron"], processes=[1], rounds=3, scratch=tmp_path
    )
    assert "neox: megatron, 1 process failed: the disk is full" in report.notes
    assert runs.count("megatron") == 3 and runs.count("ours") == 7
    assert [goal.name for goal in report.goals if not goal.holds] == [
        "neox: ours / bare loop, 1",  # 10 MB/s of 12
        "neox: ours / megatron, 1",
    ]


def test_the_synthetic_dataset_is_sound(tmp_path: Path) -> None:
    write_letters(tmp_path / "letters", 50_000)
    assert verify(tmp_path / "letters") == []
    shard, manifest = open_split(tmp_path / "letters", "train")
    assert (manifest.splits["train"].documents, shard.n_documents) == (50, 50)
    assert 20_000 < shard.n_tokens < 120_000
    assert shard.tokens(0, shard.n_tokens).tolist().count(BytesTokenizer.eod_id) == 50


def test_a_trillion_tokens_take_the_room_of_their_index_and_give_a_batch(tmp_path: Path) -> None:
    write_holes(tmp_path / "holes", 10**12, 10**8)
    assert (tmp_path / "holes" / "train.bin").stat().st_size == 2 * 10**12
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "holes").iterdir()) < 2_000_000
    assert Ours().open(str(tmp_path / "holes"), length=2048, rows=2) == 2 * 2048
    shard, _ = open_split(tmp_path / "holes", "train")
    assert shard.document_bounds(9_999) == (10**12 - 10**8, 10**12)


def test_ours_and_the_gather_read_as_many_tokens_and_the_gather_the_right_ones(tmp_path: Path) -> None:
    write_letters(tmp_path / "letters", 50_000)
    ours, gather = Ours(), Gather()
    for side in (ours, gather):
        assert side.open(str(tmp_path / "letters"), length=128, rows=4) == 512
        assert side.run(3) == 3 * 512
    tokens = np.fromfile(tmp_path / "letters" / "train.bin", np.uint16)
    start = gather.order[gather.next - 1] * 128
    inputs, labels = gather.batch
    assert (inputs[3] == tokens[start : start + 128]).all()
    assert (labels[3] == tokens[start + 1 : start + 129]).all()


def test_the_peer_takes_as_many_tokens_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_load.peer_tokens(10**6, 1000, 128, tmp_path) == 10**6
    monkeypatch.setattr(data_load, "SAMPLE_BYTES", 1 << 42)
    assert data_load.peer_tokens(10**6, 1000, 128, tmp_path) == 10_000


class Process:
    """Takes the place of a worker: half a second for ours, a second for others, and no Megatron."""

    def __init__(self, target: str, _: dict[str, Any], **__: Any) -> None:
        if "megatron" in target:
            raise WorkerError("No module named 'megatron'")
        self.seconds = 0.5 if target.endswith(":Ours") else 1.0

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, **arguments: Any) -> Answer:
        result = 20.0 if method == "own_mib" else arguments.get("count", 1) * 1024
        return Answer(result, self.seconds, 100.0, 150.0)


@pytest.fixture
def options() -> Namespace:
    return Namespace(
        rounds=2,
        corpus_tokens=[20_000, 21_000],
        lengths=[128],
        batch_tokens=[1024],
        load_tokens=4096,
        start_tokens=10**7,
        start_document=10**5,
    )


def test_without_the_peer_ours_is_still_measured_beside_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Namespace
) -> None:
    monkeypatch.setattr(data_load, "Worker", Process)
    report = Report("data", {}, columns=["what", "", "", "", ""])
    data_load.measure_loading(report, options, tmp_path)
    data_load.measure_start(report, options, tmp_path)
    assert report.figures["8 x 128: ours tokens"].value == 8192
    assert report.figures["8 x 128: ours / numpy gather"].value == 2.0
    assert report.figures["start: ours MB"].value == pytest.approx(50 * 1.048576)
    assert {goal.name: goal.holds for goal in report.goals} == {
        "8 x 128: GPTDataset tokens": False,
        "8 x 128: ours / numpy gather": True,
        "8 x 128 of 21 documents: GPTDataset tokens": False,
        "8 x 128 of 21 documents: ours / numpy gather": True,
        "start: ours s": True,
        "start: ours MB": True,
        "start: GPTDataset s": False,
    }
    assert "start: GPTDataset s: failed: No module named 'megatron'" in report.notes
    assert {len(row) for row in report.rows} == {5}


def run_script(*words: str, directory: Path) -> dict[str, Any]:
    target = directory / "data.json"
    command = [sys.executable, "-m", "benchmarks.data", "--json", str(target), "--directory", str(directory)]
    done = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## data\n\n|")
    answer: dict[str, Any] = json.loads(target.read_text())
    return answer


@pytest.mark.slow
def test_loading_starting_and_verifying(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.datasets.gpt_dataset")
    sizes = [
        "--lengths",
        "128",
        "1024",
        "--batch-tokens",
        "2048",
        "--corpus-tokens",
        "200000",
        "--load-tokens",
        "65536",
    ]
    start = ["--start-tokens", "1000000000", "--start-document", "100000", "--verify-tokens", "40000000"]
    report = run_script("--rounds", "1", "--parts", "load", "start", "verify", *sizes, *start, directory=tmp_path)
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    for rows in ("16 x 128", "2 x 1024"):
        assert {f"{rows}: {side} tokens" for side in ("ours", "numpy gather", "GPTDataset")} <= figures.keys()
        assert {f"{rows}: ours / {side}" for side in ("GPTDataset", "numpy gather, labels a view")} <= figures.keys()
    assert {
        "start: GPTDataset s",
        "start: GPTDataset MB of its own",
        "verify: sha256sum",
        "verify: ours, 2",
    } <= figures.keys()
    assert all(value is not None and value > 0 for name, value in figures.items() if "tokens" in name), figures
    assert {goal["name"] for goal in report["goals"]} == {
        "16 x 128: ours / numpy gather",
        "2 x 1024: ours / numpy gather",
        "start: ours s",
        "start: ours MB",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.slow
@pytest.mark.parametrize("peers", [("datasets", "megatron"), ("datatrove",)])
def test_tokenizing_beside_peers(tmp_path: Path, peers: tuple[str, ...]) -> None:
    """Through SentencePiece, or where a peer cannot, through a tokenizer.json made of the same text."""
    for peer in peers:
        pytest.importorskip({"megatron": "megatron.core"}.get(peer, peer))
    which = ["--tokenizers", "sentencepiece", "--pieces", "500"]
    if peers == ("datatrove",):
        which = ["--tokenizers", "neox", "--neox", str(make_tokenizer(tmp_path / "tokenizer.json"))]
    size = ["--text", "corpora/sotu.jsonl.gz", "--megabytes", "1.5"]
    report = run_script("--rounds", "1", "--parts", "tokenize", "--peers", *peers, *which, *size, directory=tmp_path)
    name = which[1]
    assert not [note for note in report["notes"] if " failed: " in note]
    expected = {f"{name}: ours / bare loop, 1", f"{name}: ours, 2 / 1"}
    for peer in peers:
        assert f"{name}: {peer}, 1 process, with start-up" in report["figures"]
        expected |= {f"{name}: ours / {peer}, {n}" for n in (1, 2)}
    assert {goal["name"] for goal in report["goals"]} == expected


def make_tokenizer(path: Path) -> Path:
    """Byte-level BPE without merges, with GPT-NeoX's end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0} | {
        piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path
