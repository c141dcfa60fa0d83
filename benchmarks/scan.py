"""How far is the selective scan from the cost of its exponentials?

The scan needs B x L x E x N exponentials; nothing that computes them can be faster than they are. So it is held against
`torch.exp` over as many fp32 elements, written into a preallocated output (out=), with the same threads. "forward" is
the training forward: it keeps what the backward needs and allocates its output. "backward" gives the gradients of all
eight inputs. Goals, for fp32 and bf16 inputs (arithmetic is fp32 in both): forward at most 1.3, backward at most 3
times the exponentials.

For information: the forward without gradients, a packed one (eight documents in each row), and, at the first size, the
readable reference.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common import AT_MOST, Figure, Report, Task, arguments, begin, finish, ratio, take_turns
from mamba_pretrain.ops.selective_scan import selective_scan, selective_scan_reference

SIZES = ["1x1024x1536", "1x2048x5120", "8x512x1536"]
FORWARD_LIMIT, BACKWARD_LIMIT = 1.3, 3.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DOCUMENTS = 8  # in each row of the packed variant


class Inputs:
    """Arguments of the scan for one size and dtype, distributed as a fresh model has them."""

    def __init__(self, batch: int, length: int, inner: int, d_state: int, dtype: torch.dtype) -> None:
        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes).to(dtype).requires_grad_()

        u_BLE, delta_BLE, z_BLE = (random(batch, length, inner) for _ in range(3))
        B_BLN, C_BLN = (random(batch, length, d_state) for _ in range(2))
        A_EN = (-torch.arange(1.0, d_state + 1).expand(inner, d_state)).clone().requires_grad_()
        D_E = torch.ones(inner, requires_grad=True)
        bias_E = torch.full((inner,), -4.0, requires_grad=True)  # steps of about 0.02
        self.all = (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, bias_E)
        self.dy_BLE = torch.randn(batch, length, inner).to(dtype)
        document_L = torch.arange(length, dtype=torch.int32) * DOCUMENTS // length
        self.seq_idx_BL = document_L.expand(batch, length).contiguous()

    def forward(self, packed: bool = False) -> Tensor:
        return selective_scan(*self.all, self.seq_idx_BL if packed else None, return_last_state=False)[0]

    def inference(self) -> None:
        with torch.no_grad():
            self.forward()

    def backward(self, y_BLE: Tensor) -> None:
        torch.autograd.grad(y_BLE, self.all, self.dy_BLE)

    def reference(self) -> None:
        selective_scan_reference(*self.all, return_last_state=False)


def measure(report: Report, size: tuple[int, int, int], d_state: int, rounds: int, reference: bool) -> None:
    elements = torch.rand(*size, d_state).neg_()  # exponents of decays: no overflow, no denormal numbers
    result = torch.empty_like(elements)
    tasks = {"exp": Task(lambda _: void(torch.exp(elements, out=result)))}
    for name, dtype in DTYPES.items():
        inputs = Inputs(*size, d_state, dtype)
        tasks |= {
            f"forward {name}": Task(lambda _, i=inputs: void(i.forward())),  # type: ignore[misc]
            f"backward {name}": Task(lambda y, i=inputs: i.backward(y), lambda i=inputs: i.forward()),  # type: ignore[misc]
            f"forward without gradients {name}": Task(lambda _, i=inputs: i.inference()),  # type: ignore[misc]
            f"packed forward {name}": Task(lambda _, i=inputs: void(i.forward(packed=True))),  # type: ignore[misc]
            f"packed backward {name}": Task(lambda y, i=inputs: i.backward(y), lambda i=inputs: i.forward(packed=True)),  # type: ignore[misc]
        }
    seconds = take_turns(tasks, rounds)
    if reference:
        inputs = Inputs(*size, d_state, torch.float32)
        alone = {"reference forward fp32": Task(lambda _: inputs.reference())}
        seconds |= take_turns(alone, rounds=1, warmup=0)
    label = "x".join(map(str, size))
    for name, values in seconds.items():
        milliseconds = report.add(f"{label} {name} ms", Figure.of([1000 * s for s in values], "ms"))
        times = Figure.of([1.0], "x")
        if name != "exp":
            times = report.add(f"{label} {name} / exp", ratio(values, seconds["exp"]))
        limit = FORWARD_LIMIT if name.startswith("forward ") else BACKWARD_LIMIT
        is_goal = name in {f"{way} {dtype}" for way in ("forward", "backward") for dtype in DTYPES}
        if is_goal:
            report.goal(f"{label} {name} / exp", AT_MOST, limit)
        report.row(f"({label})", name, milliseconds, times, limit if is_goal else "")


def void(_: Tensor) -> None:
    """A task returns a number only if it has measured itself."""


def size(text: str) -> str:
    """Three numbers above 0."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form BxLxE, as 1x1024x1536 is")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("scan", __doc__ or "", rounds=11)
    parser.add_argument("--sizes", nargs="+", type=size, default=SIZES, metavar="BxLxE", help="default: %(default)s")
    parser.add_argument("--state", type=int, default=16, help="N (%(default)s)")
    options, report = begin(parser, argv)
    report.columns = ["(B, L, E)", "what", "median (range)", "times torch.exp", "goal, at most"]
    for i, text in enumerate(options.sizes):
        batch, length, inner = map(int, size(text).split("x"))
        measure(report, (batch, length, inner), options.state, options.rounds, reference=i == 0)
    report.note("torch.exp runs over (B, L, E, N) fp32 elements into a preallocated output; the scan allocates its own")
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main())
