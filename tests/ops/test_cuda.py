"""The cuda backend on a CPU: every call it makes goes through the real mamba_ssm and causal_conv1d (see helpers.stubs).

What stands in for their compiled modules refuses what those refuse, so a wrong dtype, stride or argument fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_pretrain.config import ModelConfig
from mamba_pretrain.model.lm import MambaLM
from mamba_pretrain.ops import causal_conv1d as conv_module
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops import selective_scan as scan_module
from mamba_pretrain.ops.backends import cuda
from mamba_pretrain.ops.call import Call, KernelError
from mamba_pretrain.ops.mamba_inner import mamba_inner
from mamba_pretrain.ops.selfcheck import self_check
from tests.helpers import mixers, reference, stubs
from tests.helpers.mixers import Shape

SHAPES = {
    "usual": Shape(),
    "one state": Shape(state=1, taps=2, inner=24),
    "64 states": Shape(batch=1, length=20, state=64, taps=3),
    "no convolution bias": Shape(batch=3, length=9, conv_bias=False),
    "linear biases": Shape(linear_bias=True, taps=3),
    "one row, aligned reads": Shape(batch=1, length=128, state=4),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),  # mamba_ssm's question
    pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning"),  # its custom_bwd
]


@pytest.fixture(scope="module", autouse=True)
def packages() -> Iterator[None]:
    with stubs.installed():
        yield


@pytest.fixture(autouse=True)
def routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the cuda backend, as if its kernels were there."""
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": (cuda,)})
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(stubs, "calls", [])


def numbers(shape: Shape, seed: int = 0) -> Tensor:
    """Documents of every short length, those of one step among them."""
    return reference.layouts(shape.batch, shape.length, seed, density=0.3)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("name", SHAPES)
def test_mixer_equals_the_reference(name: str, packed: bool) -> None:
    shape = SHAPES[name]
    arguments, seq_idx = mixers.draw(shape), numbers(shape) if packed else None
    found = mixers.run(arguments, "cuda", seq_idx)
    due = mixers.run(arguments, "reference", seq_idx, dtype=torch.float64)
    # dA of packed rows: the kernel's backward takes a rounding error for a state and multiplies it by 128.
    for of, error in mixers.deviations(found, due).items():
        assert error < (2e-5 if packed and of == "dA" else 1e-5), of
    fused = ["conv_fwd", "scan_fwd", "conv_fwd", "scan_bwd", "conv_bwd"]  # the convolution is computed twice
    assert stubs.calls == (["conv_fwd", "scan_fwd", "scan_bwd", "conv_bwd"] if packed else fused)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["usual", "linear biases", "one row, aligned reads"])
def test_under_autocast_no_more_is_lost_than_by_the_reference(name: str, dtype: torch.dtype, packed: bool) -> None:
    shape = SHAPES[name]
    arguments, seq_idx = mixers.draw(shape, seed=1), numbers(shape, seed=1) if packed else None
    due = mixers.run(arguments, "reference", seq_idx, dtype=torch.float64)
    found = mixers.run(arguments, "cuda", seq_idx, autocast=dtype)
    usual = mixers.deviations(mixers.run(arguments, "reference", seq_idx, autocast=dtype), due)
    assert found.outputs["y"].dtype == dtype
    for of, error in mixers.deviations(found, due).items():
        assert error < 2 * usual[of] + 4 * torch.finfo(dtype).eps, of


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_documents_are_as_alone(dtype: torch.dtype | None) -> None:
    """Values and gradients, no number moving by more than products of other sizes move it."""
    lengths = [1, 5, 1, 1, 9, 2, 3]
    arguments = mixers.draw(Shape(batch=1, length=sum(lengths)))
    seq_idx = torch.tensor([[7 + 3 * j for j, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int64)
    packed = [x if x is None else x.float().requires_grad_() for x in arguments]
    alone = [x if x is None else x.float().requires_grad_() for x in arguments]
    with dispatch.using("cuda"), stubs.autocast(dtype):
        y, _, _ = mamba_inner(*packed, seq_idx, return_last_state=False)
        parts = [mamba_inner(part, *alone[1:], return_last_state=False)[0] for part in alone[0].split(lengths, dim=1)]
    leaves = ([x for x in packed if x is not None], [x for x in alone if x is not None])
    grads = reference.gradients((y,), leaves[0])
    due_grads = reference.gradients((torch.cat(parts, dim=1),), leaves[1])
    tolerance = 1e-5 if dtype is None else 2**-6
    for found, due in zip([y, *grads], [torch.cat(parts, dim=1), *due_grads], strict=True):
        assert (found - due).abs().max() <= tolerance * due.abs().max()


def test_numbers_that_never_change_change_nothing() -> None:
    arguments = mixers.draw(Shape())
    found = mixers.run(arguments, "cuda", torch.full((2, 24), 5))
    assert max(mixers.deviations(found, mixers.run(arguments, "cuda")).values()) < 5e-6


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_documents_are_apart_however_fast_channels_forget(spread: float) -> None:
    """The long step follows A: exactly nothing of a document, however large, is left in the next."""
    arguments = mixers.draw(Shape(batch=1, length=8))
    arguments[8] = arguments[8] * spread
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    other = [x if x is None else x.clone() for x in arguments]
    other[0][:, :4] *= 1e4
    for autocast in (None, torch.bfloat16):
        first, second = (mixers.run(a, "cuda", seq_idx, autocast=autocast, grad=False) for a in (arguments, other))
        assert not torch.equal(first.outputs["y"][:, :4], second.outputs["y"][:, :4])
        assert torch.equal(first.outputs["y"][:, 4:], second.outputs["y"][:, 4:])


@pytest.mark.parametrize("bias", [-300.0, -6.0, 10.0])
def test_the_reset_holds_for_any_bias(bias: float) -> None:
    arguments = mixers.draw(Shape())
    arguments[7] = torch.full_like(arguments[7], bias)
    seq_idx = numbers(Shape())
    due = mixers.run(arguments, "reference", seq_idx, dtype=torch.float64)
    found = mixers.run(arguments, "cuda", seq_idx, autocast=torch.bfloat16)
    usual = mixers.deviations(mixers.run(arguments, "reference", seq_idx, autocast=torch.bfloat16), due)
    errors = mixers.deviations(found, due)
    compared = ["y", "dhidden", "dout_weight"] if bias == -300 else list(errors)
    for of in compared:  # at -300 steps are 0 and so are the other gradients
        assert errors[of] < 2 * usual[of] + 2**-6, of


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("length", [2, 3, 24])
def test_states_after_a_prompt(length: int, packed: bool) -> None:
    shape = Shape(length=length)
    arguments, seq_idx = mixers.draw(shape), numbers(shape, seed=4) if packed else None
    found, due = (
        mixers.run(arguments, kernels, seq_idx, last_state=True, grad=False, dtype=dtype)
        for kernels, dtype in (("cuda", torch.float32), ("reference", torch.float64))
    )
    assert {k: v.dtype for k, v in found.outputs.items()} == dict.fromkeys(due.outputs, torch.float32)
    for name, error in mixers.deviations(found, due).items():
        assert error < 2e-6, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("taps", [2, 4])
def test_steps_from_a_state_equal_the_text_at_once_and_leave_the_state_alone(
    taps: int, dtype: torch.dtype | None
) -> None:
    shape = Shape(taps=taps, length=12)
    arguments = [x if x is None else x.float() for x in mixers.draw(shape)]
    with torch.no_grad(), stubs.autocast(dtype):
        with dispatch.using("reference"):
            due = mamba_inner(*arguments)
        with dispatch.using("cuda"):
            outputs = [mamba_inner(arguments[0][:, :4], *arguments[1:])]
            for t in range(4, 12):
                given = outputs[-1][1:]
                before = [x.clone() for x in given]
                outputs.append(mamba_inner(arguments[0][:, t : t + 1], *arguments[1:], None, *given))
                assert all(map(torch.equal, given, before))
    assert "conv_update" in stubs.calls
    tolerance = 2e-6 if dtype is None else 2**-6
    y = torch.cat([y for y, _, _ in outputs], dim=1)
    for found, expected in zip((y, *outputs[-1][1:]), due, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_first_step_has_no_state() -> None:
    arguments = mixers.draw(Shape(length=1))
    found, due = (mixers.run(arguments, k, last_state=True, grad=False) for k in ("cuda", "reference"))
    assert max(mixers.deviations(found, due).values()) < 2e-6
    assert mixers.run(arguments, "cuda", grad=False).outputs.keys() == {"y"}


def scan_inputs(batch: int = 2, length: int = 20, inner: int = 6, state: int = 5) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [(batch, length, inner)] * 2 + [(inner, state)] + [(batch, length, state)] * 2
    sizes += [(inner,), (batch, length, inner), (inner,)]
    inputs = [torch.randn(*size, generator=g) for size in sizes]
    inputs[2] = -inputs[2].exp()
    return inputs


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "u and B in bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_scan_alone(packed: bool, narrow: bool) -> None:
    """Inputs of different dtypes are widened, never rounded."""
    inputs = [x.bfloat16() if narrow and i in (0, 3) else x for i, x in enumerate(scan_inputs())]
    seq_idx = reference.layouts(2, 20) if packed else None
    found, due = [], []
    for kernels, results in (("cuda", found), ("reference", due)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with dispatch.using(kernels):
            y, last = scan_module.selective_scan(*leaves, seq_idx, None, False)
        assert last is None
        assert y.dtype == inputs[0].dtype
        results += [y, *reference.gradients((y,), leaves)]
    for i, (a, b) in enumerate(zip(found, due, strict=True)):
        assert a.dtype == b.dtype
        exact = 3e-5 if packed and i == 3 else 5e-6  # dA, as above; here channels forget slowly, and S is over 1000
        assert (a - b).abs().max() <= (2**-7 if a.dtype == torch.bfloat16 else exact) * b.abs().max()


@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("taps", "length"), [(2, 9), (4, 2), (4, 9), (3, 1)])
def test_convolution_alone(taps: int, length: int, packed: bool, with_state: bool) -> None:
    """With its state before and after, and their gradients; x is half of a product, in bf16, the state fp32."""
    g = torch.Generator().manual_seed(length)
    both = torch.randn(2, length, 32, generator=g).bfloat16()
    inputs = [torch.randn(16, taps, generator=g), torch.randn(16, generator=g)]
    state = torch.randn(2, taps - 1, 16, generator=g) if with_state else None
    seq_idx = reference.layouts(2, length, seed=3, density=0.4) - 5 if packed else None  # negative numbers, too
    found, due = [], []
    for kernels, results in (("cuda", found), ("reference", due)):
        leaves = [x.clone().requires_grad_() for x in (both, *inputs, *([] if state is None else [state]))]
        with dispatch.using(kernels):
            given = leaves[3] if with_state else None
            y, last = conv_module.causal_conv1d(leaves[0][..., 16:], leaves[1], leaves[2], seq_idx, given)
        results += [y, last, *reference.gradients((y, last), leaves)]
    for a, b in zip(found, due, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= (2**-7 if a.dtype == torch.bfloat16 else 2**-8) * b.abs().max()
    assert torch.equal(found[1], due[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_model(checkpointing: bool) -> None:
    model = MambaLM(ModelConfig(d_model=16, n_layer=2, vocab_size=23, d_state=4), seed=0)
    model.backbone.activation_checkpointing = checkpointing
    ids = torch.randint(23, (2, 30), generator=torch.Generator().manual_seed(0))
    for seq_idx in (None, reference.layouts(2, 30)):
        results = []
        for kernels in ("cuda", "reference"):
            with dispatch.using(kernels):
                loss = model(ids, ids, seq_idx, return_state=False).loss_sum
                results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_whole_model_generates() -> None:
    model = MambaLM(ModelConfig(d_model=16, n_layer=2, vocab_size=23, d_state=4), seed=0)
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with dispatch.using("reference"):
            due = model(ids).logits
        with dispatch.using("cuda"):
            _, logits, state = model(ids[:, :5])
            rows = [logits]
            for t in range(5, 9):
                next_logits, state = model.step(ids[:, t], state)
                rows.append(next_logits[:, None])
    torch.testing.assert_close(torch.cat(rows, dim=1), due, rtol=1e-5, atol=1e-5)


def test_document_starts_are_found_once_for_all_layers() -> None:
    seq_idx = torch.tensor([[3, 3, 4, 9], [1, 1, 1, 1]])
    found = cuda._documents(seq_idx)
    assert found.start.tolist() == [2, 3]
    assert found.number.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert cuda._documents(seq_idx) is found
    seq_idx[1, 3] = 2
    assert cuda._documents(seq_idx).start.tolist() == [2, 3, 7]
    with torch.inference_mode():
        assert cuda._documents(torch.tensor([[0, 1]])).start.tolist() == [1]


USUAL = Call("mamba_inner", "cuda", torch.float32, size=16, channels=16, taps=4, grad=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "take float32, bfloat16 and float16, and this is float64"),
        ({"size": 257}, "at most 256 states"),
        ({"taps": 5}, "2 to 4 taps"),
        ({"taps": 1}, "2 to 4 taps"),
        ({"initial_state": True}, "no initial state"),
        ({"initial_state": True, "length": 1}, "no initial state"),
        ({"initial_state": True, "grad": False}, "no initial state"),
        ({"last_state": True}, "drops the gradient of its last state"),
        ({"deterministic": True}, "deterministic algorithms"),
        ({"packed": True, "channels": 12}, "multiples of 8 channels"),
        ({"last_state": True, "grad": False, "channels": 12}, "multiples of 8 channels"),
        ({"length": 0}, "no empty sequences"),
        ({"op": "selective_scan", "size": 257}, "at most 256 states"),
        ({"op": "selective_scan", "initial_state": True}, "no initial state"),
        ({"op": "causal_conv1d", "size": 5}, "2 to 4 taps"),
        ({"op": "causal_conv1d", "size": 4, "channels": 12}, "multiples of 8 channels"),
        ({"packed": True}, None),
        ({"channels": 12}, None),
        ({"deterministic": True, "grad": False}, None),
        ({"initial_state": True, "last_state": True, "grad": False, "length": 1, "size": 300}, None),
        ({"op": "selective_scan", "channels": 3, "packed": True}, None),
        ({"op": "causal_conv1d", "size": 4, "last_state": True, "initial_state": True, "deterministic": True}, None),
    ],
)
def test_refusals(change: dict[str, Any], reason: str | None) -> None:
    found = cuda.refuses(USUAL._replace(**change))
    assert found is None if reason is None else reason in str(found)


def test_a_refusal_reaches_the_caller() -> None:
    with pytest.raises(KernelError, match="drops the gradient of its last state"):
        mixers.run(mixers.draw(Shape()), "cuda", last_state=True)


def test_more_values_than_the_convolution_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_VALUES", 2 * 24 * 16)
    for packed in (None, numbers(Shape())):
        with pytest.raises(KernelError, match="channels are 768, expected fewer than 768"):
            mixers.run(mixers.draw(Shape()), "cuda", packed)


def test_self_check_at_start_up() -> None:
    found = {checked.op: checked.backend for checked in self_check("cpu")}
    assert {op for op, backend in found.items() if backend == "cuda"} == set(cuda.OPS)
    assert {"conv_update", "scan_bwd", "conv_bwd"} <= set(stubs.calls)


def functions() -> dict[str, tuple[Callable[..., Any], str]]:
    """What we call, and with which arguments; ours in the order of theirs where they are not named."""
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    inner = "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A"
    return {
        "mamba_inner_fn": (mamba_inner_fn, f"{inner} D= delta_bias= delta_softplus="),
        "selective_scan_fn": (
            selective_scan_fn,
            "u delta A B C D z= delta_bias= delta_softplus= return_last_state=",
        ),
        "causal_conv1d_fn": (causal_conv1d_fn, "x weight bias seq_idx= initial_states= activation="),
        "causal_conv1d_update": (causal_conv1d_update, "x conv_state weight bias activation="),
        "selective_state_update": (selective_state_update, "state x dt A B C D= z= dt_bias= dt_softplus="),
    }


@pytest.mark.parametrize(
    "name",
    ["mamba_inner_fn", "selective_scan_fn", "causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"],
)
def test_their_functions_take_what_we_pass(name: str) -> None:
    function, passed = functions()[name]
    parameters = inspect.signature(function).parameters
    positional = [word for word in passed.split() if not word.endswith("=")]
    named = {word[:-1] for word in passed.split() if word.endswith("=")}
    assert list(parameters)[: len(positional)] == positional, f"{name} has other positional arguments now"
    assert named <= parameters.keys(), f"{name} lost {named - parameters.keys()}"
    required = {k for k, p in parameters.items() if p.default is p.empty}
    assert required <= named | set(positional), f"{name} wants more arguments now: {required}"
