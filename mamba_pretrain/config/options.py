"""Every option of a run: dataclasses with their defaults, their units in their names (`_tokens`, `_gib`, `_minutes`).

What can be computed from these fields is a property here and never a field. `loading` fills them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Optional

from mamba_pretrain.config.checks import ConfigError, at_least, did_you_mean
from mamba_pretrain.config.data import DataConfig, StagePlan

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

ENGINES = ("single", "zero", "fsdp")
PRECISIONS = ("fp32", "bf16", "fp16")
AUTO = "auto"
SCHEDULES = ("cosine", "wsd")
SINKS = ("console", "jsonl", "tensorboard", "wandb")


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
        yield from at_least(1, self, "model", *sizes)
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
        yield from at_least(0, self, "optim", "weight_decay", "clip_norm")
        if self.schedule not in SCHEDULES:
            yield f"optim.schedule is {self.schedule!r}: {did_you_mean(self.schedule, SCHEDULES)}"
        elif self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            yield "optim.warmup_fraction + optim.decay_fraction is above 1: warm-up and decay would overlap"


@dataclass
class TrainConfig:
    steps: Optional[int] = None  # give this or `tokens`
    tokens: Optional[int] = None  # budget; steps = ceil(tokens / batch_tokens)
    batch_tokens: int = 524_288  # per optimizer step, over all ranks
    micro_batch_size: int = 8  # sequences per rank in one forward pass; accumulation is derived
    seed: int = 0
    # Of matrix products; parameters, optimizer, norms and the scan's state are fp32. fp32 | bf16 | fp16 | auto: bf16
    # where the device has such products, else fp32.
    precision: str = "bf16"
    activation_checkpointing: bool = False  # recompute each block in the backward: less memory, a third more FLOPs
    device: str = "auto"  # auto | cpu | cuda
    engine: str = "single"  # single: one process | zero: DeepSpeed, see `zero` | fsdp: PyTorch's FSDP2, see `fsdp`
    kernels: str = "auto"  # native | cuda | triton | reference: those only; auto: the fastest that can run each op
    init_from: Optional[str] = None  # a Hugging Face or mamba_ssm directory whose weights the run starts from
    max_nonfinite: int = 10  # stop after this many skipped steps in a row
    hang_minutes: float = 15.0  # several ranks without progress for so long dump their stacks and end; 0: wait forever

    def problems(self) -> Iterator[str]:
        if (self.steps is None) == (self.tokens is None):
            yield f"give exactly one of train.steps and train.tokens: found {self.steps} and {self.tokens}"
        yield from at_least(1, self, "train", "steps", "tokens", "batch_tokens", "micro_batch_size", "max_nonfinite")
        yield from at_least(0, self, "train", "seed", "hang_minutes")
        choices = {"precision": (*PRECISIONS, AUTO), "device": ("auto", "cpu", "cuda"), "engine": ENGINES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"train.{name} is {getattr(self, name)!r}: {did_you_mean(getattr(self, name), allowed)}"


@dataclass
class ZeroConfig:
    """DeepSpeed. Its own configuration is derived: `mamba-pretrain describe --deepspeed RANKS` prints it."""

    stage: int = 1  # shards over all ranks 1: the optimizer, 2: and the gradients, 3: and the parameters
    offload_optimizer: bool = False  # Adam's moments and the update itself on the CPU
    offload_parameters: bool = False  # stage 3: parameters wait in CPU memory for their turn

    def problems(self) -> Iterator[str]:
        if self.stage == 0:
            yield (
                "zero.stage is 0, which shards nothing, and which in bf16 trains wrongly: DeepSpeed's optimizer for it "
                "takes a step with zero gradients when it is made, so Adam's bias correction is off from then on. Use "
                "zero.stage=1, or train.engine=fsdp with fsdp.replicas = the number of ranks"
            )
        elif self.stage not in (1, 2, 3):
            yield f"zero.stage is {self.stage}: expected 1, 2 or 3"
        if self.offload_parameters and self.stage != 3:
            yield f"zero.offload_parameters needs zero.stage=3: in stage {self.stage} every rank computes with them all"


@dataclass
class FsdpConfig:
    """PyTorch's FSDP2; the unit of sharding is the block."""

    replicas: int = 1  # HSDP: groups of ranks that each hold a whole model, sharded within the group; 1: full shard
    reshard_after_forward: bool = True  # False: parameters stay gathered until the backward; less traffic, more memory
    prefetch: int = 1  # blocks gathered ahead of the one that computes; 0: none
    offload: bool = False  # parameters, gradients and optimizer in CPU memory
    compile_blocks: bool = False  # torch.compile of each block; the first step takes minutes

    def problems(self) -> Iterator[str]:
        yield from at_least(1, self, "fsdp", "replicas")
        yield from at_least(0, self, "fsdp", "prefetch")


@dataclass
class EvalConfig:
    every_steps: int = 1000  # 0: only at the end
    max_windows: int = 256  # of the validation split, always the same ones

    def problems(self) -> Iterator[str]:
        yield from at_least(0, self, "eval", "every_steps")
        yield from at_least(1, self, "eval", "max_windows")


@dataclass
class CheckpointConfig:
    every_steps: int = 1000  # 0: not by step
    every_minutes: float = 30.0  # 0: not by time
    keep_last: int = 2
    keep_every_steps: int = 0  # multiples of this are never deleted; 0: none is kept for good
    asynchronous: bool = False  # training goes on while a snapshot of each rank's shards is written
    resume: str = "never"  # never: refuse a used run directory | auto: newest complete one | a checkpoint's path

    def problems(self) -> Iterator[str]:
        yield from at_least(0, self, "checkpoint", "every_steps", "every_minutes", "keep_every_steps")
        yield from at_least(1, self, "checkpoint", "keep_last")


@dataclass
class LogConfig:
    every_steps: int = 10
    sinks: list[str] = field(default_factory=lambda: ["console", "jsonl"])  # console, jsonl, tensorboard, wandb
    wandb_project: str = "mamba-pretrain"
    wandb_mode: str = "offline"  # offline | online

    def problems(self) -> Iterator[str]:
        yield from at_least(1, self, "log", "every_steps")
        if len(set(self.sinks)) < len(self.sinks):
            yield f"log.sinks is {self.sinks}: each sink once"
        for sink in self.sinks:
            if sink not in SINKS:
                yield f"log.sinks holds {sink!r}: {did_you_mean(sink, SINKS)}"
        if self.wandb_mode not in ("offline", "online"):
            yield f"log.wandb_mode is {self.wandb_mode!r}: {did_you_mean(self.wandb_mode, ('offline', 'online'))}"


@dataclass
class Config:
    run_dir: str = "runs/default"  # checkpoints, metrics, ledger and the resolved configuration
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def sequences_per_step(self) -> int:
        """Global batch in sequences of `data.seq_len` tokens, those of the first stage."""
        return self.train.batch_tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "validated configurations have steps or tokens"
        return math.ceil(self.train.tokens / self.train.batch_tokens)

    @property
    def stages(self) -> list[StagePlan]:
        """What `data.stages` come to; one where none are given. The batch is as many tokens in all of them."""
        plans: list[StagePlan] = []
        begins = [stage.from_tokens for stage in self.data.stages] or [0]
        for tokens, seq_len, weights in zip(begins, self.data.seq_lens, self.data.weights, strict=True):
            step, sample = math.ceil(tokens / self.train.batch_tokens), 0
            if plans:
                before = plans[-1]
                sample = before.first_sample + (step - before.first_step) * before.sequences_per_step
            micro_batch_size = self.train.micro_batch_size * self.data.seq_len // seq_len
            plans.append(
                StagePlan(step, sample, seq_len, self.train.batch_tokens // seq_len, micro_batch_size, weights)
            )
        return plans

    def samples_at(self, step: int) -> int:
        """Samples of the first `step` steps."""
        plan = [plan for plan in self.stages if plan.first_step <= step][-1]
        return plan.first_sample + (step - plan.first_step) * plan.sequences_per_step

    def accumulation(self, world: int) -> int:
        """Micro-batches per rank in one optimizer step, in all stages."""
        return self.sequences_per_step // (self.train.micro_batch_size * world)

    def digest(self) -> str:
        """Twelve hex digits that change with any option of the training itself, not with where and how it runs."""
        values = asdict(self)
        for section, name in (
            *(("data", "path"), ("data", "workers"), ("data", "verify_gib")),
            *(("train", "device"), ("train", "engine"), ("train", "hang_minutes")),
        ):
            del values[section][name]
        data = values["data"]
        for source in data["sources"]:
            del source["path"]
        if not (data["sources"] or data["stages"]) and data["packing"] == "windows":
            del data["sources"], data["stages"], data["packing"]  # as before there were such options
        kept = {section: values[section] for section in ("model", "data", "train", "optim")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
