"""Evaluation on unseen shapes videos: examples from scenes, and the attributes of captions.

Responsible for what only this world has: examples with known attributes, frames rendered without a
codec, attribute accuracy and exact captions. Conditions, controls, other scores and intervals are
`v2l_fast.evaluation`'s.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from v2l_fast.data.manifest import Example
from v2l_fast.evaluation.answers import BASELINE, SYSTEM, AnswerSettings
from v2l_fast.evaluation.evaluate import evaluate as evaluate_examples
from v2l_fast.evaluation.examples import exact_match
from v2l_fast.evaluation.report import text_scores
from v2l_fast.evaluation.statistics import Interval, mean_interval, ratio_interval
from v2l_fast.generation import Answer, SamplingParams, answer_prompts
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.language import CAPTION_PROMPTS, ask_several, attribute_hits, caption, plain
from v2l_fast.shapes.render import CLIP_SECONDS, FRAME_TIMES, render, write_clip
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.shapes.world import Scene
from v2l_fast.video import Clip, load_video
from v2l_fast.vlm import Prompt, Question
from v2l_fast.vlm.smolvlm import SmolVLM
from v2l_fast.work_units import Progress, silent

CAPTIONS, QUESTIONS = "shapes captions", "shapes questions"
QUESTIONS_PER_VIDEO = 5
MAX_NEW_TOKENS = 40
_BATCH = 32


def clip_name(split: str, index: int) -> str:
    """File name of a split's clip."""
    return f"{split}_{index:04d}.mp4"


def examples_for(scenes: Sequence[Scene], split: str = "test", seed: int = 0) -> list[Example]:
    """A caption and five questions per video; the subset of a question is its kind."""
    rng = random.Random(f"questions/{seed}")
    examples = []
    for index, scene in enumerate(scenes):
        name = clip_name(split, index)
        rows = [("caption", CAPTION_PROMPTS[0], caption(scene), CAPTIONS, {})]
        rows += [
            ("qa", pair.question, pair.answer, QUESTIONS, {"subset": pair.kind})
            for pair in ask_several(scene, QUESTIONS_PER_VIDEO, rng)
        ]
        examples += [
            Example(f"{Path(name).stem}/{number}", name, name, task, prompt, target, dataset, split,
                    metadata)
            for number, (task, prompt, target, dataset, metadata) in enumerate(rows)
        ]  # fmt: skip
    return examples


def rendered_clips(scenes: Sequence[Scene]) -> list[Clip]:
    """The frames that are sampled from each scene's file, rendered without a codec."""
    frames = render(scenes, IMAGE_SIZE)
    return [Clip.from_frames(video, len(FRAME_TIMES) / CLIP_SECONDS) for video in frames]


def encoded_clips(scenes: Sequence[Scene]) -> list[Clip]:
    """The scenes as H.264 files, sampled and decoded like any video."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            load_video(write_clip(scene, Path(folder) / f"{i}.mp4"), len(FRAME_TIMES))
            for i, scene in enumerate(scenes)
        ]


def evaluate(
    model: Video2LoRA,
    scenes: Sequence[Scene],
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate on rendered frames.

    Returns:
        The record of :func:`v2l_fast.evaluation.evaluate.evaluate`, with "attributes" and
        "caption_exact" (condition -> share with its 95% interval), "wrong_captions" (see
        :func:`wrong_captions`), "samples" and the Markdown "table".
    """
    examples = examples_for(scenes, seed=seed)
    clips = {clip_name("test", i): clip for i, clip in enumerate(rendered_clips(scenes))}
    evaluation = evaluate_examples(
        model,
        examples,
        AnswerSettings(max_new_tokens=MAX_NEW_TOKENS),
        load=lambda video: clips[video.path],
        batch=3 * _BATCH,
        progress=progress,
    )
    captions = {name: _captions(examples, texts) for name, texts in evaluation.answers.items()}
    samples = [
        {"reference": caption(scene)} | {name: texts[i] for name, texts in captions.items()}
        for i, scene in enumerate(scenes[:4])
    ]
    return {
        **evaluation.record,
        "attributes": {
            name: asdict(attribute_share(texts, scenes)) for name, texts in captions.items()
        },
        "caption_exact": {
            name: asdict(exact_share(texts, scenes)) for name, texts in captions.items()
        },
        "wrong_captions": {
            name: wrong_captions(captions[name], scenes) for name in (BASELINE, SYSTEM)
        },
        "samples": samples,
        "table": evaluation.table,
    }


def evaluate_files(model: Video2LoRA, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Attribute accuracy on H.264 files of the scenes, against rendered frames."""
    prompts = [CAPTION_PROMPTS[0]] * len(scenes)
    result: dict[str, Any] = {"videos": len(scenes)}
    for source, make in (("file", encoded_clips), ("rendered", rendered_clips)):
        clips = make(scenes)
        answers = {
            BASELINE: model.answer_direct(prompts, clips, max_new_tokens=MAX_NEW_TOKENS),
            SYSTEM: model.answer(prompts, model.internalize(clips), max_new_tokens=MAX_NEW_TOKENS),
        }
        for name, by_scene in answers.items():
            share = attribute_share([answer.text for answer in by_scene], scenes)
            result[f"{name}, {source}"] = asdict(share)
    return result


def evaluate_turns(model: Video2LoRA, scenes: Sequence[Scene], seed: int = 0) -> dict[str, Any]:
    """How well the second question of a conversation is answered.

    Two questions of different kinds per video. The second is asked alone, after the first with its
    right answer, and after the first with the model's own answer.

    Returns:
        "videos", and for each condition the share of exact second answers with its 95% interval.
    """
    rng = random.Random(f"turns/{seed}")
    pairs = [ask_several(scene, 2, rng) for scene in scenes]
    firsts, seconds = ([pair[i] for pair in pairs] for i in (0, 1))
    clips = rendered_clips(scenes)
    adapters = model.internalize(clips)
    result: dict[str, Any] = {"videos": len(scenes)}

    def score(name: str, answers: Sequence[Answer]) -> None:
        hits = [exact_match(a.text, q.answer) for a, q in zip(answers, seconds, strict=True)]
        result[name] = asdict(mean_interval(hits))

    def after(answers: Sequence[str]) -> list[Question]:
        return [
            [
                {"role": "user", "content": first.question},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": second.question},
            ]
            for first, answer, second in zip(firsts, answers, seconds, strict=True)
        ]

    ask: Mapping[str, Callable[[Sequence[Question]], list[Answer]]] = {
        BASELINE: lambda questions: model.answer_direct(
            questions, clips, max_new_tokens=MAX_NEW_TOKENS
        ),
        SYSTEM: lambda questions: model.answer(questions, adapters, max_new_tokens=MAX_NEW_TOKENS),
    }
    for name, answers in ask.items():
        first_answers = [answer.text for answer in answers([first.question for first in firsts])]
        score(f"{name}, alone", answers([second.question for second in seconds]))
        score(f"{name}, after a right answer", answers(after([q.answer for q in firsts])))
        score(f"{name}, after its own answer", answers(after(first_answers)))
    return result


def evaluate_direct(backbone: SmolVLM, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Scores of a VLM without a hypernetwork, with the video in context."""
    examples = examples_for(scenes)
    clips = {clip_name("test", i): clip for i, clip in enumerate(rendered_clips(scenes))}
    answers = direct_answers(
        backbone, [clips[e.path] for e in examples], [e.prompt for e in examples]
    )
    texts = {e.id: text for e, text in zip(examples, answers, strict=True)}
    scores = {name: by[BASELINE] for name, by in text_scores(examples, {BASELINE: texts}).items()}
    by_kind: dict[str, list[float]] = {}
    for example in examples:
        if not example.is_caption:
            kind = example.metadata["subset"]
            by_kind.setdefault(kind, []).append(scores["exact_match"][example.id])
    return {
        "videos": len(scenes),
        "questions": len(scores["exact_match"]),
        "caption_attributes": asdict(attribute_share(_captions(examples, texts), scenes)),
        "caption_exact": asdict(exact_share(_captions(examples, texts), scenes)),
        "caption_token_f1": _mean([scores["token_f1"][e.id] for e in examples if e.is_caption]),
        "qa_exact": _mean(list(scores["exact_match"].values())),
        "qa_by_kind": {kind: _mean(values) for kind, values in sorted(by_kind.items())},
    }


def direct_answers(backbone: SmolVLM, clips: Sequence[Clip], prompts: Sequence[str]) -> list[str]:
    """Answer each prompt with its clip in context, without a hypernetwork."""

    def build(clip: Clip, text: str) -> Prompt:
        return backbone.video_prompt(backbone.encode(clip, IMAGE_SIZE), text)

    builders = [partial(build, *pair) for pair in zip(clips, prompts, strict=True)]
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    answers = answer_prompts(backbone, builders, [None] * len(builders), params)
    return [answer.text for answer in answers]


def attribute_share(captions: Sequence[str], scenes: Sequence[Scene]) -> Interval:
    """Share of the scenes' attributes that the captions state correctly, resampling videos."""
    hits = [attribute_hits(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    return ratio_interval([h for h, _ in hits], [n for _, n in hits])


def exact_share(captions: Sequence[str], scenes: Sequence[Scene]) -> Interval:
    """Share of the captions that equal the scenes' captions, resampling videos."""
    pairs = zip(captions, scenes, strict=True)
    return mean_interval([exact_match(text, caption(scene)) for text, scene in pairs])


def wrong_captions(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, int]:
    """Number of captions that are "wrong", and of those with the reference's words in another order
    ("same_words"), for which token-F1 is 1."""
    pairs = [
        (plain(text), plain(caption(scene))) for text, scene in zip(captions, scenes, strict=True)
    ]
    wrong = [(text, reference) for text, reference in pairs if text != reference]
    same = sum(sorted(text.split()) == sorted(other.split()) for text, other in wrong)
    return {"wrong": len(wrong), "same_words": same}


def _captions(examples: Sequence[Example], texts: Mapping[str, str]) -> list[str]:
    return [texts[e.id] for e in examples if e.is_caption]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
