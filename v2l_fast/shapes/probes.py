"""Weaknesses that the averages of the shapes world hide, each probed separately.

Responsible for clips of other durations than 8 seconds, kinds of questions about clips of random
duration, questions that refer to one of two objects by its shape, questions of kinds and wordings
that no hypernetwork was trained on, questions about absent objects, and for how well an adapter
identifies its video. The averages are `evaluate`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from v2l_fast.evaluation.ablations import log_probabilities
from v2l_fast.evaluation.answers import BASELINE, BLANK, NONE, OTHER, SYSTEM, blank
from v2l_fast.evaluation.statistics import mean_interval, ratio_interval, recovery
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.evaluate import MAX_NEW_TOKENS, rendered_clips
from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    DETAIL_PROMPTS,
    QAPair,
    ask,
    ask_absent,
    ask_bound,
    ask_last,
    ask_reworded,
    attribute_hits,
    caption,
    parse_caption,
    plain,
    question_kinds,
    statement_hits,
)
from v2l_fast.shapes.looks import (
    HELD_OUT_PHOTOS,
    HELD_OUT_STYLE,
    PHOTOS,
    PLAIN,
    STYLES,
    TEXTURES,
    Look,
    sample_post,
)
from v2l_fast.shapes.render import CLIP_FPS, render
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.shapes.world import (
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    Recording,
    Scene,
    has_held_out_pair,
    has_held_out_place,
    sample_recordings,
    sample_varied_scenes,
)
from v2l_fast.video import Clip
from v2l_fast.work_units import Progress

# Durations (s) of the probed clips.
SECONDS = (2, 4, 6, 8, 10, 12, 16, 32, 64)
# Durations stamped on the eight frames of an 8 s clip; None draws one of RANDOM_SECONDS per clip.
RESTAMPED: tuple[int | None, ...] = (4, 8, 9, 10, 12, 16, 40, None)
RANDOM_SECONDS = (1, 104)
# Kinds of questions at other durations; binding has its own table.
DURATION_KINDS = ("background", "count", "color", "shape", "size", "motion", "order")
# The network that was trained on the frozen model's captions alone.
CAPTIONS_ONLY = "adapter, trained on captions only"
# Videos of each group of looks, and the most tokens of a detailed description.
LOOK_VIDEOS, DESCRIPTION_TOKENS = 320, 64
# Captions whose adapter is looked for among those of all videos.
RETRIEVED = 128
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
    captions_only: Video2LoRA | None = None,
) -> dict[str, Any]:
    """Run every probe on the same scenes with greedy answers.

    Args:
        captions_only: a second network for the same base, evaluated alongside the first.

    Returns:
        "videos"; "durations" and "restamped" (see :func:`duration_row`); "kinds", "binding",
        "binding_captions", "further" and "absent" (see :func:`question_rows`), of which "kinds"
        is about clips of random duration and frame rate; "looks" (see :func:`look_rows`);
        "descriptions" (see :func:`description_scores`); "retrieval" (see :func:`retrieval`). Rows
        are sorted by the adapter's score, the worst first.
    """
    record: dict[str, Any] = {"videos": len(scenes)}
    stages = len(SECONDS) + len(RESTAMPED) + 4
    record["durations"] = []
    for done, seconds in enumerate(SECONDS):
        progress(f"clips of {seconds} s", done, stages)
        record["durations"].append(
            {"seconds": str(seconds)}
            | duration_row(model, scenes, sampled_clips(scenes, seconds), seed, captions_only)
        )
    record["restamped"] = []
    rng = random.Random(f"restamped/{seed}")
    clips = rendered_clips(scenes)
    for done, stamped_seconds in enumerate(RESTAMPED, start=len(SECONDS)):
        name = (
            "{} to {}, random".format(*RANDOM_SECONDS)
            if stamped_seconds is None
            else str(stamped_seconds)
        )
        progress(f"time stamps of {name} s", done, stages)
        durations = [
            rng.uniform(*RANDOM_SECONDS) if stamped_seconds is None else stamped_seconds
            for _ in clips
        ]
        stamped = [restamped(clip, d) for clip, d in zip(clips, durations, strict=True)]
        record["restamped"].append({"seconds": name} | duration_row(model, scenes, stamped, None))
    for rows in (record["durations"], record["restamped"]):
        rows.sort(key=lambda row: row["captions"][SYSTEM]["estimate"])
    progress("questions about clips of random duration", stages - 4, stages)
    recordings = sample_recordings("test", len(scenes), seed)
    anywhere = ConditionAnswers(
        model, recorded_clips(scenes, recordings), captions_only=captions_only
    )
    record["kinds"] = question_rows(anywhere, kind_probes(scenes, seed))
    progress("retrieval", stages - 3, stages)
    record["retrieval"] = {
        name: retrieval(network, scenes, anywhere.adapters[name])
        for name, network in ((SYSTEM, model), (CAPTIONS_ONLY, captions_only))
        if network is not None
    }
    progress("questions", stages - 2, stages)
    answering = ConditionAnswers(model, clips, captions_only=captions_only)
    record["binding"] = question_rows(answering, binding_probes(scenes))
    record["binding_captions"] = _binding_captions(answering, scenes)
    record["further"] = question_rows(answering, further_probes(scenes, seed))
    record["absent"] = question_rows(answering, absent_probes(scenes, seed))
    record["descriptions"] = description_scores(answering, scenes)
    progress("three objects and other looks", stages - 1, stages)
    record["looks"] = look_rows(model, min(len(scenes), LOOK_VIDEOS), seed, captions_only)
    progress("questions", stages, stages)
    return record


def retrieval(
    model: Video2LoRA, scenes: Sequence[Scene], adapters: Sequence[Adapter | None]
) -> dict[str, Any]:
    """Whether the caption of a scene is most likely under the adapter of its own video.

    Returns:
        "adapters", "captions" (the first :data:`RETRIEVED`) and "first": interval of the share of
        captions for which no other video's adapter is more likely. A video with the same caption
        counts as its own.
    """
    texts = [caption(scene) for scene in scenes]
    hits = []
    for number, text in enumerate(texts[:RETRIEVED]):
        scores = log_probabilities(model, CAPTION_PROMPTS[0], [text], adapters)[:, 0]
        best = int(scores.argmax())
        hits.append(float(best == number or texts[best] == text))
    return {
        "adapters": len(adapters),
        "captions": len(hits),
        "first": asdict(mean_interval(hits)),
    }


# --- clips ----------------------------------------------------------------------------------------


def sampled_clips(scenes: Sequence[Scene], seconds: int) -> list[Clip]:
    """The scenes at another pace, sampled as from files of ``seconds`` s with 4 frames/s."""
    return recorded_clips(scenes, [Recording(float(seconds), CLIP_FPS)] * len(scenes))


def recorded_clips(scenes: Sequence[Scene], recordings: Sequence[Recording]) -> list[Clip]:
    """Each scene as sampled from the file that its recording describes, without a codec."""
    clips = []
    for scene, recording in zip(scenes, recordings, strict=True):
        (frames,) = render([scene], IMAGE_SIZE, recording.times)
        clips.append(
            replace(
                Clip.from_frames(frames, recording.fps),
                indices=np.array(recording.indices),
                timestamps=recording.timestamps,
                presentation_times=recording.timestamps,
                duration=recording.duration,
                num_frames=recording.num_frames,
            )
        )
    return clips


def restamped(clip: Clip, seconds: float) -> Clip:
    """The same frames with the time stamps of a clip of ``seconds``; only the prompt changes."""
    pace = seconds / clip.duration
    stamps = tuple(stamp * pace for stamp in clip.timestamps)
    return replace(
        clip, timestamps=stamps, presentation_times=stamps, duration=seconds, fps=clip.fps / pace
    )


# --- answers --------------------------------------------------------------------------------------


class ConditionAnswers:
    """Greedy answers about clips with the clip in context, with its adapter, with that of a second
    network, with the adapter of another clip or of a black one, and with none.

    Args:
        captions_only: the second network, for the same base.
    """

    def __init__(
        self,
        model: Video2LoRA,
        clips: Sequence[Clip],
        captions_only: Video2LoRA | None = None,
    ) -> None:
        self.model, self.clips = model, clips
        own = model.internalize(list(clips))
        self.adapters: dict[str, Sequence[Adapter | None]] = {SYSTEM: own}
        self._models = {SYSTEM: model}
        if captions_only is not None:
            self.adapters[CAPTIONS_ONLY] = captions_only.internalize(list(clips))
            self._models[CAPTIONS_ONLY] = captions_only
        self.adapters[OTHER] = [*own[1:], own[0]]
        self.adapters[BLANK] = model.internalize([blank(clip) for clip in clips])
        self.adapters[NONE] = [None] * len(clips)

    def __call__(
        self, questions: Sequence[ClipQuestion], max_new_tokens: int = MAX_NEW_TOKENS
    ) -> dict[str, list[str]]:
        """Condition -> one answer per (clip number, question)."""
        texts: dict[str, list[str]] = {name: [] for name in (BASELINE, *self.adapters)}
        for start in range(0, len(questions), _BATCH):
            part = questions[start : start + _BATCH]
            prompts = [text for _, text in part]
            for name, answers in texts.items():
                if name == BASELINE:
                    clips = [self.clips[clip] for clip, _ in part]
                    batch = self.model.answer_direct(prompts, clips, max_new_tokens=max_new_tokens)
                else:
                    adapters = [self.adapters[name][clip] for clip, _ in part]
                    model = self._models.get(name, self.model)
                    batch = model.answer(prompts, adapters, max_new_tokens=max_new_tokens)
                answers += [answer.text for answer in batch]
        return texts


# --- durations ------------------------------------------------------------------------------------


def duration_row(
    model: Video2LoRA,
    scenes: Sequence[Scene],
    clips: Sequence[Clip],
    seed: int | None,
    captions_only: Video2LoRA | None = None,
) -> dict[str, Any]:
    """Scores of clips that show the scenes.

    Args:
        seed: selects two questions per clip, of :data:`DURATION_KINDS`; None asks no questions.

    Returns:
        "frames" (per clip); "captions" (share of correct attributes) and, with a seed, "questions"
        (exact match): condition -> interval over videos, with "difference", adapter - direct.
    """
    answering = ConditionAnswers(model, clips, captions_only)
    texts = answering([(i, CAPTION_PROMPTS[0]) for i in range(len(clips))])
    hits = {
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


# --- looks ----------------------------------------------------------------------------------------


def look_groups(count: int, seed: int) -> dict[str, list[Scene]]:
    """Test scenes by what they have that those of the first stage do not; "held out" is what no
    stage of training has, "held out of captions only" what the network for captions never saw."""

    def group(
        look: Callable[[random.Random], Look],
        objects: tuple[int, ...] = (1, 2, 2),
        keep: Callable[[Scene], bool] = lambda scene: True,
    ) -> list[Scene]:
        return sample_varied_scenes("test", count, seed, objects, look, keep)

    def textured(rng: random.Random, kind: str, photos: tuple[str, ...] = PHOTOS) -> Look:
        number = rng.randrange(2**31)
        return Look(texture=kind, contrast=28.0, photo=rng.choice(photos), seed=number)

    def everything(rng: random.Random) -> Look:
        return replace(
            textured(rng, "photo", HELD_OUT_PHOTOS), style=HELD_OUT_STYLE, post=sample_post(rng)
        )

    return {
        "two objects, plain": group(lambda rng: PLAIN, (2,)),
        "a color and shape held out of captions only": group(
            lambda rng: PLAIN, keep=has_held_out_pair
        ),
        "a place held out of captions only": group(lambda rng: PLAIN, keep=has_held_out_place),
        "three objects": group(lambda rng: PLAIN, (3,)),
        "a post in front": group(lambda rng: Look(post=sample_post(rng))),
        "styles": group(lambda rng: Look(style=rng.choice(STYLES[1:]))),
        "a style, held out": group(lambda rng: Look(style=HELD_OUT_STYLE)),
        "textures": group(lambda rng: textured(rng, rng.choice(TEXTURES[1:-1]))),
        "photographs": group(lambda rng: textured(rng, "photo")),
        "photographs, held out": group(lambda rng: textured(rng, "photo", HELD_OUT_PHOTOS)),
        "three objects, held-out style and photograph, a post": group(everything, (3,)),
    }


def look_rows(
    model: Video2LoRA, count: int, seed: int, captions_only: Video2LoRA | None = None
) -> list[dict[str, Any]]:
    """A row of each group of looks, as :func:`duration_row`, about clips of 8 s, with "group" and
    "videos"."""
    rows = []
    for name, scenes in look_groups(count, seed).items():
        row = duration_row(model, scenes, sampled_clips(scenes, 8), seed, captions_only)
        rows.append({"group": name, "videos": count} | row)
    return sorted(rows, key=lambda row: row["captions"][SYSTEM]["estimate"])


def description_scores(answering: ConditionAnswers, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Condition -> interval of the share of true statements in detailed descriptions."""
    questions = [(number, DETAIL_PROMPTS[0]) for number in range(len(scenes))]
    texts = answering(questions, DESCRIPTION_TOKENS)
    return _intervals(
        {
            name: [statement_hits(text, scene) for text, scene in zip(part, scenes, strict=True)]
            for name, part in texts.items()
        }
    )


# --- questions ------------------------------------------------------------------------------------


# What no hypernetwork is asked in training; descriptions are worded like this.
NEVER_ASKED = frozenset({"another wording"})


def kind_probes(scenes: Sequence[Scene], seed: int) -> Iterator[Probe]:
    """Every kind that applies to a scene, twice about objects that are named by shape or color and
    about absent ones."""
    for index, scene in enumerate(scenes):
        rng = random.Random(f"kinds/{seed}/{index}")
        pairs: list[tuple[str, QAPair | None]] = [
            (kind, ask(scene, kind, rng)) for kind in question_kinds(scene) if kind != "binding"
        ]
        about = "binding" if len(scene.objects) == 2 else "an only object by name"
        pairs += [(about, ask_bound(scene, rng)) for _ in range(2)]
        pairs += [("absent", ask_absent(scene, rng)) for _ in range(2)]
        pairs.append(("another wording", ask_reworded(scene, rng)))
        pairs += [(f"where it {kind}s", ask(scene, kind, rng)) for kind in ("start", "end")]
        pairs.append(("which comes second", ask_last(scene, rng)))
        for kind, pair in pairs:
            if pair is not None:
                yield Probe(kind, index, pair.question, pair.answer)


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


def further_probes(scenes: Sequence[Scene], seed: int) -> Iterator[Probe]:
    """Questions in known words. The first hypernetwork was trained on none of them; later ones were
    trained on all but "the color of" an object and the like. The first VLM was trained on where
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
        - direct, and "kept": condition -> share of the direct score above that of no adapter (empty
        where there is no such score). For absent objects also "attribute": condition -> share of
        answers that name a color, size or motion.
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
        estimates = {name: row["score"][name]["estimate"] for name in by_condition}
        row["kept"] = {
            name: recovery(estimates[name], estimates[BASELINE], estimates[NONE])
            for name in (SYSTEM, CAPTIONS_ONLY)
            if name in estimates and estimates[BASELINE] > estimates[NONE]
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
            {
                "kind": kind,
                "questions": len(members),
                "videos": videos,
                "score": _intervals(scored),
                "kept": {},
            }
        )
    return sorted(rows, key=lambda row: row["score"][SYSTEM]["estimate"])


def _caption_answers(stated: Mapping[str, str], p: Probe) -> bool:
    """Whether a caption's attributes give the correct answer about the object of that shape."""
    for number in range(2):
        if stated.get(f"shape{number}", "?") in plain(p.question).split():
            return stated.get(f"{p.kind}{number}") == p.answer
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
