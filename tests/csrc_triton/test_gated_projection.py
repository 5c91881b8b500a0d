"""gated_projection against silu and linear layers of PyTorch, chunked and with compiled parts."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from csrc_triton import gated_projection
from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

# The package exports the op under its module's name.
module = importlib.import_module("csrc_triton.gated_projection")
HAS_KERNELS = False


def weights(d: int, hidden: int, z: int) -> list[torch.Tensor]:
    shapes = ((hidden, d), (hidden, d), (z, hidden))
    return [random(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]


def oracle(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def op(x, gate, up, down):
    return gated_projection(x, None, gate, up, down)


def masked(visible):
    return lambda x, *w: gated_projection(x, visible, *w)


@pytest.mark.parametrize(
    ("lead", "d", "z"), [((1,), 8, 4), ((2, 7), 5, 3), ((3, 31), 33, 17), ((1, 33), 2049, 1)]
)
def test_equals_oracle(lead, d, z, device, dtype):
    checks.assert_equals_oracle(op, oracle, [random(*lead, d), *weights(d, 9, z)], dtype, device)


def test_more_tokens_than_a_chunk(device, monkeypatch):
    monkeypatch.setitem(module.CHUNK_TOKENS, device.type, 1024)
    inputs = [random(2, 1023, 4), *weights(4, 6, 3)]
    checks.assert_equals_oracle(op, oracle, inputs, torch.float32, device)


def test_no_tokens(device):
    inputs = [t.float().to(device) for t in (random(2, 0, 4), *weights(4, 6, 3))]
    out, *grads = checks.values_and_gradients(op, inputs)
    assert out.shape == (2, 0, 3) and not any(g.any() for g in grads)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_masked_rows_are_zeros_and_reach_nothing(garbage, device):
    x, *w = (t.float().to(device) for t in (random(3, 700, 4), *weights(4, 6, 3)))
    visible = torch.arange(2100, device=device).view(3, 700) % 5 > 1
    visible[1] = False
    clean = torch.where(visible[..., None], x, 0.0)
    dirty = torch.where(visible[..., None], x, garbage)
    expected = checks.values_and_gradients(op, [clean, *w])
    results = checks.values_and_gradients(masked(visible), [dirty, *w])
    assert not results[0][~visible].any() and not results[1][~visible].any()
    for r, e in zip(results, expected, strict=True):
        torch.testing.assert_close(r, e)


def test_gradcheck():
    checks.assert_gradcheck(op, [random(2, 3, 4), *weights(4, 6, 3)])
    visible = torch.tensor([[True, False, True], [False, False, False]])
    checks.assert_gradcheck(masked(visible), [random(2, 3, 4), *weights(4, 6, 3)])


def test_layouts_do_not_matter(device):
    checks.assert_layouts_do_not_matter(op, [random(2, 7, 4), *weights(4, 6, 3)], device)


def test_same_bits_twice(device):
    inputs = [t.float().to(device) for t in (random(2, 1023, 16), *weights(16, 32, 8))]
    checks.assert_same_bits_twice(op, inputs)


@pytest.mark.parametrize("hides", [False, True])
def test_opcheck(hides, device):
    tensors = random(2, 7, 4), *weights(4, 6, 3)
    x, *w = [t.float().to(device).requires_grad_() for t in tensors]
    visible = torch.arange(14, device=device).view(2, 7) % 3 > 0 if hides else None
    for keep in (False, True):
        torch.library.opcheck(torch.ops.v2l.gated_projection.default, (x, visible, *w, keep))
    grad = random(2, 7, 3).to(x)
    checks.opcheck_backward(torch.ops.v2l.gated_projection_backward.default, (grad, x, visible, *w))


@pytest.mark.parametrize("hides", [False, True])
def test_kept_products_give_the_same_bits(hides, device):
    tensors = [t.float().to(device) for t in (random(2, 700, 16), *weights(16, 32, 8))]
    visible = torch.arange(1400, device=device).view(2, 700) % 3 > 0 if hides else None
    if visible is not None:
        tensors[0] = torch.where(visible[..., None], tensors[0], torch.nan)
    results = [
        checks.values_and_gradients(
            lambda x, *w, keep=keep: gated_projection(x, visible, *w, keep=keep), tensors
        )
        for keep in (False, True)
    ]
    for recomputed, kept in zip(*results, strict=True):
        assert torch.equal(recomputed, kept)


@pytest.mark.parametrize("tokens", [0, 1, 700])
@pytest.mark.parametrize("hides", [False, True])
def test_inference_equals_oracle_and_masks(tokens, hides, device, dtype):
    """Also in chunks, and where oneDNN multiplies, which it does not while gradients are
    recorded."""
    shapes = random(2, tokens, 33), *weights(33, 64, 17)
    x, *w = (t.to(device, dtype) for t in shapes)
    visible = torch.ones(2, tokens, dtype=torch.bool, device=device)
    if hides:
        visible = torch.arange(2 * tokens, device=device).view(2, tokens) % 3 > 0
    expected = [oracle(*(t.to(kind) for t in (x, *w)))[visible] for kind in (dtype, torch.double)]
    x = torch.where(visible[..., None], x, torch.nan)
    with torch.no_grad():
        out = gated_projection(x, visible if hides else None, *w)
        x, *w = (t.mT.contiguous().mT for t in (x, *w))
        strided = gated_projection(x, visible if hides else None, *w)
    for result in (out, strided):
        assert result.dtype == dtype and result.is_contiguous() and not result[~visible].any()
        checks.assert_as_exact_as(expected[:1], [result[visible]], expected[1:], dtype)


def test_compiles():
    short, longer = (
        [t.float() for t in (random(2, tokens, 4), *weights(4, 6, 3))] for tokens in (7, 13)
    )
    checks.assert_compiles(op, short, longer, "aot_eager")


# --- the elementwise part compiled, as on a GPU, with another compiler ---------------------------


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """Makes the op compile its elementwise part, as on a GPU; the size of every compiled graph."""
    compiled: list[int] = []

    def count(graph, inputs):
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, dynamic=True, backend=count)
    monkeypatch.setattr(module, "_compiled", functools.cache(compiler))
    monkeypatch.setattr(module, "_fuses", lambda x: True)
    monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", 16)
    return compiled


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("hides", [False, True])
def test_compiled_parts_equal_the_reference(graphs, tokens, hides, precision):
    visible = torch.arange(2 * tokens).view(2, tokens) % 3 > 0 if hides else None
    checks.assert_equals_oracle(
        masked(visible),
        lambda x, *w: module.reference(x, visible, *w),
        [random(2, tokens, 5), *weights(5, 9, 3)],
        precision,
        torch.device("cpu"),
    )
    assert graphs


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_compiled_parts_keep_masked_rows_zero(graphs, garbage):
    x, visible = random(3, 20, 4), torch.arange(60).view(3, 20) % 5 > 1
    visible[1] = False
    results = [
        checks.values_and_gradients(
            masked(visible),
            [torch.where(visible[..., None], x, filler), *weights(4, 6, 3)],
        )
        for filler in (0.0, garbage)
    ]
    assert not results[1][0][~visible].any() and not results[1][1][~visible].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_gradcheck_of_compiled_parts(graphs):
    visible = torch.tensor([[True, False, True], [False, False, False]])
    checks.assert_gradcheck(masked(visible), [random(2, 3, 4), *weights(4, 6, 3)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_frozen_features(graphs, backend):
    """The gradients of the weights are the same when x needs none."""
    x, w = random(2, 20, 4), weights(4, 6, 3)
    expected = checks.values_and_gradients(lambda x, *w: gated_projection(x, None, *w), [x, *w])
    op = torch.compile(lambda *w: gated_projection(x, None, *w), backend=backend)
    results = checks.values_and_gradients(op, w)
    for f, e in zip(results, [expected[0], *expected[2:]], strict=True):
        torch.testing.assert_close(f, e)


def test_opcheck_of_the_compiled_backward(graphs):
    x, *w = random(2, 7, 4), *weights(4, 6, 3)
    for needs_x in (True, False):
        checks.opcheck_backward(
            torch.ops.v2l.gated_projection_backward.default,
            (random(2, 7, 3), x, None, *w, needs_x),
        )


def test_compiled_once_for_every_length_training_and_inference(graphs):
    w = [t.float() for t in weights(4, 6, 3)]
    for tokens in (7, 13, 30, 63):
        x, visible = random(2, tokens, 4).float(), torch.arange(2 * tokens).view(2, -1) % 3 > 0
        for mask in (visible, None):
            checks.values_and_gradients(
                lambda x, *w, mask=mask: gated_projection(x, mask, *w), [x, *w]
            )
            with torch.inference_mode():
                gated_projection(x, mask, *w)
    assert len(graphs) == 2  # forward and backward


@pytest.mark.parametrize(
    ("backend", "tokens", "fuses"),
    [("auto", 831, False), ("auto", 832, True), ("reference", 832, False), ("triton", 1, True)],
)
def test_only_a_gpu_fuses_and_data_says_where(monkeypatch, backend, tokens, fuses):
    rules = {"faster": {"sm_90": {"gated_projection": [{"tokens": [832, None]}]}}}
    monkeypatch.setattr(module.dispatch.device, "table", rules.__getitem__)
    monkeypatch.setattr(module.dispatch.device, "capability", lambda device: (9, 0))
    monkeypatch.setenv("V2L_BACKEND", backend)
    with FakeTensorMode():
        assert module._fuses(torch.zeros(1, tokens, 3, device="cuda")) is fuses
    assert not module._fuses(torch.zeros(1, tokens, 3))


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(2, 7, 4, dtype=torch.long), "x must be floating point"),
        ("x", torch.zeros(()), r"x must be \[..., D\], got \[\]"),
        ("visible", torch.ones(2, 6, dtype=torch.bool), r"visible must be \[2, 7\], got \[2, 6\]"),
        ("visible", torch.ones(2, 7), "visible must be torch.bool, got torch.float32"),
        ("gate", torch.zeros(6, 5), r"gate must be \[H, 4\], got \[6, 5\]"),
        ("gate", torch.zeros(4), r"gate must be \[H, 4\], got \[4\]"),
        ("up", torch.zeros(5, 4), r"up must be \[6, 4\], got \[5, 4\]"),
        ("down", torch.zeros(3, 5), r"down must be \[Z, 6\], got \[3, 5\]"),
        ("up", torch.zeros(6, 4).half(), "up must be torch.float32, got torch.float16"),
        *(
            (name, torch.zeros(*shape, device="meta"), f"{name} must be on cpu, got meta")
            for name, shape in (("gate", (6, 4)), ("up", (6, 4)), ("down", (3, 6)))
        ),
        ("visible", torch.ones(2, 7, device="meta").bool(), "visible must be on cpu, got meta"),
    ],
)
def test_error_names_the_argument(name, wrong, message):
    x, *w = [t.float() for t in (random(2, 7, 4), *weights(4, 6, 3))]
    args = dict(zip(("x", "gate", "up", "down"), (x, *w), strict=True))
    args |= {"visible": torch.ones(2, 7, dtype=torch.bool), name: wrong}
    with pytest.raises(ValueError, match=f"gated_projection: {message}"):
        module._check(**args)
    if name == "x" or wrong.device.type == "cpu":
        with pytest.raises(ValueError, match=f"gated_projection: {message}"):
            gated_projection(**args)
