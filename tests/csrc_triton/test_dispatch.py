"""The choice between kernels and reference, and the one-line error when kernels cannot serve."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csrc_triton import device, dispatch
from csrc_triton.dispatch import Op
from csrc_triton.perceiver_attention import reference as attention_reference
from csrc_triton.rank_projection import reference as projection_reference
from tests.csrc_triton.checks import random, register_wide_product

CPU = torch.zeros(2)
REFERENCE, KERNELS = ModuleType("reference"), ModuleType("kernels")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("V2L_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class OnGpu:
    """What the choice reads of a tensor; needs no GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@pytest.fixture
def wrong() -> dict[str, int]:
    """Wrong elements that the self-checks of ``op`` count, by name of the check."""
    return {}


@pytest.fixture
def checked() -> list[tuple[str, torch.dtype]]:
    """The self-checks of ``op`` that ran."""
    return []


@pytest.fixture
def op(monkeypatch, wrong, checked) -> Op:
    """An op for which a GPU prefers kernels from 32 rows on in half precision."""
    monkeypatch.setattr(device, "capability", lambda device: (9, 0))
    rules = {"faster": {"sm_90": {"product": [{"rows": [32, None], "inputs": "half"}]}}}
    monkeypatch.setattr(device, "table", rules.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def wrong_elements(op, check, dtype, device):
        checked.append((check, dtype))
        return wrong.get(check, 0)

    monkeypatch.setattr(Op, "wrong_elements", wrong_elements)
    return Op("product", REFERENCE, lambda: KERNELS, dict.fromkeys(["prefill", "decode"]))


def test_auto_follows_the_rules_of_the_gpu(monkeypatch, op):
    choose = op.implementation
    assert choose(OnGpu(), None, rows=32) is KERNELS
    assert choose(OnGpu(), rows=31) is REFERENCE
    assert choose(OnGpu()) is REFERENCE
    assert choose(OnGpu(torch.float32), rows=32) is REFERENCE
    assert choose(OnGpu(torch.float64), rows=32) is REFERENCE
    assert choose(CPU, rows=32) is REFERENCE
    other = Op("other", REFERENCE, lambda: KERNELS, {})
    assert other.implementation(OnGpu(), rows=32) is REFERENCE
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert choose(OnGpu(), rows=32) is REFERENCE


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_kernels_are_checked_once_before_they_are_used(monkeypatch, op, checked, backend):
    monkeypatch.setenv("V2L_BACKEND", backend)
    for dtype in (torch.bfloat16, torch.float16):
        for _ in range(2):
            assert op.implementation(OnGpu(dtype), rows=32) is KERNELS
    dtypes = (torch.bfloat16, torch.float16)
    assert checked == [(check, d) for d in dtypes for check in ("prefill", "decode")]
    monkeypatch.setenv("V2L_BACKEND", "triton")
    assert op.implementation(OnGpu(torch.float32), rows=32) is KERNELS
    assert len(checked) == 4


@pytest.mark.filterwarnings("error")
def test_kernels_that_fail_their_self_check(monkeypatch, op, wrong):
    wrong["decode"] = 3
    monkeypatch.setattr(dispatch, "_warn", functools.cache(dispatch._warn.__wrapped__))
    with pytest.warns(RuntimeWarning, match=r"a GPU fail their self-check .*\(3 wrong in decode\)"):
        assert op.implementation(OnGpu(), rows=32) is REFERENCE
    # The warning is given once.
    assert op.implementation(OnGpu(), rows=32) is REFERENCE
    monkeypatch.setenv("V2L_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="^V2L_BACKEND=triton: the product kernels .* fail"):
        op.implementation(OnGpu(), rows=32)


@pytest.mark.filterwarnings("ignore:.*product kernels:RuntimeWarning")
def test_a_capture_keeps_the_verdict_and_runs_no_check(monkeypatch, op, wrong, checked):
    unchecked = dataclasses.replace(op)
    assert op.implementation(OnGpu(), rows=32) is KERNELS
    wrong["decode"] = 3
    failed = dataclasses.replace(op)
    assert failed.implementation(OnGpu(), rows=32) is REFERENCE
    ran = len(checked)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert op.implementation(OnGpu(), rows=32) is KERNELS
    assert failed.implementation(OnGpu(), rows=32) is REFERENCE
    assert unchecked.implementation(OnGpu(), rows=32) is REFERENCE
    assert len(checked) == ran


def test_a_self_check_that_cannot_run(monkeypatch, op):
    def raises(*_):
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(Op, "wrong_elements", raises)
    with pytest.warns(RuntimeWarning, match=r"failed \(Failed to find C compiler\); using plain"):
        assert op.implementation(OnGpu(), rows=32) is REFERENCE
    monkeypatch.setenv("V2L_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="^V2L_BACKEND=triton: .* set V2L_BACKEND=reference"):
        op.implementation(OnGpu(), rows=32)


def test_reference_is_the_reference_everywhere(monkeypatch, op):
    monkeypatch.setenv("V2L_BACKEND", "reference")
    assert op.implementation(CPU) is REFERENCE
    assert op.implementation(OnGpu(), rows=32) is REFERENCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_triton_on_a_gpu(monkeypatch, op, dtype):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    assert op.implementation(OnGpu(dtype), None, OnGpu(torch.int64), OnGpu(torch.bool)) is KERNELS


def test_triton_in_the_interpreter(monkeypatch, op):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.implementation(CPU, CPU.half(), torch.zeros(2, dtype=torch.int64)) is KERNELS
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        op.implementation(CPU, CPU.bfloat16())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([OnGpu(), CPU], "is on cpu"),
        ([OnGpu(), torch.zeros(2, dtype=torch.int64)], "is on cpu"),
        ([OnGpu(torch.float64)], "torch.float64"),
        ([OnGpu(torch.float8_e4m3fn)], "torch.float8_e4m3fn"),
    ],
)
def test_triton_says_in_one_line_what_it_cannot_serve(monkeypatch, op, tensors, reason):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"^V2L_BACKEND=triton: .*{reason}") as error:
        op.implementation(*tensors)
    assert "\n" not in str(error.value)


def test_triton_without_triton(monkeypatch, op):
    monkeypatch.setenv("V2L_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="^V2L_BACKEND=triton: triton is not installed"):
        op.implementation(OnGpu())


def test_unknown_backend(monkeypatch, op):
    monkeypatch.setenv("V2L_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="V2L_BACKEND must be one of auto, ref.*got 'cuda'"):
        op.implementation(CPU)


# --- half precision on a GPU that uses no kernels --------------------------------------------


class Products(TorchDispatchMode):
    """Records the dtypes of every product's operands."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.dtypes |= {t.dtype for t in args if isinstance(t, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tensor_cores(monkeypatch):
    """A CPU that multiplies half precision as a GPU does."""
    register_wide_product()
    monkeypatch.setattr(dispatch, "product_dtype", lambda x: x.dtype)


def rounded(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, seed=seed, dtype=torch.bfloat16)


def attention(reference, dtype):
    query, context = rounded(2, 5, 16) / 4, rounded(2, 9, 16, seed=1)
    inputs = query.to(dtype), context.to(dtype), random(2, 9, seed=2).abs().float()
    out, lse = reference.perceiver_attention(*inputs)
    grads = rounded(2, 5, 16, seed=3).to(dtype), torch.zeros_like(lse)
    return [out, *reference.perceiver_attention_backward(*grads, *inputs, out, lse)]


def projection(reference, dtype):
    tensors = rounded(2, 3, 16), rounded(16, 9, seed=1), *rounded(2, 3, seed=2)
    inputs = [t.to(dtype) for t in tensors]
    a, b = reference.rank_projection(*inputs, 5, 4)
    return [a, b, *reference.rank_projection_backward(a.sign(), b.sign(), *inputs)]


@pytest.mark.parametrize(
    ("run", "reference"),
    [(attention, attention_reference), (projection, projection_reference)],
)
def test_references_multiply_half_precision_on_tensor_cores(run, reference, tensor_cores):
    exact = run(reference, torch.float64)
    with Products() as products:
        results = run(reference, torch.bfloat16)
    assert products.dtypes == {torch.bfloat16}
    for r, e in zip(results, exact, strict=True):
        assert (r.double() - e).abs().max() <= 0.03 * e.abs().max()
