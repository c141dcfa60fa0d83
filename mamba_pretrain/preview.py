"""`mamba-pretrain data --dry-run`: what a run will read, counted from its configuration and measured on a sample."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from mamba_pretrain.config import Config
from mamba_pretrain.data.packing import IGNORE
from mamba_pretrain.data.shards import Shard
from mamba_pretrain.reading import Reading, open_reading, table

DOCUMENTS: Final = 1 << 20  # of a larger split so many are looked at
BLOCK: Final = 1 << 13  # documents, or tokens times a few, in memory at a time


def preview(config: Config, n_rows: int) -> dict[str, Any]:
    """All figures, of which those under "measured" are of `n_rows` of the run's own rows."""
    reading = open_reading(config)
    samples = reading.check(config, 0, 0)
    return {
        "steps": config.steps,
        "batch_tokens": config.train.batch_tokens,
        "packing": config.data.packing,
        **reading.figures(samples),
        "measured": measure(reading, samples, n_rows),
        "documents": {source.name: document_lengths(source.train) for source in reading.sources},
    }


def measure(reading: Reading, samples: int, n_rows: int) -> list[dict[str, Any]]:
    """Padding, masked positions and rows of several documents, by stage and source, in rows drawn from the run's."""
    every = samples <= n_rows
    drawn = np.arange(samples) if every else np.random.default_rng(0).integers(0, samples, n_rows)
    places = reading.mixture.locate(np.sort(drawn))
    found = []
    for s, stage in enumerate(reading.mixture.stages):
        for k, source in enumerate(reading.sources):
            rows = np.sort(places.rows[(places.stages == s) & (places.sources == k)])
            if rows.size == 0:
                continue
            padding = masked = several = 0
            at_once = max(1, BLOCK * 16 // stage.seq_len)
            for begin in range(0, rows.size, at_once):
                chosen = rows[begin : begin + at_once]
                block = reading.dataset.read(s, np.full(chosen.size, k), chosen)
                pads = int(block.padding.sum())
                padding += pads
                masked += int((block.labels == IGNORE).sum()) - pads
                last = np.maximum(stage.seq_len - block.padding - 1, 0)  # padding is at the end of a row
                several += int((block.seq_idx[np.arange(chosen.size), last] != block.seq_idx[:, 0]).sum())
            positions = rows.size * stage.seq_len
            found.append(
                {
                    "stage": s,
                    "source": source.name,
                    "rows": int(rows.size),
                    "all_rows": every,
                    "padding_share": padding / positions,
                    "masked_share": masked / positions,
                    "rows_across_a_boundary_share": several / rows.size,
                }
            )
    return found


def document_lengths(shard: Shard) -> dict[str, Any]:
    """A histogram over powers of two, of all documents or, in blocks spread evenly, of DOCUMENTS of them."""
    n = shard.n_documents
    blocks = [(first, min(first + BLOCK, n)) for first in range(0, n, BLOCK)]
    if n > DOCUMENTS:
        wanted = DOCUMENTS // BLOCK
        blocks = [blocks[i * len(blocks) // wanted] for i in range(wanted)]
    counts, tokens = np.zeros(33, np.int64), np.zeros(33, np.int64)
    looked_at = 0
    for first, last in blocks:
        lengths = np.diff(shard.document_edges(first, last))  # foreign documents may be empty
        looked_at += lengths.size
        bins = np.frexp(lengths.astype(np.float64))[1]  # length l is in bin b: 2^(b-1) <= l < 2^b; 0 is in bin 0
        counts += np.bincount(bins, minlength=33)
        tokens += np.bincount(bins, weights=lengths, minlength=33).astype(np.int64)
    histogram = [
        {"from": 1 << b - 1 if b else 0, "below": 1 << b, "documents": int(counts[b]), "tokens": int(tokens[b])}
        for b in np.flatnonzero(counts).tolist()
    ]
    return {"of": n, "looked_at": looked_at, "histogram": histogram}


def text(figures: dict[str, Any]) -> str:
    """`preview`'s figures for people."""
    parts = [
        f"{figures['steps']:,} steps of {figures['batch_tokens']:,} tokens, {figures['samples']:,} samples, "
        f"{figures['tokens']:,} tokens; packing {figures['packing']}",
        table(figures),
    ]
    lines = []
    for part in figures["measured"]:
        of = "all its rows" if part["all_rows"] else "rows drawn at random from the run's"
        lines.append(
            f"stage {part['stage']}, {part['source']}: padding {part['padding_share']:.2%}, without a target (the next "
            f"token is another document's) {part['masked_share']:.2%} of the positions; "
            f"{part['rows_across_a_boundary_share']:.1%} of the rows hold several documents ({part['rows']:,} {of})"
        )
    parts.append("\n".join(lines))
    for name, found in figures["documents"].items():
        which = "all" if found["looked_at"] == found["of"] else f"{found['looked_at']:,} of the"
        lines = [f"document lengths of {name}, {which} {found['of']:,} documents"]
        total = sum(row["documents"] for row in found["histogram"]) or 1
        all_tokens = sum(row["tokens"] for row in found["histogram"]) or 1
        for row in found["histogram"]:
            bar = "#" * math.ceil(40 * row["documents"] / total)
            span = f"{row['from']:>13,} to {row['below'] - 1:>13,} tokens"
            share = f"{row['documents'] / total:7.2%} of documents  {row['tokens'] / all_tokens:7.2%} of tokens"
            lines.append(f"  {span}  {share}  {bar}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
