"""Evaluation on unseen shapes videos: the video in context against the adapter, with controls.

Conditions: direct (visual tokens in the prompt), adapter (none), another video's adapter, the bias
adapter alone, and no adapter. All see the same questions and answer greedily, through the same
interface that users have.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v2l_fast.adapter import Adapter
from v2l_fast.backbones.smolvlm import SmolVLM
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.evaluation.statistics import mean_interval, paired_difference, ratio_interval
from v2l_fast.generation import Sampling, generate
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.language import CAPTION_PROMPTS, QUESTION_KINDS, Turn, ask_several, caption
from v2l_fast.shapes.render import CLIP_SECONDS, FRAME_TIMES, render, write_clip
from v2l_fast.shapes.scene import Scene
from v2l_fast.shapes.scoring import attribute_hits, plain
from v2l_fast.shapes.vlm import IMAGE_SIZE
from v2l_fast.video import VideoClip, load_video

F1_MARGIN = 0.05
QUESTIONS_PER_VIDEO = 5
MAX_NEW_TOKENS = 40
_BATCH = 32

Answerer = Callable[[Sequence[int], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Answers:
    """What one condition said: a caption a video, and an answer per (video, question)."""

    captions: list[str]
    answers: list[str]


def questions_for(scenes: Sequence[Scene], seed: int) -> list[tuple[int, Turn]]:
    """(video, question) pairs, the same for every condition."""
    rng = random.Random(f"questions/{seed}")
    return [
        (i, turn)
        for i, scene in enumerate(scenes)
        for turn in ask_several(scene, QUESTIONS_PER_VIDEO, rng)
    ]


def rendered_clips(scenes: Sequence[Scene]) -> list[VideoClip]:
    """The frames that sampling takes from each scene's file, rendered without a codec."""
    frames = render(scenes, IMAGE_SIZE)
    return [VideoClip.from_frames(video, len(FRAME_TIMES) / CLIP_SECONDS) for video in frames]


def encoded_clips(scenes: Sequence[Scene]) -> list[VideoClip]:
    """The scenes as H.264 files, sampled and decoded as any user's video is."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            load_video(write_clip(scene, Path(folder) / f"{i}.mp4"), len(FRAME_TIMES))
            for i, scene in enumerate(scenes)
        ]


def collect(answer: Answerer, videos: int, questions: Sequence[tuple[int, Turn]]) -> Answers:
    """Ask one condition for every video's caption and every question."""
    return Answers(
        captions=answer(range(videos), [CAPTION_PROMPTS[0]] * videos),
        answers=answer([i for i, _ in questions], [turn.question for _, turn in questions]),
    )


def score(
    said: Answers, scenes: Sequence[Scene], questions: Sequence[tuple[int, Turn]]
) -> dict[str, Any]:
    """Scores of one condition with 95% intervals over videos; `per_video` holds token-F1."""
    hits = [attribute_hits(text, scene) for text, scene in zip(said.captions, scenes, strict=True)]
    right = [
        plain(text) == plain(turn.answer)
        for text, (_, turn) in zip(said.answers, questions, strict=True)
    ]
    f1 = [token_f1(text, caption(s)) for text, s in zip(said.captions, scenes, strict=True)]
    exact = [plain(c) == plain(caption(s)) for c, s in zip(said.captions, scenes, strict=True)]
    by_video: list[list[bool]] = [[] for _ in scenes]
    by_kind: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for (video, turn), ok in zip(questions, right, strict=True):
        by_video[video].append(ok)
        by_kind[turn.kind].append(ok)
    per_video = [sum(oks) / len(oks) for oks in by_video]
    share = ratio_interval([h for h, _ in hits], [n for _, n in hits])
    return {
        "caption_attributes": asdict(share),
        "caption_exact": asdict(mean_interval(exact)),
        "caption_token_f1": asdict(mean_interval(f1)),
        "qa_exact": asdict(mean_interval(per_video)),
        "qa_by_kind": {k: round(sum(v) / len(v), 4) for k, v in by_kind.items() if v},
        "per_video": {"caption_token_f1": f1, "qa_exact": per_video},
    }


def direct_answerer(backbone: SmolVLM, clips: Sequence[VideoClip]) -> Answerer:
    """Every question carries its own video."""

    def answer(videos: Sequence[int], texts: Sequence[str]) -> list[str]:
        said: list[str] = []
        for start in range(0, len(videos), _BATCH):
            part = slice(start, start + _BATCH)
            prompts = [
                backbone.question_about(clips[video], text, IMAGE_SIZE).embeddings
                for video, text in zip(videos[part], texts[part], strict=True)
            ]
            limit = Sampling(max_new_tokens=MAX_NEW_TOKENS)
            found = generate(backbone.decoder, prompts, backbone.stop_ids, limit)
            said += [backbone.decode(tokens) for tokens in found.tokens]
        return said

    return answer


def adapter_answerer(model: Video2LoRA, adapters: Sequence[Adapter | None]) -> Answerer:
    """No visual tokens; video i is answered through adapters[i]."""

    def answer(videos: Sequence[int], texts: Sequence[str]) -> list[str]:
        if not videos:
            return []
        chosen = [adapters[video] for video in videos]
        return model.ask(list(texts), chosen, max_new_tokens=MAX_NEW_TOKENS)

    return answer


def evaluate(
    model: Video2LoRA,
    scenes: Sequence[Scene],
    seed: int = 0,
    report: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """All conditions on `scenes`, and the adapter against direct with the non-inferiority rule."""
    count = len(scenes)
    questions = questions_for(scenes, seed)
    clips = rendered_clips(scenes)
    report("internalizing")
    adapters = model.internalize(clips)
    others = [adapters[(i + count // 2) % count] for i in range(count)]
    conditions = {
        "direct": direct_answerer(model.backbone, clips),
        "adapter": adapter_answerer(model, adapters),
        "other video's adapter": adapter_answerer(model, others),
        "bias adapter only": adapter_answerer(model, [adapters[0].prune(0)] * count),
        "no adapter": adapter_answerer(model, [None] * count),
    }
    results, said = {}, {}
    for name, answerer in conditions.items():
        report(name)
        said[name] = collect(answerer, count, questions)
        results[name] = score(said[name], scenes, questions)
    compared = {}
    for metric in ("caption_token_f1", "qa_exact"):
        difference = paired_difference(
            results["adapter"]["per_video"][metric], results["direct"]["per_video"][metric]
        )
        compared[metric] = {
            **asdict(difference),
            "margin": F1_MARGIN,
            "non_inferior": difference.non_inferior(F1_MARGIN),
            "equivalent": difference.equivalent(F1_MARGIN),
        }
    for result in results.values():
        del result["per_video"]
    samples = [
        {"reference": caption(scenes[i])} | {name: said[name].captions[i] for name in said}
        for i in range(min(4, count))
    ]
    return {
        "videos": count,
        "questions": len(questions),
        "confidence": 0.95,
        "conditions": results,
        "adapter_minus_direct": compared,
        "samples": samples,
    }


def evaluate_files(model: Video2LoRA, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Caption attributes when the same scenes come as H.264 files, against rendering them."""
    result: dict[str, Any] = {"videos": len(scenes)}
    for source, make in (("file", encoded_clips), ("rendered", rendered_clips)):
        clips = make(scenes)
        adapters = model.internalize(clips)
        for name, answerer in (
            ("direct", direct_answerer(model.backbone, clips)),
            ("adapter", adapter_answerer(model, adapters)),
        ):
            said = collect(answerer, len(scenes), []).captions
            hits = [attribute_hits(text, s) for text, s in zip(said, scenes, strict=True)]
            share = ratio_interval([h for h, _ in hits], [n for _, n in hits])
            result[f"{name}, {source}"] = asdict(share)
    return result
