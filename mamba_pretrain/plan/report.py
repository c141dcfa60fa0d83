"""`mamba-pretrain plan`: tables for an engineer, and the same figures as JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mamba_pretrain.config import Config, ConfigError
from mamba_pretrain.config.checks import did_you_mean
from mamba_pretrain.plan.gpus import GPU, GPUS
from mamba_pretrain.plan.layouts import (
    MARGIN,
    NOT_OFFLOADED,
    RESERVED_BYTES,
    Layout,
    cheapest,
    compare,
    divided,
    kernels_of,
)
from mamba_pretrain.plan.memory import PARTS
from mamba_pretrain.plan.roofline import Assumptions

GIB = 2**30
FRACTIONS = ("matmul", "memory", "fp32", "network", "overlap")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, beside the configuration's."""
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--assume", action="append", default=[], metavar="name=value", help="e.g. matmul=0.5; printed")
    parser.add_argument("--json", type=Path, help="also write every figure here")


def plan(config: Config, arguments: argparse.Namespace) -> str:
    """The whole report; also as JSON, where that is wanted. Raises ConfigError for what cannot be planned."""
    world, gpu_name, json_file = arguments.gpus, arguments.gpu, arguments.json
    problems = [
        f"--{name} is {count}: it must be at least 1"
        for name, count in (("gpus", world), ("gpus-per-node", arguments.gpus_per_node))
        if count < 1
    ]
    if gpu_name not in GPUS:
        problems.append(f"--gpu {gpu_name}: {did_you_mean(gpu_name, list(GPUS))}")
    if json_file is not None and not json_file.parent.is_dir():
        problems.append(f"--json {json_file}: there is no directory {json_file.parent}")
    assume = Assumptions(gpus_per_node=arguments.gpus_per_node, **_fractions(arguments.assume, problems))
    if config.model.vocab_size is None:
        problems.append("model.vocab_size is not set, and there is no dataset here to take it from")
    if (kernels := kernels_of(config)) not in ("cuda", "triton"):
        problems.append(f"train.kernels is {kernels}: the memory of GPUs is known for auto, cuda and triton")
    if problems:
        raise ConfigError(problems)
    gpu, config = GPUS[gpu_name], divided(configured := config, world)
    layouts, best = compare(config, world, gpu, assume), cheapest(config, world, gpu, assume)
    if json_file is not None:
        figures = {
            "gpus": world,
            "configured_micro_batch_size": configured.train.micro_batch_size,
            "gpu": {"name": gpu_name, **asdict(gpu)},
            "assumptions": asdict(assume) | {"reserved_bytes": RESERVED_BYTES, "margin": MARGIN},
            "layouts": [layout.to_json() for layout in layouts],
            "cheapest": best.to_json() if best else None,
        }
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    text = _text(config, world, gpu_name, gpu, assume, layouts, best)
    if (wanted := configured.train.micro_batch_size) != config.train.micro_batch_size:
        text += (
            f"\nThe configured micro-batch of {wanted} does not divide the batch on {world} GPUs; the tables are for "
            f"{config.train.micro_batch_size}."
        )
    return text


def _fractions(words: Sequence[str], problems: list[str]) -> dict[str, float]:
    """The fields of Assumptions that `name=value` words set; what is wrong with them goes to `problems`."""
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in FRACTIONS:
            problems.append(f"--assume {word}: {did_you_mean(name, FRACTIONS)}")
        elif not (0 < value <= 1 or (name == "overlap" and value == 0)):
            problems.append(f"--assume {word}: expected a fraction above 0 and at most 1")
        found[name] = value
    return {} if problems else found


def _text(
    config: Config, world: int, name: str, gpu: GPU, assume: Assumptions, layouts: list[Layout], best: Layout | None
) -> str:
    train, nodes = config.train, -(-world // assume.gpus_per_node)
    steps, tokens = config.steps, config.steps * train.batch_tokens
    head = (
        f"{config.model.variant or 'Mamba-1'} on {world} x {name} ({gpu.memory / GIB:.1f} GiB), {nodes} node(s) of "
        f"{assume.gpus_per_node}; {steps:,} steps, {tokens:,} tokens, {layouts[0].time.flops * steps:.3e} FLOPs\n"
        f"batch {config.sequences_per_step} x {config.data.seq_len}, micro-batch {train.micro_batch_size}: "
        f"{config.accumulation(world)} a step on each GPU; {train.precision}, {kernels_of(config)} kernels"
    )
    memory = [["", *PARTS, "peak", "", "at its"]]
    seconds_of = ["products", "scan", "passes", "update", "exposed", "total"]
    time = [["", "sends, GiB", *seconds_of, "tokens/s", "MFU", "days", "GPU-h"]]
    for layout in layouts:
        of = layout.time
        parts = [f"{layout.memory[part] / GIB:.2f}" for part in PARTS]
        fits = "fits" if layout.fits else "too big"
        memory.append([_label(layout), *parts, f"{layout.bytes / GIB:.2f}", fits, layout.moment])
        seconds = [f"{getattr(of, name):.3f}" for name in seconds_of]
        cost = [f"{of.tokens_per_s:,.0f}", f"{of.mfu:.1%}", f"{layout.days:.2f}", f"{layout.gpu_hours:,.0f}"]
        time.append([_label(layout), f"{of.sent / GIB:.2f}", *seconds, *cost])
    answer = "Nothing fits: take more GPUs, or larger ones"
    if best is not None:
        answer = (
            f"The cheapest that fits, over all engines and micro-batches: {best.bytes / GIB:.1f} GiB, "
            f"{best.time.total:.3f} s a step, {best.days:.2f} days, {best.gpu_hours:,.0f} GPU-hours\n  {best.words}"
        )
    return "\n\n".join(
        [
            head,
            "Memory of one GPU at its peak, GiB\n" + _columns(memory),
            "Seconds a step (roofline, nothing measured)\n" + _columns(time),
            answer,
            _assumptions(assume),
        ]
    )


def _label(layout: Layout) -> str:
    options = layout.options
    label = str(options["train.engine"])
    label += f" stage {options['zero.stage']}" if "zero.stage" in options else ""
    label += f" x {options['fsdp.replicas']} replicas" if options.get("fsdp.replicas", 1) > 1 else ""
    label += ", offloading" if any(options.get(name) for name in NOT_OFFLOADED) else ""
    return label + (", recomputing" if options["train.activation_checkpointing"] else "")


def _assumptions(assume: Assumptions) -> str:
    return (
        "Assumed (--assume name=value): "
        f"of their data-sheet peaks, products reach matmul={assume.matmul}, passes over memory memory={assume.memory}, "
        f"the scan's\narithmetic fp32={assume.fp32}, links network={assume.network}; overlap={assume.overlap} of the "
        f"computation can hide communication;\n"
        f"{assume.cpu_bandwidth / 1e9:.0f} GB/s of host memory for each GPU's share of an offloaded update. "
        f"Fits: peak + {MARGIN:.0%} + {RESERVED_BYTES / GIB:.0f} GiB for CUDA, NCCL and fragments."
    )


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        (
            "  "
            + "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    )
