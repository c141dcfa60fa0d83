"""What a build finds when it goes on: parts that are not what was written, inputs that are not what they were."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_prep import merge_shards
from data_prep.corpus import Corpus
from data_prep.plan import Plan
from data_prep.store import store_at
from mamba_pretrain.data.tokenizer import BytesTokenizer
from tests.helpers.builds import command, contents, several_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return several_inputs(tmp_path)


@pytest.fixture
def work(inputs: list[Path], tmp_path: Path) -> Path:
    """Of a build whose parts are finished and not merged."""
    assert command(inputs, tmp_path / "data", "--task", "0/1", "--processes", "1") == 0
    return tmp_path / "data.work"


@pytest.fixture
def expected(inputs: list[Path], tmp_path: Path) -> dict[str, bytes]:
    assert command(inputs, tmp_path / "other", "--processes", "1") == 0
    return contents(tmp_path / "other")


def alter(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def turn_a_bit(file: Path) -> None:
    alter(file, lambda whole: bytes([whole[0] ^ 1]) + whole[1:])


def test_parts_that_are_not_of_the_size_they_had_are_made_again(
    inputs: list[Path], tmp_path: Path, work: Path, expected: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """What a power failure leaves: nothing of a build waits for the disk."""
    (work / "000000.tokens").unlink()
    (work / "000001.documents").unlink()
    (work / "000002.json").write_bytes(b"")
    alter(work / "000003.tokens", lambda whole: whole[:-2])
    alter(work / "000004.tokens", lambda whole: whole + b"..")
    alter(work / "000005.documents", lambda whole: b"")
    assert command(inputs, tmp_path / "data", "--processes", "1") == 0
    assert contents(tmp_path / "data") == expected
    for number in range(6):
        assert f"00000{number}.json is not what this build wrote, its part counts as missing" in caplog.text
    assert "000000.tokens has -1 bytes" not in caplog.text and "000000.tokens is not there, expected" in caplog.text
    assert "000003.tokens has " in caplog.text


def test_a_plan_is_known_by_what_its_parts_depend_on(inputs: list[Path], work: Path) -> None:
    plan = Plan.read(store_at(work))
    assert Plan.make(Corpus(inputs), BytesTokenizer(), rule=plan.split_rule, unit_bytes=4000).digest == plan.digest
    others: dict[str, Any] = {
        "inputs": plan.inputs[1:],
        "reading": dataclasses.replace(plan.reading, normalization="NFC"),
        "split_rule": dataclasses.replace(plan.split_rule, seed=1),
        "tokenizer": dataclasses.replace(plan.tokenizer, sha256="0"),
        "versions": {},
        "units": plan.units[1:],
        "parts": plan.parts[1:],
    }
    others |= {
        name: getattr(plan, name) + 1 for name in ("adds_bos", "min_bytes", "max_bytes", "unit_bytes", "version")
    }
    free = {"choices": dataclasses.replace(plan.choices, on_error="skip", drop_duplicates=True), "modified": []}
    assert {*others, *free} == {one.name for one in dataclasses.fields(plan)}
    digests = {dataclasses.replace(plan, **{name: other}).digest for name, other in others.items()}
    assert len(digests - {plan.digest}) == len(others)
    assert {dataclasses.replace(plan, **{name: other}).digest for name, other in free.items()} == {plan.digest}


def test_parts_of_a_build_with_other_options_are_made_again(
    inputs: list[Path], tmp_path: Path, work: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing locks (object stores) a second run may replace the plan while the first one's workers go on."""
    assert command(inputs, tmp_path / "other", "--min-bytes", "60", "--task", "0/1", "--processes", "1") == 0
    assert command(inputs, tmp_path / "alone", "--min-bytes", "60", "--processes", "1") == 0
    (tmp_path / "other.work" / "plan.json").replace(work / "plan.json")
    assert merge_shards.main([str(tmp_path / "data")]) == 2
    assert "start these tasks again: --task 0/1" in capsys.readouterr().err
    assert (
        "000001.json is not what this build wrote, its part counts as missing: it is of a build with other"
        in caplog.text
    )
    assert command(inputs, tmp_path / "data", "--min-bytes", "60", "--processes", "1") == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "alone")


@pytest.mark.parametrize("kinds", [("tokens", "tokens"), ("documents", "documents"), ("documents", "tokens")])
def test_all_parts_that_have_other_contents_are_named_at_once_and_made_again(
    inputs: list[Path],
    tmp_path: Path,
    work: Path,
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    kinds: tuple[str, str],
) -> None:
    for number, kind in zip((1, 3), kinds, strict=True):
        turn_a_bit(work / f"00000{number}.{kind}")
    output = tmp_path / "data"
    runs = 0
    while merge_shards.main([str(output)]) == 2:
        runs += 1
        told = capsys.readouterr().err
        same_kind = kinds[0] == kinds[1]
        assert f"{2 if same_kind else 1} parts in {work} are not what was written" in told
        assert f"00000{1 if runs == 1 else 3}.{kinds[runs - 1]} has another checksum" in told
        assert not output.exists() and merge_shards.main([str(output)]) == 2
        assert "start these tasks again: --task 0/1" in capsys.readouterr().err
        assert command(inputs, output, "--task", "0/1", "--processes", "1") == 0
    assert runs == len(set(kinds))  # hashes of documents are needed, and so looked at, before tokens
    assert contents(output) == expected


def test_inputs_with_another_time_of_modification_are_named(
    inputs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their sizes, which starts are held against, may be the same. The time may be an earlier one, as of a copy."""
    begin = partial(command, inputs, tmp_path / "data", "--processes", "1")
    assert begin("--task", "0/2") == begin("--task", "1/2") == 0
    assert "time of modification" not in caplog.text
    for time_s, again in (
        (10**9, lambda: begin("--task", "0/2")),
        (10**9, lambda: merge_shards.main([str(tmp_path / "data")])),
    ):
        os.utime(inputs[1], (time_s, time_s))
        caplog.clear()
        assert again() == 0
        assert f"another time of modification than when {tmp_path / 'data'}.work was begun: {inputs[1]}." in caplog.text


def test_only_what_ended_processes_were_writing_is_swept_away(tmp_path: Path) -> None:
    """Tasks that divide the work in another way may be at the same part."""
    store = store_at(tmp_path)
    host = socket.gethostname()
    for name in (f"000001.tokens.draft-{host}-{os.getpid()}", f"000001.tokens.draft-{host}-4194305", "000001.tokens"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in store.drafts()] == [f"000001.tokens.draft-{host}-4194305"]
