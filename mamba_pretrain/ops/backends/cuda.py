"""The CUDA kernels of mamba_ssm and causal_conv1d, as the ops' backend on NVIDIA GPUs.

Proven on a CPU only: the packages' own Python runs there over stand-ins for their two compiled modules, which check
what those check and compute by the equations (tests/ops/test_cuda.py). Nothing in this file has run on a GPU yet.

The scan wants the steps of a channel side by side in memory, the convolution with document numbers wants the channels
of a step. A product can be written either way round at no cost, so activations are made in the layout their reader
wants: (E, M), where M = B L counts the steps of all rows, or (M, E). The one copy between them is that of the packed
convolution's output. Other suffixes: F = 2 E, P = R + 2 N, G the steps at which a document begins within a row.
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_pretrain.ops.backends.cuda_packages import missing
from mamba_pretrain.ops.call import Call, KernelError

__all__ = ["NAME", "OPS", "causal_conv1d", "mamba_inner", "missing", "refuses", "selective_scan"]

NAME = "cuda"
OPS = ("mamba_inner", "selective_scan", "causal_conv1d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VALUES = 2**32  # causal_conv1d multiplies strides in 32 bits, and would read elsewhere without a word


def refuses(call: Call) -> str | None:
    if call.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, and this is {call.dtype}".replace("torch.", "")
    if call.length == 0:
        return "the kernels take no empty sequences"
    if call.op == "causal_conv1d":
        return _taps_refuse(call.size) or _channels_refuse(call.channels)
    if call.op == "selective_scan":
        return _scan_refuses(call)
    if _is_decoding(call.length, call.grad):
        return _taps_refuse(call.taps)
    channels = call.channels if call.packed or call.last_state else 0  # fused, the convolution has the other layout
    return _taps_refuse(call.taps) or _scan_refuses(call) or _channels_refuse(channels)


def _taps_refuse(taps: int) -> str | None:
    return None if 2 <= taps <= 4 else f"causal_conv1d takes 2 to 4 taps, and here they are {taps}"


def _channels_refuse(channels: int) -> str | None:
    if channels % 8 == 0:
        return None
    return f"causal_conv1d takes multiples of 8 channels where documents or states are kept, and here are {channels}"


def _scan_refuses(call: Call) -> str | None:
    if call.size > 256:
        return f"selective_scan takes at most 256 states a channel, and these are {call.size}"
    if call.initial_state:
        return "selective_scan takes no initial state"
    if call.grad and call.last_state:
        return "selective_scan drops the gradient of its last state"
    if call.grad and call.deterministic:
        return "selective_scan's backward adds in no fixed order, and deterministic algorithms were asked for"
    return None


def _is_decoding(length: int, grad: bool) -> bool:
    return length == 1 and not grad


def mamba_inner(
    hidden_BLD: Tensor,
    in_weight_FD: Tensor,
    in_bias_F: Tensor | None,
    conv_weight_EK: Tensor,
    conv_bias_E: Tensor | None,
    x_weight_PE: Tensor,
    dt_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_EN: Tensor,
    D_E: Tensor,
    out_weight_DE: Tensor,
    out_bias_D: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    conv_state_BSE: Tensor | None = None,
    ssm_state_BEN: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One of three ways: a single step from states, all in one kernel, or kernel by kernel for documents and states."""
    batch, length, _ = hidden_BLD.shape
    if _is_decoding(length, torch.is_grad_enabled()):
        y_BLD, conv_state_BSE, ssm_state_BEN = _one_step(
            hidden_BLD, in_weight_FD, in_bias_F, conv_weight_EK, conv_bias_E, x_weight_PE, dt_weight_ER, dt_bias_E,
            A_EN, D_E, out_weight_DE, out_bias_D, conv_state_BSE, ssm_state_BEN,
        )  # fmt: skip
        return (y_BLD, conv_state_BSE, ssm_state_BEN) if return_last_state else (y_BLD, None, None)
    _expect_countable(batch * length * len(A_EN))
    hidden_MD = hidden_BLD.reshape(batch * length, -1)
    if seq_idx_BL is None and not return_last_state:
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

        y_BLD = mamba_inner_fn(
            _rows(_steps_inside(in_weight_FD, in_bias_F, hidden_MD), batch),
            conv_weight_EK.unsqueeze(1),
            conv_bias_E,
            x_weight_PE,
            dt_weight_ER,
            out_weight_DE,
            None,  # its backward sums the gradient of this bias to one number, and autograd stops at that
            A_EN.float(),
            D=D_E.float(),
            delta_bias=dt_bias_E.float(),
            delta_softplus=True,
        )
        return (y_BLD if out_bias_D is None else y_BLD + out_bias_D.to(y_BLD.dtype)), None, None

    rank, d_state = dt_weight_ER.shape[1], A_EN.shape[1]
    x_weight_ED, z_weight_ED = in_weight_FD.chunk(2)
    x_bias_E, z_bias_E = (None, None) if in_bias_F is None else in_bias_F.chunk(2)
    x_BLE = F.linear(hidden_BLD, x_weight_ED, x_bias_E)
    u_BLE, conv_state_BSE = causal_conv1d(x_BLE, conv_weight_EK, conv_bias_E, seq_idx_BL, None, return_last_state)
    u_ME = u_BLE.reshape(batch * length, -1)
    delta_RM, B_NM, C_NM = torch.split(x_weight_PE @ u_ME.t(), [rank, d_state, d_state])
    y_EM, ssm_state_BEN = _scan(
        u_ME.t().clone(memory_format=torch.contiguous_format),
        dt_weight_ER @ delta_RM,
        A_EN,
        B_NM,
        C_NM,
        D_E,
        _steps_inside(z_weight_ED, z_bias_E, hidden_MD),
        dt_bias_E,
        None if seq_idx_BL is None else _documents(seq_idx_BL),
        batch,
        return_last_state,
    )
    y_BLD = F.linear(y_EM.t(), out_weight_DE, out_bias_D).view(batch, length, -1)
    return y_BLD, conv_state_BSE, ssm_state_BEN


def _one_step(
    hidden_BLD: Tensor,
    in_weight_FD: Tensor,
    in_bias_F: Tensor | None,
    conv_weight_EK: Tensor,
    conv_bias_E: Tensor | None,
    x_weight_PE: Tensor,
    dt_weight_ER: Tensor,
    dt_bias_E: Tensor,
    A_EN: Tensor,
    D_E: Tensor,
    out_weight_DE: Tensor,
    out_bias_D: Tensor | None,
    conv_state_BSE: Tensor | None,
    ssm_state_BEN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The packages' kernels for generation. They write the new states over the old ones, so they are given copies."""
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    batch, (inner, d_state), taps = len(hidden_BLD), A_EN.shape, conv_weight_EK.shape[1]
    rank = dt_weight_ER.shape[1]
    x_BE, z_BE = F.linear(hidden_BLD.squeeze(1), in_weight_FD, in_bias_F).chunk(2, dim=-1)
    if conv_state_BSE is None:
        conv_state_BSE = x_BE.new_zeros(batch, taps - 1, inner, dtype=torch.float32)
    if ssm_state_BEN is None:
        ssm_state_BEN = x_BE.new_zeros(batch, inner, d_state, dtype=torch.float32)
    conv_state_BSE = conv_state_BSE.to(torch.float32, copy=True)
    ssm_state_BEN = ssm_state_BEN.to(torch.float32, copy=True)
    # The input must have the state's dtype, which is fp32 here: nothing is rounded that the op does not round.
    weight_EK, bias_E = _one_dtype(conv_weight_EK, conv_bias_E)
    u_BE = causal_conv1d_update(x_BE.float(), conv_state_BSE.transpose(1, 2), weight_EK, bias_E, activation="silu")
    u_BE = u_BE.to(x_BE.dtype)
    delta_BR, B_BN, C_BN = torch.split(F.linear(u_BE, x_weight_PE), [rank, d_state, d_state], dim=-1)
    y_BE = selective_state_update(
        ssm_state_BEN,
        u_BE,
        F.linear(delta_BR, dt_weight_ER),
        A_EN.float(),
        B_BN,
        C_BN,
        D=D_E.float(),
        z=z_BE,
        dt_bias=dt_bias_E.float(),
        dt_softplus=True,
    )
    return F.linear(y_BE, out_weight_DE, out_bias_D).unsqueeze(1), conv_state_BSE, ssm_state_BEN


def causal_conv1d(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None,
    seq_idx_BL: Tensor | None = None,
    initial_state_BSE: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn

    _expect_countable(x_BLE.numel())
    dtype, taps = x_BLE.dtype, weight_EK.shape[1]
    number_BL = None if seq_idx_BL is None else _documents(seq_idx_BL).number
    initial_BES = None
    if initial_state_BSE is not None:  # it must have the dtype of x, and rounding it would change the result
        x_BLE = x_BLE.to(torch.promote_types(dtype, initial_state_BSE.dtype))
        initial_BES = initial_state_BSE.to(x_BLE.dtype).contiguous().transpose(1, 2)
    if x_BLE.stride(2) != 1 or x_BLE.stride(0) % 8 or x_BLE.stride(1) % 8 or x_BLE.storage_offset() % 8:
        x_BLE = x_BLE.clone(memory_format=torch.contiguous_format)  # it is read eight channels at a time
    weight_EK, bias_E = _one_dtype(weight_EK, bias_E)
    y_BEL = causal_conv1d_fn(
        x_BLE.transpose(1, 2), weight_EK, bias_E, seq_idx=number_BL, initial_states=initial_BES, activation="silu"
    )
    last_BSE = _last_inputs(x_BLE, initial_state_BSE, number_BL, taps) if return_last_state else None
    return y_BEL.transpose(1, 2).to(dtype), last_BSE


def _last_inputs(x_BLE: Tensor, initial_BSE: Tensor | None, number_BL: Tensor | None, taps: int) -> Tensor:
    """Picked out here, because the kernel does not return it together with document numbers."""
    S = taps - 1
    if initial_BSE is None:
        initial_BSE = x_BLE.new_zeros(len(x_BLE), S, x_BLE.shape[2], dtype=torch.float32)
    last_BSE = torch.cat([initial_BSE.float(), x_BLE[:, -S:].float()], dim=1)[:, -S:]
    if number_BL is None:
        return last_BSE
    number_BS = torch.cat([number_BL[:, :1].expand(-1, S), number_BL[:, -S:]], dim=1)[:, -S:]
    return last_BSE * torch.eq(number_BS, number_BL[:, -1:]).unsqueeze(-1)


def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    delta_bias_E: Tensor,
    seq_idx_BL: Tensor | None = None,
    initial_state_BEN: Tensor | None = None,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Copies its five long inputs, for the layout; `mamba_inner` does not."""
    assert initial_state_BEN is None, "refused above"
    batch, length, _ = u_BLE.shape
    wide = functools.reduce(torch.promote_types, (x.dtype for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE)))

    def steps_inside(x_BLX: Tensor) -> Tensor:
        return x_BLX.to(wide).reshape(batch * length, -1).t().clone(memory_format=torch.contiguous_format)

    y_EM, last_BEN = _scan(
        steps_inside(u_BLE),
        steps_inside(delta_BLE),
        A_EN,
        steps_inside(B_BLN),
        steps_inside(C_BLN),
        D_E,
        steps_inside(z_BLE),
        delta_bias_E,
        None if seq_idx_BL is None else _documents(seq_idx_BL),
        batch,
        return_last_state,
    )
    return y_EM.view(-1, batch, length).permute(1, 2, 0).to(u_BLE.dtype), last_BEN


def _scan(
    u_EM: Tensor,
    delta_EM: Tensor,
    A_EN: Tensor,
    B_NM: Tensor,
    C_NM: Tensor,
    D_E: Tensor,
    z_EM: Tensor,
    bias_E: Tensor,
    documents: _Documents | None,
    batch: int,
    return_last_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """selective_scan_fn, with a trick where documents begin, because it has no reset.

    There a step is handed over so long that it forgets everything, delta' with softplus(delta' + bias) = S and
    exp(S A) = 0, and the input is scaled to u' = u softplus(delta + bias) / S, so that what enters the state, S B u',
    is what should. D u and the gate stay in the kernel; there they see u', and D (u - u') silu(z) is added behind it.

    S is what the kernel makes of delta' as rounded to the activations' dtype, so that rounding does not enter the
    product; u' is rounded to that dtype, as u was. S is as short as can be: in its backward the kernel takes S B u'
    from the state and multiplies what is left, which should be 0 and is a rounding error, by S. Writes into u_EM and
    delta_EM.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    A_EN, D_E, bias_E, dtype = A_EN.float(), D_E.float().contiguous(), bias_E.float().contiguous(), u_EM.dtype
    extra_EG = None
    if documents is not None:
        if dtype == torch.float16:  # in which u' would fall below the smallest numbers that have all their bits
            u_EM, delta_EM, B_NM, C_NM, z_EM = (x.float() for x in (u_EM, delta_EM, B_NM, C_NM, z_EM))
        start_G = documents.start
        long_E = _forgetting(A_EN, bias_E).to(delta_EM.dtype)
        S_E1 = (long_E.float() + bias_E).detach().unsqueeze(1)  # constant: see _forgetting
        u_EG, delta_EG = u_EM.index_select(1, start_G).float(), delta_EM.index_select(1, start_G).float()
        scaled_EG = (u_EG * (F.softplus(delta_EG + bias_E.unsqueeze(1)) / S_E1)).to(u_EM.dtype)
        z_EG = z_EM.index_select(1, start_G).float()
        extra_EG = D_E.unsqueeze(1) * (u_EG - scaled_EG.float()) * F.silu(z_EG)
        u_EM = u_EM.index_copy_(1, start_G, scaled_EG)  # in place: both were made for this function
        delta_EM = delta_EM.index_copy_(1, start_G, long_E.unsqueeze(1).expand(-1, len(start_G)))
    out = selective_scan_fn(
        _rows(u_EM, batch),
        _rows(delta_EM, batch),
        A_EN,
        _rows(B_NM, batch),
        _rows(C_NM, batch),
        D_E,
        z=_rows(z_EM, batch),
        delta_bias=bias_E,
        delta_softplus=True,
        return_last_state=return_last_state,
    )
    y_BEL, last_BEN = out if return_last_state else (out, None)
    y_EM = y_BEL.transpose(0, 1).flatten(1)
    if documents is not None and extra_EG is not None:
        y_EM = y_EM.index_add(1, documents.start, extra_EG.to(y_EM.dtype))
    # A copy, because the kernel's is a view of all the states that it keeps for its backward.
    return y_EM.to(dtype), None if last_BEN is None else last_BEN.contiguous()


def _forgetting(A_EN: Tensor, bias_E: Tensor) -> Tensor:
    """delta' of each channel: S - bias, where exp(S A) is 0 in fp32 for all its states, which it is below exp(-104).

    128 at least, so that softplus(S) = S whatever the bias. The bias is not detached: what reaches delta' in the
    backward is its part in S, which the kernel also counts in the gradient of its own bias; they cancel.
    """
    S_E = 128 / A_EN.detach().abs().amin(dim=1).clamp(max=1)
    return S_E - bias_E


class _Documents(NamedTuple):
    number: Tensor  # (B, L) int32 from 0, as the convolution wants them; it takes a negative number for padding
    start: Tensor  # (G) where in M a document begins, but for the rows' first steps, where the state is 0 anyway


_latest: tuple[weakref.ref[Tensor], int, _Documents] | None = None


def _documents(seq_idx_BL: Tensor) -> _Documents:
    """Kept for the next layers: their number must be known on the CPU, and so the CPU waits for the GPU here."""
    global _latest
    version = -1 if seq_idx_BL.is_inference() else seq_idx_BL._version
    if _latest is not None and _latest[0]() is seq_idx_BL and _latest[1] == version >= 0:
        return _latest[2]
    begins_BL = torch.zeros_like(seq_idx_BL, dtype=torch.bool)
    begins_BL[:, 1:] = torch.ne(seq_idx_BL[:, 1:], seq_idx_BL[:, :-1])
    found = _Documents(begins_BL.cumsum(1, dtype=torch.int32), begins_BL.flatten().nonzero().squeeze(1))
    _latest = weakref.ref(seq_idx_BL), version, found
    return found


def _expect_countable(values: int) -> None:
    if values >= MAX_VALUES:
        raise KernelError(
            f"cuda kernels: rows x steps x channels are {values}, expected fewer than {MAX_VALUES}. "
            "Take a smaller train.micro_batch_size, or train.kernels=triton"
        )


def _steps_inside(weight_ED: Tensor, bias_E: Tensor | None, hidden_MD: Tensor) -> Tensor:
    """F.linear with its result the other way round, (E, M)."""
    if bias_E is None:
        return weight_ED @ hidden_MD.t()
    return torch.addmm(bias_E.unsqueeze(1), weight_ED, hidden_MD.t())


def _rows(x_EM: Tensor, batch: int) -> Tensor:
    """The kernels' (B, E, L), of any strides but the last: a view."""
    return x_EM.view(len(x_EM), batch, -1).transpose(0, 1)


def _one_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if bias is None:
        return weight, None
    wide = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(wide), bias.to(wide)
