"""How much memory a training step really takes: of tensors alive, and of a process."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_pretrain import config as config_module
from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engines import make_engine
from mamba_pretrain.distributed.env import autocast, resolve_precision
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.model.lm import MambaLM

CPU = torch.device("cpu")
# For steps that are really taken at sizes that matter: emulated products take minutes each.
PRECISION = f"train.precision={resolve_precision('auto', CPU)}"
ENGINES = {  # name: (ranks, options)
    "single": (1, ["train.engine=single"]),
    "zero-1": (2, ["train.engine=zero", "zero.stage=1"]),
    "zero-2": (2, ["train.engine=zero", "zero.stage=2"]),
    "zero-3": (2, ["train.engine=zero", "zero.stage=3"]),
    "fsdp": (2, ["train.engine=fsdp"]),
    "hsdp": (4, ["train.engine=fsdp", "fsdp.replicas=2"]),
}


def step_config(world: int, rows: int, length: int, *words: str, micro_batches: int = 1) -> Config:
    """A run of two steps, of so many micro-batches of (rows, length) each."""
    sizes = [f"train.micro_batch_size={rows}", f"data.seq_len={length}"]
    batch = f"train.batch_tokens={micro_batches * world * rows * length}"
    return config_module.load([], ["data.path=nowhere", "train.steps=2", *sizes, batch, *words], world=world)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at once, counted after every operation: what an allocator is asked for.

    Deterministic. Not seen is what an operation allocates and frees within itself.
    """

    def __init__(self, resizes: bool = False) -> None:
        """`resizes`: storages change their sizes, as FSDP2's do to free a gathered parameter."""
        super().__init__()
        self.resizes, self.peak = resizes, 0
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = len(self.sizes)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._add((leaf.to_local() if isinstance(leaf, DTensor) else leaf).untyped_storage())
        if len(self.sizes) > before:
            if self.resizes:
                alive = list(self.alive.items())  # other threads free some meanwhile
                self.sizes = {key: 0 if (s := ref()) is None else s.nbytes() for key, ref in alive}
            self.peak = max(self.peak, sum(list(self.sizes.values())))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: (self.alive.pop(key, None), self.sizes.pop(key, None)))
            self.sizes[key] = storage.nbytes()


def live_peak(ranks: Ranks, config: Config) -> int:
    """Of two steps of an engine."""
    live = LiveBytes(resizes=True)
    with live:
        _two_steps(ranks, config)
    return live.peak


def fake_live_peak(config: Config) -> int:
    """The same of one process, on fake tensors: any size, no time."""
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        _two_steps(ALONE, config, fake=True)
    return live.peak


def resident_peak(ranks: Ranks, config: Config) -> int:
    """Bytes by which two steps raise the process's anonymous memory at its highest, over what it took before.

    Pages of files, libraries' above all, are left out: the system takes cold ones back while the steps go on. Freed
    memory goes back to the system at once here; a training run keeps it (env.keep_freed_memory) and so holds its
    fragments, too.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `empty` makes: untouched pages do not count
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # of glibc's malloc.h
    for option, value in ((m_trim_threshold, 2**17), (m_mmap_threshold, 2**16), (m_mmap_max, 2**16)):
        ctypes.CDLL(None).mallopt(option, value)
    words = ["model.d_model=64", "model.n_layer=2", "model.vocab_size=512", f"train.precision={config.train.precision}"]
    tiny = step_config(ranks.world, 2, 64, *words, f"train.engine={config.train.engine}")
    tiny.zero, tiny.fsdp = config.zero, config.fsdp
    _two_steps(ranks, tiny)
    gc.collect()
    before = peak = _status("RssAnon")
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, _status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    _two_steps(ranks, config)
    ended.set()
    watching.join()
    return peak - before


def _two_steps(ranks: Ranks, config: Config, fake: bool = False, at_step: Callable[[], object] = lambda: None) -> None:
    def make_model() -> MambaLM:
        model = MambaLM(config.model)
        model.backbone.activation_checkpointing = config.train.activation_checkpointing
        return model

    def values(name: str) -> Tensor:
        return torch.full(shapes[name], 0.01)

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MambaLM(config.model).named_parameters()}
    engine: Any = make_engine(make_model, None if fake else values, config, CPU, ranks)
    engine.module.train()
    shape = (config.train.micro_batch_size, config.data.seq_len)
    ids, seq_idx = torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int32)
    micro_batches = config.accumulation(ranks.world)
    for _ in range(2):
        at_step()
        for i in range(micro_batches):
            with autocast(config.train.precision, CPU, cache=False):
                loss = engine.module(ids, ids.clone(), seq_idx, return_state=False).loss_sum / config.train.batch_tokens
            engine.backward(loss, last_micro_batch=i == micro_batches - 1)
            del loss
        if fake:  # the engine reads the norm, which has no value here
            torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])
            engine.optimizer.step()
            engine.optimizer.zero_grad(set_to_none=True)
        else:
            engine.step(1e-3)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def counted_collectives(ranks: Ranks, config: Config) -> dict[str, int]:
    """Bytes of the tensors that each kind of collective moves in the second step: in the first, ZeRO-3 learns the
    order of use."""
    counter = _Collectives()
    with counter:
        _two_steps(ranks, config, at_step=counter.bytes.clear)
    return counter.bytes


KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS.get(func._opname, func._opname)
            largest = max((leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), default=0)
            self.bytes[kind] = self.bytes.get(kind, 0) + largest
        return func(*args, **(kwargs or {}))
