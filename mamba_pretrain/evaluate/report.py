"""Pictures and tables of a run: `loss.png` and `perplexity.png` from its metrics, and Markdown comparisons."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SMOOTHING = 1 / 25  # of the curve: the span over which the bold line averages
TRAIN_COLOUR, VALIDATION_COLOUR, RATE_COLOUR = "#1f5fa8", "#c4451c", "#8a8a8a"


class ReportError(ValueError):
    """A run's metrics are missing or unreadable, or matplotlib is not installed."""


def read_metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by their "kind", in order of steps.

    A resumed run goes back to its checkpoint: where a kind's step does not rise, the lines it goes back over are
    dropped for the later ones. A line cut short by a kill is left out with a warning. Raises ReportError.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise ReportError(f"{path} does not exist: give a run directory, with `jsonl` among its log.sinks")
    kinds: dict[str, list[dict[str, Any]]] = {}
    broken = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            metrics = json.loads(line)
            kind, step = metrics["kind"], int(metrics["step"])
        except (ValueError, KeyError, TypeError):
            broken.append(number)
            continue
        lines = kinds.setdefault(kind, [])
        while lines and lines[-1]["step"] >= step:
            lines.pop()
        lines.append(metrics)
    if broken:
        warnings.warn(f"{path}: left out {len(broken)} unreadable line(s), the first is {broken[0]}", stacklevel=2)
    return kinds


def plot_run(run_dir: Path, output_dir: Path) -> list[Path]:
    """Draws loss.png and, if the run has evaluated, perplexity.png into `output_dir` (made if need be).

    Raises ReportError without metrics of training steps, or without matplotlib.
    """
    kinds = read_metrics(run_dir)
    train, evals = kinds.get("train", []), kinds.get("eval", [])
    if not train:
        raise ReportError(f"{run_dir / METRICS} has no training steps yet: wait for the first log.every_steps")
    figure, axes = _axes(f"{run_dir.name}: loss", "loss (nats per token)")
    tokens, loss = _column(train, "tokens"), _column(train, "loss")
    axes.plot(tokens, loss, color=TRAIN_COLOUR, alpha=0.35, linewidth=0.8, label="train")
    axes.plot(tokens, smoothed(loss), color=TRAIN_COLOUR, linewidth=1.8, label="train, smoothed")
    if evals:
        _plot_evals(axes, evals, "loss")
    rate_axes = axes.twinx()
    rate_axes.plot(tokens, _column(train, "lr"), color=RATE_COLOUR, linewidth=1, linestyle="--", label="learning rate")
    rate_axes.set_ylabel("learning rate", color=RATE_COLOUR)
    rate_axes.tick_params(axis="y", colors=RATE_COLOUR)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_ylim(bottom=0)
    rate_axes.spines["top"].set_visible(False)
    handles = [*axes.get_lines(), *rate_axes.get_lines()]
    axes.legend(handles, [line.get_label() for line in handles], frameon=False, loc="upper right")
    output_dir.mkdir(parents=True, exist_ok=True)
    made = [output_dir / "loss.png"]
    figure.savefig(made[0], dpi=150)

    if evals:
        figure, axes = _axes(f"{run_dir.name}: validation perplexity", "perplexity (per token)")
        _plot_evals(axes, evals, "perplexity")
        _log_scale(axes)
        last = _column(evals, "tokens")[-1], _column(evals, "perplexity")[-1]
        if all(map(math.isfinite, last)):
            axes.annotate(
                f"{last[1]:.2f}",
                last,
                textcoords="offset points",
                xytext=(0, 8),
                ha="right",
                color=VALIDATION_COLOUR,
            )
        made.append(output_dir / "perplexity.png")
        figure.savefig(made[1], dpi=150)
    return made


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average: unlike a trailing one it does not lag behind a falling loss.

    It narrows towards the steep start, and at the flat end averages what there is. What is not finite is passed over.
    """
    half = int(SMOOTHING * len(values) / 2)
    averages = []
    for i in range(len(values)):
        reach = min(half, i)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        averages.append(sum(near) / len(near) if near else math.nan)
    return averages


def comparison_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; columns are the keys in order of appearance, what a row lacks is "-", floats have 4 digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(row.get(c), int | float | None) for row in rows)}

    def cell(value: object) -> str:
        if value is None:
            return "-"
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [columns, ["---:" if c in numeric else "---" for c in columns]]
    lines += [[cell(row.get(c)) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _matplotlib() -> tuple[Any, Any]:
    """The modules `figure` and `ticker`. A Figure made directly is drawn by Agg: no display, no state of pyplot."""
    try:
        from matplotlib import figure, ticker
    except ImportError as error:
        raise ReportError("plots need matplotlib: pip install 'mamba-pretrain[report]'") from error
    return figure, ticker


def _axes(title: str, ylabel: str) -> tuple[Any, Any]:
    figure_module, ticker = _matplotlib()
    figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot_evals(axes: Any, evals: list[dict[str, Any]], name: str) -> None:
    axes.plot(
        _column(evals, "tokens"),
        _column(evals, name),
        color=VALIDATION_COLOUR,
        marker="o",
        markersize=3.5,
        linewidth=1.2,
        label="validation",
    )


def _log_scale(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade: a run seldom spans two decades of perplexity."""
    _, ticker = _matplotlib()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if line.get(name) is None else float(line[name]) for line in lines]
