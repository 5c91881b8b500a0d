"""The four ops under torch.func, forward-mode AD, derivatives of derivatives and autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from csrc_triton import gated_projection, lora_linear, perceiver_attention, rank_projection
from csrc_triton.transforms import AUTOCAST_KEYS
from tests.csrc_triton.checks import random
from tests.golden import relative

Function = Callable[..., Tensor]


def norm_of(context: Tensor) -> Tensor:
    """inv_rms of a context, its token 1 masked, and all tokens of its last slice."""
    norm = context.detach().pow(2).mean(-1).rsqrt()
    visible = torch.ones(norm.shape, dtype=norm.dtype)
    visible[:, 1] = visible[-1] = 0.0
    return norm * visible


# Made here: nothing random may be called under vmap.
WEIGHT, BIAS = random(5, 6, seed=8), random(5, seed=9)
NORM = norm_of(random(3, 4, 6, seed=1))
QUERY, CONTEXT = random(2, 3, 6, seed=2), random(2, 4, 6, seed=3)
X, DOWN = random(3, 4, seed=5), random(2, 6)


def lora(x: Tensor, a: Tensor, b: Tensor, **options) -> Tensor:
    weight, bias = WEIGHT.to(x.dtype), BIAS.to(x.dtype)
    return lora_linear(x, weight, bias, a, b, torch.tensor([1, -1, 0]), 0.7, **options)


def attention(query: Tensor, context: Tensor) -> Tensor:
    out, lse = perceiver_attention(query, context, NORM)
    return torch.cat([out, lse.masked_fill(lse == -torch.inf, 0.0)[..., None]], -1)


def attention_of_norm(norm: Tensor) -> Tensor:
    return perceiver_attention(QUERY.to(norm.dtype), CONTEXT.to(norm.dtype), norm)[0]


def projection(latents: Tensor, weight: Tensor, scaler: Tensor) -> Tensor:
    a, b = rank_projection(latents, weight, scaler, 2 * scaler, d_in=3, d_out=2)
    return torch.cat([a.flatten(), b.flatten()])


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return gated_projection(x, torch.tensor([True, False, True]), gate, up, down)


FACTORS = random(2, 4, 6, seed=1), random(2, 4, 5, seed=2)
CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "lora_linear": (lora, (random(3, 2, 6, seed=0), *FACTORS)),
    "lora_linear ranks": (
        partial(lora, ranks=torch.tensor([2, 4])),
        (random(3, 2, 6, seed=0), *FACTORS),
    ),
    "perceiver_attention": (attention, (random(3, 2, 6, seed=4), random(3, 4, 6, seed=5))),
    "perceiver_attention norm": (attention_of_norm, (random(2, 4, seed=6).abs(),)),
    "rank_projection": (
        projection,
        (random(4, 3, 4, seed=0), random(4, 6, seed=1), random(3, seed=2)),
    ),
    "gated_projection": (
        gated,
        (random(3, 4, seed=0), random(5, 4, seed=1), random(5, 4, seed=2), random(2, 5, seed=3)),
    ),
}  # fmt: skip
EVERY_OP = pytest.mark.parametrize("case", CASES)


def case_of(name: str) -> tuple[Function, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Function, float64 inputs and a direction for each."""
    function, inputs = CASES[name]
    inputs = tuple(t.double() for t in inputs)
    return function, inputs, tuple(random(*t.shape, seed=20 + i) for i, t in enumerate(inputs))


def slope(function: Function, inputs: tuple, direction: tuple, step: float = 1e-6) -> Tensor:
    """Derivative along a direction, by central differences."""
    ends = [
        function(*(t + sign * step * d for t, d in zip(inputs, direction, strict=True)))
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def loss_of(function: Function) -> Function:
    return lambda *inputs: function(*inputs).square().sum()


def gradients(function: Function, inputs: tuple, create_graph: bool = False) -> list[Tensor]:
    """What backward() gives, by the op's own backward pass."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss_of(function)(*leaves).backward(create_graph=create_graph)
    return [leaf.grad for leaf in leaves]


@EVERY_OP
def test_forward_mode(case):
    function, inputs, direction = case_of(case)
    expected = slope(function, inputs, direction)
    assert expected.abs().max() > 0.1
    value, derivative = jvp(function, inputs, direction)
    assert relative(value, function(*inputs)) <= 1e-12
    assert relative(derivative, expected) <= 1e-6
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, direction)
        derivative = forward_ad.unpack_dual(function(*duals)).tangent
    assert relative(derivative, expected) <= 1e-6


@EVERY_OP
def test_reverse_mode_of_torch_func(case):
    function, inputs, direction = case_of(case)
    expected = gradients(function, inputs)
    every = tuple(range(len(inputs)))
    for result in (
        grad(loss_of(function), every)(*inputs),
        vjp(loss_of(function), *inputs)[1](torch.ones((), dtype=torch.float64)),
        jacrev(loss_of(function), every)(*inputs),
        jacfwd(loss_of(function), every)(*inputs),
    ):
        assert all(relative(f, e) <= 1e-10 for f, e in zip(result, expected, strict=True))


@EVERY_OP
def test_gradients_of_each_sample(case):
    function, inputs, direction = case_of(case)
    batch = tuple(torch.stack([t, t + d]) for t, d in zip(inputs, direction, strict=True))
    result = vmap(grad(loss_of(function), tuple(range(len(inputs)))))(*batch)
    for sample in range(2):
        expected = gradients(function, tuple(t[sample] for t in batch))
        assert all(relative(f[sample], e) <= 1e-10 for f, e in zip(result, expected, strict=True))
    result = vmap(function)(*batch)
    for sample in range(2):
        assert relative(result[sample], function(*(t[sample] for t in batch))) <= 1e-12


@EVERY_OP
def test_derivatives_of_derivatives(case):
    function, inputs, direction = case_of(case)
    leaves = [t.detach().requires_grad_() for t in inputs]
    first = torch.autograd.grad(loss_of(function)(*leaves), leaves, create_graph=True)
    for result, expected in zip(first, gradients(function, inputs), strict=True):
        assert relative(result, expected) <= 1e-10
    along = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
    second = torch.autograd.grad(along, leaves)
    for position, result in enumerate(second):
        expected = slope(
            lambda *moved, position=position: gradients(function, moved)[position],
            inputs,
            direction,
        )
        assert relative(result, expected) <= 1e-6
    hessians = hessian(loss_of(function), tuple(range(len(inputs))))(*inputs)
    for row, expected in zip(hessians, second, strict=True):
        result = sum(
            torch.tensordot(block, d, d.dim()) for block, d in zip(row, direction, strict=True)
        )
        assert relative(result, expected) <= 1e-9


@pytest.mark.parametrize("mode", ["backward", "double", "func", "jvp"])
def test_what_unused_slots_hold_reaches_no_derivative(mode):
    x, a, b = (t.clone() for t in case_of("lora_linear ranks")[1])
    clean = a, b
    a, b = a.clone(), b.clone()
    a[0, 2:] = b[0, 2:] = torch.nan
    op = partial(lora, ranks=torch.tensor([2, 4]))

    def derivative(a: Tensor, b: Tensor) -> Tensor:
        if mode in ("backward", "double"):
            return gradients(lambda x: op(x, a, b), (x,), mode == "double")[0]
        if mode == "func":
            return grad(lambda x: loss_of(op)(x, a, b))(x)
        return jvp(lambda x: op(x, a, b), (x,), (x.cos(),))[1]

    assert relative(derivative(a, b), derivative(*clean)) <= 1e-12


def test_a_tensor_given_twice():
    shared = random(3, 4, seed=0)

    def function(t: Tensor) -> Tensor:
        return gated(X, torch.cat([t, t]), torch.cat([t, t]), DOWN)

    leaf = shared.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(function)(leaf), leaf, create_graph=True)
    assert relative(first, gradients(function, (shared,))[0]) <= 1e-12
    same = random(2, 3, 6, seed=1)
    norm = random(2, 3, seed=2).abs()

    def both(t: Tensor) -> Tensor:
        return perceiver_attention(t, t, norm)[0]

    leaf = same.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(both)(leaf), leaf, create_graph=True)
    assert relative(first, gradients(both, (same,))[0]) <= 1e-12


def test_compiled_transforms():
    function, inputs, direction = case_of("lora_linear")
    for transform in (
        lambda x: jvp(lambda t: function(t, *inputs[1:]), (x,), (direction[0],))[1],
        lambda x: grad(lambda t: loss_of(function)(t, *inputs[1:]))(x),
        lambda x: vmap(lambda t: function(t, *inputs[1:]))(x[None])[0],
    ):
        compiled = torch.compile(transform, backend="eager", fullgraph=True)
        assert relative(compiled(inputs[0]), transform(inputs[0])) <= 1e-12


# --- autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("transforming", [False, True])
@EVERY_OP
def test_autocast_on_a_cpu(case, transforming):
    function, inputs, _ = case_of(case)
    inputs = tuple(t.float() for t in inputs)
    run = (lambda f: vmap(f)(*(t[None] for t in inputs))[0]) if transforming else (
        lambda f: f(*inputs)
    )  # fmt: skip
    expected = run(function)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(function)
    if case == "rank_projection":
        assert result.dtype == torch.float32
        assert relative(result, expected) <= 1e-6
        return
    rounded = run(lambda *rounded_inputs: function(*(t.bfloat16() for t in rounded_inputs)))
    assert result.dtype == rounded.dtype
    assert relative(result.float(), rounded.float()) <= 0.01
    assert relative(result.float(), expected) <= 0.05


@EVERY_OP
def test_training_under_autocast(case):
    function, inputs, _ = case_of(case)
    inputs = tuple(t.float() for t in inputs)
    expected = gradients(function, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gradients(function, inputs)
    for f, e, t in zip(result, expected, inputs, strict=True):
        assert f.dtype == t.dtype
        assert relative(f, e) <= 0.05


def test_after_a_linear_layer_under_autocast():
    linear, x = torch.nn.Linear(6, 6), random(3, 2, 6).float()
    weight, (a, b) = random(5, 6).float(), (t.float() for t in FACTORS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(linear(x), weight, None, a, b, torch.tensor([0, 1, -1]), 0.5)
        plain = torch.nn.functional.linear(linear(x), weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y[2], plain[2])


def test_every_op_has_a_rule_for_every_device():
    for op in ("lora_linear", "perceiver_attention", "rank_projection", "gated_projection"):
        for name in (f"v2l::{op}", f"v2l::{op}_backward"):
            for key in AUTOCAST_KEYS.values():
                assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@EVERY_OP
def test_forward_mode_through_a_compiled_graph(case):
    function, inputs, direction = case_of(case)
    compiled = torch.compile(function, backend="eager")
    compiled(*inputs)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="outside of torch.compile"):
        compiled(*map(forward_ad.make_dual, inputs, direction))
