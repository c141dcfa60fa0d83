"""Logs say what is done, how fast, and how long it will take, whether or not the sizes of the inputs are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import progress
from data_prep.corpus import Corpus, split_rule
from data_prep.parts import Counts, Progress
from data_prep.plan import Plan
from data_prep.progress import Meter
from mamba_pretrain.data.tokenizer import BytesTokenizer
from tests.helpers.corpora import make_documents, write_jsonl


@pytest.mark.parametrize("known", [True, False])
def test_a_line_tells_rates_and_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: bool
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", make_documents(50))])
    if not known:
        monkeypatch.setattr(Plan, "bytes_of", lambda self, part: 0)
    plan = Plan.make(corpus, BytesTokenizer(), rule=split_rule((1, 0, 0), 0), unit_bytes=800)
    n = len(plan.parts)
    assert n > 4
    with Meter(plan, range(n), {0: Counts()}) as meter:  # an earlier run has done one
        now[0] += 61
        meter.report(1, Progress(1, 10, 1000, 400))
        first = capsys.readouterr().err
        now[0] += 61
        meter.finish(1, Counts(documents=20, tokens=2000, text_bytes=800))
        meter.finish(2, Counts(documents=20, tokens=2000, text_bytes=800))
        now[0] += 61
        meter.finish(3, Counts(documents=21, tokens=2100, text_bytes=800))
        second = capsys.readouterr().err.splitlines()[-1]
    assert ("left" in first) == known  # nothing of it is done as far as can be seen
    assert "0 documents/s, 0.0 MB/s, 33 tokens/s" in second  # 6100 in 183 s
    assert (f" of {n} parts read" in second) != known and (" % of " in second.replace("%", " %")) == known
    minutes, seconds = map(int, second.rpartition(", ")[2].removesuffix(" left").split(":"))
    assert 60 * minutes + seconds == pytest.approx(61 * (n - 4), rel=0.15)
