"""The hypernetwork against outputs and gradients of the released code."""

from __future__ import annotations

import json

import pytest
import torch

from tests.formula import formula_tensor, hypernet_parameter
from tests.golden import CONFIGS, FOLDER, load, network, relative
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork

CASES = [("a", "right"), ("a", "left"), ("a", "mixed"), ("nano_sa", "right")]
GRADIENTS = [("a", "right"), ("a", "mixed"), ("nano_sa", "right")]
M = "down_proj"


def case(name: str, padding: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
    golden = load(f"{name}/{padding}")
    return golden, golden["in.ctx_features"], golden["in.ctx_attn_mask"]


@pytest.mark.parametrize(("name", "padding"), CASES)
@torch.no_grad()
def test_factors(name, padding):
    golden, features, mask = case(name, padding)
    batch = network(name)(features, mask)
    assert relative(batch.A[M], golden[f"out.A.{M}"]) <= 3e-6
    assert relative(batch.B[M], golden[f"out.B.{M}"]) <= 3e-6


@pytest.mark.parametrize(("name", "padding"), GRADIENTS)
@torch.no_grad()
def test_factors_in_float64(name, padding):
    golden, features, mask = case(name, padding)
    batch = network(name).double()(features.double(), mask)
    assert relative(batch.A[M], golden[f"out64.A.{M}"]) <= 1e-10
    assert relative(batch.B[M], golden[f"out64.B.{M}"]) <= 1e-10


@pytest.mark.parametrize(
    ("name", "padding", "tag"),
    [
        ("a", "right", "n21"),
        ("a", "mixed", "n13"),
        ("nano_sa", "right", "n1"),
        ("nano_sa", "right", "n21"),
        ("nano_sa", "right", "n3"),
    ],
)
@torch.no_grad()
def test_composition(name, padding, tag):
    golden, features, mask = case(name, padding)
    chunks = golden[f"comb.{tag}.n_chunks"]
    composed = network(name)(features, mask).composed(None if tag == "n1" else chunks)
    assert relative(composed.A[M], golden[f"comb.{tag}.A.{M}"]) <= 3e-6
    assert relative(composed.B[M], golden[f"comb.{tag}.B.{M}"]) <= 3e-6
    assert composed.bias is None


@torch.no_grad()
def test_composition_without_bias():
    golden, features, mask = case("nano_sa", "right")
    batch = network("nano_sa")(features, mask)
    composed = type(batch)(batch.A, batch.B, batch.scale).composed([2, 1])
    for actual, side in ((composed.A[M], "A"), (composed.B[M], "B")):
        expected = golden[f"comb.n21_nobias.{side}.{M}"]
        width = actual.shape[2]
        assert width == 2 * CONFIGS["nano_sa"].rank and not expected[:, :, width:].any()
        assert relative(actual, expected[:, :, :width]) <= 3e-6


def gradients(name: str, padding: str, dtype: torch.dtype, garbage: float | None = None) -> dict:
    """Of Σ <cotangent, composed factor> for every parameter and the features."""
    golden, features, mask = case(name, padding)
    features = features.to(dtype)
    if garbage is not None:
        features = features.masked_fill((mask == 0)[:, None, :, None], garbage)
    features.requires_grad_()
    net = network(name).to(dtype)
    composed = net(features, mask).composed()
    cotangents = load(f"{name}/{padding}_grads")
    loss = sum(
        (cotangents[f"cotangent.{M}.{side}"].to(dtype) * factors[M]).sum()
        for side, factors in (("A", composed.A), ("B", composed.B))
    )
    loss.backward()
    return {"in.ctx_features": features.grad} | {n: p.grad for n, p in net.named_parameters()}


@pytest.mark.parametrize(("name", "padding"), GRADIENTS)
def test_gradients(name, padding):
    actual = gradients(name, padding, torch.float32)
    expected = load(f"{name}/{padding}_grads")
    names = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert len(names) > 20
    for key in names:
        assert relative(actual[key], expected[f"grad.{key}"]) <= 1e-5, key
    mask = load(f"{name}/{padding}")["in.ctx_attn_mask"]
    assert not actual["in.ctx_features"].transpose(1, 2)[mask == 0].any()


@pytest.mark.parametrize(("name", "padding"), GRADIENTS)
def test_gradients_in_float64(name, padding):
    actual = gradients(name, padding, torch.float64)
    expected = load(f"{name}/{padding}_grads")
    names = [key for key in expected if key.startswith(("grad64.", "gproj_"))]
    assert names
    for key in names:
        kind, parameter = key.split(".", 1)
        grad = actual[parameter]
        # Projections of large gradients along rows and columns were stored in float32.
        if kind == "gproj_row64":
            grad = grad @ torch.cos(0.37 * torch.arange(grad.shape[-1]).double() + 0.1)
        elif kind == "gproj_col64":
            grad = grad.flatten(0, -2)
            grad = torch.cos(0.53 * torch.arange(grad.shape[0]).double() + 0.2) @ grad
        limit = 1e-10 if kind == "grad64" else 1e-6
        assert relative(grad, expected[key]) <= limit, key


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_masked_positions_reach_nothing(garbage):
    golden, features, mask = case("a", "mixed")
    net = network("a")
    dirty = features.masked_fill((mask == 0)[:, None, :, None], garbage)
    with torch.no_grad():
        expected, actual = net(features, mask), net(dirty, mask)
    assert torch.equal(actual.A[M], expected.A[M]) and torch.equal(actual.B[M], expected.B[M])
    actual, expected = (gradients("a", "mixed", torch.float32, g) for g in (garbage, None))
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


@pytest.mark.parametrize(("name", "padding"), CASES)
@torch.no_grad()
def test_groups_of_layers_change_only_rounding(name, padding):
    """Vectorized functions round the last elements of a tensor differently, so bits may change."""
    _, features, mask = case(name, padding)
    net, inputs = network(name), features.unbind(1)
    whole = net(features, mask)
    for size in range(1, len(inputs)):
        groups = [
            factors
            for first in range(0, len(inputs), size)
            for factors in net.group(first, inputs[first : first + size], mask)
        ]
        batch = net.assemble(groups)
        assert relative(batch.A[M], whole.A[M]) <= 1e-6
        assert relative(batch.B[M], whole.B[M]) <= 1e-6


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch():
    _, features, mask = case("a", "mixed")
    net = network("a")
    whole = net(features, mask)
    for row in range(len(features)):
        seen = mask[row] == 1
        alone = net(features[row, None, :, seen])
        assert relative(alone.A[M][0], whole.A[M][row]) <= 3e-6
        assert relative(alone.B[M][0], whole.B[M][row]) <= 3e-6


@torch.no_grad()
def test_bfloat16_features():
    golden, features, mask = case("a", "right")
    batch = network("a")(features.bfloat16(), mask)
    assert batch.A[M].dtype == batch.B[M].dtype == torch.bfloat16
    # The released code in bfloat16 is 1.2 to 1.8% off.
    assert relative(batch.A[M], golden[f"out64.A.{M}"]) <= 0.02
    assert relative(batch.B[M], golden[f"out64.B.{M}"]) <= 0.02


@pytest.mark.parametrize("size", ["500m", "2.2b"])
def test_state_dict_of_the_released_sizes(size):
    expected = json.loads((FOLDER / "shapes.json").read_text())[size]
    shape = expected["config"]
    config = HypernetConfig(
        shape["hidden"], shape["layers"], {M: (shape["inter"], shape["hidden"])}
    )
    with torch.device("meta"):
        net = HyperNetwork(config)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == expected["total"]
    assert config.scale == expected["lora_alpha"]


@torch.no_grad()
def test_500m_shape():
    """Four of the 32 layers: the others share every weight but their slice of the head."""
    golden = load("c_formula/out")
    kept = (0, 1, 13, 31)
    features = formula_tensor("ctx_features", (2, 32, 24, 960))
    features = features * (0.5 + 0.1 * torch.arange(32)).view(1, 32, 1, 1)
    torch.testing.assert_close(features.flatten()[:8], golden["check.ctx_features"])
    with torch.device("meta"):
        net = HyperNetwork(HypernetConfig(960, len(kept), {M: (2560, 960)}))
    state = {}
    for name, value in net.state_dict().items():
        shape = tuple(value.shape)
        per_layer = name.split(".")[0] in ("head", "bias_A", "bias_B", "scaler_A", "scaler_B")
        if not per_layer:
            state[name] = hypernet_parameter(name, shape)
            continue
        one = shape[1:] if shape[0] == len(kept) else shape[2:]
        rows = torch.Size(one).numel()
        layers = [hypernet_parameter(name, one, first=index * rows) for index in kept]
        state[name] = torch.stack(layers).view(shape)
    assert torch.equal(state["head.weight"].flatten()[:8], golden["check.param_head"])
    net.load_checked(state, "formula")
    batch = net(features[:, list(kept)], golden["in.ctx_attn_mask"])
    assert relative(batch.A[M][..., ::16], golden["out.A"]) <= 5e-6
    assert relative(batch.B[M][..., ::8], golden["out.B"]) <= 5e-6
    for side, factors in (("A", batch.A[M].double()), ("B", batch.B[M].double())):
        u = torch.cos(0.37 * torch.arange(factors.shape[-1]).double() + 0.1)
        assert relative(factors.norm(dim=-1), golden[f"out64.{side} rownorm"]) <= 5e-6
        assert relative(factors @ u, golden[f"out64.{side} @ u"]) <= 5e-6
