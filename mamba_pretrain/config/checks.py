"""What every section's checks share."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any


class ConfigError(ValueError):
    """The configuration cannot be run. `problems` holds one sentence for each reason; all of them are found at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"- {p}" for p in self.problems))


def at_least(bound: int, part: Any, section: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(part, name)
        if value is not None and value < bound:
            yield f"{section}.{name} is {value}: it must be at least {bound}"


def did_you_mean(found: str, allowed: Sequence[str]) -> str:
    """The nearest allowed name: of the whole dotted path, else one whose last part is nearest."""
    near = difflib.get_close_matches(found, allowed, n=1, cutoff=0.6)
    if not near:
        tails = {name.rsplit(".", 1)[-1]: name for name in allowed}
        near = [tails[t] for t in difflib.get_close_matches(found.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]}?"
    return f"expected one of {', '.join(allowed)}" if len(allowed) < 12 else "no option has a similar name"
