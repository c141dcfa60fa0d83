"""How fast is generation, and does it stay so?

Batch 1, greedy, after a short prompt. Ours is the public `mamba_pretrain.model.generate.generate`, in fp32 and under
bf16 autocast; the peer is transformers with the same weights and its cache: `model.generate` and a bare loop of cached
steps, in fp32, with bf16 weights, and under bf16 autocast, in a process of its own. (One row, for information, gives
the peer the large memory pages that ours asks the system for.) Seconds are counted from token to token, without
the prompt.
Goal: the fastest of ours makes at least 5 times the tokens a second of the fastest of theirs.

Second, a token at position 100,000 is to cost what one at position 10 costs, within 10%. The long prompt is really read
(in parallel, in windows, with the state handed on: minutes at 130m); then two texts, one near each position, go on in
turns. Third, for information, the speed of reading a prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    AT_LEAST,
    AT_MOST,
    Figure,
    Report,
    Task,
    arguments,
    begin,
    finish,
    rates,
    ratio,
    take_turns,
)
from benchmarks.peers import hugging_face
from benchmarks.shapes import OVERRIDES, shape
from benchmarks.worker import Worker
from mamba_pretrain.model.generate import generate
from mamba_pretrain.model.lm import MambaLM

SPEEDUP, FLAT = 5.0, 1.1
WARM = 8  # tokens that are not timed: whoever sat idle while the others had their turns is slow for a moment
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision(name: str) -> torch.autocast:
    """fp32, or bf16 products from fp32 weights. Within one outer autocast, which keeps cast weights for both sides."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=name != "fp32")


class Clock:
    """A streamer for transformers that notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


def our_text(model: MambaLM, prompt: list[int], tokens: int) -> float:
    """Seconds from the first token to the one `tokens` later."""
    text = generate(model, prompt, max_tokens=WARM + tokens + 1, temperature=0)
    for _ in range(WARM + 1):
        next(text)
    began = time.perf_counter()
    assert sum(1 for _ in text) == tokens, "nothing stops it"
    return time.perf_counter() - began


class Peer:
    """transformers with the same weights, in a process of its own; with `large_pages`, which we ask for too."""

    def __init__(self, preset: str, overrides: list[str], large_pages: bool) -> None:
        if large_pages:
            os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # PyTorch's allocator looks at its first large block
        model = MambaLM(shape(preset, 512, 1, overrides).model, seed=0)
        self.twins = {name: hugging_face(model).eval().to(dtype) for name, dtype in DTYPES.items()}

    @torch.no_grad()
    def generate(self, weights: str, products: str, prompt: list[int], tokens: int) -> float:
        clock = Clock()
        amount = {"max_new_tokens": WARM + tokens + 1, "min_new_tokens": WARM + tokens + 1}
        with precision(products):
            self.twins[weights].generate(torch.tensor([prompt]), do_sample=False, streamer=clock, **amount)
        return clock.times[-1] - clock.times[1 + WARM]

    @torch.no_grad()
    def loop(self, weights: str, products: str, prompt: list[int], tokens: int) -> float:
        model = self.twins[weights]
        with precision(products):
            output = model(torch.tensor([prompt]), use_cache=True)
            for i in range(WARM + tokens):
                if i == WARM:
                    began = time.perf_counter()
                token_BL = output.logits[:, -1].argmax(-1, keepdim=True)
                output = model(token_BL, cache_params=output.cache_params, use_cache=True)
        return time.perf_counter() - began


PEERS = {  # weights and products
    "fp32": ("fp32", "fp32"),
    "bf16 weights": ("bf16", "fp32"),
    "bf16 autocast": ("fp32", "bf16"),
}


def alternatives(model: MambaLM, peer: Worker, settled: Worker, prompt: list[int], tokens: int) -> dict[str, Task]:
    def ours(products: str) -> Task:
        def timed(_: Any) -> float:
            with precision(products):
                return our_text(model, prompt, tokens)

        return Task(timed)

    def theirs(worker: Worker, how: str, kind: str) -> Task:
        weights, products = PEERS[kind]
        arguments = {"weights": weights, "products": products, "prompt": prompt, "tokens": tokens}
        return Task(lambda _: float(worker.call(how, **arguments).result))

    return {
        "ours fp32": ours("fp32"),
        "ours bf16 autocast": ours("bf16"),
        **{f"peer {how} {kind}": theirs(peer, how, kind) for kind in PEERS for how in ("generate", "loop")},
        "peer loop bf16 autocast, large pages": theirs(settled, "loop", "bf16 autocast"),
    }


def against_peer(report: Report, model: MambaLM, options: argparse.Namespace) -> None:
    prompt = list(range(1, options.prompt + 1))
    arguments = {"preset": options.preset, "overrides": options.overrides}
    with (
        Worker("benchmarks.decode:Peer", {**arguments, "large_pages": False}) as peer,
        Worker("benchmarks.decode:Peer", {**arguments, "large_pages": True}) as settled,
    ):
        seconds = take_turns(alternatives(model, peer, settled, prompt, options.tokens), options.rounds)
    candidates = {
        side: [n for n in seconds if n.startswith(side) and "large pages" not in n] for side in ("ours", "peer")
    }
    best = {side: min(names, key=lambda n: statistics.median(seconds[n])) for side, names in candidates.items()}
    for name, values in seconds.items():
        speed = report.add(f"{name} tokens", rates(options.tokens, values))
        beside = report.add(f"{name} / fastest peer", ratio(seconds[best["peer"]], values))
        report.row(name, speed, beside)
    report.add("fastest ours / fastest peer", ratio(seconds[best["peer"]], seconds[best["ours"]]))
    report.goal("fastest ours / fastest peer", AT_LEAST, SPEEDUP)
    report.note(f"fastest: {best['ours']}; {best['peer']}")


def read_prompt(report: Report, model: MambaLM, options: argparse.Namespace) -> None:
    prompt = [1] * options.prefill

    def read(autocast: str) -> Task:
        def run(_: Any) -> None:
            with precision(autocast):
                next(generate(model, prompt, max_tokens=1, temperature=0))

        return Task(run)

    for name, values in take_turns({name: read(name) for name in DTYPES}, min(3, options.rounds)).items():
        speed = report.add(f"prefill {name} tokens", rates(options.prefill, values))
        report.row(f"ours reading {options.prefill} tokens, {name}", speed, "")


def by_position(report: Report, model: MambaLM, options: argparse.Namespace) -> None:
    """Seconds of the same number of tokens near each position, in turns."""
    vocab, kept = model.config.need("vocab_size"), options.rounds * options.tokens
    texts: dict[str, Iterator[int]] = {}
    with precision(options.position_precision):
        for position in options.positions:
            prompt = torch.randint(vocab, (position,), generator=torch.Generator().manual_seed(position)).tolist()
            texts[f"position {position}"] = text = generate(
                model, prompt, max_tokens=1 + 2 * options.tokens + kept, temperature=0
            )
            began = time.perf_counter()
            next(text)
            seconds_read = [time.perf_counter() - began]
            speed = report.add(f"position {position} reading tokens", rates(position, seconds_read))
            if position == max(options.positions):
                report.row(f"ours reading {position} tokens, {options.position_precision}", speed, "")

        def go_on(text: Iterator[int]) -> Task:
            def run(_: Any) -> None:
                for _token in range(options.tokens):
                    next(text)

            return Task(run)

        seconds = take_turns({name: go_on(text) for name, text in texts.items()}, options.rounds, warmup=2)
    names = list(seconds)
    for name, values in seconds.items():
        speed = report.add(f"{name} tokens", rates(options.tokens, values))
        report.row(f"ours at {name}, {options.position_precision}", speed, "")
    for name in names[1:]:
        slower = report.add(f"{name} / {names[0]}", ratio(seconds[name], seconds[names[0]]))
        report.add(f"{name}, {names[0]} apart", Figure.of([max(slower.value, 1 / slower.value)], "x"))
        report.goal(f"{name}, {names[0]} apart", AT_MOST, FLAT)
    report.note(f"near a position: its next {(options.rounds + 2) * options.tokens} tokens")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("decode", __doc__ or "", rounds=7)
    parser.add_argument("--preset", default="130m", help="a file of configs/pretrain (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="timed at once (%(default)s)")
    parser.add_argument("--prompt", type=int, default=10, help="tokens before the first (%(default)s)")
    parser.add_argument("--positions", type=int, nargs="*", default=[10, 100_000], help="the first is the measure")
    parser.add_argument("--position-precision", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--prefill", type=int, default=4096, help="prompt whose reading is timed; 0: none (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    options, report = begin(parser, argv)
    report.columns = ["what", "tokens", "times the fastest peer"]
    model = MambaLM(shape(options.preset, 512, 1, options.overrides).model, seed=0).eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision("bf16"))
        against_peer(report, model, options)
        if options.prefill:
            read_prompt(report, model, options)
    if options.positions:
        by_position(report, model, options)
    config = model.config
    report.note(f"{config.need('n_layer')} blocks, d_model {config.need('d_model')}, vocabulary {config.vocab_size}")
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
