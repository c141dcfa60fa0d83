"""DeepSpeed's files: finding a checkpoint, reading a .pt file without running it, and calling the converter.

Every .pt file is read with weights_only. DeepSpeed's hold more than that takes: its own bookkeeping (a loss scaler, an
enum) and whatever was in the user's client_state. `load_safely` puts an inert object in the place of each, and no code
from a file runs. The converter has a process of its own, which reads in the same way (`deepspeed_convert`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint, load, safe_globals

from mamba_pretrain.export.formats import FormatError

_CONVERTER = "mamba_pretrain.export.deepspeed_convert"
_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

log = logging.getLogger("mamba_pretrain")


class Inert:
    """Stands in for an object of any other class in a file: takes what the pickle gives it, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_safely(path: Path | str, known: Mapping[str, Any] = {}) -> Any:
    """The tensors (mapped from the file, not read yet) and plain values of a .pt file; `known` classes are made too."""
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(known.get(name, Inert), name) for name in foreign]):
            return load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise FormatError(
            path, [f"cannot be read as tensors and plain values; nothing in it was run: {reason}"]
        ) from error


def locate(source: Path) -> Path:
    """The directory of one step: `source`, or the one its file `latest` names."""
    if not source.is_dir():
        raise FormatError(source, ["no such directory"])
    if (source / "zero").is_dir() or any(source.glob("*_optim_states.pt")):
        return source
    latest = next((p for name in ("latest", "latest_universal") if (p := source / name).is_file()), None)
    if latest is not None:
        tag = source / latest.read_text().strip()
        if tag.is_dir():
            return tag
        raise FormatError(source, [f"its file {latest.name} names {tag.name}, which is not there"])
    held = sorted(path.name for path in source.iterdir())
    steps = [path.name for path in source.iterdir() if path.is_dir() and any(path.glob("*_optim_states.pt"))]
    cure = (
        f"it holds {', '.join(sorted(steps))}: name one of them"
        if steps
        else f"found {', '.join(held[:10]) or 'nothing'}"
    )
    if any(source.glob("*_model_states.pt")):
        cure = "it has *_model_states.pt only: saved without ZeRO or without its optimizer, which has no universal form"
    raise FormatError(
        f"{source} is no DeepSpeed checkpoint; {cure}",
        [
            "expected a save directory, with the file latest",
            "or the directory of one step, with *_optim_states.pt of every rank",
            "or a universal checkpoint, with the directory zero",
        ],
    )


def check_shards(tag: Path) -> None:
    """The converter takes the ranks it finds for all there were."""
    found = [match for path in tag.glob("*_optim_states.pt") if (match := _SHARD.fullmatch(path.name))]
    if any(int(match[2]) for match in found) or any(tag.glob("mp_rank_01*")):
        reason = (
            "holds the parts of several model-parallel ranks: only data parallelism (ZeRO) is read. Merge them first"
        )
        raise FormatError(tag, [reason])
    ranks = {int(match[1]) for match in found}
    states = model_states(tag)
    due = set(range(states.get("dp_world_size") or max(ranks, default=0) + 1))
    problems = [f"the optimizer shard of rank {rank} is missing" for rank in sorted(due - ranks)]
    if any(tag.glob("zero_pp_rank_*_model_states.pt")):  # stage 3
        problems += [
            f"{name} is missing"
            for rank in sorted(due)
            if not (tag / (name := f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")).is_file()
        ]
    if not states:
        problems.append("there are no *_model_states.pt, which tell names and shapes")
    if problems:
        raise FormatError(f"{tag} is incomplete (copy it whole, or take an earlier step)", problems)


def convert(tag: Path, output: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"{tag} must be converted by deepspeed, which is not installed: pip install 'mamba-pretrain[deepspeed]'"
        )
    size_gb = sum(path.stat().st_size for path in tag.iterdir()) / 1e9
    log.info("DeepSpeed converts the %.1f GB of %s to its universal form, in %s", size_gb, tag, output.parent)
    words = ["--input_folder", str(tag), "--output_folder", str(output), "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # each holds a rank's shard
    done = subprocess.run(
        [sys.executable, "-m", _CONVERTER, *words, *workers],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FormatError(
            f"DeepSpeed's converter failed on {tag} (exit code {done.returncode})",
            [lines[-1].strip(" -") if lines else "it said nothing"],
        )


def model_states(directory: Path) -> dict[str, Any]:
    """What DeepSpeed saved beside the tensors: step counts, shapes, the user's client_state; empty where it is not."""
    for path in sorted(directory.glob("*rank_0*_model_states.pt")):
        found = load_safely(path)
        if isinstance(found, dict):
            return found
    return {}
