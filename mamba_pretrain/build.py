"""Makes a run ready to step: opens the data, makes or restores the model, checks everything that can be checked."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mamba_pretrain import checkpoint
from mamba_pretrain import config as config_module
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import Config, ConfigError, ModelConfig
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.distributed.agreement import agree, code_digest
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER, OPTIONAL, Engine, Values
from mamba_pretrain.distributed.engines import make_engine
from mamba_pretrain.distributed.env import DTYPES, bf16_is_native, keep_freed_memory, resolve_device, resolve_precision
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.export.pretrained import Pretrained, read_pretrained
from mamba_pretrain.files import sha256_of
from mamba_pretrain.model.describe import law_table
from mamba_pretrain.model.law import audit, initial_value
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.backends import native, native_build
from mamba_pretrain.ops.selfcheck import self_check
from mamba_pretrain.pieces import PiecesError
from mamba_pretrain.reading import Reading, Source, open_reading, table

log = logging.getLogger("mamba_pretrain")


@dataclass
class TrainState:
    """All of a run's progress that is not a tensor."""

    step: int = 0  # optimizer steps, skipped ones included
    samples: int = 0  # rows consumed by all ranks; the position in the data
    tokens: int = 0  # positions of those rows: the sum of the following
    epoch: int = 0  # whole ones, of the source that was read most often
    trained_tokens: int = 0  # targets of the steps that were taken
    skipped_tokens: int = 0  # targets of those that were skipped
    masked_tokens: int = 0  # without a target, as the next token belongs to another document or row
    padding_tokens: int = 0  # positions that hold no token
    uncounted_tokens: int = 0  # before the run came here, from a version or a program that did not count
    source_tokens: dict[str, int] = field(default_factory=dict)  # of `tokens`, where there are several sources

    @classmethod
    def read(cls, checkpoint_directory: Path) -> TrainState:
        path = checkpoint_directory / checkpoint.STATE
        try:
            values = json.loads(path.read_text())
            if "trained_tokens" not in values:
                values["uncounted_tokens"] = values["tokens"]
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}): resume from another checkpoint") from error

    def count(self, tokens: int, targets: int, padding: int, *, skipped: bool) -> None:
        """Adds what one step read."""
        self.tokens += tokens
        self.trained_tokens += 0 if skipped else targets
        self.skipped_tokens += targets if skipped else 0
        self.padding_tokens += padding
        self.masked_tokens += tokens - targets - padding

    def figures(self) -> dict[str, int]:
        values = asdict(self)
        return values | {f"tokens/{name}": n for name, n in values.pop("source_tokens").items()}


@dataclass
class Run:
    """A run ready to step."""

    config: Config  # with what the data and the weights settled filled in
    engine: Engine
    state: TrainState
    reading: Reading
    device: torch.device
    ranks: Ranks = ALONE
    kernels: dict[str, str] = field(default_factory=dict)  # which backend each op is trained on

    @property
    def directory(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change between a checkpoint and the run that goes on from it."""
        return identity(self.config, self.reading, self.state.samples)


def identity(config: Config, reading: Reading, sample: int) -> dict[str, Any]:
    """`Run.identity`, of the run that `config` (its model resolved) would be after `sample` samples."""
    model = {k: v for k, v in asdict(config.model).items() if k != "variant"}
    return {"model": model, **reading.identity(config, sample)}


def build(config: Config, ranks: Ranks = ALONE) -> Run:
    """Raises ConfigError, ShardError, CheckpointError or LawError before anything is written.

    On several ranks, what one of them finds wrong ends them all, as does anything that they disagree about.
    """
    source: Pretrained | None = None
    with ranks.together():
        device = resolve_device(config.train.device, ranks.local_rank)
        precision = resolve_precision(config.train.precision, device)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
        dispatch.select(config.train.kernels)
        reading = open_reading(config)
        manifest = reading.manifest
        resume_from = _resume_from(config)
        state = TrainState() if resume_from is None else TrainState.read(resume_from)
        known = None
        if config.train.init_from is not None and resume_from is None:
            source = read_pretrained(Path(config.train.init_from))
            _check_tokenizer(config, source, reading.sources[0])
            known = source.config
        elif config.train.init_from is not None and resume_from is not None:
            known = ModelConfig(**checkpoint.read_manifest(resume_from)["identity"]["model"])
        config = dataclasses.replace(config, model=resolve_model(config.model, known, manifest))
        if resume_from is not None:
            _check_identity(resume_from, config, reading, state.samples)
            state.source_tokens = reading.told_tokens(state.samples)  # the sources may have other names now
        end = reading.check(config, state.step, state.samples)
    log.info("%s", table(reading.figures(end)))
    agree(
        ranks,
        {
            **_flat(asdict(config), without=("data.path", "data.verify_gib", "data.sources")),
            **_data_facts(config, reading),
            "the checkpoint to start from": _name_and_hash(resume_from),
            "the code of mamba_pretrain": code_digest(),
            "torch": torch.__version__,
        },
    )
    for section in ("zero", "fsdp"):
        given = getattr(config, section)
        if config.train.engine != section and given != type(given)():
            log.warning("options of %s are set, which train.engine=%s does not read", section, config.train.engine)
    if device.type == "cpu":
        keep_freed_memory()
    if config.train.precision == "bf16" and not bf16_is_native(device):
        log.warning(
            "this CPU has no bf16 matrix products: they are emulated, up to 200 times slower than train.precision=fp32"
        )

    fresh = source is None and resume_from is None
    with torch.device("meta"):
        shapes = MambaLM(config.model)
    values: Values | None = None
    if fresh:
        shape_of = {name: parameter.shape for name, parameter in shapes.named_parameters()}
        values = partial(_draw, shape_of, config)
    elif source is not None:
        values = source.weights.__getitem__
        log.info("starting from the %s weights in %s", source.source_format, config.train.init_from)

    def make_model() -> MambaLM:
        model = MambaLM(config.model)
        model.backbone.activation_checkpointing = config.train.activation_checkpointing
        return model

    engine = make_engine(make_model, values, config, device, ranks)
    run = Run(config, engine, state, reading, device, ranks)
    run.kernels = _announce_kernels(run)
    if resume_from is not None:
        _restore(run, resume_from)
    audit(engine.full_parameters(), config.model, engine.decay_of, decay=config.optim.weight_decay, fresh=fresh)
    log.info("%s\n", law_table(shapes, engine.decay_of))
    return run


def _draw(shape_of: dict[str, torch.Size], config: Config, name: str) -> torch.Tensor:
    return initial_value(name, shape_of[name], config.model, config.train.seed)


def _announce_kernels(run: Run) -> dict[str, str]:
    """Says what every op will run on and why. A GPU's kernels are held against the reference first: no test saw it.

    Returns the names by op; of our own on CPUs the version, too.
    """
    model, dtype = run.config.model, DTYPES[run.config.train.precision]
    if run.device.type == "cuda":
        for op, backend, error in self_check(run.device):
            log.info("%s: the %s kernels agree with the reference to %.0e", op, backend, error)
    packed = run.config.data.reset_documents
    chosen = dispatch.announce(
        run.device.type, dtype, d_state=model.d_state, taps=model.d_conv, inner=model.d_inner, packed=packed
    )
    return {op: f"{name} {native_build.version()}" if name == native.NAME else name for op, name in chosen.items()}


def resolve_model(given: ModelConfig, known: ModelConfig | None, manifest: Manifest) -> ModelConfig:
    """Fills what the configuration left open: from the weights the run starts from, else from the dataset."""
    if known is not None:
        default = ModelConfig()
        clashes = [
            f"model.{f.name} is {getattr(given, f.name)}, the weights to start from have {getattr(known, f.name)}"
            for f in dataclasses.fields(ModelConfig)
            if f.name != "variant" and getattr(given, f.name) not in (getattr(default, f.name), getattr(known, f.name))
        ]
        if clashes:
            raise ConfigError(clashes)
        log.info("model as in the weights: %s", {k: v for k, v in asdict(known).items() if v != asdict(default)[k]})
        given = dataclasses.replace(known, variant=given.variant)
    vocab_size = manifest.tokenizer.vocab_size
    if given.vocab_size is None:
        given = dataclasses.replace(given, vocab_size=vocab_size)
    if vocab_size > given.need("vocab_size"):
        raise ConfigError(
            [
                f"the dataset's tokenizer has {vocab_size} tokens, model.vocab_size is {given.vocab_size}: "
                f"set model.vocab_size={vocab_size}, or build the shards with the model's tokenizer"
            ]
        )
    return given


def _check_tokenizer(config: Config, source: Pretrained, data: Source) -> None:
    """The weights' tokenizer, if known, must be that of the data; data.tokenizer, if given, has the last word."""
    if source.tokenizer_file is None or config.data.tokenizer is not None:
        return
    theirs, needed = load_tokenizer(source.tokenizer_file).sha256, data.manifest.tokenizer.sha256
    if theirs != needed:
        raise ConfigError(
            [
                f"{source.tokenizer_file} (sha256 {theirs[:12]}) is not the tokenizer that made {data.path} "
                f"(sha256 {needed[:12]}): build the shards with it, or, if the two mean the same "
                f"ids, say so with data.tokenizer={data.path}"
            ]
        )


def _resume_from(config: Config) -> Path | None:
    """The checkpoint to go on from, by the rule of `checkpoint.resume`."""
    choice, directory = config.checkpoint.resume, Path(config.run_dir) / "checkpoints"
    found = checkpoint.checkpoints(directory)
    if choice == "auto":
        if not found:
            log.info("no checkpoint in %s yet: starting at step 0", directory)
        return _resumable(found[-1]) if found else None
    if choice == "never":
        if found:
            raise ConfigError(
                [
                    f"{config.run_dir} holds checkpoints up to {found[-1].name}: go on from there with --resume auto, "
                    "or choose another run_dir"
                ]
            )
        return None
    path = _resumable(Path(choice))
    if found and path.resolve().parent != directory.resolve():
        raise CheckpointError(
            f"{directory} holds checkpoints up to {found[-1].name}, and {path} is none of them: choose another run_dir "
            "to go on from it"
        )
    newer = [p.name for p in found if p.name > path.name]
    if newer:
        raise CheckpointError(
            f"{directory} also holds {', '.join(newer)}, which going on from {path.name} would overwrite: move them "
            "away, or choose another run_dir"
        )
    return path


def _resumable(path: Path) -> Path:
    manifest = checkpoint.read_manifest(path)
    if manifest.get("kind") != "checkpoint" or "identity" not in manifest:
        raise CheckpointError(f"{path} is a model without optimizer state: start from it with train.init_from")
    return path


def _check_identity(path: Path, config: Config, reading: Reading, samples: int) -> None:
    """Raises CheckpointError unless `config` goes on with the same training on the same data."""
    manifest = checkpoint.read_manifest(path)
    saved, current = _flat(manifest["identity"]), _flat(identity(config, reading, samples))
    changed = [
        f"{k} was {saved.get(k)!r}, is {current.get(k)!r}" for k in current | saved if saved.get(k) != current.get(k)
    ]
    if changed:
        differ = {k for k in current | saved if saved.get(k) != current.get(k)}
        hint = ""
        if config.data.stages and any(k == "seq_len" or k.endswith(".end_sample") for k in differ):
            hint = "The longest row length of all stages, and where one of shorter rows ends, decide how rows are cut. "
        raise CheckpointError(
            f"{path} is of another run, and going on would not be the same training: {'; '.join(changed)}. {hint}"
            "Undo the change, or start a new run_dir from these weights with train.init_from"
        )


def _restore(run: Run, path: Path) -> None:
    """Fills the engine, and says what is not as it was. `_check_identity` was before."""
    manifest = checkpoint.verify(path, run.ranks)
    world = manifest.get("ranks", 1)
    if world != run.ranks.world:
        log.warning("resuming on %d ranks what was saved on %d: losses will agree to rounding", run.ranks.world, world)
    before, now = asdict(config_module.load([path / checkpoint.CONFIG])), asdict(run.config)
    for part in ("train", "optim", "data"):
        for key, value in now[part].items():
            if before[part][key] != value and (part != "data" or key in ("sources", "stages")):
                log.warning("resuming with another %s.%s: was %s, is %s", part, key, before[part][key], value)
    for op, backend in manifest.get("kernels", {}).items():
        if run.kernels.get(op) != backend:
            log.warning(
                "resuming on other kernels, so losses will agree to rounding and no further: %s was on %s, is on %s",
                *(op, backend, run.kernels.get(op)),
            )
    with run.ranks.together():
        parts = {part: checkpoint.open_part(path, manifest, part) for part in (MODEL, OPTIMIZER)}
        try:
            for part, pieces in run.engine.state().items():
                for piece in pieces:
                    if piece.name in parts[part] or piece.name not in OPTIONAL:
                        parts[part].check(piece)
        except PiecesError as error:
            raise CheckpointError(f"{path} cannot be resumed from: {error}") from error
    run.engine.load(parts)
    log.info("resumed from %s", path)
    if run.state.step >= run.config.steps:
        finished = "nothing is left to do" if run.state.step == run.config.steps else "the run is longer than asked for"
        log.warning("%s is at step %d of %d: %s", path, run.state.step, run.config.steps, finished)


def _data_facts(config: Config, reading: Reading) -> dict[str, str]:
    """Of the sources all but their paths, which may differ from host to host."""
    splits = [split for split in (config.data.train_split, config.data.validation_split) if split]
    found = {f"the weight of {s.name}": str((s.weight, s.max_epochs)) for s in config.data.sources}
    for source in reading.sources:
        of = f" of {source.name}" if len(reading.sources) > 1 else ""
        for split in splits:
            if split in source.manifest.splits:
                found[f"the data ({split}{of})"] = source.manifest.fingerprint(split)
    packs = reading.packs(range(len(reading.mixture.stages)))
    return found | {f"the pack of {name}": sha256 for name, sha256 in packs.items()}


def _name_and_hash(path: Path | None) -> str | None:
    return None if path is None else f"{path.name} (manifest {sha256_of(path / checkpoint.MANIFEST)[:12]})"


def _flat(values: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested sections as one dictionary with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in _flat(value).items()}
        else:
            found[key] = value
    return {key: value for key, value in found.items() if key not in without}
