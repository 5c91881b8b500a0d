"""A training step without any of its economies: the oracle of ``TrainStep``, and samples for it.

Contexts padded into one batch, all layers' features at once, the released op order of the
hypernetwork, adapters added to copies of the weights, transformers' own forward for every turn
alone, full logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from bench import released
from tests import tiny
from v2l_fast.data.readers import Sample
from v2l_fast.hypernet.adapter_bank import LayerAdapters
from v2l_fast.hypernet.config import INSTRUCTION, HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import Context
from v2l_fast.vlm.smolvlm import SmolVLM

KINDS = ("captioning", "qa")


def models(config: HypernetConfig = tiny.CONFIG) -> tuple[HyperNetwork, SmolVLM]:
    """A hypernetwork and its frozen VLM, both in float64."""
    backbone = tiny.backbone()
    backbone.model.double()
    return tiny.hypernetwork(config).double(), backbone


def sample(backbone: SmolVLM, seed: int, frames: tuple[int, ...], turns: int) -> Sample:
    """Random views and texts: a chunk for each number of frames, a kind for each turn in turn."""
    generator = torch.Generator().manual_seed(seed)

    def text(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most + 1, (), generator=generator))
        words = torch.randint(len(tiny.SPECIAL), len(backbone.tokenizer), (count,),
                              generator=generator)  # fmt: skip
        return words.tolist()

    chunks = []
    for place, count in enumerate(frames):
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        times = [float(i) for i in range(count)]
        ids = backbone.prompt_builder.video_prompt(times, float(count), 0, 0, INSTRUCTION, False)
        where = (place / len(frames), (place + 1) / len(frames))
        chunks.append(Context(torch.tensor(ids), pixels, chunk_span=where))
    return Sample(
        f"video {seed}",
        tuple(chunks),
        backbone.tokenizer("<|im_start|>User: ", add_special_tokens=False)["input_ids"],
        tuple((text(1, 6), text(1, 7)) for _ in range(turns)),
        tuple(KINDS[i % 2] for i in range(turns)),
        sum(frames),
    )


def batch(backbone: SmolVLM) -> list[Sample]:
    """Mixed lengths, one to three chunks, one to four turns; the third is of the first's length."""
    shapes = [((2,), 3), ((1, 3), 1), ((2,), 2), ((1, 2, 4), 4)]
    return [sample(backbone, seed, *shape) for seed, shape in enumerate(shapes)]


def leaves(adapters: list[LayerAdapters]) -> list[LayerAdapters]:
    """The same factors, whose gradients end with them."""
    return [
        replace(
            layer,
            A={m: t.detach().requires_grad_() for m, t in layer.A.items()},
            B={m: t.detach().requires_grad_() for m, t in layer.B.items()},
        )
        for layer in adapters
    ]


def features(backbone: SmolVLM, contexts: list[Context]) -> tuple[Tensor, Tensor]:
    """Inputs of all layers [B, L, S, D], zeros behind the shorter ones, and the mask [B, S]."""
    rows = []
    for context in contexts:
        shown = (context.pixels.to(backbone.decoder.dtype) - 127.5) / 127.5
        embeddings = backbone.decoder.embed(context.ids)
        embeddings[context.ids == backbone.image_token_id] = backbone.encode_pixels(shown).flatten(
            0, 1
        )
        actual = backbone.model.model.text_model(
            inputs_embeds=embeddings[None], output_hidden_states=True, use_cache=False
        )
        rows.append(torch.cat(actual.hidden_states[:-1]))
    longest = max(row.shape[1] for row in rows)
    padded = [F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]
    lengths = torch.tensor([row.shape[1] for row in rows])
    return torch.stack(padded), torch.arange(longest) < lengths[:, None]


def updates(
    network: HyperNetwork, samples: list[Sample], seen: Tensor, mask: Tensor
) -> list[Tensor]:
    """s Bᵀ A of each sample, [L, d_out, d_in]: the chunks' factors and the bias's one after the
    other."""
    a, b = (factors["down_proj"] for factors in released.hypernetwork(network, seen, mask))
    actual, start = [], 0
    for one in samples:
        mine = slice(start, start := start + len(one.chunks))
        sides = [
            torch.cat([*side[mine].unbind(0), bias["down_proj"]], 1)
            for side, bias in ((a, network.bias_A), (b, network.bias_B))
        ]
        actual.append(network.config.scale * sides[1].mT @ sides[0])
    return actual


def turn_losses(
    network: HyperNetwork, backbone: SmolVLM, samples: list[Sample]
) -> list[list[Tensor]]:
    """Mean cross-entropy of every turn of every sample."""
    seen, mask = features(backbone, [chunk for one in samples for chunk in one.chunks])
    text_model = backbone.model.model.text_model
    losses = []
    for one, update in zip(samples, updates(network, samples, seen, mask), strict=True):
        changed = {
            f"layers.{i}.mlp.down_proj.weight": layer.mlp.down_proj.weight + update[i]
            for i, layer in enumerate(text_model.layers)
        }
        mine = []
        for question, answer in one.qa_pairs:
            ids = torch.tensor([one.prompt_prefix + question + answer])
            hidden = functional_call(
                text_model, changed, (), {"input_ids": ids, "use_cache": False}
            ).last_hidden_state
            logits = backbone.model.lm_head(hidden[0, :-1])
            mine.append(F.cross_entropy(logits[-len(answer) :], ids[0, -len(answer) :]))
        losses.append(mine)
    return losses


def gradients(network: HyperNetwork, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter, by name; the parameters' own ``grad`` is not used."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
