"""How fast are the engines for several ranks, and saving and loading, on this machine?

Real ranks over gloo, one thread each, take the steps that mamba_pretrain.train takes, on one corpus with one global
batch, each in turns with one process that does all of it and with two that do half each and do not talk.

1. A step: its time; the time in communication (every operation of torch.distributed, waiting for the other rank
   included); what is left, beside a rank's share of the work: the two silent processes' step, with the optimizer's part
   of it divided where the optimizer is sharded. Goal: the engine adds at most a quarter. For information the same in
   processor time of the thread that computes, which other programs on the machine disturb less.
2. Bytes that a rank sends in a step, from the operations' tensors on a ring, with one micro-batch and with two, beside
   the least that the engine's stage allows (goal: 1.1 times; less than 1 means that it keeps more than its stage does),
   and beside what `mamba-pretrain plan` says (goal: within 2%). For information, what TCP sent: gloo's reduce-scatter
   is an all-reduce underneath.
3. A checkpoint of about 1 GB: saving, verifying and loading it from disk, beside dd of as many bytes on the same disk
   (conv=fsync; reads with the files out of the system's cache). Goals: half of dd's rate. Saving in the background: for
   how long training stands still, until when the checkpoint is complete, and the steps meanwhile. Goal: it stands still
   for at most a third of the time of a blocking save.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import disk
from benchmarks.common import (
    AT_LEAST,
    AT_MOST,
    Figure,
    Report,
    Seconds,
    Task,
    arguments,
    begin,
    finish,
    ratio,
    take_turns,
)
from benchmarks.rank import Group
from benchmarks.shapes import OVERRIDES, shape
from benchmarks.traffic import minimum
from benchmarks.worker import WorkerError
from data_prep.build_shards import build
from data_prep.corpus import Corpus, split_rule
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.model.flops import parameters_by_part
from mamba_pretrain.plan.traffic import collectives

ROOT = Path(__file__).parent.parent
WORLD = 2
ENGINES = {
    "zero-1": ["train.engine=zero", "zero.stage=1"],
    "zero-2": ["train.engine=zero", "zero.stage=2"],
    "zero-3": ["train.engine=zero", "zero.stage=3"],
    "fsdp": ["train.engine=fsdp"],
    "hsdp": ["train.engine=fsdp", f"fsdp.replicas={WORLD}"],
}
WHOLE, SHARE = "one process, 1 thread", "two silent processes, half of the work each"
ALONE = {WHOLE: 1, "one process, 2 threads": 2}  # threads
WHOLE_OPTIMIZER = ("hsdp",)  # every rank updates all parameters: with as many replicas as ranks nothing is sharded
# Reasons: a step is mostly products and the scan, which an engine only calls; gathers and reductions carry little but
# the parameters (norms, counts, padding); the plan claims to know the bytes; a save also hashes what it writes, and a
# load copies it; a snapshot copies memory, which is several times as fast as a disk.
OVER_SHARE, SENT, PLANNED, DISK, STALL = 1.25, 1.1, 1.02, 0.5, 1 / 3


Told = list[dict[str, Any]]  # what each rank says of one step, or of one save in the background


def make_data(directory: Path) -> list[str]:
    """A corpus as bytes, and the options that train on it and on nothing else."""
    rule = split_rule((1.0, 0.0, 0.0), 0)
    build(Corpus([ROOT / "corpora" / "sotu.jsonl.gz"]), load_tokenizer("bytes"), directory, rule=rule)
    quiet = ["eval.every_steps=0", "checkpoint.every_steps=0", "checkpoint.every_minutes=0", "train.hang_minutes=0"]
    length = ["train.tokens=null", "train.steps=100000", "train.precision=auto"]  # emulated products tell nothing
    return [f"data.path={directory}", "data.validation_split=null", "data.workers=0", *length, *quiet]


def take_step(group: Group, kept: list[Told], threads: int | None, _: object) -> float:
    if threads is not None:
        group.call("threads", threads=threads)
    told = group.call("step")
    kept.append(told)
    return max(seconds_of(told))


def seconds_of(told: Told) -> list[float]:
    return [float(one["seconds"]) for one in told]


def measure_steps(report: Report, options: argparse.Namespace, common: list[str], scratch: Path) -> None:
    """One engine at a time beside what all are held against: all at once would need the memory of all."""
    batch, losses = options.windows, []
    words = [*common, f"train.micro_batch_size={batch // WORLD}", *options.overrides]
    seconds: Seconds = {}
    with (
        Group(1, options.preset, options.length, batch, words, scratch / "alone") as alone,
        Group(WORLD, options.preset, options.length, batch // WORLD, words, scratch / "share", talk=False) as share,
    ):
        for name in list(options.engines):
            told: dict[str, list[Told]] = {one: [] for one in (*ALONE, SHARE, name)}
            tasks = {one: Task(partial(take_step, alone, told[one], threads)) for one, threads in ALONE.items()}
            tasks[SHARE] = Task(partial(take_step, share, told[SHARE], None))
            try:
                with Group(
                    WORLD, options.preset, options.length, batch, [*words, *ENGINES[name]], scratch / name
                ) as group:
                    tasks[name] = Task(partial(take_step, group, told[name], None))
                    now = take_turns(tasks, options.rounds)
            except WorkerError as error:
                options.engines.remove(name)
                report.note(f"{name} failed: {error}")
                report.goal(f"{name} sent / minimum", AT_MOST, SENT)  # which has no figure: missed
                continue
            kept = {one: rounds[-options.rounds :] for one, rounds in told.items()}
            losses.append(f"{name} {kept[name][-1][0]['loss']:.4f}")
            cells = tell_step(report, options, name, kept, common)
            report.row(name, *times(report, name, now[name], now[WHOLE]), *cells)
            for one in (*ALONE, SHARE):
                seconds.setdefault(one, []).extend(now[one])
    for one, values in seconds.items():
        report.row(one, *times(report, one, values, seconds[WHOLE]), "", "", "", "")
    report.note(f"loss after as many steps: {', '.join(losses)}")


def times(report: Report, name: str, values: list[float], whole: list[float]) -> list[object]:
    """The cells of a step's time: by itself, and beside one process that does all of the work."""
    beside = ratio(values, whole)
    return [report.add(f"{name} s", Figure.of(values, "s")), report.add(f"{name} / {WHOLE}", beside)]


def tell_step(
    report: Report,
    options: argparse.Namespace,
    name: str,
    told: dict[str, list[Told]],
    common: list[str],
) -> list[object]:
    """The cells of an engine: its communication, the rest beside its share of the work, and its bytes."""
    rounds = told[name]
    talking = [statistics.mean(one["communicating"] for one in each) for each in rounds]
    computing = [statistics.mean(one["seconds"] - one["communicating"] for one in each) for each in rounds]
    parts = 1 if name in WHOLE_OPTIMIZER else WORLD
    shares = [share_of(each, parts) for each in told[SHARE]]
    beside = report.add(f"{name} without communication / share", ratio(computing, shares))
    busy = [statistics.mean(one["processor"] for one in each) for each in rounds]
    processor = report.add(
        f"{name} processor time / share", ratio(busy, [share_of(each, parts, "processor") for each in told[SHARE]])
    )
    report.goal(f"{name} without communication / share", AT_MOST, OVER_SHARE)
    whole = statistics.median(each[0]["seconds"] for each in rounds)
    over = 100 * (statistics.median(computing) - statistics.median(shares)) / whole
    sent = tell_bytes(report, options, name, rounds, common, 1)
    return [
        report.add(f"{name} communicating s", Figure.of(talking, "s")),
        f"{beside}: {over:+.0f}% of the step; processor time {processor}",
        *sent,
    ]


def share_of(told: Told, optimizer_parts: int, clock: str = "seconds") -> float:
    """Of a rank's part of the work, from processes that did half of the windows but the whole update."""
    updating = statistics.mean(float(one["updating"]) * float(one[clock]) / float(one["seconds"]) for one in told)
    return statistics.mean(float(one[clock]) for one in told) - updating * (1 - 1 / optimizer_parts)


def tell_bytes(
    report: Report,
    options: argparse.Namespace,
    name: str,
    rounds: list[Told],
    common: list[str],
    micro_batches: int,
) -> list[object]:
    """The figures of what ranks sent a step, the most of any rank; the cells: megabytes, and times the least."""
    suffix = "" if micro_batches == 1 else f", {micro_batches} micro-batches"
    words = [*common, f"train.micro_batch_size={options.windows // WORLD}", *options.overrides, *ENGINES[name]]
    config = shape(options.preset, options.length, options.windows * micro_batches, words)
    least, planned = minimum(config, WORLD), sum(one.sent for one in collectives(config, WORLD))
    sent = max(one["sent"] for one in rounds[-1])
    on_tcp = max(statistics.mean(each[rank]["tcp"] for each in rounds) for rank in range(WORLD))
    megabytes = report.add(f"{name} sent{suffix}", Figure.of([sent / 1e6], "MB"))
    over = report.add(f"{name} sent / minimum{suffix}", Figure.of([sent / least], "x"))
    apart = max(sent / planned, planned / sent) if sent else math.nan
    report.add(f"{name} sent, planned apart{suffix}", Figure.of([apart], "x"))
    if on_tcp:
        report.add(f"{name} TCP / sent{suffix}", Figure.of([on_tcp / sent], "x"))
    report.goal(f"{name} sent / minimum{suffix}", AT_MOST, SENT)
    report.goal(f"{name} sent, planned apart{suffix}", AT_MOST, PLANNED)
    kinds = {kind: one for kind, one in rounds[-1][0]["operations"].items() if one["sent"] > 0.001 * sent}
    detail = ", ".join(f"{one['calls']} {kind} of {one['tensor_bytes'] / 1e6:.1f} MB" for kind, one in kinds.items())
    report.note(f"{name}{suffix}: {detail}; the least is {least / 1e6:.1f} MB sent; TCP sent {on_tcp / 1e6:.1f} MB")
    return [megabytes, over]


def measure_accumulation(report: Report, options: argparse.Namespace, common: list[str], scratch: Path) -> None:
    """Bytes once more, with two micro-batches a step. They do not depend on the length of the windows."""
    for name in options.engines:
        words = [*common, f"train.micro_batch_size={options.windows // WORLD}", *options.overrides, *ENGINES[name]]
        directory = scratch / f"{name}-2"
        with Group(WORLD, options.preset, 32, 2 * options.windows, words, directory) as group:
            group.call("step")
            rounds = [group.call("step")]
        cells = tell_bytes(report, options, name, rounds, common, 2)
        report.row(f"{name}, 2 micro-batches", "", "", "", "", *cells)


SAVERS = {"single": (1, []), "fsdp": (WORLD, ENGINES["fsdp"]), "zero-1": (WORLD, ENGINES["zero-1"])}


def measure_saving(report: Report, options: argparse.Namespace, common: list[str], scratch: Path) -> None:
    words = [*common, "train.micro_batch_size=1", *options.overrides, *options.save_overrides]
    config = shape(options.preset, options.save_length, WORLD, words)
    size = 12 * sum(parameters_by_part(config.model).values())  # parameters and two moments
    source, copy = scratch / "source", scratch / "copy"
    disk.make_source(source, size)
    heads = ("save", "verify from disk", "load from disk", "load after verifying", "stands still in the background")
    report.row("**checkpoint**", *(f"**{head}**" for head in heads), "**steps meanwhile**")
    for name in options.savers:
        world, engine = SAVERS[name]
        label = f"{name} on {world} rank{'s' if world > 1 else ''}"
        try:
            with Group(world, options.preset, options.save_length, WORLD, [*words, *engine], scratch / name) as group:
                measure_saver(report, options, label, group, source, copy)
        except WorkerError as error:
            report.note(f"{label} failed: {error}")
            report.goal(f"{label}: save / dd write", AT_LEAST, DISK)  # which has no figure: missed
        shutil.rmtree(scratch / name, ignore_errors=True)
    report.note(f"the checkpoint has {size / 1e9:.2f} GB on {options.disk.resolve()}")


def measure_saver(
    report: Report, options: argparse.Namespace, name: str, group: Group, source: Path, copy: Path
) -> None:
    """One engine beside dd, in turns: writing, then reading what was written, then writing in the background."""
    size, rounds = source.stat().st_size, options.rounds
    group.call("step")
    seconds = take_turns(
        {
            "dd write": Task(lambda _: disk.write(source, copy)),
            "save": Task(lambda _: group.slowest("save"), lambda: group.first("discard")),
        },
        rounds,
    )
    saved = Path(group.first("newest"))
    cold = disk.evict(copy)
    both = partial(disk.evict, copy, saved)
    seconds |= take_turns(
        {
            "dd read": Task(lambda _: disk.read(copy), both),
            "verify": Task(lambda _: group.slowest("verify", directory=str(saved)), both),
            "load": Task(lambda _: group.slowest("load", directory=str(saved)), both),
            "load after verify": Task(lambda _: group.slowest("load", directory=str(saved))),
        },
        rounds,
        warmup=0,
    )
    if not cold:
        report.note("this system cannot be asked to forget files: reads are from its cache")

    def rate(what: str) -> Figure:
        return report.add(f"{name}: {what}", Figure.of([size / 1e9 / value for value in seconds[what]], "GB/s"))

    cells: list[object] = [rate("save"), rate("verify"), rate("load"), rate("load after verify")]
    report.row(f"dd beside {name}", rate("dd write"), rate("dd read"), "", "", "", "")
    for what, peer in (("save", "dd write"), ("verify", "dd read"), ("load", "dd read")):
        report.add(f"{name}: {what} / {peer}", ratio(seconds[peer], seconds[what]))
        report.goal(f"{name}: {what} / {peer}", AT_LEAST, DISK)
    measure_background(report, name, group, cells, seconds["save"], rounds)


def measure_background(
    report: Report, name: str, group: Group, cells: list[object], blocking: list[float], rounds: int
) -> None:
    group.first("discard")
    told: list[Told] = []
    quiet: list[float] = []
    for count in range(rounds + 1):
        told.append(group.call("save_in_background"))
        if count == 0:
            first = report.add(f"{name}: first snapshot", Figure.of([max(one["snapshot"] for one in told[0])], "s"))
            report.note(f"{name}: the first snapshot, which asks for its memory, took {first}")
        quiet.append(statistics.median(max(seconds_of(group.call("step"))) for _ in range(3)))
    kept = told[1:]
    stalls = [max(one["stall"] for one in each) for each in kept]
    stall = report.add(f"{name}: stall", Figure.of(stalls, "s"))
    report.add(f"{name}: snapshot", Figure.of([max(one["snapshot"] for one in each) for each in kept], "s"))
    until = [max(one["until committed"] for one in each) for each in kept]
    complete = report.add(f"{name}: until committed", Figure.of(until, "s"))
    save = report.add(f"{name}: blocking save", Figure.of(blocking, "s"))
    report.add(f"{name}: stall / blocking save", Figure.of([s / save.value for s in stalls], "x"))
    report.goal(f"{name}: stall / blocking save", AT_MOST, STALL)
    slower = [statistics.median(each[0]["steps"]) / q for each, q in zip(kept, quiet[1:], strict=True)]
    meanwhile = report.add(f"{name}: step while writing / step", Figure.of(slower, "x"))
    report.row(name, *cells, f"{stall} of {complete}; a blocking save: {save}", meanwhile)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("distributed", __doc__ or "", rounds=5)
    parser.add_argument("--preset", default="130m", help="a file of configs/pretrain (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="of all ranks in a step (%(default)s)")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--savers", nargs="*", choices=SAVERS, default=list(SAVERS), help="none: nothing is saved")
    parser.add_argument("--save-length", type=int, default=64, help="tokens of a window there (%(default)s)")
    parser.add_argument("--save-overrides", nargs="*", default=["model.n_layer=12", "model.vocab_size=50280"])
    parser.add_argument("--disk", type=Path, default=ROOT / "runs", help="where checkpoints are written (%(default)s)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        default=["model.n_layer=6", "model.vocab_size=16384"],
        help=OVERRIDES,
    )
    options, report = begin(parser, argv)
    if options.windows % WORLD:
        parser.error(f"--windows is {options.windows}: {WORLD} ranks take equal parts")
    report.columns = ["what", "a step", "times one process, 1 thread", "communicating", "the rest / its share"]
    report.columns += ["sent a step", "times the least"]
    options.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.disk, prefix="bench-distributed-") as made:
        scratch = Path(made)
        common = [*make_data(scratch / "data"), f"train.kernels={options.kernels}"]
        if options.engines:
            measure_steps(report, options, common, scratch)
            measure_accumulation(report, options, common, scratch)
        if options.savers:
            measure_saving(report, options, common, scratch)
    model = shape(options.preset, options.length, options.windows, [*options.overrides]).model
    report.note(
        f"a step: {options.windows} windows of {options.length} tokens over all ranks, {model.need('n_layer')} blocks, "
        f"d_model {model.need('d_model')}, {sum(parameters_by_part(model).values()) / 1e6:.1f} million parameters; "
        "every rank has one thread"
    )
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
