"""gated_projection against silu and linear layers of torch."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F

from csrc_triton import gated_projection
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

# The package exports the op under its module's name.
module = importlib.import_module("csrc_triton.gated_projection")


def weights(d: int, hidden: int, z: int) -> list[torch.Tensor]:
    shapes = ((hidden, d), (hidden, d), (z, hidden))
    return [random(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]


def oracle(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def op(x, gate, up, down):
    return gated_projection(x, None, gate, up, down)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lead", "d", "z"), [((1,), 8, 4), ((2, 7), 5, 3), ((3, 31), 33, 17), ((1, 33), 2049, 1)]
)
def test_equals_oracle(lead, d, z, dtype):
    checks.assert_equals_oracle(op, oracle, [random(*lead, d), *weights(d, 9, z)], dtype)


def test_more_tokens_than_a_chunk():
    checks.assert_equals_oracle(op, oracle, [random(2, 1023, 4), *weights(4, 6, 3)], torch.float32)


def test_no_tokens():
    found = checks.values_and_gradients(op, [random(2, 0, 4), *weights(4, 6, 3)])
    assert found[0].shape == (2, 0, 3)
    assert all(not g.any() for g in found[1:])


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_hidden_rows_are_zeros_and_reach_nothing(garbage):
    x, visible = random(3, 700, 4), torch.rand(3, 700) < 0.5
    visible[1] = False
    clean = torch.where(visible[..., None], x, 0.0)
    dirty = torch.where(visible[..., None], x, garbage)
    expected = checks.values_and_gradients(op, [clean, *weights(4, 6, 3)])
    found = checks.values_and_gradients(
        lambda x, *w: gated_projection(x, visible, *w), [dirty, *weights(4, 6, 3)]
    )
    assert torch.equal(found[0], expected[0])
    assert not found[0][~visible].any() and not found[1][~visible].any()
    for f, e in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(f, e)


def test_gradcheck():
    checks.assert_gradcheck(op, [random(2, 3, 4), *weights(4, 6, 3)])
    visible = torch.tensor([[True, False, True], [False, False, False]])
    checks.assert_gradcheck(
        lambda x, *w: gated_projection(x, visible, *w), [random(2, 3, 4), *weights(4, 6, 3)]
    )


def test_layouts_do_not_matter():
    checks.assert_layouts_do_not_matter(op, [random(2, 7, 4), *weights(4, 6, 3)])


def test_same_bits_twice():
    inputs = [t.float() for t in (random(2, 1023, 16), *weights(16, 32, 8))]
    checks.assert_same_bits_twice(op, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    x, *w = [t.float().requires_grad_() for t in (random(2, 7, 4), *weights(4, 6, 3))]
    visible = torch.arange(14).view(2, 7) % 3 > 0 if masked else None
    torch.library.opcheck(torch.ops.v2l.gated_projection.default, (x, visible, *w))
    grad = random(2, 7, 3).float()
    checks.opcheck_backward(torch.ops.v2l.gated_projection_backward.default, (grad, x, visible, *w))


def test_compiles():
    short, longer = (
        [t.float() for t in (random(2, tokens, 4), *weights(4, 6, 3))] for tokens in (7, 13)
    )
    checks.assert_compiles(op, short, longer, "aot_eager")


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(2, 7, 4, dtype=torch.long), r"x must be floating point \[..., D\]"),
        ("x", torch.zeros(()), "x must be floating point"),
        ("visible", torch.ones(2, 6, dtype=torch.bool), r"visible must be \[2, 7\], not \[2, 6\]"),
        ("visible", torch.ones(2, 7), "visible must be bool, not torch.float32"),
        ("gate", torch.zeros(6, 5), r"gate must be \[H, 4\], not \[6, 5\]"),
        ("gate", torch.zeros(4), r"gate must be \[H, 4\], not \[4\]"),
        ("up", torch.zeros(5, 4), r"up must be \[6, 4\], not \[5, 4\]"),
        ("down", torch.zeros(3, 5), r"down must be \[Z, 6\], not \[3, 5\]"),
        ("up", torch.zeros(6, 4).half(), "up must be of x's dtype torch.float32"),
        *(
            (name, torch.zeros(*shape, device="meta"), f"{name} must be on cpu, not meta")
            for name, shape in (("gate", (6, 4)), ("up", (6, 4)), ("down", (3, 6)))
        ),
        ("visible", torch.ones(2, 7, device="meta").bool(), "visible must be on cpu, not meta"),
    ],
)
def test_bad_input_names_the_argument(name, wrong, message):
    x, *w = [t.float() for t in (random(2, 7, 4), *weights(4, 6, 3))]
    given = dict(zip(("x", "gate", "up", "down"), (x, *w), strict=True))
    given = {**given, "visible": torch.ones(2, 7, dtype=torch.bool), name: wrong}
    with pytest.raises(ValueError, match=f"gated_projection: {message}"):
        module._check(**given)
    if name == "x" or wrong.device.type == "cpu":
        with pytest.raises(ValueError, match=f"gated_projection: {message}"):
            gated_projection(**given)
