"""A build in parts: however it is divided, interrupted and continued, it ends in the same bytes."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import build_shards, merge_shards, parts, pool
from data_prep.build_shards import build
from data_prep.corpus import Corpus, split_rule
from data_prep.plan import work_of
from data_prep.streams import CorpusError
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import BytesTokenizer, Ids
from tests.helpers.builds import command, contents, several_inputs
from tests.helpers.corpora import make_documents, write_jsonl

RULE = split_rule((0.7, 0.2, 0.1), seed=0)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return several_inputs(tmp_path)


def make(inputs: list[Path], output: Path, **options: Any) -> Manifest:
    corpus = Corpus(inputs, on_error=options.pop("on_error", "stop"))
    return build(corpus, BytesTokenizer(), output, rule=RULE, **{"unit_bytes": 4000, **options})


def test_processes_and_units_do_not_change_a_byte(inputs: list[Path], tmp_path: Path) -> None:
    make(inputs, tmp_path / "one", unit_bytes=1 << 20)
    expected = contents(tmp_path / "one")
    for name, options in {"small": {"unit_bytes": 700}, "two": {"processes": 2}}.items():
        make(inputs, tmp_path / name, **options)
        assert contents(tmp_path / name) == expected
        assert not work_of(tmp_path / name).names()
    assert verify(tmp_path / "one") == []
    assert Manifest.read(tmp_path / "one").selection.duplicates == 305


def test_the_manifest_names_what_decides_the_content(inputs: list[Path], tmp_path: Path) -> None:
    assert command(inputs[:1], tmp_path / "data", "--drop-duplicates", "--processes", "1") == 0
    expected = f"python -m data_prep.build_shards {inputs[0]} --tokenizer bytes --split-fractions 0.7 0.2 0.1"
    assert Manifest.read(tmp_path / "data").command == [*expected.split(), "--drop-duplicates"]


@pytest.mark.slow
def test_a_kill_at_any_touch_of_the_disk_loses_nothing(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process kills itself at its k-th operation on a file below `out`, for every k, and is started again."""
    make(inputs[1:], tmp_path / "whole")
    expected, k = contents(tmp_path / "whole"), 0
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill does not lose what the system has taken; saves most time
    code = 0
    while code == 0:
        k += 1
        output = tmp_path / "out" / str(k) / "data"
        if (child := os.fork()) == 0:
            die_at(k, str(output.parent))
            make(inputs[1:], output)
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status) + signal.SIGKILL
        if output.exists():  # nothing opens that is not whole
            assert contents(output) == expected
        make(inputs[1:], output, overwrite=output.exists())
        assert contents(output) == expected
        assert list(output.parent.iterdir()) == [output]
    assert code == signal.SIGKILL + 1 and k > 60


def die_at(k: int, below: str) -> None:
    left = [k]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.")) and any(below in str(argument) for argument in arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_finished_parts_are_not_done_again(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(inputs, tmp_path / "whole")
    done: list[int] = []

    def spy(task: parts.Task, *arguments: Any, **options: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(task.part)
        return parts.write_part(task, *arguments, **options)

    monkeypatch.setattr(build_shards, "write_part", spy)
    with pytest.raises(KeyboardInterrupt, match=r"what is finished is kept in .*data.work: the same command goes on"):
        make(inputs, tmp_path / "data")
    first = list(done)
    done[:] = []
    with pytest.raises(KeyboardInterrupt):
        make(inputs, tmp_path / "data")
    monkeypatch.setattr(build_shards, "write_part", parts.write_part)
    make(inputs, tmp_path / "data")
    assert not set(first) & set(done)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_bad_file_fails_alone_and_may_be_left_out_later(
    inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, bad = tmp_path / "data", inputs[1]
    bad.write_bytes(bad.read_bytes()[:-100])
    with inputs[3].open("a") as stream:
        stream.write("{bad\n")
    assert command(inputs, output, "--processes", "1") == 2
    error = capsys.readouterr().err
    assert "parts failed:" in error and "b.jsonl.gz is damaged" in error and "c1.jsonl:2: not JSON" in error
    assert "start the same command again, and these alone are done again" in error
    assert "what is finished is kept in" in error and not output.exists()
    assert command(inputs, output, "--processes", "1", "--on-error", "skip") == 2
    assert "1 of " in (error := capsys.readouterr().err) and "c1.jsonl" not in error
    assert command(inputs, output, "--processes", "1") == 2  # a part from which a record was left out does not do
    assert "c1.jsonl:2: not JSON" in capsys.readouterr().err
    assert command(inputs, output, "--processes", "1", "--on-error", "skip-files") == 0
    manifest = Manifest.read(output)
    (left_out,) = manifest.selection.left_out
    assert left_out.startswith(f"{bad} is damaged after line") and manifest.skipped_records == 1
    assert sum(info.documents for info in manifest.splits.values()) == 405  # nothing of the damaged file
    assert f"left out: {bad}" in capsys.readouterr().out
    assert command(inputs, tmp_path / "again", "--processes", "2", "--on-error", "skip-files") == 0
    assert contents(tmp_path / "again") == contents(output)


def failing_at_part_1(failures: list[pool.Failure]) -> Callable[..., Iterator[Any]]:
    """pool.run, but in this process, and the next starts of part 1 end in these failures, the last first."""

    def run(tasks: deque[parts.Task], _: int, __: object, made_of: tuple[Any, ...], report: Any) -> Iterator[Any]:
        options = dict(zip(("corpus", "plan", "store"), made_of, strict=True))
        ready = build_shards._encodings(options["store"], options["plan"])
        while tasks:
            if (task := tasks.popleft()).part == 1 and failures:
                yield task, failures.pop()
            else:
                yield task, parts.write_part(task, partial(report, task), encodings=ready, **options)

    return run


@pytest.mark.parametrize(("deaths", "begun"), [(1, False), (2, False), (2, True)])
def test_an_input_is_left_out_once_two_workers_died_at_it(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, begun: bool
) -> None:
    """One may have been killed for another's sake, or by hand. The last part that is missing has a worker, too."""
    make(inputs, tmp_path / "all")
    died = "the worker process was ended by SIGKILL (out of memory?)"
    failures = [pool.Failure(died)] * (deaths + begun)
    monkeypatch.setattr(pool, "run", failing_at_part_1(failures))
    if begun:
        with pytest.raises(ShardError, match=re.escape(died)):
            make(inputs, tmp_path / "data", processes=2)
    make(inputs, tmp_path / "data", processes=2, on_error="skip-files")
    assert not failures
    if deaths == 1:
        assert contents(tmp_path / "data") == contents(tmp_path / "all")
    else:
        (left_out,) = Manifest.read(tmp_path / "data").selection.left_out
        assert left_out.startswith(str(inputs[0])) and left_out.endswith(f": {died}, and another one before")


def test_an_unexpected_error_of_a_worker_leaves_nothing_out(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [pool.Failure("unexpected error", died=False)] * 2
    monkeypatch.setattr(pool, "run", failing_at_part_1(failures))
    with pytest.raises(ShardError, match="1 of .* parts failed:\n.*unexpected error"):
        make(inputs, tmp_path / "data", processes=2, on_error="skip-files")
    assert len(failures) == 1


def test_empty_files_are_named(inputs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = [tmp_path / name for name in ("x.jsonl", "y.fa")]
    for path in empty:
        path.touch()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "z.jsonl").symlink_to("nowhere")
    every = [*inputs, *empty, tmp_path / "dangling"]
    assert command(every, tmp_path / "data", "--processes", "1", "--on-error", "skip-files") == 0
    assert caplog.messages == [f"2 inputs are empty: {empty[0]}, {empty[1]}"]  # the third cannot be read


@pytest.mark.parametrize(
    ("batch_documents", "buffer_bytes"),
    [(2, 1), (2, parts.BUFFER_BYTES), (parts.BATCH_DOCUMENTS, parts.BUFFER_BYTES)],
    ids=["written", "tokenized", "read"],  # by the time it ends early
)
def test_nothing_stays_of_a_damaged_file_among_good_ones(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_documents: int, buffer_bytes: int
) -> None:
    monkeypatch.setattr(parts, "BATCH_DOCUMENTS", batch_documents)
    monkeypatch.setattr(parts, "BUFFER_BYTES", buffer_bytes)
    _, damaged, *good = inputs
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    make([good[0], damaged, *good[1:]], tmp_path / "data", unit_bytes=1 << 20, on_error="skip-files")
    make(good, tmp_path / "good")
    (left_out,) = Manifest.read(tmp_path / "data").selection.left_out
    assert left_out.startswith(f"{damaged} is damaged after line ") and "after line 0" not in left_out
    for name in ("train.bin", "train.idx", "validation.bin"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_bytes": 5}, "min_bytes was 0, is 5"),
        ({"unit_bytes": 5000}, "unit_bytes was 4000, is 5000"),
        ({"add_bos": False}, "adds_bos was True, is False"),
        ({"rule": split_rule((1, 0, 0), 0)}, "split_rule was .* is "),
        ({"inputs": 3}, r"c1.jsonl was \d+ bytes, is not there; .* and 1 other inputs"),
    ],
)
def test_parts_of_another_build_are_refused_by_what_differs(
    inputs: list[Path], tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_shards, "merge", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(inputs, tmp_path / "data")
    chosen = inputs[: change.pop("inputs", len(inputs))]
    with pytest.raises(ShardError, match=rf"parts of another build with this output: .*{message}.*[Ff]inish that one"):
        build(Corpus(chosen), BytesTokenizer(), tmp_path / "data", **{"rule": RULE, "unit_bytes": 4000, **change})


def test_a_second_run_on_one_output_is_told_who_has_it(inputs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "data"
    with work_of(output).lock("run.lock"):
        with pytest.raises(ShardError, match=rf"in use by another run \(process {os.getpid()} on .* run.lock"):
            make(inputs, output)
        with pytest.raises(ShardError, match="in use by another run"):
            build_shards.build_task(Corpus(inputs), BytesTokenizer(), output, task=(0, 2), processes=1, rule=RULE)
    with work_of(output).lock("run.lock", shared=True), work_of(output).lock("task-0-of-2.lock"):
        assert command(inputs, output, "--task", "0/2", "--processes", "1") == 2
        assert command(inputs, output, "--task", "1/2", "--processes", "1") == 0
        assert merge_shards.main([str(output)]) == 2
    assert not output.exists()


def test_two_runs_at_the_same_time_make_one_dataset(inputs: list[Path], tmp_path: Path) -> None:
    codes: list[int] = []

    def run() -> None:
        try:
            make(inputs, tmp_path / "data")
            codes.append(0)
        except ShardError as error:
            assert "in use by another run" in str(error) or "exists" in str(error)
            codes.append(2)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [0, 2]
    assert verify(tmp_path / "data") == []


def test_duplicates_and_bounds(tmp_path: Path) -> None:
    documents = ["one", "two", "one", "\u00e9" * 10, "x", "two", "one", "three"]
    first, second = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "b.jsonl", ["three", "four"])
    options: dict[str, Any] = {"rule": split_rule((1, 0, 0), 0), "unit_bytes": 20, "min_bytes": 2, "max_bytes": 19}
    corpus, found = Corpus([first, second]), {}
    for drop in (False, True):
        output = tmp_path / f"{drop}"
        manifest = build(corpus, BytesTokenizer(), output, drop_duplicates=drop, **options)
        selection, info = manifest.selection, manifest.splits["train"]
        assert (selection.duplicates, selection.duplicates_dropped) == (4, drop)
        assert (selection.min_bytes, selection.max_bytes) == (2, 19)
        assert (selection.too_short, selection.too_long) == (1, 1)
        tokens = (output / "train.bin").read_bytes()[::2].replace(b"\0\0", b" ").decode()
        found[drop] = tokens.strip("\0").split(), info.documents, info.text_bytes, info.words
        assert verify(output) == []
    assert found == {
        False: (["one", "two", "one", "two", "one", "three", "three", "four"], 8, 29, 8),
        True: (["one", "two", "three", "four"], 4, 15, 4),
    }
    with pytest.raises(ShardError, match="bounds of 5 to 2 bytes a document: no document is within them"):
        build(corpus, BytesTokenizer(), tmp_path / "c", **{**options, "min_bytes": 5, "max_bytes": 2})


def test_a_build_that_was_begun_goes_on_in_its_own_units(inputs: list[Path], tmp_path: Path) -> None:
    """Though the default is another by now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_shards, "merge_with_bar", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(inputs, tmp_path / "data", unit_bytes=5000)
    work = work_of(tmp_path / "data")
    assert len([name for name in work.names() if name.endswith(".tokens")]) > 3
    with pytest.raises(ShardError, match=r"unit_bytes was 5000, is 6000"):
        make(inputs, tmp_path / "data", unit_bytes=6000)
    make(inputs, tmp_path / "data", unit_bytes=None)
    make(inputs, tmp_path / "other")
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


class Wide(BytesTokenizer):
    vocab_size = (1 << 31) + 1


class Wrong(BytesTokenizer):
    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Iterator[Ids]:
        return (np.array([1, self.wrong] if "5:" in text else [1], np.int32) for text in texts)

    wrong = 300


def test_a_tokenizer_whose_ids_do_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", make_documents(9))])
    with pytest.raises(ShardError, match="a vocabulary of 2,147,483,649 ids: .* have at most 31 bits"):
        build(corpus, Wide(), tmp_path / "data", rule=RULE)
    for wrong in (300, 70_000, -1):
        monkeypatch.setattr(Wrong, "wrong", wrong)
        monkeypatch.setattr(build_shards, "planned_tokenizer", lambda *_: Wrong())
        with pytest.raises(CorpusError, match=rf"a.jsonl:6: the tokenizer gives id {wrong}, its vocabulary has 257"):
            build(corpus, Wrong(), tmp_path / "data", rule=RULE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_document_of_more_tokens_than_the_format_holds_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MAX_TOKENS", 100)
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", ["a" * 98, "a" * 99])])
    with pytest.raises(CorpusError, match=r"a.jsonl:2: a document of 101 tokens; .* leave it out with --max-bytes"):
        build(corpus, BytesTokenizer(), tmp_path / "data", rule=RULE)


def test_the_plan_is_the_first_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves of a removal has no plan, and the next start clears it away."""
    store = work_of(tmp_path / "data")
    with store.lock("run.lock"):
        for name in ("plan.json", "000000.json"):
            store.write(name, b"{}")
        monkeypatch.setattr("shutil.rmtree", lambda _: None)
        store.remove_all(first="plan.json")
    assert store.names().keys() == {"run.lock", "000000.json"}


def test_a_damaged_copy_of_the_tokenizer_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(300))
    words = [str(corpus), "--tokenizer", "bytes", "--output", str(tmp_path / "data"), "--unit-bytes", "5000"]
    assert build_shards.main([*words, "--task", "0/2"]) == 0
    (tmp_path / "data.work/tokenizer.bytes").write_text("?")
    assert build_shards.main([*words, "--processes", "2"]) == 2
    error = capsys.readouterr().err
    assert "the copy of the tokenizer in" in error and "is damaged: remove" in error and "Traceback" not in error
    assert build_shards.main([*words, "--task", "0/2", "--overwrite"]) == 2
    assert "--overwrite goes with" in capsys.readouterr().err
