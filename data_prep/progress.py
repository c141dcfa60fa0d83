"""How far a build is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Final

from tqdm import tqdm

from data_prep.parts import Counts, Progress
from data_prep.plan import Plan

LINE_S: Final = 60.0  # between lines where stderr is no terminal


class Meter:
    """Input bytes done, documents, text and tokens a second, and the time it will take.

    What a worker reports of an unfinished part is text, which a compressed input has more of than bytes: it counts as
    input up to the part's size.
    """

    def __init__(self, plan: Plan, parts: range, done: dict[int, Counts]) -> None:
        self._plan, self._running = plan, dict[int, Progress]()
        self._documents = self._tokens = self._text_bytes = 0
        self._began = self._said = time.monotonic()
        self._done = sum(plan.bytes_of(part) for part in done)
        self._total, self._n_parts = sum(plan.bytes_of(part) for part in parts), len(parts)
        self._n_done = len(done)
        self._first = self._share(self._done)
        self._bar = tqdm(total=self._total or None, initial=self._done, unit="B", unit_scale=True, disable=None)

    def report(self, part: int, progress: Progress) -> None:
        self._running[part] = progress
        self._show()

    def finish(self, part: int, counts: Counts | None) -> None:
        """The part has ended, without `counts` if it failed."""
        self._running.pop(part, None)
        if counts is not None:
            self._documents += counts.documents
            self._tokens += counts.tokens
            self._text_bytes += counts.text_bytes
            self._done += self._plan.bytes_of(part)
            self._n_done += 1
        self._show()

    def _share(self, done: int) -> float:
        """Of the work; by parts where the inputs' sizes are not known."""
        return done / self._total if self._total else self._n_done / max(self._n_parts, 1)

    def _show(self) -> None:
        now, running = time.monotonic(), self._running.items()
        seconds = max(now - self._began, 1e-3)
        documents = self._documents + sum(progress.documents for _, progress in running)
        tokens = self._tokens + sum(progress.tokens for _, progress in running)
        mb = (self._text_bytes + sum(progress.text_bytes for _, progress in running)) / 1e6
        done = self._done + sum(min(progress.text_bytes, self._plan.bytes_of(part)) for part, progress in running)
        rates = f"{documents / seconds:,.0f} documents/s, {mb / seconds:,.1f} MB/s, {tokens / seconds:,.0f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(max(0, done - self._bar.n))
        if self._bar.disable and now - self._said > LINE_S:
            self._said = now
            share = self._share(done)
            what = (
                f"{share:.1%} of {self._total:,} bytes" if self._total else f"{self._n_done} of {self._n_parts} parts"
            )
            left = seconds * (1 - share) / (share - self._first) if share > self._first else math.nan
            eta = "" if math.isnan(left) else f", {tqdm.format_interval(left)} left"
            print(f"{what} read, {rates}{eta}", file=sys.stderr)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()
