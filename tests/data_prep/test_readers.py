"""Text files give the same documents however they are divided into units, and in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.corpus import Corpus
from data_prep.records import Document

LINES = st.lists(st.sampled_from(["", " ", "\r", "a", "b c", "\u00e9\u00e9", "long " * 5, "\t x"]), max_size=12)


@pytest.mark.parametrize("mode", ["line", "blank-line", "jsonl"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, ends=st.sampled_from(["", "\n"]), unit_bytes=st.integers(1, 40))
def test_any_unit_size_gives_the_same_documents(
    tmp_path: Path, mode: str, lines: list[str], ends: str, unit_bytes: int
) -> None:
    if mode == "jsonl":
        lines = [json.dumps({"text": line}) if line.strip() else line for line in lines]
    path = tmp_path / ("a.jsonl" if mode == "jsonl" else "a.txt")
    path.write_bytes(("\n".join(lines) + ends).encode())
    corpus = Corpus([path], txt_documents="file" if mode == "jsonl" else mode)
    (whole,) = corpus.units(1 << 20)
    expected = [record.text for record in corpus.records(whole) if isinstance(record, Document)]
    units = corpus.units(unit_bytes)
    found = [[record.text for record in corpus.records(unit) if isinstance(record, Document)] for unit in units]
    assert [text for texts in found for text in texts] == expected
    assert sum(unit.bytes for unit in units) == path.stat().st_size
