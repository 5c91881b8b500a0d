"""Evaluation of the pair with real words: captions, questions by kind, and ordinary text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.words.base import RECORDING
from bench.words.settings import Settings
from v2l_fast.evaluation.ablations import log_probabilities
from v2l_fast.evaluation.answers import NONE, SYSTEM
from v2l_fast.evaluation.statistics import mean_interval, ratio_interval
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import attribute_share
from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    ask_several,
    attributes,
    caption,
    parse_caption,
)
from v2l_fast.shapes.probes import ConditionAnswers, Probe, question_rows, recorded_clips
from v2l_fast.shapes.world import (
    Scene,
    sample_scenes,
)

# --- evaluation -----------------------------------------------------------------------------------

# Ordinary questions with answers that SmolLM2 is likely to give.
ORDINARY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey, a sweet food made from the nectar of flowers."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Which planet is the largest?", "Jupiter is the largest planet in our solar system."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is two plus two?", "Two plus two is four."),
    ("What season comes after winter?", "Spring comes after winter."),
    ("Where do fish live?", "Fish live in water, in rivers, lakes and oceans."),
    ("What is the sun?", "The sun is a star at the center of our solar system."),
    ("Why do people sleep?", "People sleep so that the body and the brain can rest."),
)
ORDINARY_ADAPTERS = 16


def evaluate(model: Video2LoRA, settings: Settings) -> dict[str, Any]:
    """Captions, questions by kind, and ordinary text, on videos of the test split."""
    scenes = sample_scenes("test", settings.test_videos, settings.seed)
    answering = ConditionAnswers(model, recorded_clips(scenes, [RECORDING] * len(scenes)))
    rng = random.Random(f"real words/{settings.seed}")
    probes = [
        Probe(pair.kind, index, pair.question, pair.answer)
        for index, scene in enumerate(scenes)
        for pair in ask_several(scene, settings.test_questions, rng)
    ]
    captions = answering([(i, CAPTION_PROMPTS[0]) for i in range(len(scenes))])
    return {
        "videos": len(scenes),
        "captions": caption_scores(captions, scenes),
        "samples": [
            {"reference": caption(scene)} | {name: texts[i] for name, texts in captions.items()}
            for i, scene in enumerate(scenes[:6])
        ],
        # Without "kept", which is not a number where the base is at chance.
        "questions": [
            {name: value for name, value in row.items() if name != "kept"}
            for row in question_rows(answering, probes)
        ],
        "ordinary_text": ordinary_text(model, answering.adapters[SYSTEM]),
    }


def caption_scores(
    captions: Mapping[str, Sequence[str]], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """Condition -> interval of the share of right attributes: of all, and by attribute."""
    rows: dict[str, Any] = {
        "all": {n: asdict(attribute_share(t, scenes)) for n, t in captions.items()}
    }
    for name in ("background", "count", "size", "color", "shape", "motion"):
        rows[name] = {}
        for condition, texts in captions.items():
            pairs = [_slots(text, scene, name) for text, scene in zip(texts, scenes, strict=True)]
            rows[name][condition] = asdict(ratio_interval(*zip(*pairs, strict=True)))
    return dict(sorted(rows.items(), key=lambda row: row[1][SYSTEM]["estimate"]))


def _slots(text: str, scene: Scene, name: str) -> tuple[int, int]:
    """(number right, number of all) of a caption's attributes of one name."""
    stated = parse_caption(text)
    expected = {k: v for k, v in attributes(scene).items() if k.rstrip("01") == name}
    return sum(stated.get(slot) == value for slot, value in expected.items()), len(expected)


def ordinary_text(model: Video2LoRA, adapters: Sequence[Adapter | None]) -> dict[str, Any]:
    """Log-probability (nats per token) of ordinary answers without an adapter and, if there are
    any, with videos' adapters, and what the model says to the questions."""
    chosen = [None, *adapters[:ORDINARY_ADAPTERS]]
    scores = torch.cat([log_probabilities(model, q, [a], chosen) for q, a in ORDINARY], 1)
    questions = [question for question, _ in ORDINARY]
    record: dict[str, Any] = {"questions": len(ORDINARY), "adapters": len(chosen) - 1}
    texts: dict[str, list[str]] = {}
    for name, rows in ((NONE, scores[:1]), (SYSTEM, scores[1:])):
        if len(rows):
            adapter = chosen[0 if name == NONE else 1]
            answers = model.answer(questions, [adapter] * len(questions), max_new_tokens=24)
            texts[name] = [answer.text for answer in answers]
            record[name] = asdict(mean_interval(rows.mean(0).tolist(), bounds=None))
    record["answers"] = [
        {"question": question} | {name: answers[i] for name, answers in texts.items()}
        for i, question in enumerate(questions)
    ]
    return record
