"""Small runs over several sources and stages."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mamba_pretrain.build import Run
from mamba_pretrain.config import Config, load
from mamba_pretrain.train import steps
from tests.helpers.corpora import make_dataset
from tests.helpers.runs import OPTIONS

STAGES = (
    "data.stages=[{}, {from_tokens: 1000, weights: {code: 3}, seq_len: 64}, {from_tokens: 2048, weights: {web: 0}}]"
)
STEPS = 11  # of 256 tokens: 4 in the first stage, 4 in the second, 3 in the third


def make_sources(directory: Path) -> dict[str, Path]:
    return {name: make_dataset(directory / name, n_documents=n, seed=n) for name, n in (("web", 70), ("code", 40))}


def mixed_config(
    paths: dict[str, Path], run_dir: Path, *overrides: str, stages: str = STAGES, **weights: str
) -> Config:
    chosen = {"web": "2", "code": "1"} | weights
    sources = ", ".join(f"{{path: {path}, weight: {chosen[name]}}}" for name, path in paths.items())
    words = [f"data.sources=[{sources}]", f"run_dir={run_dir}", f"train.steps={STEPS}", stages]
    return load([], [*OPTIONS, *words, *overrides])


def advance(run: Run, n: int) -> None:
    for _ in islice(steps(run), n):
        pass


def assert_adds_up(run: Run) -> None:
    state = run.state
    parts = (state.trained_tokens, state.skipped_tokens, state.masked_tokens, state.padding_tokens)
    assert state.tokens == 256 * state.step == sum(parts) + state.uncounted_tokens
    assert state.source_tokens == run.reading.source_tokens(state.samples)
    assert sum(state.source_tokens.values()) == state.tokens
