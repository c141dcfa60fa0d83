"""DeepSpeed's checkpoints as ours: ZeRO-1, 2 or 3, bf16 or fp32; weights and Adam's moments to the bit.

DeepSpeed's own converter (deepspeed/checkpoint/ds_to_universal.py, 0.19) puts the ranks' shards together, in
`zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`. Those files are read here tensor by tensor, by name. Hyper-parameters are
our configuration's, and there is one step count for all parameters. So the two mistakes that DeepSpeed 0.19.8 makes
when it loads such files at stage 3 itself cannot happen (runtime/zero/stage3.py,
load_hp_checkpoint_state_from_checkpoint_dir_stage3): it gives every parameter group the hyper-parameters of the first,
so that what must not decay decays; and it gives all sub-groups one step tensor, which Adam then increments for each.

Names: mamba_ssm's (ours), Hugging Face's, both also behind `module.` or `model.`; and gpt-neox's, whose Mamba
(megatron/model/mamba/mamba.py, norm: rmsnorm, no tensor parallelism) has the same tensors, and an RMSNorm that adds its
epsilon to the root and not under it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mamba_pretrain.config import ModelConfig, OptimConfig
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER
from mamba_pretrain.export.deepspeed_files import check_shards, convert, load_safely, locate, model_states
from mamba_pretrain.export.formats import EMBEDDING, HEAD, HF_EMBEDDING, FormatError
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.pieces import Piece

DEEPSPEED = "deepspeed"
WEIGHTS, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")  # the converter's files; our optimizer's names, too
_OPTIMIZER_STATE = "optimizer_state.pt"
_SAMPLES = ("samples", "consumed_samples", "consumed_train_samples")  # in a client_state: ours, others', Megatron's

log = logging.getLogger("mamba_pretrain")


@contextlib.contextmanager
def opened(source: Path, target: Path) -> Iterator[Universal]:
    """The checkpoint in `source`, converted (unless it is already) in a scratch directory beside `target`."""
    tag = locate(Path(source))
    if (tag / "zero").is_dir():
        yield Universal(tag)
        return
    check_shards(tag)
    beside = next(parent for parent in Path(os.path.abspath(target)).parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.deepspeed-", dir=beside) as scratch:
        convert(tag, Path(scratch) / "universal")
        yield Universal(Path(scratch) / "universal", tag)


class Universal:
    """A universal checkpoint by our names. Raises FormatError where it is not of a Mamba-1 language model."""

    def __init__(self, directory: Path, source: Path | None = None) -> None:
        self.zero, self.source = directory / "zero", source or directory
        self.states = model_states(directory)
        theirs = [path.name for path in self.zero.iterdir() if (path / f"{WEIGHTS}.pt").is_file()]
        self.names = translate(self.source, theirs)  # ours: theirs
        said = {name: tuple(shape) for group in self.states.get("param_shapes") or [] for name, shape in group.items()}
        self.shapes = {
            name: said.get(their) or tuple(self._load(WEIGHTS, their).shape) for name, their in self.names.items()
        }
        self._settle_head()
        self.model = self._model_of_shapes()
        if any(their.endswith("norm.scale") for their in self.names.values()):
            log.warning("gpt-neox's RMSNorm divides by rms + epsilon, ours by sqrt(mean square + epsilon)")

    def _load(self, kind: str, their: str) -> Tensor:
        path = self.zero / their / f"{kind}.pt"
        found = load_safely(path)
        found = found.get("param") if isinstance(found, dict) else found
        if not isinstance(found, Tensor):
            raise FormatError(path, [f"holds a {type(found).__name__}: expected a tensor"])
        return found

    def tensor(self, kind: str, name: str) -> Tensor:
        """Flat and fp32. At stage 3 the converter leaves tensors flat."""
        flat = self._load(kind, self.names[name]).reshape(-1).float()
        if flat.numel() != math.prod(self.shapes[name]):
            found = f"{kind} of {self.names[name]} has {flat.numel()} elements, its shape is {self.shapes[name]}"
            raise FormatError(
                self.source, [f"{found}: a rank's shard is missing, or the model states are of another model"]
            )
        return flat

    def _trained(self, name: str) -> bool:
        return all((self.zero / self.names[name] / f"{kind}.pt").is_file() for kind in MOMENTS)

    def _settle_head(self) -> None:
        """A tied head is trained under one of its two names; the converter adds the other, as the model held it."""
        if HEAD in self.names and EMBEDDING not in self.names:
            self.names[EMBEDDING], self.shapes[EMBEDDING] = self.names[HEAD], self.shapes[HEAD]
        elif HEAD not in self.names or (self._trained(HEAD) and self._trained(EMBEDDING)):
            return
        first, second = (HEAD, EMBEDDING) if self._trained(HEAD) else (EMBEDDING, HEAD)
        kept, other = self.tensor(WEIGHTS, first), self.tensor(WEIGHTS, second)
        if not any(
            torch.equal(kept.to(dtype).float(), other) for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ):
            reason = f"{self.names[second]} has no optimizer state and differs from {self.names[first]}: it was frozen"
            raise FormatError(self.source, [reason])
        self.names[EMBEDDING], self.shapes[EMBEDDING] = self.names[first], self.shapes[first]
        del self.names[HEAD], self.shapes[HEAD]

    def _model_of_shapes(self) -> ModelConfig:
        """What shapes tell. The norms' epsilon and the count of real tokens they do not."""
        mixer, shapes = "backbone.layers.0.mixer.", self.shapes
        due = [EMBEDDING, *(mixer + part for part in ("in_proj.weight", "A_log", "conv1d.weight", "dt_proj.weight"))]
        lengths = dict(zip(due, (2, 2, 2, 3, 2), strict=True))
        if missing := [
            f"{name} of {lengths[name]} dimensions" for name in due if len(shapes.get(name, ())) != lengths[name]
        ]:
            raise self._no_mamba([f"found no {text}" for text in missing])
        rows, d_model = shapes[EMBEDDING]
        (inner, d_state), rank = shapes[mixer + "A_log"], shapes[mixer + "dt_proj.weight"][1]
        layers = {int(match[1]) for name in shapes if (match := re.match(r"backbone\.layers\.(\d+)\.", name))}
        model = ModelConfig(
            d_model=d_model,
            n_layer=len(layers),
            vocab_size=rows,
            pad_vocab_to_multiple_of=1 if rows % 8 else 8,
            d_state=d_state,
            d_conv=shapes[mixer + "conv1d.weight"][2],
            expand=max(1, inner // d_model),
            dt_rank=None if rank == math.ceil(d_model / 16) else rank,
            conv_bias=mixer + "conv1d.bias" in shapes,
            linear_bias=mixer + "in_proj.bias" in shapes,
            tie_embeddings=HEAD not in shapes,
        )
        if problems := [*model.problems()]:
            raise self._no_mamba(problems)
        return model

    def _no_mamba(self, problems: list[str]) -> FormatError:
        held = ", ".join(sorted(self.names.values())[:6])
        return FormatError(f"{self.source} is not of a Mamba-1 language model (it has {held} ...)", problems)

    def fit(self, model: ModelConfig) -> list[str]:
        """The parameters' names, in the model's order; FormatError where the shapes are not those of `model`."""
        with torch.device("meta"):
            due = {name: tuple(p.shape) for name, p in MambaLM(model).named_parameters()}
        problems = [f"{name} of shape {due[name]} is missing" for name in due if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in due:
                problems.append(f"{self.names[name]} of shape {shape} is not expected")
            elif shape != due[name]:
                problems.append(f"{self.names[name]} has shape {shape}, the configuration's model {due[name]}")
        if problems:
            told = {k: v for k, v in vars(self.model).items() if v != getattr(ModelConfig(), k)}
            words = " ".join(f"model.{name}={value}" for name, value in told.items())
            raise FormatError(f"{self.source} does not fit the model; its shapes tell {words}", problems)
        return list(due)

    def pieces(self, model: ModelConfig, *, moments: bool) -> dict[str, list[Piece]]:
        """What an engine's `state` would give, mapped from the files; every value is looked at once."""
        names = self.fit(model)
        kinds = (WEIGHTS, *MOMENTS) if moments else (WEIGHTS,)
        if moments and (untrained := [self.names[name] for name in names if not self._trained(name)]):
            reasons = [f"{their} has no optimizer state: it was frozen, or no step was taken" for their in untrained]
            raise FormatError(f"{self.source} cannot be resumed; import its weights alone, without data.path", reasons)
        found: dict[str, list[Piece]] = {MODEL: [], OPTIMIZER: []}
        bar = tqdm(total=len(names) * len(kinds), desc="tensors", disable=None)
        problems = []
        for name in names:
            for kind in kinds:
                flat = self.tensor(kind, name)
                low, high = flat.aminmax()  # NaN if there is one; makes no copy
                if not torch.isfinite(high - low) or (kind == MOMENTS[1] and low < 0):
                    problems.append(
                        f"{kind} of {self.names[name]} holds values that are not finite, or negative squares"
                    )
                part, stem = (MODEL, "") if kind == WEIGHTS else (OPTIMIZER, f"{kind}.")
                found[part].append(Piece(stem + name, self.shapes[name], 0, flat))
                bar.update()
        bar.close()
        if problems:
            raise FormatError(f"{self.source} is of a run that has diverged, or damaged", problems)
        if moments:
            found[OPTIMIZER].append(Piece("step", (), 0, torch.tensor([float(self.adam_step)])))
        return found

    @cached_property
    def _optimizer_state(self) -> dict[str, Any]:
        path = self.zero / _OPTIMIZER_STATE
        found = load_safely(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def adam_step(self) -> int:
        """Adam's count, which must be one for all: skipped steps are not in it."""
        paths = [self.zero / their / "step.pt" for their in self.names.values()]
        counts = Counter(float(load_safely(path)) for path in paths if path.is_file())
        groups = self._optimizer_state.get("optimizer_state_dict", {}).get("state", {})  # at stage 3, by sub-group
        counts += Counter(float(state["step"]) for state in groups.values() if "step" in state)
        if not counts:  # apex's FusedAdam
            counts += Counter(float(group["step"]) for group in self.param_groups if "step" in group)
        if len(counts) > 1:
            reasons = [f"step {step:.0f} for {count} of them" for step, count in sorted(counts.items())]
            cure = "Adam here has one. Import the weights alone (without data.path), or another step's checkpoint"
            raise FormatError(f"{self.source} has several step counts for its parameters; {cure}", reasons)
        taken = self.states.get("global_steps")
        if taken is not None:
            taken -= self.states.get("skipped_steps", 0)
        elif not counts:
            raise FormatError(self.source, ["neither the optimizer nor the model states say how many steps were taken"])
        step = int(next(iter(counts)) if counts else taken or 0)
        if taken is not None and step != taken:
            log.warning(
                "Adam's step count is %d, though the run took %d: DeepSpeed counts each sub-group once it has loaded a "
                "universal checkpoint at stage 3. It is kept: Adam's bias correction goes on as it was",
                *(step, taken),
            )
        return step

    @property
    def step(self) -> int:
        """Steps of the run, skipped ones included."""
        return int(self.states.get("global_steps", self.adam_step))

    @property
    def ranks(self) -> int:
        return int(self.states.get("dp_world_size", 1))

    @property
    def samples(self) -> int | None:
        """Sequences consumed, where the run's client_state says it."""
        return next((n for key in _SAMPLES if isinstance(n := self.states.get(key), int)), None)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for group in self._optimizer_state.get("param_groups", []) if isinstance(group, dict)]

    def say_what_changes(self, optim: OptimConfig) -> None:
        """Logs where the configuration differs from the DeepSpeed run, and what DeepSpeed itself would do wrongly."""
        due: dict[str, set[Any]] = {
            "betas": {(optim.beta1, optim.beta2)},
            "eps": {optim.eps},
            "weight_decay": {optim.weight_decay, 0.0},
        }
        for key, values in due.items():
            found = {
                tuple(v) if isinstance(v := group[key], list) else v for group in self.param_groups if key in group
            }
            if found - values:
                log.warning("Adam's %s was %s, the configuration has %s", key, _text(found), _text(values))
        if "optimizer_state_dict" in self._optimizer_state:
            log.info(
                "a checkpoint of stage 3, read by name: DeepSpeed itself, loading its universal form, would take the "
                "first group's weight decay for all groups, and let all sub-groups add to one step count"
            )


def translate(source: object, theirs: Iterable[str]) -> dict[str, str]:
    """Our names of the parameters, and theirs; FormatError for what cannot be told apart."""
    short = {their: re.sub(r"^(?:(?:module|model|_orig_mod)\.)+", "", their) for their in theirs}
    if any(re.match(r"(?:sequential\.)?\d+\.|tied_modules\.", name) for name in short.values()):
        short = _from_neox(source, short)
    found: dict[str, str] = {}
    for their, name in sorted(short.items()):
        ours = EMBEDDING if name == HF_EMBEDDING else name
        if ours in found:
            raise FormatError(source, [f"{found[ours]} and {their} are both {ours}"])
        found[ours] = their
    return found


def _from_neox(source: object, short: dict[str, str]) -> dict[str, str]:
    """gpt-neox numbers all layers of its pipeline: embedding, a function, the blocks, a function, norm, head."""
    parts = {their: re.sub(r"^sequential\.", "", name).split(".", 1) for their, name in short.items()}
    blocks = sorted({int(number) for number, rest in parts.values() if rest.startswith("mixer.")})
    renamed, problems = {}, []
    for their, (number, rest) in parts.items():
        block = blocks.index(int(number)) if number.isdecimal() and int(number) in blocks else None
        stem = "backbone.norm_f" if block is None else f"backbone.layers.{block}.norm"
        if rest.endswith("word_embeddings.weight"):
            renamed[their] = EMBEDDING
        elif rest == "final_linear.weight":
            renamed[their] = HEAD
        elif rest in ("norm.scale", "norm.weight"):
            renamed[their] = f"{stem}.weight"
        elif rest.startswith("mixer.") and rest != "mixer.x_proj.bias":
            renamed[their] = f"backbone.layers.{block}.{rest}"
        else:
            problems.append(f"{their} has no place in Mamba-1 here")
    if problems:
        cause = "LayerNorm, biases of all linears, attention and positions are not read"
        raise FormatError(f"{source}: gpt-neox's names, but not of a Mamba that is read ({cause})", problems)
    return renamed


def _text(values: set[Any]) -> str:
    return " and ".join(map(str, sorted(values)))
