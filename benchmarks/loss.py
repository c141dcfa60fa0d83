"""What does the fused head and loss save?

`linear_cross_entropy` beside F.cross_entropy(F.linear(hidden, weight), labels), forward and backward for hidden and
weight, under bf16 autocast; hidden, weight and all gradients are fp32, as in training. There are two peers: "float"
converts the logits with .float() first, as usual training code does; "plain" leaves that to autocast.

Goals: no slower than the faster peer; and at most a quarter of the "float" peer's memory, for its softmax is written
out in fp32 as ours is. Memory is the peak of a fresh process in its first call above what it held before it, gradients
included on all sides.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import AT_MOST, Figure, Task, arguments, begin, finish, ratio, take_turns
from benchmarks.worker import Worker
from mamba_pretrain.ops.cross_entropy import linear_cross_entropy

SLOWDOWN, MEMORY_SHARE = 1.0, 0.25
MEMORY_PEER = "float"


class Loss:
    """One way to get from hidden states to gradients. A few tokens load the code that a first call loads."""

    def __init__(self, way: str, tokens: int, d_model: int, vocab: int) -> None:
        if tokens > 1:
            Loss(way, 1, d_model=8, vocab=8).run()
        self.way, self.tokens, self.vocab = way, tokens, vocab
        generator = torch.Generator().manual_seed(0)
        self.hidden_BLD = torch.randn(1, tokens, d_model, generator=generator).requires_grad_()
        self.weight_VD = (0.02 * torch.randn(vocab, d_model, generator=generator)).requires_grad_()
        self.labels_BL = torch.randint(vocab, (1, tokens), generator=generator)

    def run(self) -> float:
        """Returns the loss in nats a token."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self._loss_sum() / self.tokens
        torch.autograd.grad(loss, [self.hidden_BLD, self.weight_VD])
        return float(loss.detach())

    def _loss_sum(self) -> Tensor:
        if self.way == "ours":
            return linear_cross_entropy(self.hidden_BLD, self.weight_VD, self.labels_BL, self.vocab)
        logits_BLV = F.linear(self.hidden_BLD, self.weight_VD)
        if self.way == "float":
            logits_BLV = logits_BLV.float()
        return F.cross_entropy(logits_BLV.flatten(0, 1), self.labels_BL.flatten(), reduction="sum")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("loss", __doc__ or "", rounds=9)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50280)
    options, report = begin(parser, argv)
    sizes = {"tokens": options.tokens, "d_model": options.d_model, "vocab": options.vocab}
    ways = ("ours", "float", "plain")

    above, losses = {}, {}
    for way in ways:
        with Worker("benchmarks.loss:Loss", {"way": way, **sizes}) as worker:
            answer = worker.call("run")
            above[way], losses[way] = [answer.above_mib], answer.result

    def task(loss: Loss) -> Task:
        def run(_: Any) -> None:
            loss.run()

        return Task(run)

    seconds = take_turns({way: task(Loss(way, **sizes)) for way in ways}, options.rounds)
    faster = min(("float", "plain"), key=lambda way: statistics.median(seconds[way]))
    report.columns = ["what", "forward and backward", "memory above the inputs", "loss"]
    names = {
        "ours": "linear_cross_entropy",
        "float": "F.cross_entropy, logits .float()",
        "plain": "F.cross_entropy, logits as they are",
    }
    for way in ways:
        milliseconds = report.add(f"{way} ms", Figure.of([1000 * s for s in seconds[way]], "ms"))
        memory = report.add(f"{way} MiB", Figure.of(above[way], "MiB"))
        loss = report.add(f"{way} loss", Figure.of([losses[way]], "nats"))
        report.row(names[way], milliseconds, memory, loss)
    for way in ("float", "plain"):
        time = report.add(f"time / {way}", ratio(seconds["ours"], seconds[way]))
        memory = report.add(f"memory / {way}", ratio(above["ours"], above[way]))
        report.row(f"ours by {way}", time, memory, "")
    report.add("time / faster peer", report.figures[f"time / {faster}"])
    report.goal("time / faster peer", AT_MOST, SLOWDOWN)
    report.goal(f"memory / {MEMORY_PEER}", AT_MOST, MEMORY_SHARE)
    report.note(
        f"{options.tokens} tokens, d_model {options.d_model}, vocabulary {options.vocab}; "
        f"the faster peer is {faster!r}, memory is held against {MEMORY_PEER!r}"
    )
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
