"""What does a token of training cost at longer contexts?

Our training step at lengths 512, 1024, ... with the number of tokens held constant: batch = tokens / length. Nothing in
Mamba-1 grows with length, so time and memory for each token are to be flat: the goals are max/min over the lengths of
at most 1.15, for both. The width is the preset's; few blocks and a small vocabulary by default, so that it takes
minutes (the products of a block and its scan are in proportion as in the whole model, the head is small).

The lengths take turns, each in a process of its own. The time of a length is the median over rounds of its time by that
round's median; its memory is the peak of its first step above what the process held before.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence

from benchmarks.common import AT_MOST, Figure, Task, arguments, begin, finish, take_turns
from benchmarks.shapes import OVERRIDES
from benchmarks.worker import Worker

FLAT = 1.15
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]


def alternative(worker: Worker) -> Task:
    """A step right after another one, as in training."""
    return Task(lambda _: worker.call("step").seconds, prepare=lambda: worker.call("step"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("length", __doc__ or "", rounds=3)
    parser.add_argument("--preset", default="130m", help="a file of configs/pretrain (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--total-tokens", type=int, default=max(LENGTHS), help="in each step (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="blocks (%(default)s)")
    parser.add_argument("--vocab", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    options, report = begin(parser, argv)
    total: int = options.total_tokens
    if wrong := [length for length in options.lengths if total % length]:
        parser.error(f"lengths {wrong} do not divide --total-tokens {total}")
    overrides = [f"model.n_layer={options.layers}", f"model.vocab_size={options.vocab}", *options.overrides]

    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        above: dict[str, float] = {}
        for length in options.lengths:
            sizes = {"preset": options.preset, "length": length, "batch": total // length, "overrides": overrides}
            sizes["keep"] = False  # memory is asked for and given back, so that its peak is what the step needs
            workers[str(length)] = worker = stack.enter_context(Worker("benchmarks.shapes:TrainingStep", sizes))
            above[str(length)] = worker.call("step").above_mib
        tasks = {name: alternative(worker) for name, worker in workers.items()}
        seconds = take_turns(tasks, options.rounds, warmup=0)

    middle = [statistics.median(times) for times in zip(*seconds.values(), strict=True)]
    report.columns = ["length", "batch", "time for each token", "by the round's median", "memory for each token"]
    relative: list[float] = []
    for name, times in seconds.items():
        microseconds = report.add(f"{name} us", Figure.of([1e6 * s / total for s in times], "us"))
        beside = report.add(f"{name} / median", Figure.of([s / m for s, m in zip(times, middle, strict=True)], "x"))
        kib = report.add(f"{name} KiB", Figure.of([above[name] * 1024 / total], "KiB"))
        relative.append(beside.value)
        report.row(name, total // int(name), microseconds, beside, kib)
    report.add("time max / min", Figure.of([max(relative) / min(relative)], "x"))
    memory = list(above.values())
    report.add("memory max / min", Figure.of([max(memory) / min(memory)] if min(memory) > 0 else [], "x"))
    report.goal("time max / min", AT_MOST, FLAT)
    report.goal("memory max / min", AT_MOST, FLAT)
    report.note(
        f"{total} tokens in each step, {options.layers} blocks of the {options.preset} preset, "
        f"vocabulary {options.vocab}, bf16 autocast; forward, backward, clipping and AdamW"
    )
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
