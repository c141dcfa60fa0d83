"""Models as they lie on disk, in any of the three forms of `formats`, and the way into ours: `read_pretrained`."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain.config import Config, ConfigError, ModelConfig
from mamba_pretrain.export import formats, tokenizer_files
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.model.lm import MambaLM

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH_BIN = "pytorch_model.bin"


@dataclass(frozen=True)
class Pretrained:
    """A model read from disk. `weights`: fp32 on the CPU by our parameter names, no lm_head.weight where it is tied.

    `tokenizer` describes `tokenizer_file` as a checkpoint's manifest does (kind, file, sha256, vocab_size, bos_id,
    eod_id; ids are None where a foreign directory does not tell; without a file, where only the ids of bos and eod are
    known, kind is None). `run` and `facts` are a native directory's
    configuration and manifest.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    source_format: str
    tokenizer_file: Path | None = None
    tokenizer: dict[str, Any] | None = None
    run: Config | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def read_pretrained(directory: Path) -> Pretrained:
    """Reads a native checkpoint or model directory (all hashes verified), a Hugging Face or a mamba_ssm directory.

    Nothing is unpickled but tensors. Raises FormatError with every reason, CheckpointError for a damaged native one.
    """
    directory = Path(directory)
    form = detect_format(directory)
    try:
        return _read_native(directory) if form == formats.NATIVE else _read_foreign(directory, form)
    except OSError as error:
        raise FormatError(directory, [f"cannot be read: {error}"]) from error


def build_model(pretrained: Pretrained) -> MambaLM:
    """The model, with the weights copied in; every name and shape must agree."""
    model = MambaLM(pretrained.config)
    model.load_state_dict(pretrained.weights, strict=True)
    return model


def detect_format(directory: Path) -> str:
    """Which of the three forms `directory` has; FormatError says what it holds instead."""
    if not directory.is_dir():
        raise FormatError(directory, ["no such directory"])
    if (directory / formats.CONFIG_JSON).is_file():
        keys = _read_json(directory / formats.CONFIG_JSON)
        if "model_type" in keys:
            return formats.HF
        if "d_model" in keys:
            return formats.MAMBA_SSM
    elif (directory / checkpoint.MANIFEST).is_file() or (directory / checkpoint.CONFIG).is_file():
        return formats.NATIVE
    names = sorted(path.name for path in directory.iterdir())
    raise FormatError(
        f"{directory} holds no model: found {', '.join(names[:20]) or 'nothing'}{' ...' * (len(names) > 20)}; expected",
        [
            f"{formats.NATIVE}: a checkpoint or model of ours, with {checkpoint.MANIFEST} and {checkpoint.CONFIG}",
            f'{formats.HF}: transformers\' config.json with model_type "mamba", and {SAFETENSORS}',
            f"{formats.MAMBA_SSM}: mamba_ssm's config.json with d_model, and {PYTORCH_BIN} or {SAFETENSORS}",
        ],
    )


def _read_native(directory: Path) -> Pretrained:
    run, weights, manifest = checkpoint.load_model(directory)
    _check_shapes(directory, weights, run.model)
    file, tokenizer = tokenizer_files.find(directory, manifest.get("tokenizer"))
    facts = {k: v for k, v in manifest.items() if k not in ("format", "version", "made_by", "files")}
    # The configuration beside an imported model says nothing of how that model was trained.
    trained_here = facts.get("from", formats.NATIVE) == formats.NATIVE
    return Pretrained(run.model, weights, formats.NATIVE, file, tokenizer, run if trained_here else None, facts)


def _read_foreign(directory: Path, form: str) -> Pretrained:
    found = _read_json(directory / formats.CONFIG_JSON)
    try:
        if form == formats.HF:
            config, extra = formats.from_hf(found), found.get(formats.EXTRA_KEY)
            config = _prefer_own(directory, config, extra, lambda own: formats.from_hf(formats.to_hf(own)))
        else:
            path = directory / formats.EXTRA_FILE
            config, extra = formats.from_mamba_ssm(found), _read_json(path) if path.is_file() else None
            config = _prefer_own(
                directory, config, extra, lambda own: formats.from_mamba_ssm(formats.to_mamba_ssm(own))
            )
    except FormatError as error:
        raise FormatError(f"{directory / formats.CONFIG_JSON}: {form} model that is not read", error.problems) from None
    weights = {formats.EMBEDDING if k == formats.HF_EMBEDDING else k: v for k, v in _read_weights(directory).items()}
    if config.tie_embeddings and (head := weights.pop(formats.HEAD, None)) is not None:
        embedding = weights.get(formats.EMBEDDING)
        if embedding is not None and not torch.equal(head, embedding):
            reason = f"{formats.HEAD} differs from {formats.EMBEDDING}, though {formats.CONFIG_JSON} says they are tied"
            raise FormatError(directory, [reason])
    _check_shapes(directory, weights, config)
    file, tokenizer = tokenizer_files.find(directory, extra.get("tokenizer") if isinstance(extra, dict) else None)
    if (tokenizer is None or tokenizer.get("eod_id") is None) and isinstance(found.get("eos_token_id"), int):
        bos, eod = found.get("bos_token_id"), found["eos_token_id"]
        tokenizer = (tokenizer or {"kind": None}) | {"bos_id": eod if bos is None else bos, "eod_id": eod}
    return Pretrained(config, weights, form, file, tokenizer)


def _prefer_own(
    directory: Path, said: ModelConfig, extra: Any, there_and_back: Callable[[ModelConfig], ModelConfig]
) -> ModelConfig:
    """Our own exact configuration, as long as the format's keys, which others may have edited, still say the same."""
    if extra is None:
        return said
    try:
        own = formats.own_config(extra["model"])
        if there_and_back(own) == said:
            return own
        reason = f"it no longer agrees with the rest of {formats.CONFIG_JSON}"
    except (ConfigError, FormatError, KeyError, TypeError) as error:
        reason = f"it cannot be read: {error!r}"
    warnings.warn(f"{directory}: the entry {formats.EXTRA_KEY!r} is ignored, {reason}", stacklevel=4)
    return said


def _check_shapes(directory: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    with torch.device("meta"):
        due = {name: tuple(p.shape) for name, p in MambaLM(config).state_dict().items()}
    problems = [f"{name} is missing, of shape {due[name]}" for name in due if name not in weights]
    for name, tensor in weights.items():
        if name not in due:
            problems.append(f"{name} of shape {tuple(tensor.shape)} is not expected")
        elif tuple(tensor.shape) != due[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {due[name]}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is of {tensor.dtype}, expected a floating point type")
    if problems:
        raise FormatError(f"the weights in {directory} do not fit its configuration", problems)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a foreign directory in fp32, from safetensors (whole or in shards) before pickles."""
    if (directory / SAFETENSORS).is_file():
        tensors = _load_safetensors(directory / SAFETENSORS)
    elif (directory / SAFETENSORS_INDEX).is_file():
        tensors = _load_shards(directory / SAFETENSORS_INDEX)
    elif (directory / PYTORCH_BIN).is_file():
        tensors = _load_pickle(directory / PYTORCH_BIN)
    else:
        raise FormatError(directory, [f"no weights: expected {SAFETENSORS}, {SAFETENSORS_INDEX} or {PYTORCH_BIN}"])
    return {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in tensors.items()}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(path, [f"damaged or not a safetensors file: {error}"]) from error


def _load_shards(index: Path) -> dict[str, Tensor]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise FormatError(index, ["weight_map is not a mapping of parameters to file names"])
    tensors: dict[str, Tensor] = {}
    problems = []
    for name in sorted(set(where.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            problems.append(f"names the shard {name!r}, which is no file beside it")
        else:
            tensors |= _load_safetensors(index.parent / name)
    problems += [f"says {key} is in {where[key]}, which does not hold it" for key in sorted(set(where) - set(tensors))]
    if problems:
        raise FormatError(index, problems)
    return tensors


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        # torch's words about a pickle end in the advice to load it in the way that runs whatever it holds.
        detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({str(error).strip().splitlines()[0]})"
        raise FormatError(
            path,
            [
                f"refused: it is damaged, of torch's format before 1.6, or holds more than tensors{detail}. "
                f"Nothing in it was run. Get the weights as {SAFETENSORS}"
            ],
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FormatError(path, ["holds no state dict: expected a mapping of names to tensors"])
    return {name: tensor.clone() for name, tensor in found.items()}  # the file may be gone while the tensors live


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(path, [f"not JSON: {error}"]) from error
    if not isinstance(found, dict):
        raise FormatError(path, [f"holds a {type(found).__name__}: expected a JSON object"])
    return found
