"""Pictures of a split: how long its documents are, and how often its tokens occur."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from data_prep.statistics import Lengths, TokenCounts, lower_edges
from data_prep.streams import CorpusError

COLOUR: Final = "#1f5fa8"
MARK_COLOUR: Final = "#c4451c"
PER_OCTAVE: Final = 4  # bars


def plot_lengths(title: str, lengths: Lengths, path: Path) -> None:
    figure, axes = _axes(f"{title}: document lengths", "tokens in a document", "documents")
    low = max(lengths.shortest, 1)
    octaves = np.log2(max(lengths.longest, low) + 1) - np.log2(low)
    # Whole numbers as edges, else bars of lengths such as 5 to 6 would count no length at all.
    edges = np.unique(np.ceil(low * 2 ** np.linspace(0, octaves, max(round(octaves * PER_OCTAVE), 1) + 1)).astype(int))
    edges[-1] = max(edges[-1], lengths.longest + 1)
    counts, _ = np.histogram(lower_edges(), bins=edges, weights=lengths.counts)
    axes.stairs(counts, edges, fill=True, color=COLOUR, alpha=0.8)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlim(edges[0], edges[-1])
    median, mean = lengths.quantile(0.5), lengths.tokens / max(lengths.documents, 1)
    for value, name, style in ((median, "median", "-"), (mean, "mean", "--")):
        axes.axvline(value, color=MARK_COLOUR, linestyle=style, linewidth=1.2, label=f"{name} {value:,.0f}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_ranks(title: str, tokens: TokenCounts, path: Path) -> None:
    figure, axes = _axes(f"{title}: how often each token occurs", "rank of the token", "occurrences")
    counts = np.sort(tokens.counts[tokens.counts > 0])[::-1]
    axes.plot(np.arange(1, counts.size + 1), counts, color=COLOUR, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.text(
        0.98,
        0.95,
        f"{counts.size:,} of {tokens.counts.size:,} ids occur in\n{tokens.sample}",
        transform=axes.transAxes,
        ha="right",
        va="top",
    )
    figure.savefig(path, dpi=150)


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A Figure made directly is drawn by Agg: no display, no state of pyplot."""
    try:
        from matplotlib import figure as figures
    except ImportError as error:
        raise CorpusError("plots need matplotlib: pip install 'mamba-pretrain[report]'") from error
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_numbers(axis: Any) -> None:
    from matplotlib import ticker

    axis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.set_minor_formatter(ticker.NullFormatter())
