"""One training step: samples to adapters, adapters to the loss of their answers, and the optimizer.

Gradients flow from the answer tokens through the frozen decoder and the adapters to the
hypernetwork, which alone trains. Products run in the frozen model's dtype: with float32 parameters
and a bfloat16 backbone, gradients are float32; autocast is neither needed nor expected.

Without the video in context, each question is a row of its own (:class:`ResponseRows`): the shared
prefix is a few tokens, so repeating it costs less than the mask that sharing it would need. With
the video in the prefix, the questions of a video are packed into one row (:class:`PackedPairs`).

Nothing between the samples and the gradients waits for the device.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from v2l_fast.data.readers import Sample
from v2l_fast.device import send
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapter_bank import LayerAdapters
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.pipeline import context_batches, iter_factors, length_buckets, visual_features
from v2l_fast.training.config import STRICT, Count, NonNegative, OptimConfig, Positive
from v2l_fast.vlm import Backbone
from v2l_fast.work_units import run_to_completion

# Float32 logits computed at a time: 256 MiB, 1,361 answer tokens of a vocabulary of 49,280.
LOGITS_PER_CHUNK = 2**26


@config_dataclass(frozen=True, config=STRICT)
class StepOptions:
    """How a step computes its loss.

    Attributes:
        recompute: recompute the activations of each hypernetwork layer, and of each decoder layer
            of the answers, in the backward pass: each further layer then keeps its input, its
            projected context and its factors only. False keeps everything, which is faster. None
            keeps everything in batches that take up to half of the memory that is available at
            the first step. The choice changes no bit of the result.
        widen: compute latents and attention in float64 over float32 features, as
            :meth:`~v2l_fast.hypernet.network.HyperNetwork.group` does by default.
        kind_weights, kl_weight, kl_temperature: see :class:`~v2l_fast.training.config.LossConfig`;
            the divergence is multiplied by the squared temperature.
        max_padding: largest share of padding in a batch of contexts or rows; 0 batches equal
            lengths only.
        group_tokens: tokens computed together, which bounds activations.

    Raises:
        pydantic.ValidationError: a value is out of range.
    """

    recompute: bool | None = None
    widen: bool = False
    kind_weights: Mapping[str, NonNegative] = field(default_factory=dict)
    kl_weight: NonNegative = 0.0
    kl_temperature: Positive = 1.0
    max_padding: NonNegative = 0.1
    group_tokens: Count = 65536


@dataclass(frozen=True)
class StepResult:
    """The result of a forward pass.

    Attributes:
        loss: scalar to call backward on.
        parts: task type -> float32 [2] on the device, detached: the sum of its examples'
            cross-entropies, and their number; "kl" likewise. They may be added over micro-batches
            and processes before dividing.
    """

    loss: Tensor
    parts: dict[str, Tensor]


class TrainStep(nn.Module):
    """Samples to loss. The hypernetwork is its only submodule: the frozen model is not registered.

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
        # Not an nn.Module, so neither DDP nor state_dict sees the frozen weights.
        self.backbone = backbone
        self._memory: int | None = None

    def forward(
        self, samples: Sequence[Sample], example_total: Tensor | int | None = None
    ) -> StepResult:
        """Mean cross-entropy per answer token of each question, summed over questions and divided
        by `example_total`.

        Args:
            samples: this process's part of the batch. If it is empty, the loss and every gradient
                are 0.
            example_total: number of questions in the whole batch, over all processes and
                micro-batches; that of `samples` if omitted.

        Raises:
            ConfigError: a task type without a weight, prompts of another model, or no teacher for
                the KL divergence.
        """
        if not samples:
            zero = sum((p * 0).sum() for p in self.hypernet.parameters())
            return StepResult(cast(Tensor, zero), {})
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        features = visual_features(self.backbone, contexts)
        return self.loss(samples, features, self.adapters(samples, features), example_total)

    def adapters(
        self, samples: Sequence[Sample], features: Sequence[Tensor]
    ) -> list[LayerAdapters]:
        """Each layer's adapters, one per sample: its chunks side by side in rank, the bias once.

        features: those of every chunk of every sample, see `visual_features`.
        """
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        options = self.options
        parts, order = [], []
        heads, recompute = self.hypernet.head.slices(), self._recomputes(samples)
        for batch in context_batches(
            self.backbone, contexts, features, options.max_padding, options.group_tokens
        ):
            factors = iter_factors(
                self.backbone, self.hypernet, batch, None, heads, recompute, options.widen
            )
            parts.append(run_to_completion(factors))
            order += batch.members
        rows = sorted(range(len(order)), key=order.__getitem__)
        return LayerAdapters.compose(
            parts,
            rows,
            [len(sample.chunks) for sample in samples],
            cast(float, self.hypernet.config.scale),
            self.hypernet.bias_adapter(),
        )

    def loss(
        self,
        samples: Sequence[Sample],
        features: Sequence[Tensor],
        adapters: Sequence[LayerAdapters],
        example_total: Tensor | int | None = None,
    ) -> StepResult:
        """The samples' loss under their `adapters`; see :meth:`forward`."""
        options, backbone = self.options, self.backbone
        device = backbone.decoder.device
        bounds = options.max_padding, options.group_tokens
        rows = response_rows(samples, backbone.tokenizer.pad_token_id, *bounds).to(device)
        teacher = None
        if options.kl_weight:
            teacher = teacher_states(backbone, samples, features, *bounds)
        states = self._answer_states(rows, adapters, self._recomputes(samples))
        per_token = self._token_losses(states, rows.targets, teacher)

        task_types = [name for sample in samples for name in sample.task_types]
        count = len(task_types)
        losses = example_means(per_token[:, 0], rows.pair_index, count)
        parts = _by_task_type(losses.detach(), task_types)
        if teacher is not None:
            divergence = example_means(per_token[:, 1], rows.pair_index, count)
            parts |= _by_task_type(divergence.detach(), ["kl"] * count)
            losses = losses + options.kl_weight * divergence
        if options.kind_weights:
            weights = [w for s in samples for w in pair_weights(s, options.kind_weights)]
            losses = losses * send(torch.tensor(weights), device)
        total = count if example_total is None else example_total
        return StepResult(losses.sum() / total, parts)

    def _answer_states(
        self, rows: ResponseRows, adapters: Sequence[LayerAdapters], recompute: bool
    ) -> Tensor:
        """Normed hidden states [N, D] before each answer token, each row under its adapter."""
        decoder = self.backbone.decoder
        run = _recomputed if recompute and torch.is_grad_enabled() else _call
        states = []
        for ids, owners in rows.groups:
            metadata = decoder.prefill_metadata(*ids.shape)
            hidden = decoder.embed(ids)
            for index, layer in enumerate(adapters):
                adapter = replace(layer, index=owners)
                hidden = run(decoder.layer, index, hidden, metadata, None, adapter)
            states.append(hidden.flatten(0, 1))
        return decoder.text_model.norm(torch.cat(states).index_select(0, rows.positions))

    def _recomputes(self, samples: Sequence[Sample]) -> bool:
        """Whether this batch's activations are recomputed."""
        if self.options.recompute is not None:
            return self.options.recompute
        if self._memory is None:
            self._memory = available_bytes(self.backbone.decoder.device) // 2
        return kept_bytes(self.backbone, self.hypernet.config, samples) > self._memory

    def _token_losses(self, hidden: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """Cross-entropy and, with a teacher's states [N, D], KL of each answer token: float32
        [N, 1 or 2].

        Logits exist for a bounded number of tokens at a time, in the backward pass as well.
        """
        decoder, temperature = self.backbone.decoder, self.options.kl_temperature
        limit = max(1, LOGITS_PER_CHUNK // decoder.lm_head.out_features)

        def losses(hidden: Tensor, targets: Tensor, teacher: Tensor | None = None) -> Tensor:
            logits = decoder.logits(hidden)
            columns = [F.cross_entropy(logits, targets, reduction="none")]
            if teacher is not None:
                columns.append(token_kl(logits, decoder.logits(teacher), temperature))
            return torch.stack(columns, -1)

        tensors = [hidden, targets] if teacher is None else [hidden, targets, teacher]
        chunks = list(zip(*(tensor.split(limit) for tensor in tensors), strict=True))
        if len(chunks) == 1:
            return losses(*chunks[0])
        return torch.cat([_recomputed(losses, *chunk) for chunk in chunks])


def kept_bytes(backbone: Backbone, config: HypernetConfig, samples: Sequence[Sample]) -> int:
    """Estimate of the activations that a step keeps if it recomputes none.

    A linear layer keeps about as many numbers per row as it has outputs, so a block keeps about its
    parameters divided by its width, and a few times its width for norms and sums.
    """
    decoder, size, dim = backbone.decoder, config.latent_size, config.hidden_size
    weights = sum(p.numel() for p in decoder.text_model.layers[0].parameters() if p.dim() == 2)
    chunks = [chunk for sample in samples for chunk in sample.chunks]
    # Features, gate, up, and the context; then for every block and latent the queries and values
    # of all heads, the projections and the MLP.
    context = sum(len(chunk.ids) for chunk in chunks) * (9 * dim + 2 * size)
    latent = 6 * config.num_heads * size + 4 * config.num_heads * config.head_dim + 16 * size
    latents = len(chunks) * config.num_blocks * config.num_latents * latent
    answers = sum(
        len(sample.prompt_prefix) + len(question) + len(answer)
        for sample in samples
        for question, answer in sample.qa_pairs
    ) * (weights // dim + 6 * dim)  # fmt: skip
    return config.num_layers * (context + latents + answers) * decoder.dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that this process can still take: of the GPU, or of the machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        limits += [int(row[1]) << 10 for row in rows if row[0] == "MemAvailable:"]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        limits.append(max(0, limit - used))
    except (OSError, ValueError):
        # Not Linux, or no limit ("max").
        pass
    return min(limits, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def _call(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable, *arguments: Any) -> Any:
    # No random numbers are drawn, and reading a GPU generator's state would wait for the GPU.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def pair_weights(sample: Sample, kind_weights: Mapping[str, float]) -> list[float]:
    """Weight of each of a sample's questions; they add up to their number, or are all 0.

    A task type's weight is shared equally by the sample's questions of that type and normalized
    over the types it has.

    Raises:
        ConfigError: a task type has no weight.
    """
    counts = Counter(sample.task_types)
    for name in counts:
        if name not in kind_weights:
            raise ConfigError(
                f"{sample.video}: kind_weights has no weight for the task type {name!r}, only for "
                f"{', '.join(sorted(kind_weights))}"
            )
    total = sum(kind_weights[name] for name in counts)
    share = len(sample.task_types) / total if total else 0.0
    return [share * kind_weights[name] / counts[name] for name in sample.task_types]


def _by_task_type(losses: Tensor, task_types: Sequence[str]) -> dict[str, Tensor]:
    """Task type -> [sum, number] of its examples' losses [count]."""
    names = sorted(set(task_types))
    owner = send(torch.tensor([names.index(name) for name in task_types]), losses.device)
    pairs = torch.stack([losses, torch.ones_like(losses)], -1).float()
    sums = pairs.new_zeros(len(names), 2).index_add(0, owner, pairs)
    return dict(zip(names, sums, strict=True))


def example_means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] over the tokens of each of `count` examples: [count].

    owner: int64 [N], the example of each token. An example without tokens gives 0.
    """
    zeros = torch.zeros(count, dtype=values.dtype, device=values.device)
    tokens = zeros.index_add(0, owner, torch.ones_like(values))
    return zeros.index_add(0, owner, values) / tokens.clamp_min(1)


def token_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student) of the distributions at temperature T: [N, V] twice -> [N]."""
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return temperature**2 * divergence


@torch.no_grad()
def teacher_states(
    backbone: Backbone,
    samples: Sequence[Sample],
    features: Sequence[Tensor],
    max_padding: float,
    max_tokens: int,
) -> Tensor:
    """Normed hidden states [N, D] before every answer token, with the video in context.

    Args:
        features: visual features of the samples, each of which has one chunk.
        max_padding, max_tokens: bounds of the rows computed together.

    Raises:
        ConfigError: a sample has several chunks, or no `teacher_prefix`.
    """
    prefixes = []
    for sample in samples:
        if len(sample.chunks) > 1 or sample.teacher_prefix is None:
            raise ConfigError(
                f"{sample.video}: no teacher for its KL divergence, which needs a video in one "
                f"chunk (it has {len(sample.chunks)}) with a teacher_prefix; set kl_weight to 0"
            )
        prefixes.append(sample.teacher_prefix)
    decoder = backbone.decoder
    lengths = [
        len(prefix) + sum(len(question) + len(answer) for question, answer in sample.qa_pairs)
        for prefix, sample in zip(prefixes, samples, strict=True)
    ]
    states: dict[int, Tensor] = {}
    for members in length_buckets(lengths, max_padding, max_tokens):
        pairs = [samples[i].qa_pairs for i in members]
        packed = pack_pairs([prefixes[i] for i in members], pairs, backbone.tokenizer.pad_token_id)
        embeddings = backbone.embed(packed.ids, [features[i] for i in members])
        packed = packed.to(decoder.device)
        hidden = decoder.forward(
            embeddings, decoder.attention_metadata(packed.positions, packed.mask)
        )
        sizes = [sum(len(answer) for _, answer in row) for row in pairs]
        states |= zip(members, hidden[packed.rows, packed.columns].split(sizes), strict=True)
    return torch.cat([states[i] for i in range(len(samples))])


def trapezoid(step: int, steps: int, warmup: int, decay_ratio: float, floor: float = 0.0) -> float:
    """Factor of the learning rate at 0-based `step`: linear warm-up, flat, linear to `floor`.

    The decay takes the last `decay_ratio` of the `steps`.
    """
    decay = max(1, round(steps * decay_ratio))
    left = max(0.0, (steps - step) / decay)
    return min(1.0, (step + 1) / max(1, warmup), floor + (1 - floor) * left)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor at 0-based `step`: linear warm-up, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def rate_factor(config: OptimConfig, step: int) -> float:
    """The configured schedule's factor at 0-based `step`."""
    warmup = config.warmup_steps or round(config.warmup_ratio * config.steps)
    if config.schedule == "cosine":
        return cosine(step, config.steps, warmup, config.final_lr_ratio)
    return trapezoid(step, config.steps, warmup, config.decay_ratio, config.final_lr_ratio)


def make_optimizer(hypernet: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two parameter groups: the scalers (scaler_A.*, scaler_B.*), and the rest.

    Each group's "factor" multiplies the scheduled learning rate. Fused on a GPU.
    """
    named = {name: p for name, p in hypernet.named_parameters() if p.requires_grad}
    scalers = [p for name, p in named.items() if name.startswith("scaler_")]
    others = [p for name, p in named.items() if not name.startswith("scaler_")]
    return torch.optim.AdamW(
        [
            {"params": others, "factor": 1.0, "weight_decay": config.weight_decay},
            {
                "params": scalers,
                "factor": config.scaler_lr_factor,
                "weight_decay": config.scaler_weight_decay,
            },
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=others[0].is_cuda,
    )


def set_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> float:
    """Set every group's learning rate for 0-based `step`; returns it without the factor."""
    rate = config.lr * rate_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


# --- rows of token ids ----------------------------------------------------------------------------

# Question ids and answer ids.
QAPair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ResponseRows:
    """Rows grouped by length; answer tokens are listed flat, in the samples' order.

    Rows are right-padded, where causal attention needs no mask, and end before their last answer
    token, which predicts nothing.

    Attributes:
        groups: token ids int64 [n, T], and the sample of each row, int64 [n].
        positions: int64 [N], where the token before each answer token is in the concatenation of
            all groups' tokens, row by row.
        targets: int64 [N], the answer tokens.
        pair_index: int64 [N], the question of each answer token, counted over the whole batch.
    """

    groups: list[tuple[Tensor, Tensor]]
    positions: Tensor
    targets: Tensor
    pair_index: Tensor

    def to(self, device: torch.device) -> ResponseRows:
        """A copy on another device; does not wait for it."""
        groups = [(send(ids, device), send(owners, device)) for ids, owners in self.groups]
        return ResponseRows(
            groups, *(send(t, device) for t in (self.positions, self.targets, self.pair_index))
        )


def response_rows(
    samples: Sequence[Sample], pad_id: int, max_padding: float, max_tokens: int
) -> ResponseRows:
    """A row for every question of every sample, in groups by `length_buckets`."""
    pairs = [
        (owner, sample.prompt_prefix + question, answer)
        for owner, sample in enumerate(samples)
        for question, answer in sample.qa_pairs
    ]
    rows = [torch.tensor(prompt + answer[:-1]) for _, prompt, answer in pairs]
    groups: list[tuple[Tensor, Tensor]] = []
    starts = [0] * len(rows)
    total = 0
    for members in length_buckets([len(row) for row in rows], max_padding, max_tokens):
        ids = pad_sequence([rows[i] for i in members], batch_first=True, padding_value=pad_id)
        groups.append((ids, torch.tensor([pairs[i][0] for i in members])))
        for member in members:
            starts[member] = total
            total += ids.shape[1]
    positions: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    for number, (start, (_, prompt, answer)) in enumerate(zip(starts, pairs, strict=True)):
        first = start + len(prompt) - 1
        positions += range(first, first + len(answer))
        targets += answer
        index += [number] * len(answer)
    return ResponseRows(groups, torch.tensor(positions), torch.tensor(targets), torch.tensor(index))


@dataclass(frozen=True)
class PackedPairs:
    """Rows of a prefix and several question-answer pairs, each of which sees only the prefix and
    itself; answer tokens are listed flat, row by row.

    The positions of every pair start after the prefix, so a packed pair computes what it would
    compute alone.

    Attributes:
        ids, positions: int64 [B, T].
        segments: int64 [B, T], 0 for the prefix, 1, 2, ... for the pairs, -1 for padding.
        rows, columns: int64 [N], where the token before each answer token is.
        targets: int64 [N], the answer tokens.
        pair_index: int64 [N], the pair of each answer token, counted over the whole batch.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    pair_index: Tensor

    @property
    def mask(self) -> Tensor:
        """Attention mask, bool [B, 1, T, T], on the device of the segments."""
        rows, columns = self.segments[:, :, None], self.segments[:, None, :]
        shared = (columns == 0) & (rows >= 0)
        order = torch.arange(self.segments.shape[1], device=self.segments.device)
        return (((rows == columns) | shared) & (order <= order[:, None]))[:, None]

    def to(self, device: torch.device) -> PackedPairs:
        """A copy on another device; does not wait for it."""
        return PackedPairs(*(send(getattr(self, field.name), device) for field in fields(self)))


def pack_pairs(
    prefixes: Sequence[list[int]], pairs: Sequence[Sequence[QAPair]], pad_id: int
) -> PackedPairs:
    """Pack each prefix and its pairs into a row; rows are right-padded."""
    lengths = [
        len(prefix) + sum(len(question) + len(answer) for question, answer in row)
        for prefix, row in zip(prefixes, pairs, strict=True)
    ]
    ids = torch.full((len(prefixes), max(lengths)), pad_id)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    number = 0
    for b, (prefix, row) in enumerate(zip(prefixes, pairs, strict=True)):
        start = len(prefix)
        tokens, order, segment = list(prefix), list(range(start)), [0] * start
        for k, (question, answer) in enumerate(row, 1):
            first = len(tokens) + len(question)
            length = len(question) + len(answer)
            tokens += question + answer
            order += range(start, start + length)
            segment += [k] * length
            rows += [b] * len(answer)
            columns += range(first - 1, first - 1 + len(answer))
            targets += answer
            index += [number] * len(answer)
            number += 1
        for tensor, values in ((ids, tokens), (positions, order), (segments, segment)):
            tensor[b, : len(values)] = torch.tensor(values)
    flat = (torch.tensor(values) for values in (rows, columns, targets, index))
    return PackedPairs(ids, positions, segments, *flat)
