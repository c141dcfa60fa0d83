"""Builds as real processes: killed, told to end, out of disk, out of workers; and to a real S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import build_shards, merge_shards
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import Manifest
from tests.helpers.corpora import make_documents, write_jsonl

ROOT = Path(__file__).parents[2]
LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
    "from data_prep.build_shards import main; sys.exit(main(sys.argv[2:]))"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_documents(60_000))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "data"
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    return contents(output)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def arguments(corpus: Path, output: Path | str, *options: str) -> list[str]:
    return [str(corpus), "--tokenizer", "bytes", "--output", str(output), "--unit-bytes", "500000", *options]


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_build(corpus: Path, output: Path | str, *options: str) -> subprocess.Popen[str]:
    return start("-m", "data_prep.build_shards", *arguments(corpus, output, *options))


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """Workers, not multiprocessing's resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def n_parts(output: Path) -> int:
    return len(list(Path(f"{output}.work").glob("[0-9]*.json")))


def test_kills_of_the_parent_during_parts_and_merge(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "data"
    process = start_build(corpus, output, "--processes", "2")
    wait_for(lambda: n_parts(output))
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert not output.exists() and len(workers) == 2
    process = start_build(corpus, output, "--processes", "2")
    wait_for(lambda: list(output.parent.glob("data.tmp-*/train.bin")) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not output.exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    process = start_build(corpus, output, "--processes", "2")
    assert process.communicate()[1] == "" and process.returncode == 0
    assert contents(output) == expected
    assert list(output.parent.iterdir()) == [output]


def test_a_killed_worker_is_named_with_its_file_and_the_rest_goes_on(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "data"
    process = start_build(corpus, output, "--processes", "2")
    wait_for(lambda: n_parts(output) and children(process.pid))
    os.kill(children(process.pid)[0], signal.SIGKILL)
    error = process.communicate()[1]
    if process.returncode == 0:
        pytest.skip("the worker was between two parts: its death has cost nothing")
    assert process.returncode == 2 and f" parts failed:\n- {corpus} [" in error
    assert "the worker process was ended by SIGKILL (out of memory?)" in error
    assert "1 of " in error and n_parts(output) > 3
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    assert contents(output) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_build_told_to_end_keeps_its_parts_and_says_so(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out" / "data"
    process = start_build(corpus, output, "--processes", "2")
    wait_for(lambda: n_parts(output))
    process.send_signal(number)
    error = process.communicate()[1]
    kept = f"what is finished is kept in {output}.work: the same command goes on from there\n"
    expected = f"python -m data_prep.build_shards: interrupted, {kept}" if number == signal.SIGINT else kept
    assert (process.returncode, error) == (128 + number, expected)
    assert [path.name for path in output.parent.iterdir()] == ["data.work"]
    assert not any("draft" in path.name for path in Path(f"{output}.work").iterdir())


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_disk_that_fills_up_is_named_and_room_lets_it_go_on(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, processes: str
) -> None:
    output = tmp_path / "out" / "data"
    process = start("-c", LIMITED, "100000", *arguments(corpus, output, "--processes", processes))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.count("\n") == 1
    assert "the disk is full: File too large" in error and "MB are free" in error and "make room" in error
    assert list(output.parent.iterdir()) == []  # no part was finished: nothing is worth keeping
    process = start("-c", LIMITED, "3000000", *arguments(corpus, output, "--processes", processes))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert f"{output} was not written, the disk is full: File too large" in error
    assert f"what is finished is kept in {output}.work" in error
    assert [path.name for path in output.parent.iterdir()] == ["data.work"]
    n = n_parts(output)
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    assert n > 3 and contents(output) == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Of the parent and of the largest worker, for a corpus and one of four times the documents."""
    code = (
        "import resource, sys; from data_prep.build_shards import main; code = main(sys.argv[1:]);"
        "print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)));"
        "sys.exit(code)"
    )
    peaks = []
    for n in (150_000, 600_000):
        corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(n))
        process = start("-c", code, *arguments(corpus, tmp_path / f"{n}", "--processes", "2", "--unit-bytes", "4000000"))
        out, error = process.communicate()
        assert process.returncode == 0, error
        peaks.append([int(word) / 1024 for word in out.splitlines()[-1].split()])
    print(peaks)
    for small, large in zip(*peaks, strict=True):
        assert large < small + 30  # MiB; the larger corpus is 60 MB of text, 120 MB of tokens, 23 MB of rows


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket/data/pile"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_an_object_store_gets_the_same_dataset(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    process = start_build(corpus, bucket, "--processes", "2")
    wait_for(lambda: files.glob(f"{bucket}.work/*.json") and not files.invalidate_cache())
    process.kill()
    process.communicate()
    for task in ("0/2", "1/2"):
        if task == "1/2":
            assert merge_shards.main([bucket]) == 2
            assert "--task 1/2" in capsys.readouterr().err
        assert build_shards.main(arguments(corpus, bucket, "--processes", "1", "--task", task)) == 0
    files.invalidate_cache()
    assert not files.exists(bucket)
    assert merge_shards.main([bucket]) == 0
    files.invalidate_cache()
    assert not files.exists(f"{bucket}.work")
    files.get(bucket, str(tmp_path / "data"), recursive=True)
    assert contents(tmp_path / "data") == expected
    assert verify(tmp_path / "data") == []
    assert build_shards.main(arguments(corpus, bucket, "--processes", "1")) == 2
    assert f"{bucket} exists" in capsys.readouterr().err


def test_an_interrupted_upload_does_not_open(
    corpus: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert build_shards.main(arguments(corpus, bucket, "--processes", "1")) == 0
    monkeypatch.setattr("data_prep.merge._Target.publish", full)
    assert build_shards.main(arguments(corpus, bucket, "--processes", "1", "--overwrite")) == 2
    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    files.get(bucket, str(tmp_path / "data"), recursive=True)
    assert not (tmp_path / "data" / "manifest.json").exists()
    monkeypatch.undo()


def test_an_object_store_that_does_not_answer_is_one_message(
    corpus: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_shards.main(arguments(corpus, "s3://nowhere/data", "--processes", "1")) == 2
    assert "s3://nowhere/data.work: " in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert Manifest is not None
