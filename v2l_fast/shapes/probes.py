"""Weaknesses that the averages of the shapes world hide, each probed separately.

Responsible for clips of other durations than 8 seconds, questions that refer to one of two objects
by its shape, questions of kinds and wordings that no hypernetwork was trained on, and questions
about absent objects. The averages are `evaluate`'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from v2l_fast.evaluation.answers import BASELINE, NONE, OTHER, SYSTEM
from v2l_fast.evaluation.statistics import ratio_interval
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import MAX_NEW_TOKENS, rendered_clips
from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    ask,
    attribute_hits,
    parse_caption,
    plain,
    question_kinds,
)
from v2l_fast.shapes.render import CLIP_FPS, FRAME_TIMES, render
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.shapes.world import COLORS, MOTIONS, SHAPES, SIZES, Scene
from v2l_fast.video import Clip, sample_indices
from v2l_fast.work_units import Progress

# Durations of the probed clips; every training clip lasts 8 s.
SECONDS = (2, 4, 6, 8, 10, 12, 16, 32, 64)
# Durations stamped on the eight frames of an 8 s clip; None draws one of RANDOM_SECONDS per clip.
RESTAMPED: tuple[int | None, ...] = (4, 8, 9, 10, 12, 16, 40, None)
RANDOM_SECONDS = (1, 104)
# Kinds of questions at other durations; binding has its own table.
DURATION_KINDS = ("background", "count", "color", "shape", "size", "motion", "order")
DENIALS = frozenset("no not none nothing zero neither isn absent missing".split())
_BATCH = 128

ClipQuestion = tuple[int, str]


@dataclass(frozen=True)
class Probe:
    """A question about clip number `clip` with its correct answer ("": the object is absent, and a
    correct answer denies it)."""

    kind: str
    clip: int
    question: str
    answer: str


def probe(
    model: Video2LoRA,
    scenes: Sequence[Scene],
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Run every probe on the same scenes with greedy answers.

    Returns:
        "videos"; "durations" and "restamped" (see :func:`duration_row`); "binding",
        "binding_captions", "untrained" and "absent" (see :func:`question_rows`). Rows are sorted by
        the adapter's score, the worst first.
    """
    record: dict[str, Any] = {"videos": len(scenes)}
    stages = len(SECONDS) + len(RESTAMPED) + 1
    record["durations"] = []
    for done, seconds in enumerate(SECONDS):
        progress(f"clips of {seconds} s", done, stages)
        record["durations"].append(
            {"seconds": str(seconds)}
            | duration_row(model, scenes, sampled_clips(scenes, seconds), seed)
        )
    record["restamped"] = []
    rng = random.Random(f"restamped/{seed}")
    clips = rendered_clips(scenes)
    for done, seconds in enumerate(RESTAMPED, start=len(SECONDS)):
        name = "{} to {}, random".format(*RANDOM_SECONDS) if seconds is None else str(seconds)
        progress(f"time stamps of {name} s", done, stages)
        durations = [rng.uniform(*RANDOM_SECONDS) if seconds is None else seconds for _ in clips]
        stamped = [restamped(clip, d) for clip, d in zip(clips, durations, strict=True)]
        record["restamped"].append({"seconds": name} | duration_row(model, scenes, stamped, None))
    for rows in (record["durations"], record["restamped"]):
        rows.sort(key=lambda row: row["captions"][SYSTEM]["estimate"])
    progress("questions", stages - 1, stages)
    answering = ConditionAnswers(model, clips)
    record["binding"] = question_rows(answering, binding_probes(scenes))
    record["binding_captions"] = _binding_captions(answering, scenes)
    record["untrained"] = question_rows(answering, untrained_probes(scenes, seed))
    record["absent"] = question_rows(answering, absent_probes(scenes, seed))
    progress("questions", stages, stages)
    return record


# --- clips ----------------------------------------------------------------------------------------


def sampled_clips(scenes: Sequence[Scene], seconds: int) -> list[Clip]:
    """The scenes at another pace, sampled as from files of ``seconds`` s with 4 frames/s."""
    count = seconds * CLIP_FPS
    indices = sample_indices(count, CLIP_FPS, seconds, len(FRAME_TIMES))
    frames = render(scenes, IMAGE_SIZE, [index / count for index in indices])
    stamps = tuple(float(index) / CLIP_FPS for index in indices)
    return [
        replace(
            Clip.from_frames(video, CLIP_FPS),
            indices=indices,
            timestamps=stamps,
            presentation_times=stamps,
            duration=float(seconds),
            num_frames=count,
        )
        for video in frames
    ]


def restamped(clip: Clip, seconds: float) -> Clip:
    """The same frames with the time stamps of a clip of ``seconds``; only the prompt changes."""
    pace = seconds / clip.duration
    stamps = tuple(stamp * pace for stamp in clip.timestamps)
    return replace(
        clip, timestamps=stamps, presentation_times=stamps, duration=seconds, fps=clip.fps / pace
    )


# --- answers --------------------------------------------------------------------------------------


class ConditionAnswers:
    """Greedy answers about clips with the clip in context, with its adapter, with another clip's
    adapter, and with neither.

    Args:
        conditions: the conditions to run.
    """

    def __init__(
        self,
        model: Video2LoRA,
        clips: Sequence[Clip],
        conditions: Sequence[str] = (BASELINE, SYSTEM, OTHER, NONE),
    ) -> None:
        self.model, self.clips, self.conditions = model, clips, conditions
        self.adapters = model.internalize(list(clips))

    def __call__(self, questions: Sequence[ClipQuestion]) -> dict[str, list[str]]:
        """Condition -> one answer per (clip number, question)."""
        texts: dict[str, list[str]] = {name: [] for name in self.conditions}
        for start in range(0, len(questions), _BATCH):
            part = questions[start : start + _BATCH]
            prompts = [text for _, text in part]
            for name, answers in texts.items():
                if name == BASELINE:
                    clips = [self.clips[clip] for clip, _ in part]
                    batch = self.model.answer_direct(prompts, clips, max_new_tokens=MAX_NEW_TOKENS)
                else:
                    adapters = [self._adapter(name, clip) for clip, _ in part]
                    batch = self.model.answer(prompts, adapters, max_new_tokens=MAX_NEW_TOKENS)
                answers += [answer.text for answer in batch]
        return texts

    def _adapter(self, condition: str, clip: int) -> Adapter | None:
        if condition == NONE:
            return None
        return self.adapters[(clip + (condition == OTHER)) % len(self.adapters)]


# --- durations ------------------------------------------------------------------------------------


def duration_row(
    model: Video2LoRA, scenes: Sequence[Scene], clips: Sequence[Clip], seed: int | None
) -> dict[str, Any]:
    """Scores of clips that show the scenes.

    Args:
        seed: selects two questions per clip, of :data:`DURATION_KINDS`; None asks no questions.

    Returns:
        "frames" (per clip); "captions" (share of correct attributes) and, with a seed, "questions"
        (exact match): condition -> interval over videos, with "difference", adapter - direct.
    """
    answering = ConditionAnswers(model, clips, (BASELINE, SYSTEM, OTHER))
    texts = answering([(i, CAPTION_PROMPTS[0]) for i in range(len(clips))])
    hits: dict[str, list[tuple[float, float]]] = {
        name: [attribute_hits(text, scene) for text, scene in zip(answers, scenes, strict=True)]
        for name, answers in texts.items()
    }
    row: dict[str, Any] = {"frames": len(clips[0].frames), "captions": _intervals(hits)}
    if seed is not None:
        probes = list(_duration_probes(scenes, seed))
        texts = answering([(p.clip, p.question) for p in probes])
        row["questions"] = _intervals(
            {name: _by_clip(probes, _scores(probes, answers)) for name, answers in texts.items()}
        )
    return row


def _duration_probes(scenes: Sequence[Scene], seed: int) -> Iterator[Probe]:
    for index, scene in enumerate(scenes):
        rng = random.Random(f"durations/{seed}/{index}")
        kinds = [kind for kind in question_kinds(scene) if kind in DURATION_KINDS]
        for kind in rng.sample(kinds, 2):
            pair = ask(scene, kind, rng)
            yield Probe(kind, index, pair.question, pair.answer)


# --- questions ------------------------------------------------------------------------------------


def binding_probes(scenes: Sequence[Scene]) -> Iterator[Probe]:
    """Questions that refer to both objects of a scene by shape, if they differ in shape and in the
    answer: an answer that ignores the shape is correct half the time."""
    for index, scene in enumerate(scenes):
        if len(scene.objects) == 2 and len({item.shape for item in scene.objects}) == 2:
            for kind in ("color", "size", "motion"):
                values = [getattr(item, kind) for item in scene.objects]
                for item, value in zip(scene.objects, values, strict=True):
                    if len(set(values)) == 2:
                        yield Probe(kind, index, _about(kind, item.shape), value)


def untrained_probes(scenes: Sequence[Scene], seed: int) -> Iterator[Probe]:
    """Questions in known words that no hypernetwork was trained on. The VLM was trained on where
    objects start and end, but not on the other wordings."""
    for index, scene in enumerate(scenes):
        rng = random.Random(f"untrained/{seed}/{index}")
        for kind in ("start", "end"):
            pair = ask(scene, kind, rng)
            yield Probe(f"where an object {kind}s", index, pair.question, pair.answer)
        number = rng.randrange(len(scene.objects))
        item = scene.objects[number]
        name = "object" if len(scene.objects) == 1 else f"{('first', 'second')[number]} object"
        for kind in ("color", "size", "shape"):
            question = f"What is the {kind} of the {name}?"
            yield Probe(f'"the {kind} of"', index, question, getattr(item, kind))
        question = "What is the color of the background?"
        yield Probe('"the color of the background"', index, question, scene.background)
        shapes = [one.shape for one in scene.objects]
        if len(set(shapes)) == 2:
            one, other = rng.sample(shapes, 2)
            question = f"Which comes second, the {one} or the {other}?"
            yield Probe("which comes second", index, question, shapes[1])


def absent_probes(scenes: Sequence[Scene], seed: int) -> Iterator[Probe]:
    """Questions about a shape that is not in the scene, and about the second object of one."""
    for index, scene in enumerate(scenes):
        rng = random.Random(f"absent/{seed}/{index}")
        shapes = {item.shape for item in scene.objects}
        shape = rng.choice([name for name in SHAPES if name not in shapes])
        for kind in ("color", "size", "motion"):
            yield Probe(f"{kind} of an absent shape", index, _about(kind, shape), "")
        if len(scene.objects) == 1:
            question = "What color is the second object?"
            yield Probe("color of the second object of one", index, question, "")


def question_rows(answering: ConditionAnswers, probes: Iterable[Probe]) -> list[dict[str, Any]]:
    """One row per kind of question.

    Returns:
        "kind", "questions", "videos", "example" and "score": condition -> interval over videos of
        the share of correct answers (for an absent object: of denials), with "difference", adapter
        - direct. For absent objects also "attribute": condition -> share of answers that name a
        color, size or motion.
    """
    probes = list(probes)
    texts = answering([(p.clip, p.question) for p in probes])
    rows = []
    for kind in dict.fromkeys(p.kind for p in probes):
        chosen = [i for i, p in enumerate(probes) if p.kind == kind]
        members = [probes[i] for i in chosen]
        by_condition = {name: [answers[i] for i in chosen] for name, answers in texts.items()}
        scored = {
            name: _by_clip(members, _scores(members, answers))
            for name, answers in by_condition.items()
        }
        row: dict[str, Any] = {
            "kind": kind,
            "questions": len(members),
            "videos": len({p.clip for p in members}),
            "example": members[0].question,
            "score": _intervals(scored),
        }
        if not members[0].answer:
            row["attribute"] = {
                name: sum(map(_names_attribute, answers)) / len(answers)
                for name, answers in by_condition.items()
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row["score"][SYSTEM]["estimate"])


def _binding_captions(answering: ConditionAnswers, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """The binding questions, answered from each condition's own caption of the clip."""
    texts = answering([(i, CAPTION_PROMPTS[0]) for i in range(len(scenes))])
    stated = {name: [parse_caption(text) for text in answers] for name, answers in texts.items()}
    probes = list(binding_probes(scenes))
    rows = []
    for kind in dict.fromkeys(p.kind for p in probes):
        members = [p for p in probes if p.kind == kind]
        scored = {
            name: _by_clip(members, [float(_caption_answers(slots[p.clip], p)) for p in members])
            for name, slots in stated.items()
        }
        videos = len({p.clip for p in members})
        rows.append(
            {"kind": kind, "questions": len(members), "videos": videos, "score": _intervals(scored)}
        )
    return sorted(rows, key=lambda row: row["score"][SYSTEM]["estimate"])


def _caption_answers(stated: Mapping[str, str], probe: Probe) -> bool:
    """Whether a caption's attributes give the correct answer about the object of that shape."""
    for number in range(2):
        if stated.get(f"shape{number}", "?") in plain(probe.question).split():
            return stated.get(f"{probe.kind}{number}") == probe.answer
    return False


def _about(kind: str, shape: str) -> str:
    return f"How does the {shape} move?" if kind == "motion" else f"What {kind} is the {shape}?"


def _scores(probes: Sequence[Probe], answers: Sequence[str]) -> list[float]:
    return [
        float(plain(text) == plain(p.answer) if p.answer else denies(text))
        for p, text in zip(probes, answers, strict=True)
    ]


def denies(text: str) -> bool:
    """Whether an answer denies that the object exists, in any words."""
    return not DENIALS.isdisjoint(plain(text).split())


def _names_attribute(text: str) -> bool:
    return not {*COLORS, *SIZES, *MOTIONS}.isdisjoint(plain(text).split())


def _by_clip(probes: Sequence[Probe], scores: Sequence[float]) -> list[tuple[float, float]]:
    """(sum of scores, number of questions) for each clip."""
    sums: dict[int, list[float]] = {}
    for p, score in zip(probes, scores, strict=True):
        sums.setdefault(p.clip, []).append(score)
    return [(sum(values), float(len(values))) for values in sums.values()]


def _intervals(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Condition -> interval of sum / count over videos, and "difference", adapter - direct."""
    intervals = {name: ratio_interval(*zip(*rows, strict=True)) for name, rows in pairs.items()}
    changes = [(a - d, n) for (a, n), (d, _) in zip(pairs[SYSTEM], pairs[BASELINE], strict=True)]
    intervals["difference"] = ratio_interval(*zip(*changes, strict=True), bounds=(-1.0, 1.0))
    return {name: asdict(interval) for name, interval in intervals.items()}
