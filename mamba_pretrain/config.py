"""Every option of a run: dataclasses with their defaults, and the one way to fill them.

Order of precedence, lowest first: the defaults below, the model variant's published shape, the YAML files in the order
given, the command line's dotted overrides (``optim.lr=1e-3``). `load` reports every unknown key, wrong type and
impossible combination at once. What can be computed from these fields is a property here and never a field.

Units are in the names: `_tokens`, `_gib`, `_minutes`. This module imports neither torch nor the rest of the package.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Shapes of the released checkpoints (state-spaces/mamba-130m ... mamba-2.8b, their config.json). Some tables in
# circulation list 370m with 24 blocks, 790m as 1024 x 48 and 1.4b as 1536 x 48: those do not give the parameter
# counts in the names.
VARIANTS: dict[str, dict[str, int]] = {
    "130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50277},
    "370m": {"d_model": 1024, "n_layer": 48, "vocab_size": 50277},
    "790m": {"d_model": 1536, "n_layer": 48, "vocab_size": 50277},
    "1.4b": {"d_model": 2048, "n_layer": 48, "vocab_size": 50277},
    "2.8b": {"d_model": 2560, "n_layer": 64, "vocab_size": 50277},
}

ENGINES = ("single",)
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "wsd")
SINKS = ("console", "jsonl", "tensorboard", "wandb")


class ConfigError(ValueError):
    """The configuration cannot be run. `problems` holds one sentence for each reason; all of them are found at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"- {p}" for p in self.problems))


@dataclass
class ModelConfig:
    variant: Optional[str] = None  # 130m | 370m | 790m | 1.4b | 2.8b: fills d_model, n_layer and vocab_size
    d_model: Optional[int] = None
    n_layer: Optional[int] = None
    vocab_size: Optional[int] = None  # real tokens; None: taken from the dataset's manifest
    pad_vocab_to_multiple_of: int = 8  # rows added so that the head's matrix product is aligned; never predicted
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: Optional[int] = None  # None: ceil(d_model / 16)
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    linear_bias: bool = False
    norm_eps: float = 1e-5
    embedding_std: float = 0.02
    tie_embeddings: bool = True

    @property
    def d_inner(self) -> int:
        return self.expand * self.need("d_model")

    @property
    def rank(self) -> int:
        return self.dt_rank if self.dt_rank is not None else math.ceil(self.need("d_model") / 16)

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.need("vocab_size") // multiple) * multiple

    def need(self, name: str) -> int:
        """The value of a field that has no default; ConfigError where it is not set."""
        value = getattr(self, name)
        if value is None:
            raise ConfigError([f"model.{name} is not set: name a model.variant ({', '.join(VARIANTS)}) or set it"])
        return int(value)

    def problems(self) -> Iterator[str]:
        sizes = ("d_model", "n_layer", "vocab_size", "d_state", "expand", "dt_rank", "pad_vocab_to_multiple_of")
        yield from _at_least(1, self, "model", *sizes)
        if not 2 <= self.d_conv <= 4:
            yield f"model.d_conv is {self.d_conv}: causal-conv1d's kernels take 2, 3 or 4"
        if self.d_state > 256:
            yield f"model.d_state is {self.d_state}: mamba_ssm's scan takes at most 256"
        if not 0 < self.dt_min < self.dt_max or not 0 < self.dt_init_floor < self.dt_max:
            yield (
                "model.dt_min and model.dt_init_floor must lie above 0 and below dt_max: found "
                f"{self.dt_min}, {self.dt_init_floor}, {self.dt_max}"
            )
        if self.norm_eps <= 0 or self.embedding_std <= 0:
            yield f"model.norm_eps and model.embedding_std must be above 0: found {self.norm_eps}, {self.embedding_std}"


@dataclass
class DataConfig:
    path: Optional[str] = None  # a directory made by data_prep.build_shards
    train_split: str = "train"
    validation_split: Optional[str] = "validation"  # null: no evaluation during training
    tokenizer: Optional[str] = None  # when given, the dataset must have been made with this very tokenizer
    seq_len: int = 2048
    reset_documents: bool = True  # scan and convolution start anew at each document; False: state flows across
    workers: int = 1  # loader processes; the order of samples does not depend on it
    verify_gib: float = 1.0  # splits up to this size are hashed against the manifest at start-up; 0: never

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, self, "data", "seq_len")
        yield from _at_least(0, self, "data", "workers", "verify_gib")


@dataclass
class OptimConfig:
    lr: float = 1e-3  # peak
    min_lr: float = 1e-5  # at the last step
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0: no clipping
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay: linear to min_lr over decay_fraction)
    warmup_fraction: float = 0.1  # of all steps
    decay_fraction: float = 0.2  # of all steps, wsd only

    def warmup_steps(self, total_steps: int) -> int:
        return round(total_steps * self.warmup_fraction)

    def problems(self) -> Iterator[str]:
        if not self.lr > 0:
            yield f"optim.lr is {self.lr}: it must be above 0"
        if not 0 <= self.min_lr <= self.lr:
            yield f"optim.min_lr is {self.min_lr}: it must lie between 0 and optim.lr ({self.lr})"
        for name in ("beta1", "beta2", "warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) < 1:
                yield f"optim.{name} is {getattr(self, name)}: it must be at least 0 and below 1"
        if self.eps <= 0:
            yield f"optim.eps is {self.eps}: it must be above 0"
        yield from _at_least(0, self, "optim", "weight_decay", "clip_norm")
        if self.schedule not in SCHEDULES:
            yield f"optim.schedule is {self.schedule!r}: {_did_you_mean(self.schedule, SCHEDULES)}"
        elif self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            yield "optim.warmup_fraction + optim.decay_fraction is above 1: warm-up and decay would overlap"


@dataclass
class TrainConfig:
    steps: Optional[int] = None  # give this or `tokens`
    tokens: Optional[int] = None  # budget; steps = ceil(tokens / batch_tokens)
    batch_tokens: int = 524_288  # per optimizer step, over all ranks
    micro_batch_size: int = 8  # sequences per rank in one forward pass; accumulation is derived
    seed: int = 0
    precision: str = "bf16"  # of matrix products; parameters, optimizer, norms and the scan's state are fp32
    activation_checkpointing: bool = False  # recompute each block in the backward: less memory, a third more FLOPs
    device: str = "auto"  # auto | cpu | cuda
    engine: str = "single"
    kernels: str = "auto"  # native | cuda | triton | reference: those only; auto: the fastest that can run each op
    init_from: Optional[str] = None  # a Hugging Face or mamba_ssm directory whose weights the run starts from
    max_nonfinite: int = 10  # stop after this many skipped steps in a row

    def problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.tokens is None):
            yield f"give exactly one of train.steps and train.tokens: found {self.steps} and {self.tokens}"
        yield from _at_least(1, self, "train", "steps", "tokens", "batch_tokens", "micro_batch_size", "max_nonfinite")
        yield from _at_least(0, self, "train", "seed")
        choices = {"precision": PRECISIONS, "device": ("auto", "cpu", "cuda"), "engine": ENGINES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"train.{name} is {getattr(self, name)!r}: {_did_you_mean(getattr(self, name), allowed)}"


@dataclass
class EvalConfig:
    every_steps: int = 1000  # 0: only at the end
    max_windows: int = 256  # of the validation split, always the same ones

    def problems(self) -> Iterator[str]:
        yield from _at_least(0, self, "eval", "every_steps")
        yield from _at_least(1, self, "eval", "max_windows")


@dataclass
class CheckpointConfig:
    every_steps: int = 1000  # 0: not by step
    every_minutes: float = 30.0  # 0: not by time
    keep_last: int = 2
    keep_every_steps: int = 0  # multiples of this are never deleted; 0: none is kept for good
    resume: str = "never"  # never: refuse a used run directory | auto: newest complete one | a checkpoint's path

    def problems(self) -> Iterator[str]:
        yield from _at_least(0, self, "checkpoint", "every_steps", "every_minutes", "keep_every_steps")
        yield from _at_least(1, self, "checkpoint", "keep_last")


@dataclass
class LogConfig:
    every_steps: int = 10
    sinks: list[str] = field(default_factory=lambda: ["console", "jsonl"])  # console, jsonl, tensorboard, wandb
    wandb_project: str = "mamba-pretrain"
    wandb_mode: str = "offline"  # offline | online

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, self, "log", "every_steps")
        if len(set(self.sinks)) < len(self.sinks):
            yield f"log.sinks is {self.sinks}: each sink once"
        for sink in self.sinks:
            if sink not in SINKS:
                yield f"log.sinks holds {sink!r}: {_did_you_mean(sink, SINKS)}"
        if self.wandb_mode not in ("offline", "online"):
            yield f"log.wandb_mode is {self.wandb_mode!r}: {_did_you_mean(self.wandb_mode, ('offline', 'online'))}"


@dataclass
class Config:
    run_dir: str = "runs/default"  # checkpoints, metrics, ledger and the resolved configuration
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def sequences_per_step(self) -> int:
        """Global batch in sequences of `data.seq_len` tokens."""
        return self.train.batch_tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "validated configurations have steps or tokens"
        return math.ceil(self.train.tokens / self.train.batch_tokens)

    def accumulation(self, world: int) -> int:
        """Micro-batches per rank in one optimizer step."""
        return self.sequences_per_step // (self.train.micro_batch_size * world)

    def digest(self) -> str:
        """Twelve hex digits that change with any option of the training itself, not with where and how it runs."""
        values = asdict(self)
        for section, name in (("data", "path"), ("data", "workers"), ("data", "verify_gib"), ("train", "device")):
            del values[section][name]
        kept = {section: values[section] for section in ("model", "data", "train", "optim")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def validate(config: Config, world: int = 1) -> list[str]:
    """All reasons why `config` cannot run on `world` ranks; empty when it can."""
    problems = [
        f"{key} is {value}: it must be a finite number"
        for key, value in _leaves(asdict(config))
        if isinstance(value, float) and not math.isfinite(value)
    ]
    problems += [p for part in _parts(config) for p in part.problems()]
    if config.train.init_from is None:  # else the shape is that of the weights
        for name in ("d_model", "n_layer"):
            if getattr(config.model, name) is None:
                problems.append(
                    f"model.{name} is not set: name a model.variant ({', '.join(VARIANTS)}) or give the number"
                )
    train, seq_len = config.train, config.data.seq_len
    if train.batch_tokens >= 1 and seq_len >= 1 and train.micro_batch_size >= 1:
        if train.batch_tokens % seq_len:
            lower = train.batch_tokens // seq_len * seq_len
            near = f"{lower} or {lower + seq_len}" if lower else str(seq_len)
            problems.append(
                f"train.batch_tokens ({train.batch_tokens}) is not a multiple of data.seq_len ({seq_len}): "
                f"the nearest is {near}"
            )
        elif config.sequences_per_step % (train.micro_batch_size * world):
            problems.append(
                f"train.batch_tokens / data.seq_len is {config.sequences_per_step} sequences a step, which "
                f"train.micro_batch_size ({train.micro_batch_size}) x {world} rank(s) does not divide"
            )
    return problems


def load(paths: Sequence[str | Path] = (), overrides: Sequence[str] = (), *, world: int = 1) -> Config:
    """Resolves defaults, variant, YAML files and `key=value` overrides, in that order, and validates the result.

    Raises ConfigError with every unknown key (and the nearest valid name), every value of a wrong type and every
    impossible combination.
    """
    problems: list[str] = []
    given: Any = OmegaConf.create({})
    sources: list[tuple[str, Callable[[], Any]]] = [(str(path), partial(OmegaConf.load, path)) for path in paths]
    for text in overrides:
        if not text.partition("=")[0] or "=" not in text:
            problems.append(f"override {text!r} is not of the form key=value, as in optim.lr=1e-3")
        else:
            sources.append((f"override {text!r}", partial(OmegaConf.from_dotlist, [text])))
    for name, read in sources:
        try:
            given = OmegaConf.merge(given, read())
        except FileNotFoundError:
            problems.append(f"no such configuration file: {name}")
        except Exception as error:  # yaml and OmegaConf raise a dozen types; all mean the same to the reader
            problems.append(f"{name} is not a YAML mapping: {' '.join(str(error).split())}")
    values = OmegaConf.to_container(given, resolve=False)
    assert isinstance(values, dict), "merging mappings gives a mapping"
    return from_dict(values, problems=problems, world=world)


def from_dict(values: dict[Any, Any], *, problems: Sequence[str] = (), world: int = 1) -> Config:
    """Builds a Config from nested plain values, e.g. those of a saved run; errors as in `load`."""
    problems = list(problems)
    config = OmegaConf.structured(Config)
    known = dict(_schema(Config))
    sections = {f.name for f in fields(Config) if f.default is MISSING}
    leaves = {k: v for k, v in _leaves(values) if not (v is None and k in sections)}  # an empty section is no mistake
    unread = set()
    variant = leaves.get("model.variant")
    if variant is not None and str(variant) not in VARIANTS:
        problems.append(f"model.variant is {variant!r}: {_did_you_mean(str(variant), list(VARIANTS))}")
    elif variant is not None:
        leaves = {f"model.{name}": n for name, n in VARIANTS[str(variant)].items()} | leaves
    for key, value in leaves.items():
        if key not in known:
            inside = any(name.startswith(f"{key}.") for name in known)
            problems.append(
                f"{key} is a section, not a value: found {value!r}"
                if inside
                else f"unknown key {key}: {_did_you_mean(key, list(known))}"
            )
            continue
        if isinstance(value, float) and value.is_integer() and known[key] in (int, Optional[int]):
            value = int(value)  # 3e11 is the natural way to write a token budget
        try:
            if isinstance(value, str) and ("${" in value or value == "???"):
                raise OmegaConfBaseException("placeholders are not filled in: write the value")
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            unread.add(key)
            problems.append(f"{key} is {value!r}: {str(error).splitlines()[0]}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config), "the structured schema is Config"
    # What was not read has its default now: a problem that names it would be about a value nobody gave.
    problems += [p for p in validate(result, world) if not any(key in p for key in unread)]
    if problems:
        raise ConfigError(problems)
    return result


def save(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration as YAML that `load` reads back to an equal Config."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _at_least(bound: int, part: Any, section: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(part, name)
        if value is not None and value < bound:
            yield f"{section}.{name} is {value}: it must be at least {bound}"


def _parts(config: Config) -> Iterator[Any]:
    return (getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name)))


def _schema(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option's dotted name and type."""
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            yield from _schema(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", kind


def _leaves(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _did_you_mean(found: str, allowed: Sequence[str]) -> str:
    """The nearest allowed name: of the whole dotted path, else one whose last part is nearest."""
    near = difflib.get_close_matches(found, allowed, n=1, cutoff=0.6)
    if not near:
        tails = {name.rsplit(".", 1)[-1]: name for name in allowed}
        near = [tails[t] for t in difflib.get_close_matches(found.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]}?"
    return f"expected one of {', '.join(allowed)}" if len(allowed) < 12 else "no option has a similar name"
