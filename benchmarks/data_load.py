"""Loading: batches a second beside numpy and GPTDataset; the start on a trillion tokens; verify_shards."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import AT_LEAST, AT_MOST, Figure, Report, Task, rates, ratio, take_turns
from benchmarks.data_tokenize import CommandError, run_command
from benchmarks.synthetic import DTYPE, write_holes, write_letters
from benchmarks.worker import Worker, WorkerError
from mamba_pretrain.data.shards import Shard

OURS, LIMIT, VIEWS, PEER = "ours", "numpy gather", "numpy gather, labels a view", "GPTDataset"
TARGETS = {
    OURS: "benchmarks.loading:Ours",
    LIMIT: "benchmarks.loading:Gather",
    VIEWS: "benchmarks.loading:GatherViews",
    PEER: "benchmarks.loading_megatron:Megatron",
}
# Reasons: beside the copy stand document boundaries, labels and a look at all ids; nobody should notice a start.
OF_LIMIT, START_S, START_MB = 0.7, 1.0, 100.0
INDEX_LIMIT_S = 3600  # of GPTDataset's indices, which take minutes
SAMPLE_BYTES, DOCUMENT_BYTES = 16, 24  # of memory that they take at their peak, generously, and less on disk


def measure_loading(report: Report, options: Any, scratch: Path) -> None:
    for asked in options.corpus_tokens:
        data = scratch / "letters"
        write_letters(data, asked)
        documents = Shard(data / "train").n_documents
        heads = ("tokens a second", "ours / this", "", "")
        report.row(f"**loading, of {documents:,} documents**", *(f"**{head}**" if head else "" for head in heads))
        of = "" if asked == options.corpus_tokens[0] else f" of {documents} documents"
        for length, batch_tokens in product(options.lengths, options.batch_tokens):
            measure_rows(report, options, length, max(batch_tokens // length, 1), of, data, scratch)
        shutil.rmtree(data)
    report.note(
        f"loading: tokens of {DTYPE.name} in documents of log-normal length around 1,000, in the system's cache; one "
        "thread each, no loader processes; ours resets documents and masks their last labels, the gather and "
        "GPTDataset (its default reset_position_ids=False; create_attention_mask=False) know no documents; labels that "
        "are a view of the inputs' array cannot be masked"
    )


def measure_rows(report: Report, options: Any, length: int, rows: int, of: str, data: Path, scratch: Path) -> None:
    what = f"{rows} x {length}{of}"
    count = max(options.load_tokens // (rows * length), 1)
    expected = count * rows * length
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, target in TARGETS.items():
            try:
                worker = stack.enter_context(Worker(target, {}))
                cache = {"cache": str(data / f"indices-{length}")} if name == PEER else {}
                worker.call("open", directory=str(data), length=length, rows=rows, **cache)
            except WorkerError as error:
                _failed(report, f"{what}: {name} tokens", error)
                continue
            workers[name] = worker

        def run(worker: Worker, _: object) -> float:
            answer = worker.call("run", count=count)
            assert answer.result == expected, f"{answer.result} tokens instead of {expected}"
            return answer.seconds

        seconds = take_turns({name: Task(partial(run, worker)) for name, worker in workers.items()}, options.rounds)
    for name in workers:
        cells: list[object] = [report.add(f"{what}: {name} tokens", rates(expected, seconds[name]))]
        if name != OURS:
            cells.append(report.add(f"{what}: ours / {name}", ratio(seconds[name], seconds.get(OURS, []))))
        report.row(f"{rows} rows of {length:,}: {name}", *cells, *[""] * (4 - len(cells)))
    report.goal(f"{what}: ours / {LIMIT}", AT_LEAST, OF_LIMIT)


def _failed(report: Report, figure: str, error: Exception) -> None:
    """A side without a figure is a goal missed: what was to be beside ours is not."""
    report.note(f"{figure}: failed: {error}")
    report.goal(figure, AT_LEAST, 0)


def peer_tokens(asked: int, document_tokens: int, length: int, scratch: Path) -> int:
    """As many tokens as GPTDataset's indices have memory and disk for, a power of ten under what was asked."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):  # the system's cache can be given back, too
            available = int(line.split()[1]) * 1024
    room = 0.8 * min(available, shutil.disk_usage(scratch).free)
    tokens = asked
    while tokens > 10 * document_tokens and needed(tokens, document_tokens, length) > room:
        tokens //= 10
    return tokens


def needed(tokens: int, document_tokens: int, length: int) -> int:
    return tokens // length * SAMPLE_BYTES + tokens // document_tokens * DOCUMENT_BYTES


def measure_start(report: Report, options: Any, scratch: Path) -> None:
    """Ours in a fresh process each round; the peer's indices once, as they take minutes."""
    data, length = scratch / "holes", options.lengths[0]
    rows = max(options.batch_tokens[0] // length, 1)
    write_holes(data, options.start_tokens, options.start_document)
    index = (data / "train.idx").stat().st_size

    def start(target: str, **more: object) -> tuple[float, ...]:
        """Seconds, and megabytes of memory: the most of all, and what is held at the end without mapped files."""
        with Worker(target, {}, limit_s=INDEX_LIMIT_S) as worker:
            before = float(worker.call("own_mib").result)
            answer = worker.call("open", directory=str(data), length=length, rows=rows, **more)
            own = float(worker.call("own_mib").result) - before
            return answer.seconds, answer.above_mib * 2**20 / 1e6, own * 2**20 / 1e6

    def tell(label: str, side: str, measured: Sequence[tuple[float, ...]], tokens: int) -> None:
        units = (("s", "s"), ("MB", "MB"), ("MB of its own", "MB"))
        cells = [
            report.add(f"start: {side} {name}", Figure.of([one[i] for one in measured], unit))
            for i, (name, unit) in enumerate(units)
        ]
        report.row(label, *cells, report.add(f"start: {side} tokens", Figure.of([tokens], "tokens")))

    report.row(
        "**start, imports excluded**", "**until the first batch**", "**memory at its peak**", "**of its own**", "**of**"
    )
    measured: list[tuple[float, ...]] = []
    try:
        measured = [start(TARGETS[OURS]) for _ in range(options.rounds)]
    except WorkerError as error:
        report.note(f"start: ours failed: {error}")
    tell(OURS, OURS, measured, options.start_tokens)
    report.goal("start: ours s", AT_MOST, START_S)
    report.goal("start: ours MB", AT_MOST, START_MB)
    tokens = peer_tokens(options.start_tokens, options.start_document, length, scratch)
    if tokens < options.start_tokens:
        report.note(
            f"start: GPTDataset on {tokens:,} tokens: its indices of more have no room in this machine's memory"
        )
        shutil.rmtree(data)
        write_holes(data, tokens, options.start_document)
    try:
        once = start(TARGETS[PEER], cache=str(scratch / "indices-start"))
    except WorkerError as error:
        _failed(report, "start: GPTDataset s", error)
    else:
        on_disk = sum(file.stat().st_size for file in (scratch / "indices-start").iterdir()) / 1e6
        tell("GPTDataset, building its indices", PEER, [once], tokens)
        report.add("start: GPTDataset MB on disk", Figure.of([on_disk], "MB"))
        report.note(f"start: GPTDataset's indices take {on_disk:,.0f} MB on disk; they grow with samples and documents")
    report.note(
        f"start: {options.start_tokens:,} tokens, all 0, in a sparse file, documents of {options.start_document:,}, an "
        f"index of {index / 1e6:,.0f} MB; rows of {length:,}; the peak counts pages of mapped files, which the system "
        "shares and takes back, the process's own memory does not"
    )
    for made in (data, scratch / "indices-start"):
        shutil.rmtree(made, ignore_errors=True)


def measure_verify(report: Report, options: Any, scratch: Path) -> None:
    """The command on two datasets and, in the same round, on two of a single document, which is its start-up."""
    data, small = ([scratch / f"{name}-{i}" for i in range(2)] for name in ("verified", "verified-small"))
    for large, tiny in zip(data, small, strict=True):
        write_letters(large, options.verify_tokens // 2)
        write_letters(tiny, 1)
    files = [directory / f"train.{suffix}" for directory in data for suffix in ("bin", "idx")]
    gigabytes = sum(file.stat().st_size for file in files) / 1e9

    def verify(directories: Sequence[Path], workers: int, _: object = None) -> float:
        words = ["data_prep.verify_shards", *map(str, directories), "--workers", str(workers)]
        return run_command([sys.executable, "-m", *words])[0]

    tasks = {"sha256sum": Task(lambda _: run_command(["sha256sum", *map(str, files)])[0])}
    for n in options.processes:
        tasks[f"ours, {n}"] = Task(partial(verify, data, n))
        tasks[f"ours, {n}, start-up"] = Task(partial(verify, small, n))
    report.row("**verify_shards**", "**bytes a second**", "**with start-up**", "**ours / sha256sum**", "**start-up**")
    try:
        seconds = take_turns(tasks, options.rounds)
    except (CommandError, OSError) as error:
        _failed(report, f"verify: ours, {options.processes[0]}", error)
        return
    others = seconds["sha256sum"]
    report.row("sha256sum", report.add("verify: sha256sum", _rate(gigabytes, others)), "", "", "")
    for n in options.processes:
        whole, starting = seconds[f"ours, {n}"], seconds[f"ours, {n}, start-up"]
        net = [all_ - start for all_, start in zip(whole, starting, strict=True)]
        if min(net) <= 0:
            report.note(f"verify: ours, {n}: its start-up takes as long as the data: use more --verify-tokens")
            net = []
        report.row(
            f"ours, {n} worker{'s' if n > 1 else ''}",
            report.add(f"verify: ours, {n}", _rate(gigabytes, net)),
            report.add(f"verify: ours, {n}, with start-up", _rate(gigabytes, whole)),
            report.add(f"verify: ours / sha256sum, {n}", ratio(others, net)),
            report.add(f"verify: ours, {n}, start-up", Figure.of(starting, "s")),
        )
    report.note(
        f"verify: {gigabytes:.2f} GB of two datasets, in the system's cache; ours also looks at every token and the "
        "whole index; a worker of it reads in one thread and hashes in another"
    )
    for made in (*data, *small):
        shutil.rmtree(made)


def _rate(gigabytes: float, seconds: Sequence[float]) -> Figure:
    return Figure.of([gigabytes / s for s in seconds], "GB/s")
