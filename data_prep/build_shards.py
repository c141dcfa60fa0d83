"""Turns raw corpora into a dataset of token shards: one directory with splits, tokenizer and manifest."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from data_prep import pool
from data_prep.command import available_cores, new_parser, run
from data_prep.corpus import Corpus, add_split_arguments, chosen_rule, split_files
from data_prep.merge import UselessError, merge, require_room
from data_prep.parts import Counts, Failed, Progress, Task, finished, left_out, sweep, write_part
from data_prep.plan import PLAN, Plan, agree, has_parts, name_of, planned_tokenizer, work_of
from data_prep.progress import Meter
from data_prep.store import Store
from data_prep.streams import CorpusError, is_url
from mamba_pretrain.data import encodings
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from mamba_pretrain.data.writer import token_dtype

DESCRIPTION = """\
Tokenize corpora into a dataset directory of train, validation and test shards (Megatron's .bin and .idx),
with a copy of the tokenizer and a manifest of hashes and counts. The directory appears when it is complete, or not at
all. Until then finished parts wait in OUTPUT.work: the same command goes on after a kill, a full disk or a bad file,
and ends in the same bytes. Examples:

    python -m data_prep.build_shards corpora/sotu.jsonl.gz --tokenizer bytes --output data/sotu \\
        --split-fractions 0.9 0.1 0
    python -m data_prep.show_shards data/sotu --split train --document 0

Over machines that share OUTPUT, or with an OUTPUT such as s3://bucket/data/pile (see slurm/prep_array.sbatch):

    python -m data_prep.build_shards pile/ --tokenizer 20B_tokenizer.json --output data/pile --task 0/16   # to 15/16
    python -m data_prep.merge_shards data/pile
"""
RUN_LOCK: Final = "run.lock"
SHOWN: Final = 20  # failures that a message lists
HOW_NOT_WHAT: Final = frozenset(("output", "processes", "task", "unit_bytes", "overwrite"))  # not in the manifest


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    overwrite: bool = False,
    processes: int = 1,
    **what: Any,
) -> Manifest:
    """Writes the dataset `output` and returns its manifest; with one process, in this one. `what`: Plan.make's options.

    Raises CorpusError, ShardError, TokenizerError; then finished parts are kept in OUTPUT.work, and a call with the
    same arguments goes on with them. The dataset does not depend on `processes`, `unit_bytes`, or how often it went on.
    """
    require_room(output, overwrite)
    store = work_of(output)
    plan = _plan(corpus, tokenizer, store, what)
    with store.lock(RUN_LOCK):
        agree(store, plan, tokenizer, alone=True)
        with _kept(store, alone=True):
            parts = make_parts(corpus, store, plan, range(len(plan.parts)), processes)
            manifest = merge_with_bar(output, store, plan, parts, overwrite)
        store.remove_all(first=PLAN)
    return manifest


def build_task(
    corpus: Corpus, tokenizer: Tokenizer, output: str | Path, *, task: tuple[int, int], processes: int, **what: Any
) -> int:
    """Makes every n-th part from the i-th on, task (i, n), and returns how many that are."""
    index, count = task
    require_room(output, overwrite=True)
    store = work_of(output)
    plan = _plan(corpus, tokenizer, store, what)
    with store.lock(RUN_LOCK, shared=True), store.lock(f"task-{index}-of-{count}.lock"):
        agree(store, plan, tokenizer, alone=False)
        with _kept(store, alone=False):
            return len(make_parts(corpus, store, plan, range(index, len(plan.parts), count), processes))


def _plan(corpus: Corpus, tokenizer: Tokenizer, store: Store, what: dict[str, Any]) -> Plan:
    """In units as large as those of a build that was begun, where their size is left open."""
    if what.get("unit_bytes") is None and PLAN in store.names():
        what = {**what, "unit_bytes": Plan.read(store).unit_bytes}
    return Plan.make(corpus, tokenizer, **what)


def merge_with_bar(output: str | Path, store: Store, plan: Plan, parts: dict[int, Counts], overwrite: bool) -> Manifest:
    total = sum(counts.tokens for counts in parts.values()) * token_dtype(plan.tokenizer.vocab_size).itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None) as bar:
        return merge(output, store, plan, parts, overwrite=overwrite, progress=bar.update)


def make_parts(corpus: Corpus, store: Store, plan: Plan, chosen: range, processes: int) -> dict[int, Counts]:
    """The `chosen` parts, those that are not there yet made now. Raises CorpusError that lists all that failed."""
    sweep(store, chosen)
    parts = {part: counts for part, counts in finished(store, plan).items() if part in chosen}
    tasks = deque(Task(part) for part in chosen if part not in parts)
    apart = processes > 1 and (len(tasks) > 1 or corpus.on_error == "skip-files")  # an input may end its process
    processes = min(processes, len(tasks))
    failed: dict[int, str] = {}
    at: dict[int, int] = {}  # the unit that each part is at
    try:
        with Meter(plan, chosen, parts) as meter:

            def report(task: Task, progress: Progress) -> None:
                at[task.part] = progress.unit
                meter.report(task.part, progress)

            ended: Generator[tuple[Any, Any]]
            if apart:
                planned_tokenizer(store, plan)  # what is wrong with it is better said once, here
                encodings.compiled()
                ended = pool.run(tasks, processes, _worker, (corpus, plan, store), report)
            else:
                ended = _in_process(tasks, corpus, plan, store, report)
            with contextlib.closing(ended):
                for task, result in ended:
                    if isinstance(result, Counts):
                        parts[task.part] = result
                    elif isinstance(result, Failed) and result.disk_full:
                        raise ShardError(_disk_full(result.reason, store))
                    elif isinstance(result, Failed):
                        failed[task.part] = result.reason
                    else:
                        unit = at.get(task.part, plan.units_of(task.part)[0])
                        reason = left_out(name_of(plan.units[unit]), result.reason)
                        if corpus.on_error != "skip-files" or not result.died or unit in task.left_out:
                            failed[task.part] = reason
                        elif unit in task.fatal:
                            more = {unit: f"{reason}, and another one before"}
                            tasks.append(replace(task, left_out={**task.left_out, **more}))
                        else:  # what ended it may not have been the input
                            tasks.append(replace(task, fatal=task.fatal | {unit}))
                    meter.finish(task.part, parts.get(task.part))
    except pool.WorkerError as error:
        raise ShardError(str(error)) from error
    finally:
        sweep(store, chosen)
    if failed:
        raise CorpusError(_failures(plan, failed, len(chosen)))
    return parts


def _worker(corpus: Corpus, plan: Plan, store: Store) -> Callable[[Task, Callable[[Progress], None]], Counts | Failed]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core's
    logging.getLogger("mamba_pretrain").setLevel(logging.ERROR)  # the parent has warned
    return partial(write_part, corpus=corpus, plan=plan, store=store, encodings=_encodings(store, plan))


def _encodings(store: Store, plan: Plan) -> encodings.Encodings:
    tokenizer = planned_tokenizer(store, plan)
    return encodings.Encodings(tokenizer, token_dtype(tokenizer.vocab_size))


def _in_process(
    tasks: deque[Task], corpus: Corpus, plan: Plan, store: Store, report: Callable[[Task, Progress], None]
) -> Generator[tuple[Task, Counts | Failed]]:
    ready = _encodings(store, plan)
    while tasks:
        task = tasks.popleft()
        yield (
            task,
            write_part(task, partial(report, task), corpus=corpus, plan=plan, store=store, encodings=ready),
        )


@contextlib.contextmanager
def _kept(store: Store, *, alone: bool) -> Iterator[None]:
    """Says that finished parts are kept, where the block raises; if `alone`, removes the work directory without any."""
    try:
        yield
    except BaseException as error:
        kept = f"what is finished is kept in {store}: the same command goes on from there"
        if alone and (isinstance(error, UselessError) or not has_parts(store)):
            store.remove_all(first=PLAN)
            raise
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        if isinstance(error, SystemExit):
            print(kept, file=sys.stderr)
        if isinstance(error, (CorpusError, ShardError, TokenizerError, OSError)):
            raise ShardError(f"{error}\n{kept}") from error
        raise


def _failures(plan: Plan, failed: dict[int, str], n_parts: int) -> str:
    reasons = [failed[part] for part in sorted(failed)]
    if len(reasons) == n_parts == 1:
        return reasons[0]
    shown = [f"- {reason}" for reason in reasons[:SHOWN]]
    shown += [f"- and {len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else []
    return "\n".join(
        [
            f"{len(failed)} of {n_parts} parts failed:",
            *shown,
            "start the same command again, and these alone are done again; or, with --on-error skip-files, files that "
            "cannot be read are left out and named in the manifest",
        ]
    )


def _disk_full(reason: str, store: Store) -> str:
    place = Path(tempfile.gettempdir() if is_url(str(store)) else str(store))
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    return (
        f"the disk is full: {reason}. {free / 1e6:,.1f} MB are free on its file system (a quota or ulimit -f may allow "
        "less): make room, or choose an output elsewhere"
    )


def _require_outside(output: str | Path, inputs: Sequence[str | Path]) -> None:
    if is_url(str(output)):
        return
    for place in (Path(output), Path(str(work_of(output)))):
        for path in inputs:
            if not is_url(str(path)) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)):
                raise ShardError(f"{place} holds the input {path}, which it would replace: choose another output")


def summary(manifest: Manifest) -> str:
    """A table of the splits, and a sentence for everything a reader should know before training on them."""
    rows = [f"{'split':<12}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'tokens/byte':>13}"]
    rows += [
        f"{split:<12}{info.documents:>12,}{info.tokens:>16,}"
        + ("" if info.text_bytes is None else f"{info.text_bytes:>16,}{info.tokens / max(info.text_bytes, 1):>13.4f}")
        for split, info in manifest.splits.items()
    ]
    rows += [f"warning: the {split} split is empty" for split, info in manifest.splits.items() if not info.documents]
    for count, what in (
        (manifest.skipped_records, "invalid records were left out"),
        (manifest.empty_documents, "records without text were left out"),
        (manifest.selection.too_short, "documents shorter than --min-bytes were left out"),
        (manifest.selection.too_long, "documents longer than --max-bytes were left out"),
        (
            manifest.selection.duplicates,
            "documents repeat the text of an earlier one, and "
            + ("were left out" if manifest.selection.duplicates_dropped else "are in; --drop-duplicates drops them"),
        ),
        (
            sum(info.not_round_trip for info in manifest.splits.values()),
            "documents do not decode back to their own bytes: the tokenizer loses text",
        ),
    ):
        rows += [f"warning: {count:,} {what}"] if count else []
    rows += [f"warning: left out: {reason}" for reason in manifest.selection.left_out]
    return "\n".join(rows)


def parser() -> ArgumentParser:
    result = new_parser("data_prep.build_shards", DESCRIPTION)
    Corpus.add_arguments(result)
    result.add_argument(
        "--tokenizer", required=True, help="`bytes`, a SentencePiece .model, a tokenizer.json, or a directory with one"
    )
    result.add_argument("--eod", help="special token that ends a document, where a tokenizer.json leaves it open")
    result.add_argument("--output", required=True, type=place, help="dataset directory to make, or a URL such as s3://")
    add_split_arguments(result)
    result.add_argument(
        "--no-bos",
        action="store_true",
        help="store tokens + [eod] rather than [bos] + tokens + [eod]. With bos, and state reset where documents "
        "begin, the first token is predicted too, so that bits per byte count every byte",
    )
    result.add_argument("--min-bytes", type=int, default=0, help="leave out documents with less UTF-8 text")
    result.add_argument(
        "--max-bytes",
        type=int,
        default=0,
        help="leave out documents with more (default: no bound). In memory one takes 8 times its size and "
        "more: 26 with SentencePiece, 125 with a tokenizer.json other than GPT-NeoX's and GPT-2's",
    )
    result.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out documents whose text is exactly that of an earlier one; they are counted in any case",
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing output, once the new is complete")
    result.add_argument(
        "--processes",
        type=int,
        default=available_cores(),
        help="workers (default: as many as this process may use cores)",
    )
    result.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="make only every N-th part from the I-th on (I counts from 0); merge_shards makes the dataset of all",
    )
    result.add_argument(
        "--unit-bytes",
        type=int,
        metavar="N",
        help="input in a part, the least that is done again after a kill (default: 1/4096 of all, at least 2 MiB)",
    )
    return result


def place(text: str) -> str | Path:
    text = text.removeprefix("file://") if text.startswith("file:///") else text  # as inputs are
    return text if is_url(text) else Path(text)


def _task(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/16")
    return int(index), int(count)


def content_command(arguments: Namespace) -> list[str]:
    """The command for the manifest: what decides the dataset's content, and is not the default."""
    words = ["python", "-m", "data_prep.build_shards", *map(str, arguments.inputs)]
    for action in parser()._actions:
        value = getattr(arguments, action.dest, action.default)
        plain = list(value) if isinstance(value, (list, tuple)) else [value]
        plain = ["=".join(one) if isinstance(one, tuple) else one for one in plain]
        default = list(action.default) if isinstance(action.default, (list, tuple)) else [action.default]
        if action.option_strings and action.dest not in HOW_NOT_WHAT and plain != default:
            words += [action.option_strings[-1], *([] if action.nargs == 0 else map(str, plain))]
    return words


def body(arguments: Namespace) -> int:
    began = time.perf_counter()
    if arguments.processes < 1:
        raise ShardError(f"--processes {arguments.processes}: expected 1 or more")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core, whichever it is
    corpus = Corpus.from_arguments(arguments, split_files(arguments))
    _require_outside(
        arguments.output, [*corpus.files, *([] if arguments.tokenizer == "bytes" else [arguments.tokenizer])]
    )
    what: Any = {
        "corpus": corpus,
        "tokenizer": load_tokenizer(arguments.tokenizer, eod=arguments.eod),
        "rule": chosen_rule(arguments),
        "add_bos": not arguments.no_bos,
        "min_bytes": arguments.min_bytes,
        "max_bytes": arguments.max_bytes,
        "drop_duplicates": arguments.drop_duplicates,
        "unit_bytes": arguments.unit_bytes,
        "command": content_command(arguments),
    }
    if arguments.task and arguments.overwrite:
        raise ShardError("--overwrite goes with the command that makes the dataset: with merge_shards, not with --task")
    if arguments.task:
        index, count = arguments.task
        n_parts = build_task(output=arguments.output, task=arguments.task, processes=arguments.processes, **what)
        print(
            f"task {index}/{count}: its {n_parts} parts are finished, {time.perf_counter() - began:,.1f} s. When all "
            f"{count} tasks are: python -m data_prep.merge_shards {arguments.output}"
        )
        return 0
    manifest = build(output=arguments.output, overwrite=arguments.overwrite, processes=arguments.processes, **what)
    seconds = time.perf_counter() - began
    text_mb = sum(info.text_bytes or 0 for info in manifest.splits.values()) / 1e6
    print(summary(manifest))
    print(f"{arguments.output}: {text_mb:,.1f} MB of text in {seconds:,.1f} s, {text_mb / seconds:,.1f} MB/s")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
