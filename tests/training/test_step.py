"""TrainStep against a plain training step in float64, and what it must not do; the optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from tests.golden import relative
from tests.training import plain
from v2l_fast.data.readers import Sample
from v2l_fast.errors import ConfigError
from v2l_fast.pipeline import Context, visual_features
from v2l_fast.training import step as step_module
from v2l_fast.training.config import OptimConfig
from v2l_fast.training.step import (
    StepOptions,
    TrainStep,
    cosine,
    example_means,
    make_optimizer,
    pair_weights,
    rate_factor,
    set_rate,
    token_kl,
    trapezoid,
)
from v2l_fast.vlm.smolvlm import SmolVLM

# Relative errors against the plain step: transformers' norms are float32 in any dtype.
LOSS, GRADIENT = 1e-7, 5e-6


@pytest.fixture(scope="module")
def pair():
    """Hypernetwork and backbone in float64; tests must leave them as they are."""
    return plain.models()


@pytest.fixture(scope="module")
def samples(pair) -> list[Sample]:
    return plain.batch(pair[1])


def measured(pair, samples, total=None, **options) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Loss, gradients and parts of one step."""
    step = TrainStep(*pair, StepOptions(**options))
    result = step(samples, total)
    return result.loss.detach(), plain.gradients(pair[0], result.loss), result.parts


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().sum() > 0, name
        assert relative(actual[name], value) <= limit, name


# --- against the plain step -----------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("max_padding", [0.0, 0.5])
def test_equals_a_plain_step(pair, samples, recompute, max_padding):
    losses = plain.turn_losses(*pair, samples)
    each = [loss for mine in losses for loss in mine]
    expected = torch.stack(each).mean()
    actual, gradients, parts = measured(pair, samples, recompute=recompute, max_padding=max_padding)
    assert relative(actual, expected) < LOSS
    assert_same(gradients, plain.gradients(pair[0], expected), GRADIENT)
    for kind in plain.KINDS:
        of_kind = [
            loss
            for one, mine in zip(samples, losses, strict=True)
            for name, loss in zip(one.task_types, mine, strict=True)
            if name == kind
        ]
        total, count = parts[kind].tolist()
        assert count == len(of_kind)
        assert total == pytest.approx(sum(of_kind).item(), rel=1e-6)


def test_task_types_are_weighted(pair, samples):
    weights = {"captioning": 0.25, "qa": 0.75}
    losses = plain.turn_losses(*pair, samples)
    expected = 0.0
    for one, mine in zip(samples, losses, strict=True):
        by_kind = {
            kind: torch.stack(
                [x for k, x in zip(one.task_types, mine, strict=True) if k == kind]
            ).mean()
            for kind in set(one.task_types)
        }
        share = sum(weights[kind] for kind in by_kind)
        mixed = sum(weights[kind] * value for kind, value in by_kind.items()) / share
        expected = expected + len(mine) * mixed
    expected = expected / sum(len(mine) for mine in losses)
    actual, gradients, _ = measured(pair, samples, kind_weights=weights)
    assert relative(actual, expected) < LOSS
    assert_same(gradients, plain.gradients(pair[0], expected), GRADIENT)


def test_parts_of_a_batch_add_up(pair, samples):
    total = sum(len(one.qa_pairs) for one in samples)
    whole, expected, _ = measured(pair, samples)
    parts = [measured(pair, samples[:1], total), measured(pair, samples[1:], torch.tensor(total))]
    assert relative(sum(loss for loss, _, _ in parts), whole) < 1e-12
    added = {name: parts[0][1][name] + parts[1][1][name] for name in expected}
    assert_same(added, expected, 1e-9)


def test_composition_counts_the_bias_once(pair, samples):
    network, backbone = pair
    one = samples[3]
    step = TrainStep(*pair)
    with torch.no_grad():
        layers = step.adapters([one], visual_features(backbone, one.chunks))
    rank = tiny.CONFIG.rank
    for side, bias in (("A", network.bias_A), ("B", network.bias_B)):
        rows = torch.stack([getattr(layer, side)["down_proj"][0] for layer in layers])
        assert rows.shape[1] == (len(one.chunks) + 1) * rank
        same = (rows.unflatten(1, (-1, rank)) == bias["down_proj"][:, None]).all(-1).all(-1)
        assert same.sum(1).tolist() == [1] * tiny.CONFIG.num_layers
        for place, chunk in enumerate(one.chunks):
            with torch.no_grad():
                alone = step.adapters(
                    [replace(one, chunks=(chunk,))], visual_features(backbone, [chunk])
                )
            mine = torch.stack([getattr(x, side)["down_proj"][0, :rank] for x in alone])
            assert relative(rows[:, place * rank : (place + 1) * rank], mine) < 1e-12


def encoded(backbone: SmolVLM, one: Sample) -> Sample:
    """The same with connector outputs for pixels."""
    actual = visual_features(backbone, one.chunks)
    chunks = [
        replace(chunk, pixels=None, features=features)
        for chunk, features in zip(one.chunks, actual, strict=True)
    ]
    return replace(one, chunks=tuple(chunks))


def test_stored_features_stand_for_pixels(pair, samples):
    backbone = pair[1]
    stored = [encoded(backbone, one) for one in samples]
    mixed = [stored[0], samples[1], samples[2], stored[3]]
    actual, gradients, _ = measured(pair, mixed)
    expected, reference, _ = measured(pair, samples)
    assert relative(actual, expected) < 1e-12
    assert_same(gradients, reference, 1e-9)


def test_the_order_of_chunks_matters_to_a_network_with_chunk_positions():
    pair = plain.models(replace(tiny.CONFIG, chunk_position=True))
    one = plain.sample(pair[1], 0, (2, 3), 2)
    spans = [chunk.chunk_span for chunk in one.chunks]
    turned = [replace(c, chunk_span=p) for c, p in zip(one.chunks, spans[::-1], strict=True)]
    loss, gradients, _ = measured(pair, [one])
    other, _, _ = measured(pair, [replace(one, chunks=tuple(turned))])
    assert abs(loss - other) > 1e-4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# --- KL -------------------------------------------------------------------------------------------


def teacher_logits(backbone, one: Sample) -> list[Tensor]:
    """transformers' own logits at each turn's answer tokens, the video in context."""
    shown = visual_features(backbone, one.chunks)[0].flatten(0, 1)
    actual = []
    for question, answer in one.qa_pairs:
        ids = torch.tensor(one.teacher_prefix + question + answer)
        embeddings = backbone.decoder.embed(ids)
        embeddings[ids == backbone.image_token_id] = shown
        hidden = backbone.model.model.text_model(inputs_embeds=embeddings[None]).last_hidden_state
        actual.append(backbone.model.lm_head(hidden[0, -len(answer) - 1 : -1]))
    return actual


@pytest.fixture(scope="module")
def taught(pair) -> list[Sample]:
    """Samples of one chunk with a prompt for a teacher that sees the video."""
    backbone = pair[1]
    samples = []
    for seed, frames in enumerate((2, 1, 3)):
        one = plain.sample(backbone, seed, (frames,), 2)
        times = [float(i) for i in range(frames)]
        opening = backbone.prompt_builder.video_prompt(times, float(frames), 0, 0, "", False)
        end = backbone.tokenizer("<end_of_utterance>\n", add_special_tokens=False)["input_ids"]
        samples.append(replace(one, teacher_prefix=opening[: -len(end)]))
    return samples


def test_kl_to_the_model_that_sees_the_video(pair, taught):
    temperature, weight = 2.0, 0.7
    logits = [teacher_logits(pair[1], one) for one in taught]
    step = TrainStep(*pair)
    plain_loss = step(taught).loss
    options = {"kl_weight": weight, "kl_temperature": temperature}
    actual, gradients, parts = measured(pair, taught, **options)

    # The student's logits, recovered from a step whose only task is one token at one place.
    divergences = []
    for one, rows in zip(taught, logits, strict=True):
        for turn, reference in zip(one.qa_pairs, rows, strict=True):
            student = student_logits(step, one, turn)
            teacher = (reference / temperature).softmax(-1)
            log_ratio = teacher.log() - (student / temperature).log_softmax(-1)
            divergences.append(temperature**2 * (teacher * log_ratio).sum(-1).mean())
    divergence = torch.stack(divergences).mean()
    assert relative(actual, plain_loss + weight * divergence) < LOSS
    assert_same(gradients, plain.gradients(pair[0], plain_loss + weight * divergence), GRADIENT)
    total, count = parts["kl"].tolist()
    assert total / count == pytest.approx(divergence.item(), rel=1e-5)


def student_logits(step: TrainStep, one: Sample, turn) -> Tensor:
    """transformers' own logits at one turn's answer tokens, with the adapter added to W."""
    backbone, network = step.backbone, step.hypernet
    seen, mask = plain.features(backbone, list(one.chunks))
    update = plain.updates(network, [one], seen, mask)[0]
    text_model = backbone.model.model.text_model
    changed = {
        f"layers.{i}.mlp.down_proj.weight": layer.mlp.down_proj.weight + update[i]
        for i, layer in enumerate(text_model.layers)
    }
    question, answer = turn
    ids = torch.tensor([one.prompt_prefix + question + answer])
    hidden = torch.func.functional_call(text_model, changed, (), {"input_ids": ids})
    return backbone.model.lm_head(hidden.last_hidden_state[0, -len(answer) - 1 : -1])


def test_kl_without_a_teacher_is_refused(pair, samples):
    with pytest.raises(ConfigError, match="video 0: no teacher"):
        TrainStep(*pair, StepOptions(kl_weight=1.0))(samples)


# --- economies ------------------------------------------------------------------------------------


def test_logits_in_chunks_change_nothing(pair, taught, monkeypatch):
    options = {"kl_weight": 0.5}
    expected, reference, _ = measured(pair, taught, **options)
    vocabulary = len(pair[1].tokenizer)
    monkeypatch.setattr(step_module, "LOGITS_PER_CHUNK", 4 * vocabulary)
    largest = LargestWith(vocabulary)
    with largest:
        actual, gradients, _ = measured(pair, taught, **options)
    assert largest.numbers == 4 * vocabulary
    assert relative(actual, expected) < 1e-12
    assert_same(gradients, reference, 1e-10)


class LargestWith(TorchDispatchMode):
    """The largest result whose last axis is of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.numbers = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        actual = func(*args, **(kwargs or {}))
        wide = isinstance(actual, Tensor) and actual.dim() > 1 and actual.shape[-1] == self.size
        # The LM head's weight is transposed for the product, not copied.
        if wide and func.name() != "aten::t":
            self.numbers = max(self.numbers, actual.numel())
        return actual


ONE, TWO, RAGGED = [((2,), 2)] * 3, [((2, 2), 2)] * 3, [((2,), 2), ((1, 3), 1), ((1, 2, 1), 1)]


@pytest.mark.parametrize(
    ("shapes", "bias", "max_padding", "copies"),
    [
        (ONE, False, 0.0, {}),
        (TWO, False, 0.0, {}),
        (ONE, True, 0.0, {"aten::cat": 2}),
        (TWO, True, 0.0, {"aten::cat": 2}),
        (RAGGED, False, 1.0, {"aten::cat": 2, "aten::new_zeros": 2}),
        (RAGGED, True, 1.0, {"aten::cat": 2, "aten::new_zeros": 2}),
        (RAGGED, True, 0.0, {"aten::cat": 2, "aten::new_zeros": 2}),
    ],
)
def test_a_factor_is_written_once_more_at_most(shapes, bias, max_padding, copies):
    """A and B of a layer: not at all where the decoder reads what rank_projection wrote."""
    pair = plain.models(replace(tiny.CONFIG, bias_adapter=bias))
    samples = [plain.sample(pair[1], seed, *shape) for seed, shape in enumerate(shapes)]
    step = TrainStep(*pair, StepOptions(max_padding=max_padding))
    features = visual_features(pair[1], [chunk for one in samples for chunk in one.chunks])
    readers = Readers("v2l::rank_projection", slice(0, 2))
    with readers:
        adapters = step.adapters(samples, features)
    assert readers.actual == {name: n * tiny.CONFIG.num_layers for name, n in copies.items()}
    for layer in adapters:
        for factor in (layer.A["down_proj"], layer.B["down_proj"]):
            assert factor.is_contiguous() and len(factor) == len(samples)
            assert factor.untyped_storage().data_ptr() in readers.written


@pytest.mark.parametrize("max_padding", [0.0, 1.0], ids=["many groups", "one group"])
def test_a_factor_s_gradient_goes_from_op_to_op(max_padding):
    """Added over the groups of rows alone; not written for all layers, nor once a layer."""
    pair = plain.models(replace(tiny.CONFIG, bias_adapter=False))
    samples = [plain.sample(pair[1], seed, (2,), 2) for seed in range(3)]
    step = TrainStep(*pair, StepOptions(max_padding=max_padding, recompute=False))
    groups = len(step_module.response_rows(samples, 0, max_padding, 10**6).groups)
    assert (groups > 1) == (max_padding == 0)
    loss = step(samples).loss
    readers = Readers("v2l::lora_linear_backward", slice(1, 3))
    with readers:
        loss.backward()
    sums = [name for name in readers.actual if name.startswith("aten::add")]
    added = sum(readers.actual.pop(name) for name in sums)
    assert added == 2 * (groups - 1) * tiny.CONFIG.num_layers
    assert readers.actual == {"v2l::rank_projection_backward": tiny.CONFIG.num_layers}


class Readers(TorchDispatchMode):
    """Counts the operations that read what an op wrote, or a copy of it, leaving out views.

    written: the storages of these results, by address; all are kept, so that none is used again.
    """

    def __init__(self, op: str, results: slice) -> None:
        super().__init__()
        self.op, self.results = op, results
        self.actual: Counter[str] = Counter()
        self.written: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        actual = func(*args, **(kwargs or {}))
        if func.name() == self.op:
            self._keep(actual[self.results])
        elif not func.is_view and any(
            leaf.untyped_storage().data_ptr() in self.written
            for leaf in tree_leaves(args)
            if isinstance(leaf, Tensor)
        ):
            self.actual[func.name()] += 1
            if func.namespace == "aten":
                self._keep(tree_leaves(actual))
        return actual

    def _keep(self, tensors) -> None:
        self.written |= {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


class Waits(TorchDispatchMode):
    """Counts the operations that make a host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.actual: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.startswith(self.NAMES):
            self.actual[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": False, "kind_weights": {"captioning": 1.0, "qa": 2.0}}, {"kl_weight": 1.0}],
    ids=["recomputed", "kept", "taught"],
)
def test_nothing_waits_for_the_device(pair, samples, taught, options):
    network, backbone = pair
    given = [encoded(backbone, one) for one in (taught if "kl_weight" in options else samples)]
    step = TrainStep(network, backbone, StepOptions(**options))
    total = torch.tensor(9)
    waits = Waits()
    with waits:
        step(given, total).loss.backward()
    network.zero_grad()
    assert not waits.actual


def test_waiting_would_be_noticed():
    waits = Waits()
    with waits:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert set(waits.actual) == {"_local_scalar_dense", "nonzero"}


def deep_backbone(layers: int) -> SmolVLM:
    """The tiny backbone with copies of its layers on top of each other."""
    base = tiny.backbone()
    text_model = base.model.model.text_model
    stack = [copy.deepcopy(text_model.layers[i % len(text_model.layers)]) for i in range(layers)]
    text_model.layers = torch.nn.ModuleList(stack)
    return SmolVLM(base.model, base.tokenizer, "deep")


def saved_bytes(layers: int, recompute: bool) -> int:
    """Bytes kept for the backward pass of a network of some layers over the same context."""
    config = replace(tiny.CONFIG, num_layers=layers)
    backbone = deep_backbone(layers)
    step = TrainStep(tiny.hypernetwork(config), backbone, StepOptions(recompute=recompute))
    kept: dict[int, int] = {}
    owned = {t.untyped_storage().data_ptr() for t in step.parameters()}
    owned |= {t.untyped_storage().data_ptr() for t in backbone.model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = step([plain.sample(backbone, 0, (30,), 2)])
    result.loss.backward()
    return sum(kept.values())


def test_a_further_layer_keeps_its_input_context_and_factors_alone():
    """Activations are at least four times the layer's input here, eighty times at 500M."""
    config = tiny.CONFIG
    tokens = len(plain.sample(tiny.backbone(), 0, (30,), 2).chunks[0].ids)
    layer_input = 4 * tokens * config.hidden_size
    expected = 3 * 4 * tokens * (config.hidden_size + config.latent_size)
    grown = {r: saved_bytes(6, r) - saved_bytes(3, r) for r in (True, False)}
    assert expected <= grown[True] < 1.1 * expected
    assert grown[False] > 4 * 3 * layer_input


def test_recomputation_changes_no_bit(samples):
    network, backbone = tiny.hypernetwork(), tiny.backbone()
    results = []
    for recompute in (False, True):
        network.zero_grad()
        result = TrainStep(network, backbone, StepOptions(recompute=recompute))(samples)
        result.loss.backward()
        results.append([result.loss.detach(), *(p.grad.clone() for p in network.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


def test_activations_are_kept_where_memory_allows(monkeypatch):
    config = replace(tiny.CONFIG, num_layers=6)
    backbone = deep_backbone(6)
    samples = [plain.sample(backbone, 0, (30,), 2)]
    need = step_module.kept_bytes(backbone, config, samples)
    assert 0.5 * need < saved_bytes(6, False) < 2 * need
    for available, recomputed in ((2 * need + 2, False), (2 * need - 2, True)):
        monkeypatch.setattr(step_module, "available_bytes", lambda _, size=available: size)
        step = TrainStep(tiny.hypernetwork(config), backbone)
        assert step._recomputes(samples) is recomputed


# --- the rest -------------------------------------------------------------------------------------


def test_no_samples_give_zero_gradients(pair):
    loss, gradients, parts = measured(pair, [])
    assert loss == 0 and parts == {}
    assert all(g is not None and not g.any() for g in gradients.values())


def test_master_weights_get_float32_gradients():
    backbone = tiny.backbone()
    backbone.model.bfloat16()
    network = tiny.hypernetwork()
    step = TrainStep(network, backbone)
    result = step(plain.batch(backbone))
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_only_the_hypernetwork_is_registered(pair):
    step = TrainStep(*pair)
    names = {name.partition(".")[0] for name, _ in step.named_parameters()}
    assert names == {"hypernet"} == {name.partition(".")[0] for name in step.state_dict()}


def test_samples_pickle_and_are_checked(samples):
    copy = pickle.loads(pickle.dumps(samples[3]))
    assert copy.qa_pairs == samples[3].qa_pairs
    assert torch.equal(copy.chunks[2].pixels, samples[3].chunks[2].pixels)
    with pytest.raises(ValueError, match="either pixels or features"):
        Context(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one chunk"):
        replace(samples[0], qa_pairs=(), task_types=())


def test_prompts_of_another_model_are_refused(pair, samples):
    chunk = replace(samples[0].chunks[0], pixels=samples[0].chunks[0].pixels[:1])
    with pytest.raises(ConfigError, match="8 image tokens in the prompts for 4 visual features"):
        TrainStep(*pair)([replace(samples[0], chunks=(chunk,))])


def test_weights_of_pairs(samples):
    weights = pair_weights(samples[0], {"captioning": 0.5, "qa": 0.5})
    assert weights == [0.75, 1.5, 0.75] and samples[0].task_types[0] == samples[0].task_types[2]
    assert pair_weights(samples[1], {"captioning": 0.0, "qa": 1.0}) == [0.0]
    with pytest.raises(ConfigError, match="no weight for the task type 'qa'"):
        pair_weights(samples[0], {"captioning": 1.0})


@pytest.mark.parametrize("options", [{"kl_weight": -1}, {"kl_temperature": 0}, {"group_tokens": 0},
    {"max_padding": -0.1}, {"kind_weights": {"qa": -1}}])  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        StepOptions(**options)


# Means per example and the KL divergence, against loops in float64.


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 5, generator=generator)


def probabilities(row: torch.Tensor, temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_means_are_per_example():
    values = torch.arange(9.0)
    owner = torch.tensor([0, 0, 0, 0, 2, 2, 2, 3, 3])
    assert example_means(values, owner, 5).tolist() == [1.5, 0.0, 5.0, 7.5, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_scales_with_the_squared_temperature(logits, temperature):
    actual = token_kl(*logits, temperature)
    for token, (student, teacher) in enumerate(logits.unbind(1)):
        p, q = probabilities(teacher, temperature), probabilities(student, temperature)
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert actual[token].item() == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_kl_to_itself_is_zero(logits):
    assert token_kl(logits[0], logits[0]).abs().max() < 1e-6


# Learning-rate schedules and the optimizer's groups.


def test_trapezoid_rises_stays_and_falls():
    values = [trapezoid(step, 100, 10, 0.4) for step in range(101)]
    assert values[0] == 0.1 and values[9] == 1.0
    assert all(v == 1.0 for v in values[9:61])
    assert values[80] == 0.5 and values[100] == 0.0
    assert values[60:] == sorted(values[60:], reverse=True)


def test_cosine_rises_and_falls():
    values = [cosine(step, 110, 10) for step in range(110)]
    assert values[0] == 0.1 and values[9] == values[10] == 1.0
    assert values[60] == pytest.approx(0.5)
    assert values[109] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert values[10:] == sorted(values[10:], reverse=True)
    assert cosine(0, 10, 0) == 1.0 and cosine(10, 10, 0, floor=0.1) == pytest.approx(0.1)


def test_warmup_is_a_share_of_the_steps_or_a_number():
    assert rate_factor(OptimConfig(steps=1000, warmup_ratio=0.03), 14) == 0.5
    assert rate_factor(OptimConfig(steps=1000, warmup_steps=100), 49) == 0.5
    assert rate_factor(OptimConfig(steps=100, schedule="trapezoid", decay_ratio=0.5), 75) == 0.5


def test_scalers_have_their_own_rate_and_decay():
    network = tiny.hypernetwork()
    config = OptimConfig(
        lr=2e-3, scaler_lr_factor=5.0, scaler_weight_decay=0.0, weight_decay=0.01, warmup_steps=4
    )
    optimizer = make_optimizer(network, config)
    assert set_rate(optimizer, config, 1) == 1e-3
    others, scalers = optimizer.param_groups
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.01)
    assert (scalers["lr"], scalers["weight_decay"]) == (5e-3, 0.0)
    assert len(scalers["params"]) == 2
    assert len(others["params"]) + 2 == len(list(network.parameters()))
