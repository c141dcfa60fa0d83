"""Tokenization: whole commands of ours and of peers on the same files, beside a bare loop over the tokenizer's library.

A command is run on the text and, in the same round, on two of its documents: the second is its start-up (interpreter,
imports, tokenizer, processes). Rates are of what is left, unless they say otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.common import AT_LEAST, Figure, Report, Seconds, Task, ratio, take_turns
from benchmarks.worker import Worker
from data_prep.corpus import Corpus
from data_prep.plan import MIN_UNIT_BYTES
from mamba_pretrain.data.manifest import Manifest

ROOT = Path(__file__).parent.parent
OURS, LIMIT, FASTEST = "ours", "bare loop", "bare loop by the call for ids alone"
PEERS = {"datasets": "datasets.map", "datatrove": "datatrove", "megatron": "Megatron's procedure"}
# Reasons: beside the library's own work stand reading, parsing, hashing and writing, which are cheap; documents do not
# depend on each other; a tool made for this should not be slower than those made for more.
OF_LIMIT, SCALING, AHEAD = 0.9, 1.8, 1.0
APART = 0.001  # two ways that differ by more tokens than this have not done the same work
# One core for each process: the libraries would otherwise use all, whatever the number of processes. And no hub.
ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


class CommandError(RuntimeError):
    """A command did not end well, or did not do the work it was asked for."""


def run_command(command: Sequence[str], limit_s: float = 1800) -> tuple[float, str]:
    """Seconds from start to end, and what it printed. Raises CommandError with its last words."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        raise CommandError(f"took more than {limit_s:.0f} s") from None
    seconds = time.perf_counter() - began
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise CommandError(f"ended with {done.returncode}: {words}")
    return seconds, done.stdout


@dataclass(frozen=True)
class Text:
    """One text in files of about equal size, a document on each line: a process each is busy to the end."""

    files: list[Path]
    bytes: int
    documents: int
    tokens: dict[str, int] = field(default_factory=dict)  # by tokenizer, without ends of documents

    @property
    def directory(self) -> Path:
        return self.files[0].parent


def documents_of(path: Path, limit: int) -> Iterator[str]:
    """Documents of a corpus until `limit` bytes: records of a .jsonl, <page>s of a wiki dump, else blocks of lines."""
    if any(suffix in (".jsonl", ".parquet") for suffix in path.suffixes):
        taken = 0
        for document in Corpus([path]):
            taken += len(document.text.encode())
            if taken > limit:
                return
            yield document.text
        return
    with path.open("rb") as stream:
        text = stream.read(limit).decode("utf-8", errors="ignore")
    separator = r"(?=^  <page>$)" if "\n  <page>\n" in text else r"(?<=\n)\n+"
    yield from filter(str.strip, re.split(separator, text, flags=re.MULTILINE))


def write_parts(directory: Path, documents: Sequence[str], parts: int) -> Text:
    """Every document to the file that is the smallest so far."""
    directory.mkdir(parents=True)
    files = [directory / f"part-{i}.jsonl" for i in range(parts)]
    sizes = [0] * parts
    with ExitStack() as stack:
        streams = [stack.enter_context(file.open("w", encoding="utf-8")) for file in files]
        for text in documents:
            smallest = sizes.index(min(sizes))
            streams[smallest].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            sizes[smallest] += len(text.encode())
    return Text(files, sum(sizes), len(documents))


def trained_model(text: Text, pieces: int, cache: Path) -> Path:
    """A SentencePiece model of this text, made by our own command; it is kept, as training takes a minute."""
    digest = hashlib.sha256()
    for file in text.files:
        digest.update(file.read_bytes())
    model = cache / f"sentencepiece-{pieces}-{digest.hexdigest()[:12]}.model"
    if not model.is_file():
        words = ["--vocab-size", str(pieces), "--split", "all", "--output", str(model)]
        run_command([sys.executable, "-m", "data_prep.train_tokenizer", str(text.directory), *words])
    return model


def command_of(way: str, tokenizer: Path, processes: int, text: Text, output: Path) -> list[str]:
    if way == OURS:
        words: list[object] = ["data_prep.build_shards", text.directory, "--tokenizer", tokenizer, "--output", output]
        if text.bytes < MIN_UNIT_BYTES * processes:  # else it starts fewer processes than the whole text has
            words += ["--unit-bytes", max(file.stat().st_size for file in text.files)]
        return [sys.executable, "-m", *map(str, words), "--processes", str(processes)]
    words = [f"benchmarks.tokenize_{way}", tokenizer, processes, output, *text.files]
    return [sys.executable, "-m", *map(str, words)]


@dataclass(frozen=True)
class Way:
    """One command with one number of processes."""

    name: str
    tokenizer: Path
    processes: int
    scratch: Path

    def run(self, text: Text, _: object = None) -> float:
        output = self.scratch / f"{self.name}-{self.processes}"
        shutil.rmtree(output, ignore_errors=True)
        seconds, said = run_command(command_of(self.name, self.tokenizer, self.processes, text, output))
        if self.name == OURS:
            tokens = sum(split.tokens for split in Manifest.read(output).splits.values()) - 2 * text.documents
        else:
            tokens = int(json.loads(said.splitlines()[-1])["tokens"]) - text.documents
        expected = text.tokens.setdefault(self.tokenizer.name, tokens)
        if abs(tokens - expected) > APART * expected:
            raise CommandError(f"made {tokens:,} tokens, another way made {expected:,} of the same text")
        shutil.rmtree(output)
        return seconds


def loops(tokenizer: Path, text: Text, processes: int, stack: ExitStack, **how: bool) -> Callable[[object], float]:
    """The bare loop in as many processes, each with its part of the documents, all at once: the slowest one's time."""
    parts = [[str(file) for file in text.files[i::processes]] for i in range(processes)]
    target = "benchmarks.tokenize_library:Loop"
    workers = [
        stack.enter_context(Worker(target, {"tokenizer": str(tokenizer), "files": part})) for part in parts if part
    ]
    pool = stack.enter_context(ThreadPoolExecutor(len(workers)))

    def run(_: object) -> float:
        answers = list(pool.map(lambda worker: worker.call("run", **how).result, workers))
        text.tokens.setdefault(tokenizer.name, sum(int(one["tokens"]) for one in answers))
        return max(float(one["seconds"]) for one in answers)

    return run


def measure_tokenizer(
    report: Report,
    name: str,
    tokenizer: Path,
    text: Text,
    few: Text,
    *,
    ways: Sequence[str],
    processes: Sequence[int],
    rounds: int,
    scratch: Path,
) -> None:
    """Figures, goals and rows of one tokenizer. A way that fails is told, and its goals are missed."""
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        tasks = {}
        for way, n in ((way, n) for way in (OURS, *ways) for n in processes):
            if way == OURS:  # next to it, what it is held against most closely: a shared machine's speed drifts
                tasks[_label(LIMIT, n)] = limit = Task(loops(tokenizer, text, n, stack))
                limit.run(None)  # once before all: what the text has of tokens is known from here on
            one, label = Way(way, tokenizer, n, scratch), _label(way, n)
            try:
                one.run(few)  # not kept: it fills caches
            except CommandError as error:
                failed[label] = str(error)
                continue
            guarded = partial(_guarded, failed, label)
            tasks[label] = Task(partial(guarded, partial(one.run, text)))
            tasks[f"{label}, start-up"] = Task(partial(guarded, partial(one.run, few)))
        tasks[FASTEST] = Task(loops(tokenizer, text, 1, stack, fast=True))
        tasks[FASTEST].run(None)
        seconds = take_turns(tasks, rounds, warmup=0)
    for label, reason in failed.items():
        report.note(f"{name}: {label} failed: {reason}")
        for part in (label, f"{label}, start-up"):
            seconds.pop(part, None)
    tell(report, name, seconds, text, few, ways, processes)


def _guarded(failed: dict[str, str], label: str, run: Callable[[object], float], prepared: object) -> float:
    if label in failed:
        return math.nan
    try:
        return run(prepared)
    except CommandError as error:
        failed[label] = str(error)
        return math.nan


def _label(way: str, processes: int) -> str:
    return f"{way}, {processes} process{'es' if processes > 1 else ''}"


def tell(
    report: Report,
    name: str,
    seconds: Seconds,
    text: Text,
    few: Text,
    ways: Sequence[str],
    processes: Sequence[int],
) -> None:
    rates: dict[str, list[float]] = {}  # MB/s by label
    for way in (LIMIT, OURS, *ways):
        for label in (_label(way, n) for n in processes):
            whole, starting = seconds.get(label, []), seconds.get(f"{label}, start-up", [])
            if way == LIMIT:
                rates[label] = [text.bytes / 1e6 / s for s in whole]
                continue
            net = [all_ - start for all_, start in zip(whole, starting, strict=True)]
            if min(net, default=1) <= 0:
                report.note(f"{name}: {label}: its start-up takes as long as the text: use more --megabytes")
                net = []
            rates[label] = [(text.bytes - few.bytes) / 1e6 / s for s in net]
            rates[f"{label}, with start-up"] = [text.bytes / 1e6 / s for s in whole]
            report.add(f"{name}: {label}, start-up", Figure.of(starting, "s"))
    for label, values in rates.items():
        report.add(f"{name}: {label}", Figure.of(values, "MB/s"))
    fastest = [text.bytes / 1e6 / s for s in seconds.get(FASTEST, [])]
    report.note(
        f"{name}: {FASTEST}: {report.add(f'{name}: {FASTEST}', Figure.of(fastest, 'MB/s'))}, of which ours has "
        f"{report.add(f'{name}: ours / {FASTEST}, 1', ratio(rates.get(_label(OURS, 1), []), fastest))}"
    )
    for way in (LIMIT, OURS, *ways):
        cells: list[object] = []
        for n in processes:
            label = _label(way, n)
            cell = str(report.figures[f"{name}: {label}"])
            if way != LIMIT:
                whole_rate, start = (
                    report.figures[f"{name}: {label}, {what}"] for what in ("with start-up", "start-up")
                )
                cell += f"; {whole_rate} with the start-up of {start}"
            cells.append(cell)
            if way != OURS:
                report.add(f"{name}: ours / {way}, {n}", ratio(rates[_label(OURS, n)], rates[label]))
            if way == LIMIT and n == 1:
                report.goal(f"{name}: ours / {way}, {n}", AT_LEAST, OF_LIMIT)
            elif way in ways:
                report.goal(f"{name}: ours / {way}, {n}", AT_LEAST, AHEAD)
        if {1, 2} <= set(processes):
            scaling = report.add(f"{name}: {way}, 2 / 1", ratio(rates[_label(way, 2)], rates[_label(way, 1)]))
            cells.append(scaling)
            if way == OURS:
                report.goal(f"{name}: {way}, 2 / 1", AT_LEAST, SCALING)
        report.row(f"{name}: {PEERS.get(way, way)}", *cells, *[""] * (len(report.columns) - 1 - len(cells)))


def measure_tokenization(
    report: Report,
    tokenizers: dict[str, Path],
    text: Text,
    few: Text,
    *,
    peers: Sequence[str],
    processes: Sequence[int],
    rounds: int,
    scratch: Path,
) -> None:
    heads = [f"{n} process{'es' if n > 1 else ''}" for n in processes] + ["2 processes / 1"] * (
        {1, 2} <= set(processes)
    )
    heads = [f"**{head}**" for head in heads] + [""] * (len(report.columns) - 1 - len(heads))
    report.row("**tokenization, text a second**", *heads)
    for name, tokenizer in tokenizers.items():
        ways = [peer for peer in peers if peer != "datatrove" or tokenizer.suffix == ".json"]
        if len(ways) < len(peers):
            report.note(f"{name}: datatrove reads a tokenizer.json only, it has no form for a SentencePiece model")
        measure_tokenizer(
            report, name, tokenizer, text, few, ways=ways, processes=processes, rounds=rounds, scratch=scratch
        )
    report.note(
        f"the text: {text.bytes / 1e6:.1f} MB, {text.documents:,} documents in {len(text.files)} files; tokens: "
        + ", ".join(f"{name} {text.tokens.get(path.name, 0):,}" for name, path in tokenizers.items())
    )
    report.note(
        "every process has one core (the libraries' own threads are off); ours is the whole build_shards with its "
        "hashes, checks and manifest; Megatron's procedure writes in one more process than it says"
    )
