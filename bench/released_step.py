"""A training step in the released order, in plain PyTorch: a baseline of ``bench.runs.train_step``.

Every example has its own video encoded by vision tower and decoder; ``bench.runs.train_step`` says
what is padded, materialized and repeated. Written from that description, for our weights; the
hypernetwork is that of ``bench.released``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bench import released
from v2l_fast.data.samples import Sample
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.vlm.smolvlm import SmolVLM

Stage = Callable[[str], None]
IGNORED = -100


class Step(Protocol):
    """A training step without the optimizer; reports each stage when it is over."""

    def __call__(self, samples: list[Sample], total: int, stage: Stage) -> Tensor:
        """Sum of the examples' losses over `total`; gradients are added to the parameters'."""


class ReleasedStep:
    """Samples of one chunk and one turn each."""

    def __init__(self, network: HyperNetwork, backbone: SmolVLM) -> None:
        self.network, self.backbone = network, backbone
        self.text_model = backbone.model.model.text_model
        self.device = backbone.decoder.device

    def __call__(self, samples: list[Sample], total: int, stage: Stage) -> Tensor:
        views = torch.cat([one.chunks[0].pixels.to(self.device) for one in samples])
        seen = self.backbone.encode_views(views)
        stage("vision")
        features, mask = self._features(samples, seen)
        stage("text encode")
        factors = released.hypernetwork(self.network, features, mask)
        a, b = (side["down_proj"] for side in factors)
        biases = (self.network.bias_A["down_proj"], self.network.bias_B["down_proj"])
        sides = [
            torch.cat([rows, bias.expand(len(rows), *bias.shape)], 2)
            for rows, bias in zip((a, b), biases, strict=True)
        ]
        stage("hypernetwork forward")
        leaves = [side.detach().requires_grad_() for side in sides]
        loss = self._losses(samples, *leaves).sum() / total
        stage("answer forward")
        loss.backward()
        stage("answer backward")
        torch.autograd.backward(sides, [leaf.grad for leaf in leaves])
        stage("hypernetwork backward")
        return loss.detach()

    @torch.no_grad()
    def _features(self, samples: list[Sample], seen: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states entering every layer, float32 [B, L, S, D], and the mask [B, S]."""
        ids, mask = self._padded([one.chunks[0].ids for one in samples], 0)
        words = self.text_model.get_input_embeddings()(ids)
        image = (ids == self.backbone.image_token_id)[..., None]
        found = self.text_model(
            inputs_embeds=words.masked_scatter(image, seen.to(words.dtype)),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.stack(found.hidden_states[:-1], 1).float(), mask

    def _losses(self, samples: list[Sample], a: Tensor, b: Tensor) -> Tensor:
        """Mean cross-entropy of each example, from logits of all positions."""
        rows, labels = [], []
        for one in samples:
            ((question, answer),) = one.qa_pairs
            prompt = one.prompt_prefix + question
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
        ids, mask = self._padded(rows, 0)
        targets, _ = self._padded(labels, IGNORED)
        with self._adapted(a, b):
            hidden = self.text_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
        logits = self.backbone.model.lm_head(hidden).float()[:, :-1]
        targets = targets[:, 1:]
        each = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        return each.sum(1) / (targets != IGNORED).sum(1)

    @contextlib.contextmanager
    def _adapted(self, a: Tensor, b: Tensor) -> Iterator[None]:
        """Adapters [B, L, r, d] in force on every down projection, one an example."""
        scale = self.network.config.scale

        def hook(layer: int) -> Callable:
            def add(module: torch.nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
                ones = torch.ones(len(out), dtype=torch.int64, device=out.device)
                mine_a = a[:, layer].to(out.dtype).repeat_interleave(ones, dim=0)
                mine_b = b[:, layer].to(out.dtype).repeat_interleave(ones, dim=0)
                shrunk = torch.einsum("btd,brd->btr", inputs[0], mine_a)
                return out + torch.einsum("btr,brd->btd", shrunk, mine_b) * scale

            return add

        handles = [
            layer.mlp.down_proj.register_forward_hook(hook(index))
            for index, layer in enumerate(self.text_model.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _padded(self, rows: list[Tensor], value: int) -> tuple[Tensor, Tensor]:
        """Rows of ids padded on the right to [B, T], and 1 where they are, on the device."""
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return padded.to(self.device), mask.to(self.device)
