"""Evaluation on unseen shapes videos: the video in context against the adapter, with controls.

Conditions: direct (visual tokens in the prompt), adapter (none), another video's adapter, the bias
adapter alone, and no adapter. All see the same questions; answers are greedy.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import SmolVLMForConditionalGeneration

from v2l_fast.adapter import AdapterBatch
from v2l_fast.evaluation.metrics import token_f1
from v2l_fast.evaluation.statistics import (
    mean_interval,
    paired_difference,
    ratio_interval,
)
from v2l_fast.hypernet import HyperNetwork
from v2l_fast.shapes.adapt import adapted
from v2l_fast.shapes.decode import answer_batch
from v2l_fast.shapes.language import CAPTION_PROMPTS, QUESTION_KINDS, Turn, ask_several, caption
from v2l_fast.shapes.prompts import Prompts
from v2l_fast.shapes.render import FRAME_TIMES, render, write_clip
from v2l_fast.shapes.scene import Scene
from v2l_fast.shapes.scoring import attribute_hits, plain
from v2l_fast.shapes.train_hypernet import cache_contexts, context_states
from v2l_fast.shapes.train_language import cache_visual_tokens
from v2l_fast.shapes.vlm import IMAGE_SIZE, video_tokens
from v2l_fast.video import frame_views, load_video

F1_MARGIN = 0.05
QUESTIONS_PER_VIDEO = 5
_CHUNK = 128

Answerer = Callable[[Sequence[int], Sequence[str], int], list[str]]


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


def collect(
    answer: Answerer, scenes: Sequence[Scene], questions: Sequence[tuple[int, Turn]]
) -> Answers:
    """Ask one condition for every caption and every question."""

    def run(videos: Sequence[int], texts: Sequence[str], limit: int) -> list[str]:
        said: list[str] = []
        for start in range(0, len(videos), _CHUNK):
            part = slice(start, start + _CHUNK)
            said += answer(videos[part], texts[part], limit)
        return said

    captions = run(range(len(scenes)), [CAPTION_PROMPTS[0]] * len(scenes), 40)
    answers = run([i for i, _ in questions], [turn.question for _, turn in questions], 8)
    return Answers(captions, answers)


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


def direct_answerer(
    model: SmolVLMForConditionalGeneration, prompts: Prompts, visual: torch.Tensor
) -> Answerer:
    """Every question carries its video's visual tokens [B, F, T, D]."""

    def answer(videos: Sequence[int], texts: Sequence[str], limit: int) -> list[str]:
        return answer_batch(model, prompts, texts, visual[torch.tensor(videos)], limit)

    return answer


def adapter_answerer(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    adapters: AdapterBatch | None,
    choose: Callable[[int], int] = lambda video: video,
) -> Answerer:
    """No visual tokens; video i is answered through adapter choose(i), or none without adapters."""

    def answer(videos: Sequence[int], texts: Sequence[str], limit: int) -> list[str]:
        if adapters is None:
            return answer_batch(model, prompts, texts, None, limit)
        index = torch.tensor([choose(video) for video in videos])
        used, places = index.unique(return_inverse=True)
        some = AdapterBatch(
            {m: a[used] for m, a in adapters.A.items()},
            {m: b[used] for m, b in adapters.B.items()},
            adapters.scale,
            adapters.bias,
        )
        with adapted(model, some, places):
            return answer_batch(model, prompts, texts, None, limit)

    return answer


@torch.no_grad()
def generate_adapters(hypernet: HyperNetwork, contexts: torch.Tensor) -> AdapterBatch:
    """Adapters of all videos, in chunks: contexts [B, L, S, D]."""
    parts = [hypernet(contexts[i : i + _CHUNK].float()) for i in range(0, len(contexts), _CHUNK)]
    return AdapterBatch(
        {m: torch.cat([p.A[m] for p in parts]) for m in parts[0].A},
        {m: torch.cat([p.B[m] for p in parts]) for m in parts[0].B},
        parts[0].scale,
        parts[0].bias,
    )


@torch.no_grad()
def evaluate(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    hypernet: HyperNetwork,
    scenes: Sequence[Scene],
    seed: int = 0,
) -> dict[str, Any]:
    """All conditions on `scenes`, and the adapter against direct with the non-inferiority rule."""
    questions = questions_for(scenes, seed)
    adapters = generate_adapters(hypernet, cache_contexts(model, prompts, scenes, None))
    silent = AdapterBatch(
        adapters.A,
        {m: torch.zeros_like(b) for m, b in adapters.B.items()},
        adapters.scale,
        adapters.bias,
    )
    count = len(scenes)
    conditions = {
        "direct": direct_answerer(model, prompts, cache_visual_tokens(model, scenes, None)),
        "adapter": adapter_answerer(model, prompts, adapters),
        "other video's adapter": adapter_answerer(
            model, prompts, adapters, lambda video: (video + count // 2) % count
        ),
        "bias adapter only": adapter_answerer(model, prompts, silent),
        "no adapter": adapter_answerer(model, prompts, None),
    }
    results, said = {}, {}
    for name, answerer in conditions.items():
        said[name] = collect(answerer, scenes, questions)
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


@torch.no_grad()
def evaluate_files(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    hypernet: HyperNetwork,
    scenes: Sequence[Scene],
) -> dict[str, Any]:
    """Caption attributes when the same scenes come as H.264 files, against rendering them directly.

    The files are sampled, decoded and resized by `v2l_fast.video`, as any user's video is.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = torch.stack([_file_frames(scene, Path(folder) / "clip.mp4") for scene in scenes])
    result: dict[str, Any] = {"videos": len(scenes)}
    for source, frames in (("file", files), ("rendered", render(scenes, IMAGE_SIZE))):
        visual = video_tokens(model, frames)
        adapters = generate_adapters(hypernet, context_states(model, prompts, visual))
        for name, answerer in (
            ("direct", direct_answerer(model, prompts, visual)),
            ("adapter", adapter_answerer(model, prompts, adapters)),
        ):
            said = collect(answerer, scenes, []).captions
            hits = [attribute_hits(text, s) for text, s in zip(said, scenes, strict=True)]
            share = ratio_interval([h for h, _ in hits], [n for _, n in hits])
            result[f"{name}, {source}"] = asdict(share)
    return result


def _file_frames(scene: Scene, path: Path) -> torch.Tensor:
    clip = load_video(write_clip(scene, path), max_frames=len(FRAME_TIMES))
    return frame_views(clip.frames, IMAGE_SIZE, IMAGE_SIZE).views
