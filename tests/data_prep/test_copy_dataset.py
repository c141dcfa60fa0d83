"""A dataset from a real S3 server to local disk: complete and right, or absent; what is broken off goes on."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tokenizers import Tokenizer, models

from data_prep import copy_dataset as module
from data_prep import fetch
from data_prep.build_shards import build
from data_prep.copy_dataset import copy_dataset
from data_prep.corpus import Corpus, split_rule
from data_prep.registries import FetchError
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.tokenizer import load_tokenizer
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.s3 import s3_server
from tests.helpers.web import web_server

URL = "s3://bucket/datasets/small"


@pytest.fixture
def s3(dataset: Path) -> Iterator[Any]:
    with s3_server():
        fsspec.config.conf.clear()
        s3 = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        s3.mkdir("bucket")
        for path in dataset.iterdir():
            s3.put_file(str(path), f"{URL}/{path.name}")
        yield s3


def test_a_dataset_on_s3_becomes_the_same_on_disk(
    s3: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 500)  # many requests, more than are under way at a time
    s3.pipe_file(f"{URL}/notes.txt", b"not in the manifest")
    output = tmp_path / "data"
    assert fetch.main([URL + "/", str(output)]) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in dataset.iterdir()
    }
    assert verify(output) == []
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "data.part").mkdir()  # as a kill right before its removal leaves it
    (tmp_path / "data.part/lock").touch()
    with (tmp_path / "data.part/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert fetch.main([URL, str(output)]) == 0
    assert (tmp_path / "data.part").exists()
    assert fetch.main([URL, str(output)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "data.part").mkdir()  # somebody else's
    assert fetch.main([URL, str(output)]) == 0
    assert (tmp_path / "data.part").exists()


def test_a_copy_that_broke_off_goes_on_inside_a_file(
    s3: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 500)
    monkeypatch.setattr(module, "REQUESTS", 1)
    asked: list[tuple[str, int]] = []

    class Breaking:
        """The file system, but the fifth request for a part of a file fails."""

        def size(self, path: str) -> int:
            return int(s3.size(path))

        def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            if start is not None:
                asked.append((Path(path).name, start))
                if len(asked) == 5:
                    raise ConnectionError("the line is down")
            return bytes(s3.cat_file(path, start=start, end=end))

    monkeypatch.setattr(module, "filesystem", lambda url: (Breaking(), url))
    output = tmp_path / "data"
    with pytest.raises(FetchError, match="the line is down.*run the command again"):
        copy_dataset(URL, output)
    assert not output.exists() and (tmp_path / "data.part").is_dir()
    name, start = asked[4]
    copy_dataset(URL, output)
    assert asked[5] == (name, start)
    assert len(asked) == len(set(asked)) + 1  # nothing is asked for twice but what failed
    assert verify(output) == []


def test_a_file_that_is_not_what_the_manifest_says_never_appears(s3: Any, tmp_path: Path) -> None:
    content = bytearray(s3.cat_file(f"{URL}/train.bin"))
    content[7] ^= 1
    s3.pipe_file(f"{URL}/train.bin", bytes(content))
    with pytest.raises(FetchError, match="train.bin has sha256"):
        copy_dataset(URL, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "data.part" / "result" / "train.bin").exists()


def test_a_dataset_that_changes_in_between_begins_anew(
    s3: Any, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bin_ = s3.cat_file(f"{URL}/train.bin")
    s3.rm(f"{URL}/train.bin")
    with pytest.raises(FetchError, match="train.bin cannot be read"):
        copy_dataset(URL, tmp_path / "data")
    s3.pipe_file(f"{URL}/train.bin", bin_)
    s3.pipe_file(f"{URL}/manifest.json", (dataset / "manifest.json").read_bytes() + b"\n")
    copy_dataset(URL, tmp_path / "data")
    assert "it begins anew" in capsys.readouterr().err
    assert verify(tmp_path / "data") == []


def test_a_manifest_cannot_name_files_elsewhere(s3: Any, tmp_path: Path) -> None:
    raw = s3.cat_file(f"{URL}/manifest.json").replace(b'"tokenizer.bytes"', b'"../tokenizer.bytes"')
    s3.pipe_file(f"{URL}/manifest.json", raw)
    with pytest.raises(FetchError, match=r"'../tokenizer.bytes', which is not one of its directory"):
        copy_dataset(URL, tmp_path / "data")


def test_a_server_without_ranges_gives_whole_files(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(module, "BLOCK_BYTES", 500)  # far less than the files have
    (tmp_path / "data.part" / "result").mkdir(parents=True)
    (tmp_path / "data.part" / "lock").touch()
    (tmp_path / "data.part" / "result" / "train.bin.begun").write_bytes((dataset / "train.bin").read_bytes()[:800])
    with web_server(dataset) as url:
        copy_dataset(url, tmp_path / "data")
    assert verify(tmp_path / "data") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_the_names_of_special_tokens_come_along(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    tokenizer = Tokenizer(models.WordLevel({"[A]": 0, "[B]": 1, "a": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["[A]", "[B]"])  # neither says that it ends a document
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(80))
    made = load_tokenizer(tmp_path / "tokenizer.json", eod="[B]")
    build(Corpus([corpus]), made, tmp_path / "made", rule=split_rule((0.75, 0.25, 0.0), 0))
    with web_server(tmp_path / "made") as url:
        copy_dataset(url, tmp_path / "data")
        assert verify(tmp_path / "data") == []
        (tmp_path / "made" / "tokenizer_config.json").unlink()
        with pytest.raises(FetchError, match="the tokenizer at .* is not what its manifest says: .* --eod"):
            copy_dataset(url, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("name", "cut", "reason"), [("train.bin", 5, "train.bin is missing or not of"), ("tokenizer.bytes", 0, "another")]
)
def test_a_finished_copy_that_has_lost_something_is_not_called_complete(
    s3: Any, tmp_path: Path, name: str, cut: int, reason: str
) -> None:
    copy_dataset(URL, tmp_path / "data")
    path = tmp_path / "data" / name
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FetchError, match=reason):
        copy_dataset(URL, tmp_path / "data")
    path.unlink()
    with pytest.raises(FetchError, match=f"{name} is missing"):
        copy_dataset(URL, tmp_path / "data")


def test_no_dataset_and_another_directory_are_said(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="there is no dataset at s3://bucket/none"):
        copy_dataset("s3://bucket/none", tmp_path / "data")
    (tmp_path / "data").mkdir()
    with pytest.raises(FetchError, match="exists and is not the dataset"):
        copy_dataset(URL, tmp_path / "data")
