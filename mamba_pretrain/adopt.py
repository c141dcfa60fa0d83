"""A DeepSpeed checkpoint becomes a model directory of ours, or a checkpoint from which a run of ours goes on."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mamba_pretrain import checkpoint
from mamba_pretrain.build import TrainState, identity, resolve_model
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import Config, ConfigError, TrainConfig, load
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER
from mamba_pretrain.export import deepspeed
from mamba_pretrain.export.deepspeed import Universal
from mamba_pretrain.pieces import write_pieces
from mamba_pretrain.reading import Reading, open_reading

log = logging.getLogger("mamba_pretrain")


def import_deepspeed(
    source: Path, target: Path, paths: Sequence[str], words: Sequence[str], *, samples: int | None, overwrite: bool
) -> Path:
    """Writes what `paths` and `words` (as of `config.load`) ask for, and returns its directory.

    With data.path: a checkpoint with optimizer state in the run directory `target`, for --resume auto. Without: the
    model directory `target`, of the shape that the tensors tell; `words` may add to it (model.norm_eps=1e-6).
    """
    config = None if not paths and all(word.startswith("model.") for word in words) else load(paths, words)
    if samples is not None and samples < 0:
        raise ConfigError([f"--samples is {samples}: it must be at least 0"])
    if config is not None and config.data.named_sources:
        return _import_run(source, target, config, samples, overwrite)
    if samples is not None:
        raise ConfigError(["--samples is of a run that goes on: name its dataset with data.path too"])
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists; choose another output, or pass --overwrite to replace it")
    with deepspeed.opened(source, target) as found:
        if config is None:
            told = [f"model.{name}={value}" for name, value in asdict(found.model).items() if value is not None]
            config = load([], [*told, "train.steps=1", *words])
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or found.model.vocab_size)
        tensors = found.pieces(model, moments=False)
        facts = {"kind": "model", "from": deepspeed.DEEPSPEED, "tokenizer": None}

        def write_files(directory: Path) -> None:
            write_pieces(directory / checkpoint.MODEL, tensors[MODEL])

        checkpoint.write(
            target, Config(model=model, train=TrainConfig(steps=1)), facts, write_files, overwrite=overwrite
        )
    return target


def _import_run(source: Path, run_dir: Path, config: Config, samples: int | None, overwrite: bool) -> Path:
    if config.run_dir != Config().run_dir and Path(config.run_dir).resolve() != run_dir.resolve():
        raise ConfigError([f"run_dir is {config.run_dir}, the target {run_dir}: the target is the run's directory"])
    directory = run_dir / "checkpoints"
    if (held := checkpoint.checkpoints(directory)) and not overwrite:
        raise CheckpointError(f"{run_dir} holds checkpoints up to {held[-1].name}: choose another run directory")
    reading = open_reading(config)
    manifest, tokenizer = reading.manifest, reading.tokenizer
    config = dataclasses.replace(config, run_dir=str(run_dir), model=resolve_model(config.model, None, manifest))
    with deepspeed.opened(source, run_dir) as found:
        found.fit(config.model)
        target = checkpoint.step_directory(directory, found.step)
        if others := [path.name for path in held if path != target]:
            raise CheckpointError(
                f"{run_dir} holds {', '.join(others)} too, which is not replaced by {target.name}: choose another run "
                "directory"
            )
        found.say_what_changes(config.optim)
        state = _state(found, config, samples, reading)
        facts = {
            "kind": "checkpoint",
            "step": state.step,
            "identity": identity(config, reading, state.samples),
            "engine": deepspeed.DEEPSPEED,
            "ranks": found.ranks,
            "tokenizer": asdict(manifest.tokenizer),
            "adds_bos": manifest.adds_bos,
            "config_digest": config.digest(),
            "imported_from": str(source),
        }
        tensors = found.pieces(config.model, moments=True)

        def write_files(path: Path) -> None:
            for part in (MODEL, OPTIMIZER):
                write_pieces(path / f"{part}.safetensors", tensors[part])
            tokenizer.save(path)
            (path / checkpoint.STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")

        checkpoint.write(target, config, facts, write_files, overwrite=overwrite)
    log.info("go on with: mamba-pretrain train ... run_dir=%s --resume auto", run_dir)
    return target


def _state(found: Universal, config: Config, samples: int | None, reading: Reading) -> TrainState:
    """Where the run goes on. DeepSpeed does not know the data: without better word, as if every step had been ours."""
    if samples is None:
        samples = found.samples
    if samples is None:
        samples = config.samples_at(found.step)
    counted = found.states.get("global_samples")
    if counted is not None and counted != samples:
        log.warning("the data goes on at sample %d, DeepSpeed counted %d: --samples N says otherwise", samples, counted)
    epoch, tokens = reading.epoch(samples), reading.source_tokens(samples)
    log.info("step %d, sample %d, epoch %d", found.step, samples, epoch)
    reading.check(config, found.step, samples)
    by_source = tokens if len(tokens) > 1 else {}
    read = sum(tokens.values())
    return TrainState(found.step, samples, read, epoch, uncounted_tokens=read, source_tokens=by_source)
