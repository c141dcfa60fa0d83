"""Cleaning with the real datatrove: planted junk and near duplicates go and say why; a run that was interrupted, killed
or lost a worker goes on.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from data_prep import build_shards, clean, clean_steps, pool
from mamba_pretrain.data.manifest import Manifest
from tests.helpers.corpora import write_jsonl

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0  # of what takes a few seconds on an idle machine
RNG = random.Random(0)
WORDS = ["river", "stone", "carries", "ancient", "window", "morning", "garden", "letter", "quiet", "journey", "harbor"]
WORDS += [a + b for a in WORDS[:8] for b in ("s", "like", "less", "ward")]


def sentence() -> str:
    return "The " + " ".join(RNG.choices([*WORDS, "of", "and", "to", "with"], k=RNG.randint(9, 15))) + "."


GOOD = ["\n".join(" ".join(sentence() for _ in range(3)) for _ in range(5)) for _ in range(12)]
NEAR = GOOD[3].replace(GOOD[3].split()[7], "changed", 1) + " One more sentence."
JUNK = {
    "short": "Far too short, for it has fewer words than the page of any decent book would need to be worth a look, "
    "and yet none of its words comes twice near enough that some other filter might take offence with them first.",
    "repeated": "Buy now and save the money of the day.\n" * 40,
    "code": GOOD[0][:200] + "\n" + "function () { return 1; }.\n" + "\n".join(sentence() for _ in range(8)),
}
FILTERS = ["--filters", "gopher-repetition", "gopher-quality", "c4-fineweb"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three formats; the near duplicate is in another file than what it repeats."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    (directory / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*GOOD[:6], "", *JUNK.values()])
    )
    with gzip.open(directory / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in [*GOOD[6:11], NEAR])
    (directory / "c.txt").write_text(GOOD[11])
    return directory


def documents(directory: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(directory.glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def run_clean(corpus: Path, output: Path, *options: str) -> int:
    return clean.main([str(corpus), "--output", str(output), "--workers", "1", *options])


def test_junk_and_near_duplicates_go_and_say_why(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "clean"
    assert run_clean(corpus, output, *FILTERS, "--minhash") == 0
    kept = {document["text"] for document in documents(output / "kept")}
    assert kept - {NEAR, GOOD[3]} == set(GOOD) - {GOOD[3]}
    assert len(kept & {NEAR, GOOD[3]}) == 1
    assert "clean.part" not in json.dumps(documents(output / "kept"))
    removed = {stage.name: documents(stage) for stage in (output / "removed").iterdir()}
    assert {stage: len(found) for stage, found in removed.items()} == {
        "gopher-repetition": 1,
        "gopher-quality": 1,
        "c4-fineweb": 1,
        "minhash": 1,
    }
    assert removed["gopher-quality"][0]["metadata"]["filter_reason"] == "gopher_short_doc"
    assert removed["gopher-quality"][0]["id"] == f"{corpus / 'a.jsonl'}:8"
    assert removed["c4-fineweb"][0]["metadata"]["filter_reason"] == "curly_bracket"
    report = json.loads((output / "report.json").read_text())
    reader = report["stages"]["filters"]["READER: corpus"]
    assert (reader["documents"], reader["empty"], reader["invalid"]) == (16, 1, 0)
    assert [step["dropped"] for step in report["stages"]["minhash"].values() if "dropped" in step] == [1]
    table = capsys.readouterr().out
    assert "gopher_short_doc" in table and "curly_bracket" in table
    assert not (tmp_path / "clean.part").exists()

    options = ["--tokenizer", "bytes", "--output", str(tmp_path / "data"), "--split-fractions", "1", "0", "0"]
    assert build_shards.main([str(output / "kept"), *options]) == 0
    assert Manifest.read(tmp_path / "data").splits["train"].documents == 12


def test_an_input_that_is_left_out_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = corpus / "b.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    output = tmp_path / "clean"
    assert run_clean(corpus, output, *FILTERS, "--on-error", "skip-files") == 0
    said = f"left out, it could not be read: {damaged} is damaged"
    assert said in capsys.readouterr().out
    reader = json.loads((output / "report.json").read_text())["stages"]["filters"]["READER: corpus"]
    assert [count for name, count in reader.items() if name.startswith(said)] == [1]


def test_an_interrupted_run_goes_on_with_what_is_not_complete(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "b2.jsonl").write_text("{broken\n")
    output, part = tmp_path / "clean", tmp_path / "clean.part"
    assert run_clean(corpus, output, *FILTERS, "--minhash") == 2
    assert "b2.jsonl:1: not JSON" in capsys.readouterr().err
    assert not output.exists()
    completed = part / "result" / "logs" / "filters" / "completions"
    assert [path.name for path in sorted(completed.iterdir())] == ["00000", "00001"]

    assert run_clean(corpus, output, "--filters", "gopher-quality", "--minhash") == 2
    assert "with other filters" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in (part / "filtered").iterdir()}
    (corpus / "b2.jsonl").write_text(" " * len("{broken") + "\n")
    seen: list[str] = []
    counts = clean._counts
    monkeypatch.setattr(
        clean,
        "_counts",
        lambda *a: seen.extend(p.name for p, t in written.items() if p.stat().st_mtime_ns == t) or counts(*a),
    )
    assert run_clean(corpus, output, *FILTERS, "--minhash") == 0
    assert len(seen) == len(written)  # the tasks that were complete did not run again
    report = json.loads((output / "report.json").read_text())
    assert report["stages"]["filters"]["READER: corpus"]["documents"] == 16  # of both runs
    assert len(documents(output / "kept")) == 12


def test_filters_alone_leave_duplicates_in_place(corpus: Path, tmp_path: Path) -> None:
    assert run_clean(corpus, tmp_path / "clean", "--filters", "gopher-quality") == 0
    assert len(documents(tmp_path / "clean" / "kept")) == 15
    assert not (tmp_path / "clean" / "logs" / "minhash").exists()


@pytest.mark.parametrize("name", clean.NAMES)
def test_every_filter_runs_without_a_network_or_a_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert set(clean_steps.FILTERS) == set(clean.NAMES)
    step = clean_steps.FILTERS[name](None)
    texts = [*GOOD, *JUNK.values()]
    assert 0 < len(list(step.run(Document(text=text, id=str(i)) for i, text in enumerate(texts)))) < len(texts)


@pytest.mark.slow
def test_two_workers_and_byte_ranges_give_what_one_gives(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_clean(corpus, tmp_path / "one", *FILTERS) == 0
    units = clean.Corpus.units
    monkeypatch.setattr(clean.Corpus, "units", lambda self: units(self, 2000))
    assert run_clean(corpus, tmp_path / "two", *FILTERS, "--workers", "2") == 0
    assert len(list((tmp_path / "two" / "kept").iterdir())) > 3
    texts = [[document["text"] for document in documents(tmp_path / name / "kept")] for name in ("one", "two")]
    assert texts[0] == texts[1]


@contextlib.contextmanager
def command(corpus: Path, output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, by which its processes are known however they were started; they end with the block."""
    arguments = [sys.executable, "-m", "data_prep.clean", str(corpus), "--output", str(output), "--workers", "2"]
    with output.with_suffix(".stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [*arguments, *options], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def processes_of(session: int) -> dict[int, str]:
    """Process ids and states, T for a stopped one; without zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, of = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found[int(path.name)] = state
    return found


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def stop_in_a_task(session: int, logs: Path) -> tuple[int, int] | None:
    """The process id of a worker, stopped while it does a task, and the task: the log it has open says which."""
    for pid in processes_of(session):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended, or the file was closed
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                log = fd.readlink()
                if log.parent == logs / "logs":
                    os.kill(pid, signal.SIGSTOP)
                    wait_for(lambda pid=pid: processes_of(session).get(pid, "T") == "T")
                    task = log.stem.removeprefix("task_")
                    if os.path.realpath(fd) == str(log) and not (logs / "completions" / task).exists():
                        return pid, int(task)
                    os.kill(pid, signal.SIGCONT)
    return None


def contents(output: Path) -> dict[str, bytes]:
    """Uncompressed: gzip writes the time down."""
    return {
        str(path.relative_to(output)): gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and "logs" not in path.relative_to(output).parts
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each of 12 tasks, and near duplicates across files."""
    directory = tmp_path_factory.mktemp("large")
    for i in range(12):
        texts = ["\n".join(" ".join(sentence() for _ in range(3)) for _ in range(30)) for _ in range(12)]
        write_jsonl(directory / f"{i:02}.jsonl", [*texts, f"{GOOD[3]} {sentence()}", *JUNK.values()])
    return directory


@pytest.fixture(scope="module")
def undisturbed(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "clean"
    assert run_clean(large, output, *FILTERS, "--minhash") == 0
    return contents(output)


@pytest.mark.slow
def test_a_kill_leaves_no_process_and_the_same_command_goes_on(
    large: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output, logs = tmp_path / "clean", tmp_path / "clean.part" / "result" / "logs" / "filters"
    with command(large, output, *FILTERS, "--minhash") as killed:
        worker, _ = wait_for(lambda: stop_in_a_task(killed.pid, logs))
        wait_for(lambda: list(logs.glob("completions/*")))
        killed.kill()
        killed.wait()
        os.kill(worker, signal.SIGCONT)
        complete = {path.name: (logs / f"stats/{path.name}.json").stat() for path in logs.glob("completions/*")}
        with command(large, output, *FILTERS, "--minhash") as again:
            again.wait(DEADLINE_S)
            assert again.returncode == 0, output.with_suffix(".stderr").read_text()
            wait_for(lambda: not processes_of(again.pid))
        wait_for(lambda: not processes_of(killed.pid))
    stats = {name: output / f"logs/filters/stats/{name}.json" for name in complete}
    assert {name: path.stat().st_mtime_ns for name, path in stats.items()} == {
        name: found.st_mtime_ns for name, found in complete.items()
    }
    assert contents(output) == undisturbed
    assert not (tmp_path / "clean.part").exists()


@pytest.mark.slow
def test_a_killed_worker_is_named_with_its_task_and_the_same_command_goes_on(
    large: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output, logs = tmp_path / "clean", tmp_path / "clean.part" / "result" / "logs" / "filters"
    with command(large, output, *FILTERS, "--minhash") as process:
        worker, task = wait_for(lambda: stop_in_a_task(process.pid, logs))
        os.kill(worker, signal.SIGKILL)
        process.wait(DEADLINE_S)
        wait_for(lambda: not processes_of(process.pid))
    assert process.returncode == 2
    said = (
        f"error: 1 of the 12 tasks of the stage filters failed:\n- task {task} ({large}/{task:02}.jsonl): the worker "
        "process was ended by SIGKILL (out of memory?)\ncomplete tasks are kept: start the same command again, and it "
        "does the others alone, with fewer --workers than 2 if memory was short\n"
    )
    assert output.with_suffix(".stderr").read_text().endswith(said)
    assert {path.name for path in logs.glob("completions/*")} == {f"{i:05d}" for i in range(12) if i != task}
    assert run_clean(large, output, *FILTERS, "--minhash") == 0
    assert contents(output) == undisturbed


def test_what_stops_a_task_in_a_worker_stops_the_command(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "b2.jsonl").write_text("{broken\n")
    assert run_clean(corpus, tmp_path / "clean", *FILTERS, "--workers", "2") == 2
    assert "error: " + str(corpus / "b2.jsonl:1: not JSON") in capsys.readouterr().err


def test_workers_that_do_not_start_are_told_with_the_tasks_that_failed_before(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[tuple[int, pool.Failure]]()

    def run(*_: object) -> Iterator[tuple[int, pool.Failure]]:
        yield from ended
        raise pool.WorkerError("3 workers did not start")

    monkeypatch.setattr(pool, "run", run)
    for failed in ("", "1 of the 3 tasks of the stage filters failed:\n- task 1 ("):
        assert run_clean(corpus, tmp_path / "clean", *FILTERS, "--tasks", "3", "--workers", "2") == 2
        error = capsys.readouterr().err
        assert (
            f"error: {failed}" in error and "\n" * bool(failed) + "the stage filters: 3 workers did not start" in error
        )
        assert "0 of the" not in error
        ended.append((1, pool.Failure("gone", died=True)))


def test_what_cannot_be_done_is_said(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_clean(corpus, tmp_path / "clean") == 2
    assert "give --filters, --minhash or both" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("Too short.")
    assert run_clean(tmp_path / "short.txt", tmp_path / "clean", *FILTERS) == 2
    assert "no document passed the filters" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


def test_without_datatrove_the_extra_is_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(clean.sys.modules, "data_prep.clean_steps", None)
    assert run_clean(corpus, tmp_path / "clean", *FILTERS) == 2
    assert "pip install 'mamba-pretrain[clean]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tasks", "--workers", "--buckets", "--hashes", "--ngram"])
def test_none_of_something_is_said_at_once(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["a"])
    assert clean.main([str(corpus), "--output", str(tmp_path / "out"), "--minhash", option, "0"]) == 2
    assert f"{option} 0: expected 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [corpus]
