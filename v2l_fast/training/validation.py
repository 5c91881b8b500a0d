"""Validation during training: the loss on videos kept apart, and generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from v2l_fast.data.readers import Failure, Sample, Source
from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.pipeline import visual_features
from v2l_fast.training.config import TrainConfig
from v2l_fast.training.loader import Key, Quarantine, read_batches
from v2l_fast.training.logging import Sums, added, means
from v2l_fast.training.step import TrainStep

MAX_NEW_TOKENS = 96


class Validation:
    """Passes over one source, with the same videos and questions every time.

    Args:
        source: the videos, of which the first `data.val_videos` are used.
        config: of the run.
        quarantine: list of the source's broken videos.
        rank, processes: this process takes every `processes`-th video.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        quarantine: Quarantine,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.source, self.config, self.quarantine = source, config, quarantine
        count = min(len(source), config.data.val_videos)
        self.indices = range(rank, count, processes)

    @torch.no_grad()
    def loss(self, step: TrainStep, gather: Callable[[Sums], list[Sums]]) -> dict[str, float]:
        """Means over examples: `val_loss`, `val_TYPE` of each task type, and `val_ce`.

        The latter is the cross-entropy with every answer weighted equally; the best network is the
        one with the lowest.
        """
        sums: Sums = {}
        for samples in self._batches():
            if samples:
                result = step(samples, example_total=1)
                examples = sum(len(sample.qa_pairs) for sample in samples)
                parts = {name: pair.tolist() for name, pair in result.parts.items()}
                parts["loss"] = [result.loss.item(), float(examples)]
                sums = added([sums, parts])
        merged = added(gather(sums))
        values = means(merged)
        answers = [pair for name, pair in merged.items() if name not in ("loss", "kl")]
        if count := sum(number for _, number in answers):
            values["ce"] = sum(total for total, _ in answers) / count
        return {f"val_{name}": value for name, value in values.items()}

    @torch.no_grad()
    def answers(self, step: TrainStep, count: int) -> list[dict[str, Any]]:
        """Greedy answers to one question of each of the first `count` videos."""
        samples: list[Sample] = []
        for index in self.indices[:count]:
            sample = self.source.load(index, 0)
            if not isinstance(sample, Failure):
                samples.append(sample)
        if not samples:
            return []
        backbone = step.backbone
        contexts = [chunk for sample in samples for chunk in sample.chunks]
        adapters = step.adapters(samples, visual_features(backbone, contexts))
        # A different question of each video, so that every task type appears.
        pairs = [s.qa_pairs[i % len(s.qa_pairs)] for i, s in enumerate(samples)]
        prompts = [
            partial(backbone.prompt, sample.prompt_prefix + question)
            for sample, (question, _) in zip(samples, pairs, strict=True)
        ]
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
        answers = answer_prompts(backbone, prompts, list(adapters), params)
        return [
            {
                "video": sample.video,
                "question": " ".join(backbone.decode(sample.prompt_prefix + question).split()),
                "answer": answer.text,
                "reference": backbone.decode(reference),
            }
            for sample, (question, reference), answer in zip(samples, pairs, answers, strict=True)
        ]

    def _batches(self) -> Iterator[Sequence[Sample]]:
        size = self.config.optim.micro_batch_size
        keys: list[list[Key]] = [
            [(0, index) for index in self.indices[start : start + size]]
            for start in range(0, len(self.indices), size)
        ]
        return read_batches(self.source, keys, self.config.data, self.quarantine)
