"""Writing a model in any of the three forms of `formats`, whichever of them it is read from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain.config import Config, TrainConfig
from mamba_pretrain.export import formats, tokenizer_files
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.export.pretrained import (
    PYTORCH_BIN,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Pretrained,
    detect_format,
    read_pretrained,
)
from mamba_pretrain.files import atomic_directory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Fewer than 1 in 100 bytes of a model, and the only ones that a 16-bit dtype harms: the time constants. Both readers
# take files of several dtypes and cast to the model's own, which for A_log and D is fp32 in mamba_ssm.
ALWAYS_FP32 = ("A_log", "mixer.D", "dt_proj.bias", "norm.weight", "norm_f.weight")


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    to: str,
    dtype: str = "fp32",
    max_shard_gib: float = 5.0,
    overwrite: bool = False,
) -> None:
    """Writes the model in `source`, a checkpoint or any directory `read_pretrained` reads, as the directory `target`.

    `to`: hf | mamba_ssm | native. `dtype`: fp32 | bf16 | fp16, for matrices, convolutions and embeddings; A_log, D,
    dt_proj.bias and norms stay fp32, and native is fp32 only. hf weights above `max_shard_gib` are split. `target`
    appears when it is complete or not at all.

    Raises FormatError for a model that is not read or that `to` cannot hold, CheckpointError for a damaged checkpoint,
    an existing target (unless `overwrite`) and a full disk.
    """
    problems = []
    if to not in formats.FORMATS:
        problems.append(f"to is {to!r}: expected one of {', '.join(formats.FORMATS)}")
    if dtype not in DTYPES:
        problems.append(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    elif to == formats.NATIVE and dtype != "fp32":
        problems.append(f"dtype is {dtype!r}: the native form is fp32, from which training can go on")
    if not max_shard_gib > 0:
        problems.append(f"max_shard_gib is {max_shard_gib}: it must be above 0")
    if Path(source).resolve().is_relative_to(Path(target).resolve()):
        problems.append("source is the target or lies in it, and would be replaced: choose another target")
    if problems:
        raise FormatError(f"cannot export {source}", problems)
    pretrained = read_pretrained(source)
    if to == formats.NATIVE:
        _write_native(pretrained, target, overwrite)
        return
    config = formats.to_hf(pretrained.config) if to == formats.HF else formats.to_mamba_ssm(pretrained.config)
    weights = {name: _stored(name, tensor, DTYPES[dtype]) for name, tensor in pretrained.weights.items()}
    with atomic_directory(target, error=checkpoint.CheckpointError, overwrite=overwrite) as directory:
        if to == formats.HF:
            _write_hf(pretrained, config, weights, dtype, round(max_shard_gib * 2**30), directory)
        else:
            _write_mamba_ssm(pretrained, config, weights, directory)


def import_pretrained(source: Path, target: Path, *, from_format: str | None, overwrite: bool = False) -> None:
    """Writes a Hugging Face or mamba_ssm directory as a native model directory; `from_format` None: it is detected.

    Errors as in `export_checkpoint`; also a `from_format` that is not the one found.
    """
    if from_format is not None and (found := detect_format(Path(source))) != from_format:
        expected = f"expected one of {', '.join(formats.FORMATS)}" if from_format not in formats.FORMATS else "as asked"
        raise FormatError(source, [f"is of the form {found}, not {from_format} ({expected})"])
    export_checkpoint(source, target, to=formats.NATIVE, overwrite=overwrite)


def _write_native(pretrained: Pretrained, target: Path, overwrite: bool) -> None:
    """A checkpoint without optimizer and training state. Keeps what the source knows of its own training."""
    # A configuration needs a length to be valid; a model from elsewhere was trained for one we do not know.
    run = pretrained.run or Config(model=pretrained.config, train=TrainConfig(steps=1))
    origin = pretrained.facts.get("from", pretrained.source_format)
    facts = pretrained.facts | {"kind": "model", "from": origin, "tokenizer": pretrained.tokenizer}

    def write_files(directory: Path) -> None:
        save_file(pretrained.weights, directory / checkpoint.MODEL)
        tokenizer_files.copy(pretrained.tokenizer_file, directory)

    checkpoint.write(target, run, facts, write_files, overwrite=overwrite)


def _write_hf(
    pretrained: Pretrained,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    dtype: str,
    shard_bytes: int,
    directory: Path,
) -> None:
    renamed = {formats.HF_EMBEDDING if name == formats.EMBEDDING else name: t for name, t in weights.items()}
    shards = _shards(renamed, shard_bytes)
    if len(shards) == 1:
        save_file(renamed, directory / SAFETENSORS, metadata={"format": "pt"})
    else:
        where: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in renamed.values())
        _write_json(directory / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    model, tokenizer = pretrained.config, pretrained.tokenizer or {}
    eod = tokenizer.get("eod_id")
    ids = {"bos_token_id": tokenizer.get("bos_id"), "eos_token_id": eod, "pad_token_id": eod}
    ids = {name: i for name, i in ids.items() if i is not None}
    config = (
        config
        | ids
        | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        | {formats.EXTRA_KEY: _extra(pretrained)}
    )
    _write_json(directory / formats.CONFIG_JSON, config)
    # Rows that pad the head are no tokens; transformers would sample them.
    padding = list(range(model.need("vocab_size"), model.padded_vocab_size))
    _write_json(directory / "generation_config.json", ids | ({"suppress_tokens": padding} if padding else {}))
    tokenizer_files.write_for_transformers(pretrained.tokenizer_file, pretrained.tokenizer, directory)


def _write_mamba_ssm(
    pretrained: Pretrained, config: dict[str, Any], weights: dict[str, Tensor], directory: Path
) -> None:
    """model.safetensors, and the same as pytorch_model.bin: mamba_ssm's own from_pretrained reads nothing else."""
    save_file(weights, directory / SAFETENSORS, metadata={"format": "pt"})
    head = {formats.HEAD: weights[formats.EMBEDDING]} if pretrained.config.tie_embeddings else {}
    try:
        torch.save(weights | head, directory / PYTORCH_BIN)
    except RuntimeError as error:  # torch's way to say that a write failed
        raise OSError(str(error)) from error
    _write_json(directory / formats.CONFIG_JSON, config)
    _write_json(directory / formats.EXTRA_FILE, _extra(pretrained))
    tokenizer_files.copy(pretrained.tokenizer_file, directory)


def _extra(pretrained: Pretrained) -> dict[str, Any]:
    return {"model": asdict(pretrained.config), "tokenizer": pretrained.tokenizer}


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor if name.endswith(ALWAYS_FP32) else tensor.to(dtype)
    if not torch.isfinite(stored).all():
        largest = tensor.abs().max().item()
        raise FormatError(
            name, [f"is not finite in {stored.dtype} (largest value in fp32: {largest:g}): use bf16 or fp32"]
        )
    return stored


def _shards(weights: dict[str, Tensor], most_bytes: int) -> list[dict[str, Tensor]]:
    """Splits in the given order; a tensor larger than a shard has one to itself."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in weights.items():
        if shards[-1] and held + tensor.nbytes > most_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
