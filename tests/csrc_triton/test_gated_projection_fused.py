"""The form of gated_projection that runs on a GPU, on the CPU: the same code, another compiler."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.csrc_triton import checks
from tests.csrc_triton.checks import random

# The package exports the op under its module's name.
module = importlib.import_module("csrc_triton.gated_projection")


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """The op in the form for GPUs, and the size of every elementwise graph it has compiled."""
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


def weights(d: int, hidden: int, z: int) -> list[torch.Tensor]:
    shapes = ((hidden, d), (hidden, d), (z, hidden))
    return [random(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(graphs, tokens, dtype, masked):
    visible = torch.arange(2 * tokens).view(2, tokens) % 3 > 0 if masked else None
    checks.assert_equals_oracle(
        lambda x, *w: module.gated_projection(x, visible, *w),
        lambda x, *w: module.reference(x, visible, *w),
        [random(2, tokens, 5), *weights(5, 9, 3)],
        dtype,
    )
    assert graphs


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_hidden_rows_are_zeros_and_reach_nothing(graphs, garbage):
    x, visible = random(3, 20, 4), torch.arange(60).view(3, 20) % 5 > 1
    visible[1] = False
    results = [
        checks.values_and_gradients(
            lambda x, *w: module.gated_projection(x, visible, *w),
            [torch.where(visible[..., None], x, filler), *weights(4, 6, 3)],
        )
        for filler in (0.0, garbage)
    ]
    assert not results[1][0][~visible].any() and not results[1][1][~visible].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_gradcheck(graphs):
    visible = torch.tensor([[True, False, True], [False, False, False]])
    checks.assert_gradcheck(
        lambda x, *w: module.gated_projection(x, visible, *w),
        [random(2, 3, 4), *weights(4, 6, 3)],
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_frozen_features(graphs, backend):
    """The gradients of the weights are the same when x needs none."""
    x, w = random(2, 20, 4), weights(4, 6, 3)
    expected = checks.values_and_gradients(
        lambda x, *w: module.gated_projection(x, None, *w), [x, *w]
    )
    op = torch.compile(lambda *w: module.gated_projection(x, None, *w), backend=backend)
    found = checks.values_and_gradients(op, w)
    for f, e in zip(found, [expected[0], *expected[2:]], strict=True):
        torch.testing.assert_close(f, e)


def test_opcheck_of_the_backward(graphs):
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
                lambda x, *w, mask=mask: module.gated_projection(x, mask, *w), [x, *w]
            )
            with torch.inference_mode():
                module.gated_projection(x, mask, *w)
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
