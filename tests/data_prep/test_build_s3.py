"""A build whose output is at a real S3 server, moto's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs

from data_prep import build_shards, merge_shards
from data_prep.corpus import Corpus
from data_prep.plan import work_of
from data_prep.store import RemoteStore
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import MANIFEST
from tests.helpers.corpora import make_documents, write_jsonl
from tests.helpers.s3 import s3_server


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    with s3_server():
        name = request.node.name.replace("_", "-")[:60]
        s3fs.S3FileSystem().mkdir(name)
        yield f"s3://{name}/data/pile"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", make_documents(3000))


def build(corpus: Path, output: Path | str, *options: str, processes: str = "1") -> int:
    options = ("--unit-bytes", "100000", "--processes", processes, *options)
    return build_shards.main([str(corpus), "--tokenizer", "bytes", "--output", str(output), *options])


def listed(url: str) -> set[str]:
    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    return {path.rpartition("/")[2] for path in files.glob(f"{url}/*")}


def fetched(url: str, directory: Path) -> dict[str, bytes]:
    s3fs.S3FileSystem().get(url, str(directory), recursive=True)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
def test_one_run_with_workers_uploads_the_same_dataset(corpus: Path, bucket: str, tmp_path: Path) -> None:
    assert build(corpus, tmp_path / "local") == 0
    assert build(corpus, bucket, processes="2") == 0
    assert listed(f"{bucket}.work") == set()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert fetched(bucket, tmp_path / "data") == expected
    assert verify(tmp_path / "data") == []


@pytest.mark.slow
def test_tasks_leave_parts_and_the_merge_takes_them(
    corpus: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(corpus, tmp_path / "local") == 0
    assert build(corpus, bucket, "--task", "1/2") == 0
    assert {"plan.json", "000001.json", "000001.tokens", "000001.documents"} <= listed(f"{bucket}.work")
    assert merge_shards.main([bucket]) == 2
    assert "--task 0/2" in capsys.readouterr().err and listed(bucket) == set()
    assert build(corpus, bucket, "--task", "0/2") == 0
    assert merge_shards.main([bucket]) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert fetched(bucket, tmp_path / "data") == expected
    assert build(corpus, bucket) == 2
    assert f"{bucket} exists" in capsys.readouterr().err


def test_drafts_of_killed_processes_do_not_stay_on_this_machine(
    corpus: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    draft = work_of(bucket).draft("000001.tokens")
    ours, others = draft.with_name(draft.name.replace(str(os.getpid()), str(gone.pid))), tmp_path / "000001.tokens"
    another = work_of(f"{bucket}-2").draft("000001.tokens")
    another = another.with_name(another.name.replace(str(os.getpid()), str(gone.pid)))
    for path in (ours, others, another):
        path.touch()
    assert build(corpus, bucket) == 0
    assert [path.exists() for path in (ours, others, another)] == [False, True, True]


def test_an_interrupted_upload_does_not_open_and_goes_on(
    corpus: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, iterdir = RemoteStore.write, Path.iterdir

    def cut(self: RemoteStore, name: str, content: bytes) -> None:
        if str(self) == bucket and name.startswith("tokenizer"):
            raise OSError(5, "the line is cut")
        write(self, name, content)

    assert build(corpus, bucket) == 0
    before = listed(bucket)
    with monkeypatch.context() as patched:
        patched.setattr(RemoteStore, "write", cut)
        patched.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self))))  # one of the orders it may have
        assert build(corpus, bucket, "--overwrite") == 2
    assert "the line is cut\nwhat is finished is kept in" in capsys.readouterr().err
    assert MANIFEST in before and MANIFEST not in listed(bucket)
    assert build(corpus, bucket, "--overwrite") == 0
    assert listed(bucket) == before


@pytest.mark.slow
def test_a_remote_input_is_fetched_about_once_however_it_is_divided(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"document {i}\n\n" for i in range(400_000))
    with fsspec.open(f"{bucket}/a.txt", "w") as stream:
        stream.write(text)
    n_bytes, fetch = [0], s3fs.S3File._fetch_range

    def counted(self: object, start: int, end: int) -> bytes:
        found: bytes = fetch(self, start, end)
        n_bytes[0] += len(found)
        return found

    monkeypatch.setattr(s3fs.S3File, "_fetch_range", counted)
    corpus = Corpus([f"{bucket}/a.txt"], txt_documents="line")
    units = corpus.units(1 << 20)
    assert sum(1 for unit in units for _ in corpus.records(unit)) == 400_000 and len(units) > 5
    assert n_bytes[0] < 1.5 * len(text)


@pytest.mark.slow
def test_a_merge_that_is_given_up_leaves_one_message_and_no_object(bucket: str, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["", ""])
    words = ["data_prep.build_shards", str(corpus), "--tokenizer", "bytes", "--output", bucket]
    ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "no documents in the input (1 files): 2 records are empty" in ended.stderr
    assert listed(bucket) == set()


def test_a_bucket_that_is_not_there_is_one_message(
    corpus: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(corpus, "s3://nowhere/data") == 2
    error = capsys.readouterr().err
    assert "s3://nowhere/data" in error and error.count("\n") == 1
