"""Decoding on a CPU: one call of `ops/csrc/step.h` for a token, over pointers that are collected once."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from mamba_pretrain.ops.backends import native_build
from mamba_pretrain.ops.call import BlockWeights, KernelError, ModelWeights, expect

MATRICES = {"in_weight", "x_weight", "dt_weight", "out_weight"}


BLOCK = "norm in_weight x_weight dt_weight out_weight in_bias out_bias conv_weight conv_bias dt_bias A D"
SIZES = "batch width inner state rank taps vocabulary blocks threads"
RESULTS = "new_conv_state new_ssm_state logits normed xz x projected y out"


class _BlockArgs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in BLOCK.split()]


class _StepArgs(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in SIZES.split()],
        ("block", ctypes.POINTER(_BlockArgs)),
        *[(name, c_void_p) for name in ("embedding", "norm", "head", "token")],
        *[(name, ctypes.POINTER(c_void_p)) for name in ("conv_state", "ssm_state")],
        *[(name, c_void_p) for name in RESULTS.split()],
        ("eps", c_float),
    ]


class DecodeStep:
    """Holds the weights, laid out for the kernel: matrices in bf16 where all of them are, all else in fp32."""

    def __init__(self, weights: ModelWeights) -> None:
        self._library = native_build.load()
        matrices = [weights.head, *(getattr(b, name) for b in weights.blocks for name in MATRICES)]
        dtype = torch.bfloat16 if all(m.dtype == torch.bfloat16 for m in matrices) else torch.float32
        self._kept: list[Tensor] = []  # what the pointers point to
        block = weights.blocks[0]
        (self._inner, self._state), self._taps = block.A.shape, block.conv_weight.shape[1]
        self._vocabulary, self._width = weights.head.shape
        self._rank = block.dt_weight.shape[1]
        self._blocks = len(weights.blocks)
        self._half = int(dtype == torch.bfloat16)
        self._arguments = _StepArgs(
            width=self._width,
            inner=self._inner,
            state=self._state,
            rank=self._rank,
            taps=self._taps,
            vocabulary=self._vocabulary,
            blocks=self._blocks,
            block=(_BlockArgs * self._blocks)(*(self._block(b, dtype) for b in weights.blocks)),
            embedding=self._pointer(weights.embedding, torch.float32),
            norm=self._pointer(weights.norm, torch.float32),
            head=self._pointer(weights.head, dtype),
            eps=weights.eps,
        )
        self._embeddings = len(weights.embedding)

    def __call__(
        self, token_B: Tensor, conv: list[Tensor], ssm: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if bad := [i for i in token_B.tolist() if not 0 <= i < self._embeddings]:
            raise KernelError(f"decode_step: token ids {bad} are outside the vocabulary of {self._embeddings}")
        batch, threads = len(token_B), torch.get_num_threads()
        arguments = _StepArgs.from_buffer_copy(self._arguments)  # two threads may take steps at once
        for name, states, shape in (
            ("conv", conv, (batch, self._taps - 1, self._inner)),
            ("ssm", ssm, (batch, self._inner, self._state)),
        ):
            if len(states) != self._blocks:
                raise KernelError(f"decode_step: there are {len(states)} {name} states, expected {self._blocks}")
            for state in states:
                expect("decode_step", token_B.device, **{f"a {name} state": (state, shape)})
        conv = [s.float().contiguous() for s in conv]
        ssm = [s.float().contiguous() for s in ssm]
        token_B = token_B.to(torch.int64).contiguous()
        new_conv, new_ssm = (torch.empty(self._blocks, *states[0].shape) for states in (conv, ssm))
        logits_BV = torch.empty(batch, self._vocabulary)
        sizes = {
            "normed": 2 * threads * self._width,
            "xz": 2 * self._inner,
            "x": self._inner,
            "projected": self._rank + 2 * self._state,
            "y": self._inner,
            "out": self._width,
        }
        scratch = torch.empty(batch * sum(sizes.values()))
        address = scratch.data_ptr()
        for name, size in sizes.items():
            setattr(arguments, name, address)
            address += batch * size * scratch.itemsize
        arguments.batch, arguments.threads, arguments.token = batch, threads, token_B.data_ptr()
        arguments.conv_state, arguments.ssm_state = (
            (c_void_p * self._blocks)(*(s.data_ptr() for s in states)) for states in (conv, ssm)
        )
        arguments.new_conv_state, arguments.new_ssm_state = new_conv.data_ptr(), new_ssm.data_ptr()
        arguments.logits = logits_BV.data_ptr()
        self._library.mamba_decode_step(ctypes.byref(arguments), self._half)
        return logits_BV, list(new_conv.unbind()), list(new_ssm.unbind())

    def _block(self, weights: BlockWeights, dtype: torch.dtype) -> _BlockArgs:
        laid_out = weights._replace(conv_weight=weights.conv_weight.t())
        return _BlockArgs(
            **{
                name: self._pointer(tensor, dtype if name in MATRICES else torch.float32)
                for name, tensor in laid_out._asdict().items()
            }
        )

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.detach().to(dtype).contiguous())
        return self._kept[-1].data_ptr()
