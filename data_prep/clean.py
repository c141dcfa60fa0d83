"""Filters and removal of near duplicates by datatrove, over any corpus, before it is tokenized."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from data_prep.command import available_cores, new_parser, run
from data_prep.corpus import Corpus
from data_prep.records import Unit
from data_prep.streams import CorpusError
from data_prep.workspace import reveal, workspace

DESCRIPTION = """\
Clean a corpus with datatrove before it is tokenized: filters, in the order given, then MinHash removal of near
duplicates. The output directory, which appears when it is complete, holds

    kept/*.jsonl.gz             what build_shards takes
    removed/STAGE/*.jsonl.gz    what each stage took out, with the reason in metadata.filter_reason
    report.json                 what was asked for, and how many documents each stage dropped, and why
    logs/                       datatrove's own, by stage and task

An interrupted or killed run goes on with the tasks that are not complete. A worker that the system kills is named with
its task, once the stage's other tasks are done. Example, FineWeb's recipe as far as it needs no downloads:

    python -m data_prep.clean web/*.jsonl.gz --output data/clean --minhash \\
        --filters gopher-repetition c4-fineweb gopher-quality fineweb-quality
    python -m data_prep.build_shards data/clean/kept --tokenizer tokenizer.json --output data/web

Filters (all at the defaults of their papers, for English):
    gopher-repetition  lines, paragraphs and n-grams that repeat (arXiv 2112.11446, table A1)
    gopher-quality     length, word length, signs, bullets, ellipses, stop words (the same paper)
    c4-quality         lines without final punctuation are cut out; braces, lorem ipsum, under 5 sentences
    c4-fineweb         the same, lines without final punctuation stay
    c4-paragraphs      under three paragraphs of 200 characters (mC4)
    fineweb-quality    lines without final punctuation, short lines, repeated lines (arXiv 2406.17557)
"""
NAMES: Final = ("gopher-repetition", "gopher-quality", "c4-quality", "c4-fineweb", "c4-paragraphs", "fineweb-quality")
MAX_TASKS: Final = 1000  # MinHash has a file open for each
SETTINGS, REPORT = "settings.json", "report.json"


def clean(
    corpus: Corpus,
    output: Path,
    *,
    filters: Sequence[str] = (),
    minhash: tuple[int, int, int] | None = None,
    workers: int = 1,
    tasks: int | None = None,
) -> dict[str, Any]:
    """Makes the directory `output` and returns its report. `minhash`: (words in an n-gram, buckets, hashes in each).

    Raises CorpusError; then `OUTPUT.part` holds what is complete, for the next run with the same arguments.
    """
    steps = _steps()
    units = corpus.units()
    tasks = min(tasks or MAX_TASKS, len(units), MAX_TASKS)
    settings = {
        "filters": list(filters),
        "minhash": minhash and dict(zip(("ngram", "buckets", "hashes"), minhash, strict=True)),
        "tasks": tasks,
        "inputs": corpus.files
        if len(corpus.files) <= 100
        else [*corpus.files[:100], f"... {len(corpus.files)} in all"],
        "inputs_sha256": _digest(units, corpus),
        "datatrove": importlib.metadata.version("datatrove"),
    }
    with workspace(output.absolute(), CorpusError) as part:
        _require_same(settings, part / SETTINGS)
        result, scratch = part / "result", part / "scratch"
        kept, removed = result / "kept", result / "removed"
        filtered = part / "filtered" if minhash else kept
        reader = steps.CorpusReader(corpus, units)
        stages = {"filters": (tasks, steps.filter_steps(reader, list(filters), str(removed), str(filtered)))}
        if minhash:
            ngram, buckets, hashes = minhash
            stages |= steps.minhash_stages(
                *map(str, (filtered, scratch, removed, kept)), tasks=tasks, ngram=ngram, buckets=buckets, hashes=hashes
            )
        for name, (n, pipeline) in stages.items():
            steps.run_stage(pipeline, n, workers, result / "logs" / name)
            if not any(filtered.glob("*.jsonl.gz")):
                raise CorpusError(f"no document passed the filters; {removed} has them all, with the reasons")
        report = {"settings": settings, "stages": _counts(result / "logs", list(stages))}
        (result / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        reveal(result, output.absolute())
    return report


def _steps() -> Any:
    try:
        importlib.import_module("orjson")  # datatrove's writer asks for it, late
        import data_prep.clean_steps
    except ImportError as error:
        raise CorpusError(f"cleaning takes datatrove ({error}): pip install 'mamba-pretrain[clean]'") from error
    return data_prep.clean_steps


def _digest(units: Sequence[Unit], corpus: Corpus) -> str:
    parts = [dataclasses.astuple(unit) for unit in units], dataclasses.astuple(corpus.reading), corpus.on_error
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _require_same(settings: dict[str, Any], path: Path) -> None:
    if not path.exists():
        draft = path.with_suffix(".new")  # a kill leaves no half of it under its name
        draft.write_text(json.dumps(settings))
        draft.replace(path)
        return
    begun = json.loads(path.read_text())
    if different := [name for name in settings if json.loads(json.dumps(settings[name])) != begun.get(name)]:
        raise CorpusError(
            f"{path.parent} holds what another run began, with other {', '.join(different)}: remove it to begin anew, "
            "give the same options to go on, or choose another output"
        )


def _counts(logs: Path, stages: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """stage -> step -> count, summed over tasks: datatrove's own sum leaves out the tasks of earlier runs."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for stage in stages:
        steps: dict[str, Counter[str]] = {}
        for path in sorted((logs / stage / "stats").glob("*.json")):
            for step in json.loads(path.read_text()):
                counter = steps.setdefault(step["name"].encode("ascii", "ignore").decode().strip(" -:"), Counter())
                for label, value in step["stats"].items():
                    counter[label] += int(value["total"] if isinstance(value, dict) else value)
        found[stage] = {name: dict(counter) for name, counter in steps.items()}
    return found


def parser() -> ArgumentParser:
    result = new_parser("data_prep.clean", DESCRIPTION)
    Corpus.add_arguments(result)
    result.add_argument("--output", required=True, type=Path, help="directory to make")
    result.add_argument("--filters", nargs="+", choices=NAMES, default=[], metavar="FILTER", help=", ".join(NAMES))
    result.add_argument("--minhash", action="store_true", help="remove near duplicates, but for one of each cluster")
    result.add_argument("--ngram", type=int, default=5, help="words that count as one feature (default: 5)")
    result.add_argument("--buckets", type=int, default=14, help="of hashes; one equal bucket is a match (default: 14)")
    result.add_argument(
        "--hashes", type=int, default=8, help="per bucket (default: 8; with 14 buckets similarity 0.8 is found at 92%%)"
    )
    result.add_argument("--workers", type=int, default=available_cores(), help="default: all cores")
    result.add_argument("--tasks", type=int, help=f"parts to divide the work into, at most {MAX_TASKS} (default)")
    return result


def body(arguments: Namespace) -> int:
    if not arguments.filters and not arguments.minhash:
        raise CorpusError("nothing to do: give --filters, --minhash or both")
    for option in ("ngram", "buckets", "hashes", "workers", "tasks"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise CorpusError(f"--{option} {value}: expected 1 or more")
    try:
        report = clean(
            Corpus.from_arguments(arguments),
            arguments.output,
            filters=arguments.filters,
            minhash=(arguments.ngram, arguments.buckets, arguments.hashes) if arguments.minhash else None,
            workers=arguments.workers,
            tasks=arguments.tasks,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the tasks that are not complete", file=sys.stderr)
        return 130
    print(summary(report))
    print(f"{arguments.output}/kept is ready for build_shards, {arguments.output}/removed for a look")
    return 0


def summary(report: dict[str, Any]) -> str:
    """A line for each step that may drop documents, and for each of its reasons."""
    lines = [f"{'step':<44}{'documents':>12}{'dropped':>12}"]
    for stage in report["stages"].values():
        for step, counts in stage.items():
            if "corpus" in step:
                lines.append(f"{step:<44}{counts.get('documents', 0):>12,}")
                lines += [f"    {k:<40}{'':>12}{counts[k]:>12,}" for k in ("invalid", "empty") if counts.get(k)]
                lines += [f"    {k}" for k in counts if k.startswith("left out, ")]
            elif "forwarded" in counts or "dropped" in counts:
                lines.append(f"{step:<44}{counts.get('total', 0):>12,}{counts.get('dropped', 0):>12,}")
                lines += [f"    {k[8:]:<40}{'':>12}{n:>12,}" for k, n in counts.items() if k.startswith("dropped_")]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
