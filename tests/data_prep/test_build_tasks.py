"""A build in tasks, as an array of jobs starts them: in any order, and to the bytes of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import merge_shards
from data_prep.corpus import Corpus, split_rule
from data_prep.plan import Plan
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.tokenizer import BytesTokenizer
from tests.helpers.builds import command, contents, several_inputs
from tests.helpers.corpora import make_documents, write_jsonl

RULE = split_rule((0.7, 0.2, 0.1), seed=0)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return several_inputs(tmp_path)


def test_tasks_differ_in_no_choice_that_would_be_of_the_last_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    corpus = write_jsonl(tmp_path / "a.jsonl", make_documents(300))
    with corpus.open("a") as stream:
        stream.write("no json\n")
    options = ("--unit-bytes", "5000", "--processes", "1", "--drop-duplicates")
    assert command([corpus], tmp_path / "whole", *options, "--on-error", "skip") == 0
    last = len(Plan.make(Corpus([corpus]), BytesTokenizer(), rule=RULE, unit_bytes=5000).parts) - 1
    tasks = [f"{(last + i) % 2}/2" for i in range(2)]  # the one with the invalid record first
    assert command([corpus], output, *options, "--on-error", "skip", "--task", tasks[0]) == 0
    assert command([corpus], output, *options[:-1], "--task", tasks[1]) == 2
    assert "was begun with --drop-duplicates, this task is without: start all tasks alike" in capsys.readouterr().err
    assert command([corpus], output, *options, "--task", tasks[1]) == 0  # stops at invalid records, and has none
    assert merge_shards.main([str(output)]) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert command([corpus], tmp_path / "kept", *options, "--on-error", "skip", "--task", tasks[0]) == 0
    assert command([corpus], tmp_path / "kept", *options[:-1], "--on-error", "skip") == 0  # alone it may choose
    assert not Manifest.read(tmp_path / "kept").selection.duplicates_dropped


def test_tasks_and_a_merge_are_the_one_run(
    inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(inputs, tmp_path / "one", "--processes", "1") == 0
    output = tmp_path / "many"
    for task in ("2/3", "0/3"):
        assert command(inputs, output, "--task", task, "--processes", "1") == 0
    assert "python -m data_prep.merge_shards " in capsys.readouterr().out
    assert merge_shards.main([str(output)]) == 2
    error = capsys.readouterr().err
    assert "parts are missing" in error and f"- part 1 ({inputs[0]} [4,0" in error
    assert "start these tasks again: --task 1/3\n" in error
    assert not output.exists()
    assert command(inputs, output, "--task", "1/3", "--processes", "1") == 0
    assert merge_shards.main([str(output)]) == 0
    assert contents(output) == contents(tmp_path / "one")
    assert not Path(f"{output}.work").exists()
    assert merge_shards.main([str(output), "--overwrite"]) == 2
    assert "plan.json does not exist: no build was started" in capsys.readouterr().err
