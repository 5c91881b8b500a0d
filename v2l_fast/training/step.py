"""One training step's forward pass: samples to adapters, adapters to the loss of their answers.

Responsible for the path that gradients take: hypernetwork, adapters, frozen decoder, answer tokens.
Reading videos is a `Source`'s work, the optimizer and everything around it the trainer's. Only the
hypernetwork trains. Products run in the frozen model's dtype, so with float32 master weights and a
bfloat16 backbone gradients are float32; autocast is not needed and not expected.

Nothing between the samples and the gradients waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from v2l_fast.data.samples import Sample
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapted_linear import LayerAdapters
from v2l_fast.hypernet.adapter import AdapterBatch
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import context_batches, iter_factors, visual_features
from v2l_fast.training.batches import (
    ResponseRows,
    turn_rows,
)
from v2l_fast.training.losses import Teacher, example_means, teacher_of, token_kl
from v2l_fast.transfer import send
from v2l_fast.vlm import Backbone
from v2l_fast.work_units import run_to_completion

# Float32 logits kept at a time: 256 MiB, 1,361 answer tokens of a vocabulary of 49,280.
LOGITS_PER_CHUNK = 2**26


@dataclass(frozen=True)
class StepOptions:
    """How a step computes and what it weighs.

    Attributes:
        recompute: redo the activations of each hypernetwork layer and of each decoder layer of the
            answers in the backward pass (long contexts, large batches): then a further layer keeps
            its input and its factors alone. False keeps everything, for small models.
        kind_weights: kind of task -> its share of a video's loss, divided among the video's turns
            of that kind and normalized over the kinds it has. A video still counts as many examples
            as it has turns: its weights add up to their number. Empty: every turn weighs 1.
        kl_weight: of the KL divergence from the teacher, added to the cross-entropy; 0 is off. The
            teacher is a sample's `teacher_logits` or, where a batch has none, the frozen model with
            the video in context.
        kl_temperature: T of both distributions; the divergence is multiplied by T².
        max_padding: share of a group of contexts that may be padding; 0 groups equal lengths only.
        group_tokens: context tokens computed together, which bounds activations.
    """

    recompute: bool = True
    kind_weights: Mapping[str, float] = field(default_factory=dict)
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    max_padding: float = 0.1
    group_tokens: int = 65536

    def __post_init__(self) -> None:
        for name, low in (("kl_weight", 0), ("max_padding", 0), ("group_tokens", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.kl_temperature <= 0:
            raise ConfigError(f"kl_temperature must be positive, not {self.kl_temperature}")
        for kind, weight in self.kind_weights.items():
            if weight < 0:
                raise ConfigError(f"kind_weights: {kind!r} must be at least 0, not {weight}")


@dataclass(frozen=True)
class StepResult:
    """What a forward pass gives.

    loss: scalar to call backward on. parts: kind of task -> float32 [2] on the device, detached:
    the sum of its examples' cross-entropies and their number; "kl" likewise. Added up over
    micro-batches and processes, then divided, they are means over examples.
    """

    loss: Tensor
    parts: dict[str, Tensor]


class TrainStep(nn.Module):
    """Samples to loss. The hypernetwork is its only submodule; the frozen model is not registered.

    Args:
        hypernet: the network to train.
        backbone: the frozen VLM, on the same device.
        options: see :class:`StepOptions`.
    """

    def __init__(
        self, hypernet: HyperNetwork, backbone: Backbone, options: StepOptions | None = None
    ) -> None:
        super().__init__()
        self.hypernet = hypernet
        self.options = options or StepOptions()
        # No nn.Module: neither DDP nor state_dict sees the frozen weights.
        self.backbone = backbone

    def forward(
        self, samples: Sequence[Sample], example_total: Tensor | int | None = None
    ) -> StepResult:
        """Sum over turns of their mean cross-entropy per answer token, over `example_total`.

        Args:
            samples: this process's part of the batch, maybe none: then the loss is 0 and every
                parameter's gradient zeros.
            example_total: turns in the whole batch, over all processes and micro-batches; those of
                `samples` when omitted.

        Raises:
            ConfigError: a kind without a weight, prompts of another model, or no teacher for KL.
        """
        if not samples:
            return StepResult(sum((p * 0).sum() for p in self.hypernet.parameters()), {})
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        features = visual_features(self.backbone, contexts)
        return self.loss(samples, features, self.adapters(samples, features), example_total)

    def adapters(self, samples: Sequence[Sample], features: Sequence[Tensor]) -> AdapterBatch:
        """One adapter a sample, its chunks side by side in rank and the bias once.

        features: of every chunk of every sample, as from `visual_features`.
        """
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        options = self.options
        parts, order = [], []
        heads = self.hypernet.head.slices()
        for batch in context_batches(
            self.backbone, contexts, features, options.max_padding, options.group_tokens
        ):
            factors = iter_factors(self.backbone, self.hypernet, batch, heads=heads, run=self._run)
            parts.append(run_to_completion(factors))
            order += batch.members
        back = sorted(range(len(order)), key=order.__getitem__)
        index = send(torch.tensor(back), self.backbone.decoder.device)

        def joined(side: str) -> dict[str, Tensor]:
            factors = [getattr(part, side) for part in parts]
            rows = {m: torch.cat([f[m] for f in factors]) for m in factors[0]}
            return {m: t.index_select(0, index) for m, t in rows.items()}

        batch = AdapterBatch(joined("A"), joined("B"), parts[0].scale, parts[0].bias)
        return batch.composed([len(sample.chunks) for sample in samples])

    def loss(
        self,
        samples: Sequence[Sample],
        features: Sequence[Tensor],
        adapters: AdapterBatch,
        example_total: Tensor | int | None = None,
    ) -> StepResult:
        """The samples' loss under their `adapters`; see :meth:`forward`."""
        options, backbone = self.options, self.backbone
        device = backbone.decoder.device
        bounds = options.max_padding, options.group_tokens
        rows = turn_rows(samples, backbone.tokenizer.pad_token_id, *bounds).to(device)
        teacher = None
        if options.kl_weight:
            teacher = teacher_of(backbone, samples, features, *bounds)
        states = self._answer_states(rows, adapters)
        per_token = self._token_losses(states, rows.targets, teacher)

        kinds = [kind for sample in samples for kind in sample.kinds]
        losses = example_means(per_token[:, 0], rows.turns, len(kinds))
        parts = _by_kind(losses.detach(), kinds)
        if teacher is not None:
            divergence = example_means(per_token[:, 1], rows.turns, len(kinds))
            parts |= _by_kind(divergence.detach(), ["kl"] * len(kinds))
            losses = losses + options.kl_weight * divergence
        if options.kind_weights:
            weights = [w for s in samples for w in turn_weights(s, options.kind_weights)]
            losses = losses * send(torch.tensor(weights), device)
        total = len(kinds) if example_total is None else example_total
        return StepResult(losses.sum() / total, parts)

    def _answer_states(self, rows: ResponseRows, adapters: AdapterBatch) -> Tensor:
        """Normed hidden states [N, D] before each answer token, each row with its adapter."""
        decoder = self.backbone.decoder
        layers = LayerAdapters.of_batch(adapters)
        states = []
        for ids, owners in rows.groups:
            span = decoder.prefill_metadata(*ids.shape)
            hidden = decoder.embed(ids)
            for index, slots in enumerate(layers):
                chosen = replace(slots, index=owners)
                hidden = self._run(decoder.layer, index, hidden, span, None, chosen)
            states.append(hidden.flatten(0, 1))
        return decoder.text_model.norm(torch.cat(states).index_select(0, rows.places))

    def _run(self, function: Callable, *arguments: Any) -> Any:
        """Call a function; with `recompute`, keep its arguments alone for the backward pass."""
        if not (self.options.recompute and torch.is_grad_enabled()):
            return function(*arguments)
        return _recomputed(function, *arguments)

    def _token_losses(self, hidden: Tensor, targets: Tensor, teacher: Teacher | None) -> Tensor:
        """Cross-entropy and, with a teacher, KL of each answer token: [N, 1 or 2], float32.

        Logits exist for a bounded number of tokens at a time, in the backward pass as well.
        """
        limit = max(1, LOGITS_PER_CHUNK // self.backbone.decoder.lm_head.out_features)

        def losses(hidden: Tensor, targets: Tensor, values: Tensor | None = None) -> Tensor:
            logits = self.backbone.decoder.logits(hidden)
            found = [F.cross_entropy(logits, targets, reduction="none")]
            if teacher is not None:
                found.append(token_kl(logits, teacher.logits(values), options.kl_temperature))
            return torch.stack(found, -1)

        options = self.options
        columns = [hidden.split(limit), targets.split(limit)]
        if teacher is not None:
            columns.append(teacher.values.split(limit))
        chunks = list(zip(*columns, strict=True))
        if len(chunks) == 1:
            return losses(*chunks[0])
        return torch.cat([_recomputed(losses, *chunk) for chunk in chunks])


def _recomputed(function: Callable, *arguments: Any) -> Any:
    # Nothing draws random numbers, and reading a GPU generator's state would wait.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def turn_weights(sample: Sample, kind_weights: Mapping[str, float]) -> list[float]:
    """Weight of each of a sample's turns; they add up to the number of turns, or are all 0.

    Raises ConfigError for a kind without a weight.
    """
    counts = Counter(sample.kinds)
    for kind in counts:
        if kind not in kind_weights:
            raise ConfigError(
                f"{sample.video}: no weight for turns of kind {kind!r}; kind_weights names "
                f"{', '.join(sorted(kind_weights))}"
            )
    total = sum(kind_weights[kind] for kind in counts)
    share = len(sample.kinds) / total if total else 0.0
    return [share * kind_weights[kind] / counts[kind] for kind in sample.kinds]


def _by_kind(losses: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Kind -> [sum, number] of its examples' losses [count]."""
    names = sorted(set(kinds))
    owner = send(torch.tensor([names.index(kind) for kind in kinds]), losses.device)
    pairs = torch.stack([losses, torch.ones_like(losses)], -1).float()
    sums = pairs.new_zeros(len(names), 2).index_add(0, owner, pairs)
    return dict(zip(names, sums, strict=True))
