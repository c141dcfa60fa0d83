"""How fast is a training step, beside transformers' and beside its own matrix products?

A preset's model, batch 1, bf16 autocast: forward, backward, clipping, AdamW. Three alternatives take turns, each in a
process of its own:

  ours       as mamba_pretrain.train takes the step
  products   the matrix products of that step alone: of in_proj, x_proj, dt_proj, out_proj and head, forward and both of
             the backward, plain bf16 tensors; no implementation can be faster
  peer       transformers with use_mambapy=True (its default path is many times slower), torch's fused AdamW, the same
             weights, clipping and autocast, the loss by way of labels

Goals at each length: at least 12 times the peer's tokens a second, at most 1.7 times the time of the products, at most
half of the peer's peak memory (of the whole process, in its first steps).

The peer keeps several copies of all states of all blocks: above --peer-whole-up-to tokens it is measured with a few of
the blocks, two sizes of it, and extended to all of them in a straight line (time and memory are linear in blocks); the
table says so where it was done.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

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
    rates,
    ratio,
    take_turns,
)
from benchmarks.shapes import OVERRIDES, TrainingStep, shape
from benchmarks.worker import Answer, Worker, WorkerError

SPEEDUP, OVER_PRODUCTS, MEMORY_SHARE = 12.0, 1.7, 0.5


class Memory:
    """Of a process over its first steps, in MiB."""

    def __init__(self) -> None:
        self.peak: list[float] = []  # the most in any step, all included; empty before the first
        self.above: list[float] = []  # the same, less what the process held before the first
        self._before: float | None = None

    def add(self, before: float, peak: float) -> None:
        self._before = before if self._before is None else self._before
        self.peak = [max(peak, *self.peak)] if self.peak else [peak]
        self.above = [self.peak[0] - self._before]


class Peer:
    """transformers, whole or with a few blocks and extended."""

    def __init__(self, options: argparse.Namespace, length: int, overrides: list[str]) -> None:
        all_blocks = shape(options.preset, length, 1, overrides).model.need("n_layer")
        few = sorted({min(count, all_blocks) for count in options.peer_blocks})
        whole = length <= options.peer_whole_up_to or len(few) < 2
        self.blocks = [all_blocks] if whole else few[:2]
        # Weights of the line through the measurements, at all the blocks.
        self.weights = [1.0]
        self.note = "whole"
        if not whole:
            slope = (all_blocks - self.blocks[0]) / (self.blocks[1] - self.blocks[0])
            self.weights = [1 - slope, slope]
            self.note = f"extended to {all_blocks} blocks from {self.blocks[0]} and {self.blocks[1]}"
        self.workers: list[Worker] = []
        self.memory = Memory()
        try:
            for count in self.blocks:
                arguments = {
                    "preset": options.preset,
                    "length": length,
                    "overrides": [*overrides, f"model.n_layer={count}"],
                }
                limits = {"limit_s": options.peer_limit_s, "memory_gib": options.peer_memory_gib}
                self.workers.append(Worker("benchmarks.peers:TrainingStep", arguments, **limits))
            self.step()  # warm-up at the full length: the first step asks the system for all of its memory
        except WorkerError:
            self.close()
            raise

    def step(self) -> float:
        answers = [worker.call("step") for worker in self.workers]
        before, peak = (
            sum(w * a[i] for w, a in zip(self.weights, answers, strict=True))
            for i in (Answer._fields.index("before_mib"), Answer._fields.index("peak_mib"))
        )
        self.memory.add(before, peak)
        return sum(w * a.seconds for w, a in zip(self.weights, answers, strict=True))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def measure(report: Report, options: argparse.Namespace, length: int, overrides: list[str]) -> None:
    arguments = {"preset": options.preset, "length": length, "overrides": overrides}
    memory = {"ours": Memory(), "peer": Memory()}
    peer_note = "not measured"
    with (
        Worker("benchmarks.shapes:TrainingStep", arguments) as ours,
        Worker("benchmarks.shapes:MatrixProducts", arguments) as products,
    ):

        def our_step(_: Any = None) -> float:
            answer = ours.call("step")
            memory["ours"].add(answer.before_mib, answer.peak_mib)
            return answer.seconds

        # While the peer takes its step these processes are idle for so long that the system may page them out. A step
        # that is not timed goes before each that is; in training another step has always just been taken.
        tasks = {
            "ours": Task(our_step, prepare=our_step),
            "products": Task(lambda _: products.call("step").seconds, prepare=lambda: products.call("step")),
        }
        take_turns(tasks, rounds=0, warmup=4)  # memory that is kept is all there after the third step
        seconds: Seconds = {"ours": [], "products": [], "peer": []}
        if options.peer_steps:
            try:
                with contextlib.closing(Peer(options, length, overrides)) as peer:
                    with_peer = {"peer": Task(lambda _: peer.step()), **tasks}
                    seconds = take_turns(with_peer, options.peer_steps, warmup=0)
                peer_note, memory["peer"] = peer.note, peer.memory
            except WorkerError as error:
                peer_note = f"failed: {error}"
                report.note(f"length {length}: the peer {peer_note}")
        for name, more in take_turns(tasks, max(0, options.rounds - len(seconds["ours"])), warmup=0).items():
            seconds[name] += more
    tell(report, length, seconds, memory, peer_note)


def tell(report: Report, length: int, seconds: Seconds, memory: dict[str, Memory], peer_note: str) -> None:
    for name in ("ours", "products", "peer"):
        cells = [
            report.add(f"{length} {name} s", Figure.of(seconds[name], "s")),
            report.add(f"{length} {name} tokens", rates(length, seconds[name])),
        ]
        if name != "products":
            cells += [
                report.add(f"{length} {name} / products", ratio(seconds[name], seconds["products"])),
                report.add(f"{length} {name} peak MiB", Figure.of(memory[name].peak, "MiB")),
                report.add(f"{length} {name} above start MiB", Figure.of(memory[name].above, "MiB")),
            ]
        report.row(length, f"{name}, {peer_note}" if name == "peer" else name, *cells, *[""] * (5 - len(cells)))
    report.add(f"{length} ours tokens / peer tokens", ratio(seconds["peer"], seconds["ours"]))
    report.add(f"{length} ours peak / peer peak", ratio(memory["ours"].peak, memory["peer"].peak))
    shares = Figure.of([100 * p / o for p, o in zip(seconds["products"], seconds["ours"], strict=True)], "%")
    report.note(
        f"length {length}: the matrix products are {report.add(f'{length} products share', shares)} of our step"
    )
    report.goal(f"{length} ours tokens / peer tokens", AT_LEAST, SPEEDUP)
    report.goal(f"{length} ours / products", AT_MOST, OVER_PRODUCTS)
    report.goal(f"{length} ours peak / peer peak", AT_MOST, MEMORY_SHARE)


def show_profile(options: argparse.Namespace, length: int, overrides: list[str]) -> None:
    ours = TrainingStep(options.preset, length, overrides)
    ours.step()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        ours.step()
    print(f"Our step at length {length}, by operator:\n")
    print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("train_step", __doc__ or "", rounds=7)
    parser.add_argument("--preset", default="130m", help="a file of configs/pretrain (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--peer-steps", type=int, default=2, help="the peer's rounds, after a warm-up step; 0: no peer")
    parser.add_argument("--peer-whole-up-to", type=int, default=512, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--peer-blocks", type=int, nargs=2, default=[2, 6], help="of the peer above that length")
    parser.add_argument("--peer-limit-s", type=float, default=600, help="for each of its steps (%(default)s)")
    parser.add_argument("--peer-memory-gib", type=float, default=None, help="it fails if it needs more (no limit)")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of our step, and measure nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    options, report = begin(parser, argv)
    report.columns = ["length", "what", "a step", "tokens", "times the products", "peak memory", "above its start"]
    if options.profile:
        for length in options.lengths:
            show_profile(options, length, options.overrides)
        return 0
    for length in options.lengths:
        measure(report, options, length, options.overrides)
    model = shape(options.preset, options.lengths[0], 1, options.overrides).model
    report.note(
        f"{model.need('n_layer')} blocks, d_model {model.need('d_model')}, vocabulary {model.padded_vocab_size}, "
        f"batch 1, bf16 autocast, {options.threads} threads; peak memory is that of the whole process, libraries "
        "included, and beside it what that is above the process before its first step"
    )
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
