"""The hypernetwork's variants against the released op order, on random weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench import released
from tests import tiny
from tests.golden import relative
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork, as_dtype
from v2l_fast.work_units import label_units, run_to_completion

BASE = replace(tiny.CONFIG, hidden_size=12, target_modules={"down_proj": (10, 12)}, scale=None)
SEVERAL = {"up_proj": (12, 10), "down_proj": (10, 12), "q_proj": (12, 12)}
VARIANTS = {
    "plain": {},
    "several modules": {"target_modules": SEVERAL},
    "self-attention": {"num_self_attn_per_block": 2},
    "shared weights": {"num_blocks": 4, "num_self_attn_per_block": 1, "shared_weights": True},
    "paper": {"shared_head": True, "bias_adapter": False},
    "paper, several modules": {
        "shared_head": True,
        "bias_adapter": False,
        "target_modules": SEVERAL,
    },
    "no pre-head": {"num_pre_head_layers": 0},
    "two pre-heads": {"num_pre_head_layers": 2},
    "rank one": {"rank": 1, "num_latents": 1, "num_blocks": 1},
    "every head its own keys": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 5},
}


def features(batch: int = 3, tokens: int = 7, config: HypernetConfig = BASE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_layers, tokens, config.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MASKS = {
    "none": None,
    "right": torch.arange(7) < torch.tensor([[7], [4], [1]]),
    "left": torch.arange(7) >= torch.tensor([[0], [3], [6]]),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]]),
    "nothing visible": torch.tensor([[1] * 7, [0] * 7, [0] * 6 + [1]]),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", MASKS)
def test_equals_released_op_order(variant, padding):
    network = tiny.hypernetwork(replace(BASE, **VARIANTS[variant])).double()
    mask = MASKS[padding]
    with torch.no_grad():
        expected = released.hypernetwork(network, features(), mask)
        batch = network(features(), mask)
    assert list(batch.A) == sorted(network.config.target_modules)
    for actual, target in zip((batch.A, batch.B), expected, strict=True):
        for module, factor in actual.items():
            assert factor.shape == target[module].shape
            assert relative(factor, target[module]) <= 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_released_op_order_and_reach_every_parameter(variant):
    network = tiny.hypernetwork(replace(BASE, **VARIANTS[variant])).double()
    mask = MASKS["holes"]

    def gradients(run) -> dict[str, torch.Tensor]:
        inputs = features().requires_grad_()
        batch = AdapterBatch(*run(inputs), network.config.scale, network.bias_adapter())
        composed = batch.composed([2, 1])
        loss = sum(
            (i + 1) * factor.sin().sum()
            for side in (composed.A, composed.B)
            for i, factor in enumerate(side.values())
        )
        target = {"features": inputs, **dict(network.named_parameters())}
        return dict(zip(target, torch.autograd.grad(loss, target.values()), strict=True))

    def ours(inputs):
        batch = network(inputs, mask)
        return batch.A, batch.B

    actual = gradients(ours)
    expected = gradients(lambda inputs: released.hypernetwork(network, inputs, mask))
    for name, grad in expected.items():
        assert grad.any(), name
        assert relative(actual[name], grad) <= 1e-10, name


@hypothesis_settings(max_examples=60)
@given(
    layers=st.integers(1, 3),
    rank=st.integers(1, 5),
    modules=st.integers(1, 3),
    latent=st.integers(2, 9),
    latents=st.integers(1, 4),
    blocks=st.integers(1, 4),
    self_attention=st.integers(0, 2),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_random_variants_equal_released_op_order(
    layers,
    rank,
    modules,
    latent,
    latents,
    blocks,
    self_attention,
    groups,
    kv_heads,
    flags,
    tokens,
    seed,
):
    shared_weights, shared_head, bias, masked = flags
    config = HypernetConfig(
        hidden_size=5,
        num_layers=layers,
        target_modules={f"m{i}": (3 + i, 7 - i) for i in range(modules)},
        rank=rank,
        latent_size=latent,
        num_latents=latents,
        num_blocks=blocks,
        num_self_attn_per_block=self_attention,
        shared_weights=shared_weights,
        shared_head=shared_head,
        bias_adapter=bias,
        num_heads=groups * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=4,
    )
    network = tiny.hypernetwork(config, seed).double()
    inputs = features(2, tokens, config)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, tokens, generator=generator) < 0.6 if masked else None
    with torch.no_grad():
        batch = network(inputs, mask)
        expected = released.hypernetwork(network, inputs, mask)
    for actual, target in zip((batch.A, batch.B), expected, strict=True):
        for module, factor in actual.items():
            assert relative(factor, target[module]) <= 1e-9


def test_shared_weights_are_one_parameter_under_every_index():
    network = HyperNetwork(replace(BASE, **VARIANTS["shared weights"]))
    layers = network.aggregator["perceiver"].encoder.layers
    assert layers[2] is not layers[0]
    assert layers[4] is layers[2] and layers[6] is layers[2]
    assert layers[3] is layers[1] and layers[7] is layers[1]
    prefix = "aggregator.perceiver.encoder.layers."
    listed = {k.removeprefix(prefix).split(".")[0] for k in network.state_dict() if prefix in k}
    assert listed == set("01234567")


def test_saved_tensors_do_not_grow_with_activations():
    """Per layer only its input and its projected context are kept: blocks are recomputed."""
    network = tiny.hypernetwork(replace(BASE, num_blocks=4))
    inputs = features(1, 64).float()
    inside = 0

    def count(t: torch.Tensor) -> torch.Tensor:
        nonlocal inside
        inside += t.numel() if t.grad_fn is not None else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        network(inputs)
    context = BASE.num_layers * 64 * BASE.latent_size
    assert inside < 2 * context


def test_the_heads_gradient_is_filled_once():
    """Not once a layer, as it is for a selection from the whole."""
    network = tiny.hypernetwork(replace(BASE, num_blocks=1))
    batch = network(features().float())
    loss = sum(t.sin().sum() for side in (batch.A, batch.B) for t in side.values())
    with ResultsOf(network.head.weight.shape) as actual:
        loss.backward()
    assert actual.count == 1


class ResultsOf(TorchDispatchMode):
    """Counts the tensors of one shape that operations make."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        actual = func(*args, **(kwargs or {}))
        if isinstance(actual, torch.Tensor) and actual.shape == self.shape:
            self.count += not func.is_view
        return actual


def test_initialization_changes_nothing():
    """Generated and bias B start at 0: the model answers as before."""
    torch.manual_seed(0)
    batch = HyperNetwork(BASE)(features().float())
    assert not batch.B["down_proj"].any() and not batch.bias.B["down_proj"].any()
    assert batch.A["down_proj"].any() and batch.bias.A["down_proj"].any()
    config = HypernetConfig(64, 4, {"down_proj": (96, 64)}, latent_size=32)
    network = HyperNetwork(config)
    assert network.head.weight.std().item() == pytest.approx(0.5 / (32 + 160 * 16) ** 0.5, rel=0.05)
    std = 0.2 / (96 * 16) ** 0.5
    assert network.bias_A["down_proj"].std().item() == pytest.approx(std, rel=0.05)


def test_wide_master_weights_over_half_precision_features():
    network = tiny.hypernetwork(BASE)
    inputs = features().bfloat16().requires_grad_()
    batch = network(inputs)
    assert batch.A["down_proj"].dtype == torch.bfloat16
    sum(f.float().sum() for f in (batch.A["down_proj"], batch.B["down_proj"])).backward()
    grads = [p.grad for n, p in network.named_parameters() if not n.startswith("bias_")]
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((3, 2, 7, 12), None),
        ((3, 3, 7, 11), None),
        ((3, 7, 12), None),
        ((3, 3, 7, 12), torch.ones(3, 6)),
    ],
)
def test_shapes_that_do_not_fit(shape, mask):
    with pytest.raises(ValueError, match="must be"):
        tiny.hypernetwork(BASE)(torch.zeros(shape), mask)


def test_indexing_gives_adapters_of_their_own(hypernet):
    batch = hypernet(features(2, 5, tiny.CONFIG).float())
    assert len(batch) == 2 and len(list(batch)) == 2
    adapter = batch[-1]
    assert torch.equal(adapter.A["down_proj"], batch.A["down_proj"][1])
    assert not adapter.A["down_proj"].requires_grad
    assert adapter.A["down_proj"].data_ptr() != batch.A["down_proj"][1].data_ptr()
    assert adapter.bias is batch.bias and adapter.scale == hypernet.config.scale
    with pytest.raises(IndexError):
        batch[2]


def test_adapters_are_written_once(hypernet):
    inputs = features(2, 5, tiny.CONFIG).float()
    per_layer = hypernet.group(0, inputs.unbind(1))
    adapters = hypernet.adapters(per_layer)
    assert adapters == list(hypernet.assemble(per_layer)) and len(adapters) == 2
    assert adapters[0].bias is adapters[1].bias is not None
    for adapter in adapters:
        for factor in (adapter.A["down_proj"], adapter.B["down_proj"]):
            assert factor.is_contiguous() and not factor.requires_grad
            assert factor.untyped_storage().nbytes() == factor.nbytes
    writes = Writes()
    with writes:
        hypernet.adapters(per_layer)
    assert writes.actual == {"aten::stack": 2 * len(adapters)}


class Writes(TorchDispatchMode):
    """Counts the operations, leaving out views."""

    def __init__(self) -> None:
        super().__init__()
        self.actual: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.actual[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunks", [[1, 1], [4], [3, 0], [2, 2], [4, -1]])
def test_chunks_that_do_not_add_up(chunks):
    with pytest.raises(ValueError, match="n_chunks"):
        tiny.hypernetwork(BASE)(features().float()).composed(chunks)


@pytest.mark.parametrize("variant", ["plain", "shared weights", "paper, several modules"])
def test_save_and_load(variant, tmp_path):
    network = tiny.hypernetwork(replace(BASE, **VARIANTS[variant]))
    network.save_pretrained(tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    back = HyperNetwork.from_pretrained(tmp_path / "net")
    assert back.config == network.config and back.fingerprint == network.fingerprint
    assert not back.training
    for (name, actual), expected in zip(
        back.state_dict().items(), network.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name
    with torch.no_grad():
        inputs = features().float()
        for module, factor in network(inputs).A.items():
            assert torch.equal(back(inputs).A[module], factor)


def test_load_in_another_dtype(tmp_path):
    network = tiny.hypernetwork(BASE)
    network.save_pretrained(tmp_path)
    half = HyperNetwork.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.fingerprint == network.fingerprint


@pytest.mark.parametrize("dtypes", [
    ["float16"], ["bfloat16"], ["float64"], ["float16", "bfloat16"], ["float16", "float32"],
    ["bfloat16", "float16"], ["float16", "bfloat16", "float32", "float16"],
])  # fmt: skip
def test_identity_does_not_depend_on_the_dtype(dtypes, tmp_path):
    network = tiny.hypernetwork(BASE)
    with torch.no_grad():
        # float16 rounds this down to 1 + 2**-8, which bfloat16 then rounds to 1, not to 1 + 2**-7.
        network.scaler_B["down_proj"].fill_(1 + 2**-8 + 2**-12)
        network.bias_B["down_proj"].fill_(1 + 2**-8 + 2**-12)
    fingerprint, bias = network.fingerprint, network.bias_adapter()
    network.save_pretrained(tmp_path)
    loaded = HyperNetwork.from_pretrained(tmp_path, dtype=dtypes[0])
    for dtype in dtypes:
        loaded.to(getattr(torch, dtype))
        assert loaded.fingerprint == fingerprint
        assert loaded.bias_adapter() == bias and loaded.bias_adapter().id == bias.id
    assert copy.deepcopy(loaded).fingerprint == fingerprint
    with torch.no_grad():
        loaded.scaler_B["down_proj"].mul_(1.1)
        loaded.bias_B["down_proj"].mul_(1.1)
    assert loaded.fingerprint != fingerprint and loaded.bias_adapter().id != bias.id


def test_identities_of_released_versions():
    network = tiny.hypernetwork(BASE)
    digest = hashlib.sha256(json.dumps(BASE.to_dict(), sort_keys=True).encode())
    for name, value in sorted(network.named_parameters()):
        if value.numel() <= 65536:
            digest.update(name.encode() + value.detach().bfloat16().float().numpy().tobytes())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert network.to(dtype).fingerprint == digest.hexdigest()[:16]


@torch.no_grad()
def test_autocast_changes_nothing():
    network, inputs = tiny.hypernetwork(BASE), features().float()
    expected = network(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = network(inputs)
    for module, factor in expected.A.items():
        assert torch.equal(actual.A[module], factor)
        assert torch.equal(actual.B[module], expected.B[module])


@torch.no_grad()
def test_half_precision_on_a_cpu_is_the_projections():
    """The rest is float32."""
    network, inputs = tiny.hypernetwork(BASE), features().bfloat16()
    whole = copy.deepcopy(network).double()(inputs.double())
    name, bias = network.fingerprint, network.bias_adapter().id
    half = network.for_inference("cpu", torch.bfloat16)
    projection = half.aggregator["perceiver"].modality_projection
    kinds = {n: p.dtype for n, p in half.named_parameters()}
    assert {p.dtype for p in projection.parameters()} == {torch.bfloat16}
    assert sum(kind == torch.bfloat16 for kind in kinds.values()) == 3
    assert half.fingerprint == name and half.bias_adapter().id == bias
    batch = half(inputs)
    pieces = half.iter_layer(1, inputs[:, 1], None, None, [slice(0, 4), slice(4, 7)])
    a, _ = run_to_completion(label_units(pieces, ("generate adapter", 0, 0)))
    assert relative(a["down_proj"], batch.A["down_proj"][:, 1]) <= 0.01
    for factor, exact in ((batch.A, whole.A), (batch.B, whole.B)):
        assert factor["down_proj"].dtype == torch.bfloat16
        assert relative(factor["down_proj"], exact["down_proj"]) <= 0.01


@pytest.mark.parametrize("wrong", ["int8", "float9", "no dtype", torch.int32, 3, "float8_e4m3fn"])
def test_dtypes_that_are_none(wrong):
    with pytest.raises(ConfigError, match="dtype must be 'bfloat16', .*got"):
        as_dtype(wrong)


def test_fingerprint_tells_networks_apart():
    network = tiny.hypernetwork(BASE)
    before = network.fingerprint
    assert tiny.hypernetwork(BASE, seed=1).fingerprint != before
    assert tiny.hypernetwork(replace(BASE, max_frames=9)).fingerprint != before
    with torch.no_grad():
        network.scaler_B["down_proj"].mul_(1.1)
    assert network.fingerprint != before


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("head.weight"), "lacks .?head.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected .?extra"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), r"head.weight is \[1\]"),
        (lambda s: s.update({"head.weight": s["head.weight"].int()}), "torch.int32"),
        (lambda s: s["head.weight"].view(-1)[0].fill_(float("nan")), "head.weight holds NaN"),
    ],
)
def test_state_that_does_not_fit(edit, words):
    network = tiny.hypernetwork(BASE)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    edit(state)
    with pytest.raises(CheckpointError, match=words) as caught:
        network.load_checked(state, "some.file")
    assert str(caught.value).startswith("some.file: ") and "\n" not in str(caught.value)
