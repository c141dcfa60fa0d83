"""Which values of a parametrized test run in the fast set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Values to parametrize with, of which only those in `fast` run in the fast set."""
    chosen = list(fast)
    found: list[Any] = []
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        found.append(value if value in chosen else pytest.param(*several, marks=pytest.mark.slow))
    return found
