"""How far a build is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

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
        total = sum(plan.bytes_of(part) for part in parts)
        self._bar = tqdm(total=total, initial=self._done, unit="B", unit_scale=True, disable=None)

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
        self._show()

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
            share = 100 * done / max(self._bar.total, 1)
            print(f"{share:.1f} % of {self._bar.total:,} bytes read, {rates}", file=sys.stderr)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()
