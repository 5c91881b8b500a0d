"""Simulated viewers: a question that names no object, about a video of two.

A viewer means the first or the second object and does not say which. Guessing answers from the
adapter as it is; CPER notices that sampled answers differ, asks which object is meant, and later
questions need no question. No language model takes part: the reasoner reads the schema's words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from v2l_fast.conversation.cper import cper_turn
from v2l_fast.conversation.models import NgramEncoder, VideoModel
from v2l_fast.conversation.persona import Persona, Statement
from v2l_fast.conversation.policy import CperSettings
from v2l_fast.conversation.prompts import LexiconModel
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.state import Models, State
from v2l_fast.evaluation.statistics import auroc, mean_interval, paired_difference
from v2l_fast.hypernet import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import rendered_clips
from v2l_fast.shapes.language import plain
from v2l_fast.shapes.world import Scene, SceneObject

# The sampled answers to the first question show that it names no object.
QUESTIONS = (
    ("color", "What color is the object?"),
    ("motion", "How does the object move?"),
    ("shape", "What shape is the object?"),
    ("size", "What size is the object?"),
)
FOCUS = ("first", "second")
Arm = Literal["guess", "ask", "persona", "other video"]
ARMS: tuple[Arm, ...] = ("guess", "ask", "persona", "other video")


@dataclass(frozen=True)
class Viewing:
    """One conversation about one video.

    Attributes:
        correct: for each question, whether its final answer is right for the object that is meant.
        questions: how many questions the system asked.
        uncertainty: of the sampled answers to each question as it was put.
        unsure: how many replies say that they are not sure about the video.
    """

    correct: tuple[bool, ...]
    questions: int
    uncertainty: tuple[float, ...]
    unsure: int


def ambiguous_scenes(scenes: Sequence[Scene]) -> list[Scene]:
    """Scenes of two objects whose colors, motions, shapes or sizes differ; colors always do."""
    return [s for s in scenes if len(s.objects) == 2 and s.objects[0].color != s.objects[1].color]


def view(model: Video2LoRA, adapter: Adapter, scene: Scene, focus: int, arm: Arm) -> Viewing:
    """A viewer who means object ``focus`` asks :data:`QUESTIONS`.

    Args:
        arm: "guess" asks nothing; "ask" asks at most once; "persona" asks nothing and knows the
            viewer from an earlier conversation; "other video" is "ask" with the adapter of another
            video, which the caller passes.
    """
    schema = Schema.load("shapes")
    settings = CperSettings(max_questions=1 if arm in ("ask", "other video") else 0)
    models = Models(LexiconModel(), NgramEncoder(), VideoModel(model, adapter))
    state = State()
    if arm == "persona":
        statement = Statement(f"means the {FOCUS[focus]} object", "focus", FOCUS[focus])
        state = State(persona=Persona().update([(statement, 1.0)], 0, None, schema, 0.0)[0])
    correct, uncertainty, questions, unsure = [], [], 0, 0
    for attribute, question in QUESTIONS:
        state, reply = cper_turn(state, question, models, settings, schema)
        uncertainty.append(reply.gap.video or 0.0)
        if reply.action == "ask":
            questions += 1
            answer = f"The {FOCUS[focus]} one."
            state, reply = cper_turn(state, answer, models, settings, schema)
        # A reply says when it is not sure; the answer within it is what counts here.
        assert reply.video is not None
        unsure += reply.video.unsure
        correct.append(plain(reply.video.text) == _expected(scene.objects[focus], attribute))
    return Viewing(tuple(correct), questions, tuple(uncertainty), unsure)


def evaluate_viewers(model: Video2LoRA, scenes: Sequence[Scene], seed: int = 0) -> dict[str, Any]:
    """All arms on the ambiguous scenes; the uncertainty on scenes of one object as a control.

    Returns:
        A JSON-ready record: exact match with 95% intervals by arm, of the first question and of the
        later ones, questions asked, the differences to guessing, and for each question the AUROC of
        its uncertainty for scenes of two objects against scenes of one.
    """
    rng = random.Random(f"viewers/{seed}")
    two = ambiguous_scenes(scenes)
    one = [scene for scene in scenes if len(scene.objects) == 1]
    adapters = model.internalize(rendered_clips(two))
    rotated = adapters[1:] + adapters[:1]
    focus = [rng.randrange(2) for _ in two]
    viewings: dict[Arm, list[Viewing]] = {}
    for arm in ARMS:
        arm_adapters = rotated if arm == "other video" else adapters
        viewings[arm] = [
            view(model, adapter, scene, which, arm)
            for adapter, scene, which in zip(arm_adapters, two, focus, strict=True)
        ]
    single = [
        view(model, adapter, scene, 0, "guess")
        for adapter, scene in zip(model.internalize(rendered_clips(one)), one, strict=True)
    ]
    first = {arm: [float(v.correct[0]) for v in viewings[arm]] for arm in ARMS}
    later = {arm: [float(np.mean(v.correct[1:])) for v in viewings[arm]] for arm in ARMS}
    return {
        "videos": len(two),
        "arms": {
            arm: {
                "first question": asdict(mean_interval(first[arm])),
                "later questions": asdict(mean_interval(later[arm])),
                "questions asked": float(np.mean([v.questions for v in viewings[arm]])),
                "replies that are not sure": float(
                    np.mean([v.unsure / len(QUESTIONS) for v in viewings[arm]])
                ),
            }
            for arm in ARMS
        },
        **{
            f"{arm} minus guess": {
                "first question": asdict(paired_difference(first[arm], first["guess"])),
                "later questions": asdict(paired_difference(later[arm], later["guess"])),
            }
            for arm in ("ask", "persona")
        },
        "auroc of the uncertainty": {
            attribute: auroc(
                [viewing.uncertainty[index] for viewing in viewings["guess"]],
                [viewing.uncertainty[index] for viewing in single],
            )
            for index, (attribute, _) in enumerate(QUESTIONS)
        },
        "one-object videos": len(one),
    }


def _expected(item: SceneObject, attribute: str) -> str:
    return plain(getattr(item, attribute))
