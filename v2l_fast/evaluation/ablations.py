"""Ablations of generated adapters: rank directions, layers, norms, chunks, logit attribution.

Each ablation maps a model, examples and their adapters to a JSON-ready record. All of them score
any metric or the teacher-forced log-probability of the references, with the shared bias adapter in
force; the references' tokens are those that the model would generate, without the stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.answers import NONE, OTHER
from v2l_fast.evaluation.examples import (
    EvalExample,
    Metric,
    answer_scores,
    control_scores,
    internalize_each,
    interval,
    other_adapters,
)
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.model import Video2LoRA
from v2l_fast.video import FrameSampling
from v2l_fast.work_units import Progress, silent

# Kept rank directions and number of chunks, by default.
BUDGETS = (1, 2, 4, 8, 16)
COUNTS = (1, 2, 4, 8, 16)
STRATEGIES = ("top", "bottom", "random", "remove-top")
SEEDS = (0, 1, 2)

# Rows per forward pass; every row may have an adapter of its own.
_ROWS = 8


# --- teacher-forced scores (paper Eqs. 10 and 11) -------------------------------------------------


def candidate_ids(model: Video2LoRA, candidates: Sequence[str]) -> list[list[int]]:
    """Token ids z of each candidate string as an answer.

    Raises:
        ConfigError: a candidate has no tokens.
    """
    ids = [model.backbone.prompt_builder.answer(text, finished=False) for text in candidates]
    for text, tokens in zip(candidates, ids, strict=True):
        if not tokens:
            raise ConfigError(f"the reference {text!r} has no tokens: give a text with words")
    return ids


@torch.inference_mode()
def log_probabilities(
    model: Video2LoRA,
    prompt: str,
    candidates: Sequence[str],
    adapters: Sequence[Adapter | None],
) -> Tensor:
    """Length-normalized log-probability of every candidate under every adapter (Eq. 10).

    Returns:
        [len(adapters), len(candidates)] float64 on the CPU, nats per token.
    """
    decoder = model.backbone.decoder
    question = model.backbone.prompt_builder.question(prompt)
    answers = candidate_ids(model, candidates)
    pairs = [(adapter, answer) for adapter in adapters for answer in answers]
    scores = []
    for start in range(0, len(pairs), _ROWS):
        part = pairs[start : start + _ROWS]
        rows = [torch.tensor(question + answer[:-1]) for _, answer in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(decoder.device)
        attached = [None if a is None else model.attach(a) for a, _ in part]
        bank = AdapterBank.pack(attached, decoder.device, decoder.dtype)
        hidden = decoder.forward(decoder.embed(ids), adapters=bank)
        # The logits of an answer token are those of the token before it.
        first = len(question) - 1
        for row, (_, answer) in enumerate(part):
            logits = decoder.logits(hidden[row, first : first + len(answer)])
            targets = torch.tensor(answer, device=logits.device)[:, None]
            scores.append(logits.double().log_softmax(-1).gather(1, targets).mean().cpu())
    return torch.stack(scores).view(len(adapters), len(answers))


def diagnostic_scores(
    model: Video2LoRA,
    prompt: str,
    references: Sequence[str],
    adapters: Sequence[Adapter | None],
) -> Tensor:
    """S of each adapter: the log-probability of its best reference (Eq. 11), [len(adapters)]."""
    return log_probabilities(model, prompt, references, adapters).amax(1)


# --- rank directions (paper Appendix C, Table 5) --------------------------------------------------


def kept_directions(
    strategy: str, k: int, rank: int, seeds: Sequence[int] = SEEDS
) -> list[tuple[int, str, int]]:
    """``Adapter.prune`` arguments of a strategy at budget k; one set per seed for "random".

    "remove-top" removes the k directions with the highest norm product ‖A_r‖·‖B_r‖, so it keeps the
    rank - k lowest.
    """
    keep = rank - k if strategy == "remove-top" else k
    if keep in (0, rank):
        # All strategies agree.
        return [(keep, "norm", 0)]
    if strategy == "random":
        return [(keep, "random", seed) for seed in seeds]
    return [(keep, "norm" if strategy == "top" else "bottom", 0)]


def rank_ablation(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter],
    metric: Metric,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = SEEDS,
    max_new_tokens: int = 128,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Scores of answers through adapters that keep only some rank directions.

    Directions are ranked per layer and module by the norm product ‖A_r‖·‖B_r‖. With k = 0 the bias
    adapter remains.

    Args:
        adapters: one per example, all of one generated rank.
        budgets: values of k. Those above the rank are skipped; 0 and the rank are always included.

    Returns:
        "rank", "examples", "seeds", "controls" (condition -> interval, see
        :func:`~v2l_fast.evaluation.examples.control_scores`) and "rows": for each "k", strategy ->
        interval over videos ("random": of the mean over seeds).

    Raises:
        ConfigError: the adapters differ in rank.
    """
    rank = _common_rank(adapters)
    ks = sorted({0, rank, *(k for k in budgets if 0 < k < rank)})
    plan = {(k, s): kept_directions(s, k, rank, seeds) for k in ks for s in STRATEGIES}
    distinct = list(dict.fromkeys(choice for choices in plan.values() for choice in choices))
    scores: dict[tuple[int, str, int], list[float]] = {}
    for done, choice in enumerate(distinct):
        progress("answering through pruned adapters", done, len(distinct))
        pruned = {id(a): a.prune(*choice) for a in adapters}
        scores[choice] = answer_scores(
            model, examples, [pruned[id(a)] for a in adapters], metric, max_new_tokens
        )
    progress("answering through pruned adapters", len(distinct), len(distinct))
    rows = []
    for k in ks:
        row: dict[str, Any] = {"k": k}
        for strategy in STRATEGIES:
            runs = [scores[choice] for choice in plan[k, strategy]]
            means = [sum(run) / len(run) for run in zip(*runs, strict=True)]
            row[strategy] = interval(means, examples)
        rows.append(row)
    controls = control_scores(model, examples, adapters, metric, max_new_tokens)
    return {
        "rank": rank,
        "examples": len(examples),
        "seeds": list(seeds),
        "controls": {name: interval(values, examples) for name, values in controls.items()},
        "rows": rows,
    }


def _common_rank(adapters: Sequence[Adapter]) -> int:
    ranks = {adapter.rank for adapter in adapters}
    if len(ranks) != 1:
        raise ConfigError(f"adapters must all have the same rank, got {sorted(ranks)}")
    return ranks.pop()


# --- layers (paper Appendix D.2, Figure 7) --------------------------------------------------------


def removal_effects(model: Video2LoRA, example: EvalExample, adapter: Adapter) -> Tensor:
    """[L + 2] float64: S with the adapter, the effect of removing each layer (Eq. 12), and S of the
    plain model.

    Removing a layer removes its generated update; the shared bias adapter stays.
    """
    without = [adapter.without_layers([layer]) for layer in range(adapter.num_layers)]
    scores = diagnostic_scores(model, example.prompt, example.references, [adapter, *without, None])
    scores[1:-1] -= scores[0]
    return scores


def layer_removal(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Effect of each layer's update on the references' likelihood, and the update's norm.

    Returns:
        "examples"; "score": interval of S, nats per token; "controls": condition -> the same;
        "rows": for each "layer" the "effect" (interval) and "norm", module -> mean Frobenius norm
        of s·BᵀA.
    """
    effects = []
    for done, (example, adapter) in enumerate(zip(examples, adapters, strict=True)):
        progress("removing layers", done, len(examples))
        effects.append(removal_effects(model, example, adapter))
    progress("removing layers", len(examples), len(examples))
    table = torch.stack(effects)
    controls = {NONE: table[:, -1].tolist()}
    if others := other_adapters(examples, adapters):
        controls[OTHER] = [
            diagnostic_scores(model, example.prompt, example.references, [other]).item()
            for example, other in zip(examples, others, strict=True)
        ]
    norms = mean_layer_norms(adapters)
    rows = [
        {
            "layer": layer,
            "effect": interval(table[:, 1 + layer].tolist(), examples, None),
            "norm": {module: values[layer] for module, values in norms.items()},
        }
        for layer in range(table.shape[1] - 2)
    ]
    return {
        "examples": len(examples),
        "score": interval(table[:, 0].tolist(), examples, None),
        "controls": {name: interval(scores, examples, None) for name, scores in controls.items()},
        "rows": rows,
    }


# --- norms ----------------------------------------------------------------------------------------


def mean_layer_norms(adapters: Sequence[Adapter]) -> dict[str, list[float]]:
    """Module -> [L] Frobenius norm of the generated update, mean over adapters."""
    norms = [adapter.norms()["layer"] for adapter in adapters]
    return {m: torch.stack([n[m].cpu() for n in norms]).mean(0).tolist() for m in norms[0]}


def adapter_norms(model: Video2LoRA, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Norms of the generated updates, and how stable the order of the rank directions is.

    Returns:
        "adapters", "rank" and "modules": for each module "rank_norms" [L, r], mean products
        ‖A_r‖·‖B_r‖; "layer_norms" [L], mean Frobenius norms of s·BᵀA; "relative_norms" [L], those
        divided by the norm of the frozen weight; "largest" and "smallest": direction -> share of
        adapters in which its product, averaged over layers, is the largest or the smallest
        (Appendix C.2 reports one direction that is the largest for every video).

    Raises:
        ConfigError: the adapters differ in rank.
    """
    rank = _common_rank(adapters)
    products = [adapter.norms()["rank"] for adapter in adapters]
    layers = mean_layer_norms(adapters)
    modules = {}
    for module in products[0]:
        stacked = torch.stack([p[module].cpu() for p in products])
        per_direction = stacked.mean(1)
        frozen = [
            model.backbone.linear(layer, module).weight.float().norm().item()
            for layer in range(adapters[0].num_layers)
        ]
        modules[module] = {
            "rank_norms": stacked.mean(0).tolist(),
            "layer_norms": layers[module],
            "relative_norms": [n / w for n, w in zip(layers[module], frozen, strict=True)],
            "largest": _shares(per_direction.argmax(1)),
            "smallest": _shares(per_direction.argmin(1)),
        }
    return {"adapters": len(adapters), "rank": rank, "modules": modules}


def _shares(winners: Tensor) -> dict[str, float]:
    counts = winners.bincount()
    order = counts.argsort(descending=True, stable=True)
    return {f"R{r}": counts[r].item() / len(winners) for r in order.tolist() if counts[r]}


# --- chunks (paper Section 5.6) -------------------------------------------------------------------


def compare_chunks(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    metric: Metric,
    counts: Sequence[int] = COUNTS,
    max_new_tokens: int = 128,
    progress: Progress = silent,
    *,
    sampling: FrameSampling | None = None,
) -> dict[str, Any]:
    """Adapters composed of a video's chunks against the single adapter of the whole video.

    Each chunk is internalized on its own; the adapters are joined along the rank, the bias adapter
    once. A network without ``chunk_position`` was not trained on chunks and composes zero-shot.

    Args:
        counts: numbers of chunks; 1, the single adapter, is always included.
        sampling: frames and size of each chunk; as in training by default.

    Returns:
        "examples", "chunk_position", "controls" (condition -> kind -> interval, with the single
        adapters) and "rows": for each count "chunks", "rank" (generated), "score", kind ->
        interval; "change", kind -> interval of the difference to the single adapter; "kept", kind
        -> share of the single adapter's mean score above that without an adapter (absent if it is
        not above).

    Raises:
        ConfigError: a count is less than 1.
    """
    # scipy is slow to import and not needed for help.
    from v2l_fast.evaluation.statistics import recovery

    if any(count < 1 for count in counts):
        raise ConfigError(f"chunks must be at least 1, got {min(counts)}")
    kinds = list(dict.fromkeys(example.kind for example in examples))
    members = {kind: [e for e in examples if e.kind == kind] for kind in kinds}

    def by_kind(scores: Sequence[float]) -> dict[str, list[float]]:
        pairs = list(zip(scores, examples, strict=True))
        return {kind: [s for s, e in pairs if e.kind == kind] for kind in kinds}

    single: dict[str, list[float]] = {}
    controls: dict[str, list[float]] = {}
    none: dict[str, float] = {}
    rows = []
    for count in sorted({1, *counts}):
        adapters = internalize_each(
            model,
            examples,
            progress,
            sampling=sampling,
            chunks=count,
        )
        scores = by_kind(answer_scores(model, examples, adapters, metric, max_new_tokens))
        if count == 1:
            single = scores
            controls = control_scores(model, examples, adapters, metric, max_new_tokens)
            none = {kind: fmean(values) for kind, values in by_kind(controls[NONE]).items()}
        changes = {
            kind: [a - b for a, b in zip(values, single[kind], strict=True)]
            for kind, values in scores.items()
        }
        rows.append(
            {
                "chunks": count,
                "rank": adapters[0].rank,
                "score": {kind: interval(values, members[kind]) for kind, values in scores.items()},
                "change": {
                    kind: interval(values, members[kind], (-1.0, 1.0))
                    for kind, values in changes.items()
                },
                "kept": {
                    kind: recovery(fmean(values), fmean(single[kind]), none[kind])
                    for kind, values in scores.items()
                    if fmean(single[kind]) > none[kind]
                },
            }
        )
    return {
        "examples": len(examples),
        "chunk_position": model.config.chunk_position,
        "controls": {
            name: {
                kind: interval(values, members[kind]) for kind, values in by_kind(scores).items()
            }
            for name, scores in controls.items()
        },
        "rows": rows,
    }


# --- direct logit attribution (paper Appendix D.3, Eq. 13, Figure 8) ------------------------------


@dataclass(frozen=True)
class Attribution:
    """The adapter's shifts at the prompt's last token, projected on the answer direction; [L]
    float32 each.

    Attributes:
        whole: of the residual stream after each layer; the running sum of the two parts.
        attention: of each attention block's output.
        mlp: of each MLP's output.
    """

    whole: Tensor
    attention: Tensor
    mlp: Tensor


@torch.inference_mode()
def residual_shifts(
    model: Video2LoRA, prompt: str, adapter: Adapter
) -> tuple[Tensor, Tensor, Tensor]:
    """The adapter's changes at the prompt's last token, whose output is the first answer token.

    Returns:
        Δx, Δa and Δm, [L, D] float32 each: of the residual stream after each layer, of the
        attention block's output and of the MLP's output.
    """
    decoder = model.backbone.decoder
    embeddings = model.backbone.question(prompt).embeddings
    bank = AdapterBank.pack([None, model.attach(adapter)], decoder.device, decoder.dtype)
    hidden = embeddings.expand(2, *embeddings.shape)
    span = decoder.prefill_metadata(*hidden.shape[:2])
    shifts: tuple[list[Tensor], ...] = ([], [], [])
    for index, layer in enumerate(decoder.layers):
        attention = decoder.attention_block(layer, index, hidden, span, adapters=bank)
        hidden = hidden + attention
        mlp = decoder.mlp_block(layer, index, hidden, bank)
        hidden = hidden + mlp
        for layers, rows in zip(shifts, (hidden, attention, mlp), strict=True):
            base, adapted = rows[:, -1].float()
            layers.append(adapted - base)
    whole, attention, mlp = (torch.stack(layers) for layers in shifts)
    return whole, attention, mlp


def answer_direction(model: Video2LoRA, reference: str) -> Tensor:
    """d̂: the normalized mean output embedding of the reference's tokens, [D] float32."""
    (ids,) = candidate_ids(model, [reference])
    weight = model.backbone.decoder.lm_head.weight
    mean = weight[torch.tensor(ids, device=weight.device)].detach().float().mean(0)
    return mean / mean.norm()


def attribute(model: Video2LoRA, example: EvalExample, adapter: Adapter) -> Attribution:
    """Attribution towards the reference that is most likely with the adapter (Eq. 11)."""
    scores = log_probabilities(model, example.prompt, example.references, [adapter])[0]
    direction = answer_direction(model, example.references[int(scores.argmax())])
    shifts = residual_shifts(model, example.prompt, adapter)
    return Attribution(*((shift @ direction).cpu() for shift in shifts))


def logit_attribution(
    model: Video2LoRA,
    examples: Sequence[EvalExample],
    adapters: Sequence[Adapter],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Where adapters turn the residual stream towards the answer.

    Returns:
        "examples", and "rows": for each "layer" the intervals of "whole", "attention" and "mlp".
    """
    attributions = []
    for done, (example, adapter) in enumerate(zip(examples, adapters, strict=True)):
        progress("attributing logits", done, len(examples))
        attributions.append(attribute(model, example, adapter))
    progress("attributing logits", len(examples), len(examples))
    parts = ("whole", "attention", "mlp")
    columns = {part: torch.stack([getattr(a, part) for a in attributions]) for part in parts}
    rows = [
        {
            "layer": layer,
            **{p: interval(columns[p][:, layer].tolist(), examples, None) for p in parts},
        }
        for layer in range(adapters[0].num_layers)
    ]
    return {"examples": len(examples), "rows": rows}
