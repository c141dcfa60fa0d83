"""Metrics of resumed and killed runs are read as what happened; the pictures show something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mamba_pretrain.evaluate.report import ReportError, comparison_table, plot_run, read_metrics, smoothed


def train_line(step: int, loss: float = 3.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}


def eval_line(step: int, loss: float = 3.0) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": 100 * step, "loss": loss, "perplexity": math.exp(loss)}


def write(run_dir: Path, lines: list[dict[str, Any] | str]) -> Path:
    run_dir.mkdir()
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run_dir / "metrics.jsonl").write_text("\n".join(text) + "\n")
    return run_dir


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    first = [train_line(10, 5.0), train_line(20, 4.0), eval_line(20, 4.5), train_line(30, 3.9)]
    resumed = [train_line(20, 4.1), eval_line(20, 4.4), train_line(30, 3.0), train_line(40, 2.0)]
    kinds = read_metrics(write(tmp_path / "run", [*first, *resumed]))
    assert [(m["step"], m["loss"]) for m in kinds["train"]] == [(10, 5.0), (20, 4.1), (30, 3.0), (40, 2.0)]
    assert [(m["step"], m["loss"]) for m in kinds["eval"]] == [(20, 4.4)]


def test_steps_that_a_resumed_run_went_back_over_are_dropped(tmp_path: Path) -> None:
    """Also where it logs at other steps than before: 25 was of the life that was given up."""
    run = write(tmp_path / "run", [train_line(10), train_line(20), train_line(25), train_line(20), train_line(30)])
    assert [m["step"] for m in read_metrics(run)["train"]] == [10, 20, 30]


def test_a_line_cut_by_a_kill_is_left_out_and_told(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [train_line(10), '{"kind": "train", "st', train_line(20)])
    with pytest.warns(UserWarning, match=r"left out 1 unreadable line\(s\), the first is 2"):
        kinds = read_metrics(run)
    assert [m["step"] for m in kinds["train"]] == [10, 20]


def test_pictures_show_something(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    losses = [10 * math.exp(-i / 20) + 2 for i in range(100)]
    losses[50] = math.nan  # a skipped step
    lines: list[dict[str, Any] | str] = [train_line(i, loss) for i, loss in enumerate(losses)]
    run = write(tmp_path / "run", lines + [eval_line(i, losses[i]) for i in (20, 40, 99)])
    made = plot_run(run, tmp_path / "deep" / "plots")
    assert [p.name for p in made] == ["loss.png", "perplexity.png"]
    for path in made:
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[0] > 400
        assert pixels.shape[1] > 700
        coloured = (pixels.max(-1) - pixels.min(-1) > 0.3).mean()
        assert coloured > 0.001, "no coloured line in the picture"


def test_a_run_without_evaluation_has_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write(tmp_path / "run", [train_line(1)])
    assert [p.name for p in plot_run(run, tmp_path)] == ["loss.png"]


@pytest.mark.parametrize("finite_before", [True, False])
def test_figures_that_were_not_finite_are_gaps_in_the_picture(tmp_path: Path, finite_before: bool) -> None:
    """The trainer writes them as null."""
    pytest.importorskip("matplotlib")
    gap = {"loss": None, "perplexity": None}
    run = write(tmp_path / "run", [train_line(1), train_line(2) | {"loss": None}, eval_line(2) | gap])
    if finite_before:
        run = write(tmp_path / "longer", [train_line(1), train_line(2), eval_line(1), eval_line(2) | gap])
    assert [p.name for p in plot_run(run, tmp_path)] == ["loss.png", "perplexity.png"]


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"metrics\.jsonl does not exist"):
        plot_run(tmp_path, tmp_path)
    with pytest.raises(ReportError, match="no training steps yet"):
        plot_run(write(tmp_path / "run", [eval_line(1)]), tmp_path)


def test_smoothing_keeps_the_level_and_passes_over_nan() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    ramp = [float(i) for i in range(200)]
    assert smoothed(ramp)[:190] == pytest.approx(ramp[:190])  # no lag
    assert smoothed([1.0, math.nan, 3.0] * 50)[75] == pytest.approx(2.0, abs=0.4)
    assert math.isnan(smoothed([math.nan])[0])
    assert smoothed([]) == []


def test_comparison_table() -> None:
    rows: list[dict[str, object]] = [
        {"model": "a|b", "bits/byte": 1.23456, "bytes": 12345},
        {"model": "c", "note": "x"},
    ]
    assert comparison_table(rows).splitlines() == [
        "| model | bits/byte | bytes | note |",
        "| --- | ---: | ---: | --- |",
        "| a\\|b | 1.235 | 12,345 | - |",
        "| c | - | - | x |",
    ]
