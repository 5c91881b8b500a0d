"""Learning end to end: a hypernetwork for the shipped shapes base reaches a loss that a broken
training step does not.

Rendered scenes of one object, three questions each, AdamW; the loss is measured on scenes that were
not trained on, always with the right step. `python -m tests.training.test_convergence` breaks the
step in every way and prints the three kinds' losses, the lowest first; they start from 0.69, 0.70
and 1.06.

                                   after 60 steps           after 240 steps
    right                          0.031  0.691  0.761      0.015  0.024  0.111
    another video's adapter        0.692  0.697  1.049      0.692  0.698  1.042
    context masked                 0.691  0.699  1.053      0.694  0.699  1.040
    rows mixed up                  0.690  0.700  1.052      0.693  0.697  1.039
    gradient of layer 1 flipped    2.592  2.904  3.461      0.034  0.220  0.348
    gradient of layer 3 detached   0.152  0.611  0.730      0.006  0.118  0.684

The bound asks for one kind below 0.3 after 60 steps and for two after 240. All but the last miss
it: the other layers make up for one that gets no gradient. That one fails in `test_step`, which
compares gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from v2l_fast.data.readers import Sample
from v2l_fast.hypernet.adapter_bank import LayerAdapters
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import Context
from v2l_fast.shapes.language import ask
from v2l_fast.shapes.vlm import Prompts, cache_visual_tokens, load_base
from v2l_fast.shapes.world import sample_scenes
from v2l_fast.training import step as step_module
from v2l_fast.training.step import ResponseRows, StepOptions, TrainStep, response_rows
from v2l_fast.vlm.smolvlm import SmolVLM

KINDS = ("background", "color", "shape")
STEPS, SHORT, BATCH, RATE = 240, 60, 16, 3e-3
STOPS = (SHORT, STEPS)
# Cross-entropy per answer token, in nats. Kinds are learned one after the other, in an order that
# the last bits decide: the first must be there after SHORT steps, the second at the end.
LEARNED = 0.3


@pytest.fixture(scope="module")
def backbone() -> SmolVLM:
    return load_base()


@pytest.fixture(scope="module")
def videos(backbone) -> tuple[list[Sample], list[Sample]]:
    """To train on, and held out."""
    return scenes(backbone, "train", 2048, 0), scenes(backbone, "val", 64, 1)


def scenes(backbone: SmolVLM, split: str, count: int, seed: int) -> list[Sample]:
    """Videos of one object, encoded."""
    single = [s for s in sample_scenes(split, 4 * count, seed) if len(s.objects) == 1][:count]
    prompts = Prompts(backbone.tokenizer)
    ids = torch.tensor(prompts.context)
    visual = cache_visual_tokens(backbone.model, single, None)
    samples = []
    for scene, features in zip(single, visual, strict=True):
        turns = [ask(scene, kind, random.Random(0)) for kind in KINDS]
        samples.append(
            Sample(
                str(scene),
                (Context(ids, features=features),),
                prompts.text_prefix,
                tuple((prompts.question(t.question), prompts.answer(t.answer)) for t in turns),
                KINDS,
            )
        )
    return samples


Breaking = Callable[[], AbstractContextManager]


def training(
    backbone: SmolVLM, videos: list[Sample], stops: Sequence[int], broken: Breaking = nullcontext
) -> Iterator[TrainStep]:
    """Train with every step within `broken()`; the state of things after each of `stops` steps."""
    torch.manual_seed(0)
    text = backbone.decoder.config
    network = HyperNetwork(
        HypernetConfig(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            target_modules={"down_proj": (text.intermediate_size, text.hidden_size)},
            rank=4,
            latent_size=64,
            num_latents=4,
            num_blocks=1,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
        )
    )
    step = TrainStep(network, backbone, StepOptions(recompute=False))
    scalers = [p for name, p in network.named_parameters() if name.startswith("scaler_")]
    others = [p for name, p in network.named_parameters() if not name.startswith("scaler_")]
    groups = [{"params": others, "factor": 1.0}, {"params": scalers, "factor": 5.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    order = random.Random(0)
    for done in range(max(stops)):
        rate = RATE * min(1.0, (done + 1) / 10, (STEPS - done) / (0.3 * STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with broken():
            step(order.sample(videos, BATCH)).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done + 1 in stops:
            yield step


@torch.no_grad()
def losses(step: TrainStep, videos: list[Sample]) -> list[float]:
    """Mean cross-entropy of each kind, the best first."""
    sums = [pair.tolist() for pair in step(videos).parts.values()]
    return sorted(total / count for total, count in sums)


# --- what can be wrong ----------------------------------------------------------------------------


def others_adapter() -> AbstractContextManager:
    """Every video answers with the next one's adapter."""
    right = TrainStep.adapters

    def wrong(
        self: TrainStep, samples: list[Sample], features: list[Tensor]
    ) -> list[LayerAdapters]:
        layers = right(self, samples, features)
        return [
            replace(
                layer,
                A={m: t.roll(1, 0) for m, t in layer.A.items()},
                B={m: t.roll(1, 0) for m, t in layer.B.items()},
            )
            for layer in layers
        ]

    return mock.patch.object(TrainStep, "adapters", wrong)


def unseen_context() -> AbstractContextManager:
    """The hypernetwork's mask hides what it should show."""
    right = HyperNetwork.group

    def wrong(self: HyperNetwork, first: int, hiddens: Sequence[Tensor], mask, *options):
        return right(self, first, hiddens, torch.zeros(hiddens[0].shape[:2]), *options)

    return mock.patch.object(HyperNetwork, "group", wrong)


def mixed_up_rows() -> AbstractContextManager:
    """Within a group of turns, rows answer with each other's adapters."""

    def wrong(*arguments) -> ResponseRows:
        rows = response_rows(*arguments)
        return replace(rows, groups=[(ids, owners.flip(0)) for ids, owners in rows.groups])

    return mock.patch.object(step_module, "response_rows", wrong)


def scaled_gradient(layer: int, factor: float) -> AbstractContextManager:
    """The gradient of one layer's factors is multiplied."""
    right = HyperNetwork.group

    def wrong(self: HyperNetwork, first: int, *arguments):
        layers = right(self, first, *arguments)
        if 0 <= layer - first < len(layers):
            layers[layer - first] = tuple(
                {m: factor * t + (1 - factor) * t.detach() for m, t in side.items()}
                for side in layers[layer - first]
            )
        return layers

    return mock.patch.object(HyperNetwork, "group", wrong)


BROKEN: dict[str, Breaking] = {
    "another video's adapter": others_adapter,
    "context masked": unseen_context,
    "rows mixed up": mixed_up_rows,
    "gradient of layer 1 flipped": partial(scaled_gradient, 1, -1.0),
    "gradient of layer 3 detached": partial(scaled_gradient, 3, 0.0),
}


FIRST, *OTHERS = list(BROKEN)[:-1]

# --- the checks -----------------------------------------------------------------------------------


def test_a_hypernetwork_learns(backbone, videos):
    train, held_out = videos
    (step,) = training(backbone, train, (SHORT,))
    assert losses(step, held_out)[0] < LEARNED


@pytest.mark.slow
def test_a_hypernetwork_learns_a_second_kind(backbone, videos):
    train, held_out = videos
    (step,) = training(backbone, train, (STEPS,))
    assert losses(step, held_out)[1] < LEARNED
    with others_adapter():
        assert losses(step, held_out)[-1] > 1.0


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_broken_step_does_not(backbone, videos, name):
    train, held_out = videos
    (step,) = training(backbone, train, (SHORT,), BROKEN[name])
    assert losses(step, held_out)[0] > 1.5 * LEARNED


def main() -> None:
    """Print what every broken step reaches."""
    torch.set_num_threads(1)
    backbone = load_base()
    train, held_out = scenes(backbone, "train", 2048, 0), scenes(backbone, "val", 64, 1)
    for name, broken in {"right": nullcontext, **BROKEN}.items():
        actual = [losses(step, held_out) for step in training(backbone, train, STOPS, broken)]
        print(name, [[round(loss, 3) for loss in at_once] for at_once in actual], flush=True)


if __name__ == "__main__":
    main()
