"""Fills the options: defaults, variant, YAML files, command line; and says everything that is wrong with the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mamba_pretrain.config.checks import ConfigError, did_you_mean
from mamba_pretrain.config.options import VARIANTS, Config


def validate(config: Config, world: int | None = None) -> list[str]:
    """All reasons why `config` cannot run on `world` ranks (None: on any number); empty when it can."""
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
    train = config.train
    problems += _batch_problems(config, world or 1)
    if train.engine == "single" and (world or 1) > 1:
        problems.append(
            f"train.engine is single, and this is one of {world} ranks: each would train the same model by itself. "
            "Use train.engine=zero or fsdp, or start one process"
        )
    if train.engine == "fsdp" and world is not None and config.fsdp.replicas >= 1 and world % config.fsdp.replicas:
        problems.append(f"fsdp.replicas is {config.fsdp.replicas}, which does not divide the {world} ranks")
    return problems


def _batch_problems(config: Config, world: int) -> Iterator[str]:
    train, seq_len = config.train, config.data.seq_len
    if min(train.batch_tokens, train.micro_batch_size, *config.data.seq_lens) < 1:
        return
    if train.batch_tokens % seq_len:
        lower = train.batch_tokens // seq_len * seq_len
        near = f"{lower} or {lower + seq_len}" if lower else str(seq_len)
        yield (
            f"train.batch_tokens ({train.batch_tokens}) is not a multiple of data.seq_len ({seq_len}): "
            f"the nearest is {near}"
        )
        return
    if config.sequences_per_step % (train.micro_batch_size * world):
        yield (
            f"train.batch_tokens / data.seq_len is {config.sequences_per_step} sequences a step, which "
            f"train.micro_batch_size ({train.micro_batch_size}) x {world} rank(s) does not divide"
        )
    for longer in sorted(set(config.data.seq_lens)):
        if train.micro_batch_size * seq_len % longer:
            yield (
                f"data.stages: micro-batches have as many tokens in all stages, train.micro_batch_size x data.seq_len "
                f"= {train.micro_batch_size} x {seq_len}, which rows of {longer} do not divide"
            )
    begins = [-(-stage.from_tokens // train.batch_tokens) for stage in config.data.stages]
    for i in range(1, len(begins)):
        if begins[i] <= begins[i - 1]:
            yield f"data.stages[{i}] begins with step {begins[i]}, as the one before it: it would have no steps"


def load(paths: Sequence[str | Path] = (), overrides: Sequence[str] = (), *, world: int | None = None) -> Config:
    """Resolves the options' defaults, the variant's published shape, YAML files in the order given, and `key=value`
    overrides (``optim.lr=1e-3``), lowest precedence first, and validates the result for `world` ranks.

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


def from_dict(values: dict[Any, Any], *, problems: Sequence[str] = (), world: int | None = None) -> Config:
    """Builds a Config from nested plain values, e.g. those of a saved run; errors as in `load`."""
    problems = list(problems)
    config = OmegaConf.structured(Config)
    known = dict(_schema(Config))
    sections = {f.name for f in fields(Config) if f.default is MISSING}
    leaves = {k: v for k, v in _leaves(values) if not (v is None and k in sections)}  # an empty section is no mistake
    unread: set[str] = set()
    variant = leaves.get("model.variant")
    if variant is not None and str(variant) not in VARIANTS:
        problems.append(f"model.variant is {variant!r}: {did_you_mean(str(variant), list(VARIANTS))}")
    elif variant is not None:
        leaves = {f"model.{name}": n for name, n in VARIANTS[str(variant)].items()} | leaves
    for key, value in leaves.items():
        above = next((name for name in known if key.startswith(f"{name}.") and _element(known[name])), None)
        if above is not None:
            unread.add(above)
            shape = f"{{{', '.join(get_type_hints(_element(known[above])))}}}"
            problems.append(f"{key} is {value!r}: {above} is a list of {shape}, each beginning with `- ` in YAML")
            continue
        if key not in known:
            inside = any(name.startswith(f"{key}.") for name in known)
            problems.append(
                f"{key} is a section, not a value: found {value!r}"
                if inside
                else f"unknown key {key}: {did_you_mean(key, list(known))}"
            )
            continue
        element = _element(known[key])
        if element is not None:
            value, wrong = _records(key, value, element)
            unread |= wrong.keys()
            problems += wrong.values()
        problem = _assign(config, key, value, known[key])
        if problem is not None:
            unread.add(key)
            problems.append(f"{key} is {value!r}: {problem}")
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


def _assign(node: Any, key: str, value: Any, kind: Any) -> str | None:
    """Sets one option; returns what is wrong with the value, if anything."""
    if isinstance(value, float) and value.is_integer() and kind in (int, Optional[int]):
        value = int(value)  # 3e11 is the natural way to write a token budget
    try:
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise OmegaConfBaseException("placeholders are not filled in: write the value")
        OmegaConf.update(node, key, value)
    except OmegaConfBaseException as error:
        return str(error).splitlines()[0]
    return None


def _records(key: str, value: Any, element: Any) -> tuple[list[Any], dict[str, str]]:
    """The sections in a list, and what is wrong by name, as in data.sources[0].weight."""
    kinds = get_type_hints(element)
    found: list[Any] = []
    wrong: dict[str, str] = {}
    if not isinstance(value or [], list):
        return [], {key: f"{key} is {value!r}: expected a list of {{{', '.join(kinds)}}}"}
    for i, item in enumerate(value or []):
        name = f"{key}[{i}]"
        found.append(OmegaConf.structured(element))
        if not isinstance(item, dict):
            wrong[name] = f"{name} is {item!r}: expected {{{', '.join(kinds)}}}"
            continue
        for field, given in item.items():
            if field not in kinds:
                wrong[f"{name}.{field}"] = f"unknown key {name}.{field}: {did_you_mean(str(field), list(kinds))}"
            elif (problem := _assign(found[-1], field, given, kinds[field])) is not None:
                wrong[f"{name}.{field}"] = f"{name}.{field} is {given!r}: {problem}"
    return found, wrong


def _element(kind: Any) -> Any:
    """The section that a list holds many of; None for any other type."""
    inner = get_args(kind)
    return inner[0] if getattr(kind, "__origin__", None) is list and is_dataclass(inner[0]) else None


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
