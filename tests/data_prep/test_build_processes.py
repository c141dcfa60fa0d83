"""Builds as real processes: killed, told to end, out of disk, out of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import build_shards
from mamba_pretrain.data import encodings
from mamba_pretrain.data.manifest import Manifest
from tests.helpers.builds import contents
from tests.helpers.corpora import make_documents, write_jsonl

ROOT = Path(__file__).parents[2]
LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
    "from data_prep.build_shards import main; sys.exit(main(sys.argv[2:]))"
)
AFTER_A_PART = "from data_prep.progress import Meter as owner; name = 'finish'"
WITHIN_THE_MERGE = "from data_prep import merge as owner; name = '_copy'"
PAUSING = """
import os, signal, sys
from data_prep.build_shards import main
{}
old = getattr(owner, name)
def pausing(*arguments):
    result = old(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
    return result
setattr(owner, name, pausing)
sys.exit(main(sys.argv[1:]))
"""
MORTAL = (
    "import functools, sys; from pathlib import Path; from data_prep import build_shards;"
    "from tests.helpers import builds;"
    "build_shards._worker = functools.partial(builds.mortal_worker, Path(sys.argv[1]));"
    "sys.exit(build_shards.main(sys.argv[2:]))"
)
MEASURED = (
    "import json, re, resource, sys; from pathlib import Path; from data_prep import build_shards, duplicates;"
    "from mamba_pretrain.data import writer;"
    "duplicates.BLOCK_BYTES = writer.BLOCK_BYTES = int(sys.argv[1]); code = build_shards.main(sys.argv[2:]);"
    "own = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1];"
    "print(json.dumps({'parent': int(own), 'worker': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}));"
    "sys.exit(code)"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_documents(60_000))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "data"
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    return contents(output)


def arguments(corpus: Path, output: Path | str, *options: str) -> list[str]:
    return [str(corpus), "--tokenizer", "bytes", "--output", str(output), "--unit-bytes", "500000", *options]


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_build(corpus: Path, output: Path | str, *options: str) -> subprocess.Popen[str]:
    return start("-m", "data_prep.build_shards", *arguments(corpus, output, *options))


def start_pausing(after: str, corpus: Path, output: Path) -> subprocess.Popen[str]:
    """A build that has stopped itself there for the first time, and stays so until it is sent SIGCONT or SIGKILL."""
    process = start("-c", PAUSING.format(after), *arguments(corpus, output, "--processes", "2"))
    state = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] in "TZ")
    assert process.poll() is None, process.communicate()
    return process


def start_mortal(corpus: Path, output: Path, died: Path, *options: str) -> subprocess.Popen[str]:
    """A build of which one worker is killed at a part, once; then there is the file `died`."""
    return start("-c", MORTAL, str(died), *arguments(corpus, output, "--processes", "2", *options))


def wait_for(condition: Callable[[], object], timeout_s: float = 300) -> None:
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


@pytest.mark.slow
def test_kills_of_the_parent_during_parts_and_merge(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out" / "data"
    process = start_pausing(AFTER_A_PART, corpus, output)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert n_parts(output) and not output.exists() and len(workers) == 2
    process = start_pausing(WITHIN_THE_MERGE, corpus, output)
    process.kill()
    process.communicate()
    assert list(output.parent.glob("data.tmp-*/train.bin")) and not output.exists()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    process = start_build(corpus, output, "--processes", "2")
    assert process.communicate()[1] == "" and process.returncode == 0
    assert contents(output) == expected
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.slow
def test_a_killed_worker_is_named_with_its_file_and_the_rest_goes_on(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "data"
    process = start_mortal(corpus, output, tmp_path / "died")
    error = process.communicate()[1]
    assert process.returncode == 2 and f" parts failed:\n- {corpus} [" in error
    assert "the worker process was ended by SIGKILL (out of memory?)" in error
    n = len(json.loads(Path(f"{output}.work/plan.json").read_text())["parts"])
    assert f"1 of {n} parts failed" in error and n_parts(output) == n - 1 > 3
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    assert contents(output) == expected


@pytest.mark.slow
def test_the_input_of_a_killed_worker_is_read_again_before_it_is_left_out(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output, died = tmp_path / "data", tmp_path / "died"
    process = start_mortal(corpus, output, died, "--on-error", "skip-files")
    process.communicate()
    assert died.exists() and process.returncode == 0
    assert Manifest.read(output).selection.left_out == []
    found = contents(output)
    assert found.pop("manifest.json") and found == {k: v for k, v in expected.items() if k != "manifest.json"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_build_told_to_end_keeps_its_parts(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out" / "data"
    process = start_pausing(AFTER_A_PART, corpus, output)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
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
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and error.count("\n") == 1
    assert "the disk is full: File too large" in error and "MB are free" in error and "make room" in error
    assert list(output.parent.iterdir()) == []  # no part was finished: nothing is worth keeping
    process = start("-c", LIMITED, "3000000", *arguments(corpus, output, "--processes", processes))
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert f"{output} was not written, the disk is full: File too large" in error
    assert f"what is finished is kept in {output}.work" in error
    assert [path.name for path in output.parent.iterdir()] == ["data.work"]
    n = n_parts(output)
    assert build_shards.main(arguments(corpus, output, "--processes", "1")) == 0
    assert n > 3 and contents(output) == expected


def test_the_slurm_script_makes_parts_of_its_task(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(300))
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "slurm/prep_array.sbatch", str(tmp_path / "data"), str(corpus), "--tokenizer", "bytes"]
    options = {"cwd": ROOT, "text": True, "capture_output": True, "env": {**os.environ, **slurm, "PATH": path}}
    found = subprocess.run([*command, "--unit-bytes", "5000"], **options)  # type: ignore[call-overload]
    assert found.returncode == 0, found.stderr
    made = {part.stem for part in (tmp_path / "data.work").glob("[0-9]*.json")}
    planned = len(json.loads((tmp_path / "data.work/plan.json").read_text())["parts"])
    assert planned >= 4
    assert "task 1/2: its " in found.stdout
    assert made == {f"{part:06d}" for part in range(1, planned, 2)}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Of the parent and of the largest worker, for a corpus and one of four times the documents.

    The larger corpus is 60 MB of text, 120 MB of tokens, 23 MB of rows. With blocks of 16 MiB, as they are, sorting its
    hashes (14 MB, one bucket) raises the parent's peak by 36 MiB. Other growth could hide behind that of the sort, so a
    second build has blocks of 256 KiB, 55 buckets: there the peak rises by 2 MiB, on a busy machine, where reports of
    the workers wait for the parent, by up to 6. Workers' rise by less than 0.4. What the bounds leave, 10 to 14 MiB, is
    24 to 33 bytes for each of the 450,000 documents.
    """
    encodings.compiled()  # else a compiler may be among the children
    peaks: dict[int, list[dict[str, float]]] = {1 << 24: [], 1 << 18: []}
    for n in (150_000, 600_000):
        corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(n))
        for block_bytes, found in peaks.items():
            output = tmp_path / f"{n}-{block_bytes}"
            words = arguments(corpus, output, "--processes", "2", "--unit-bytes", "4000000")
            process = start("-c", MEASURED, str(block_bytes), *words)
            printed, error = process.communicate()
            assert process.returncode == 0, error
            found.append({role: kib / 1024 for role, kib in json.loads(printed.splitlines()[-1]).items()})
    print(peaks)
    for block_bytes, growth in ((1 << 24, 50), (1 << 18, 16)):
        small, large = peaks[block_bytes]
        assert large["parent"] < small["parent"] + growth
        assert 0 < large["worker"] < small["worker"] + 10
