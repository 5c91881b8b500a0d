"""The shapes world as a data source of the trainer: scenes as samples, with cached visual tokens.

The loop, the loss and the schedule are `v2l_fast.training`'s. Targets are the scenes' correct
captions and answers instead of a teacher's: they are known here, and the tiny teacher makes errors.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from v2l_fast.console import note, progress_bar
from v2l_fast.data.readers import Sample
from v2l_fast.errors import CheckpointError, ConfigError
from v2l_fast.files import LARGE_BYTES, read_json, write_json
from v2l_fast.generation import SamplingParams, answer_prompts
from v2l_fast.pipeline import Context
from v2l_fast.shapes.language import (
    CAPTION_PROMPTS,
    DETAIL_PROMPTS,
    QAPair,
    ask,
    ask_absent,
    ask_bound,
    ask_further,
    ask_several,
    describe,
)
from v2l_fast.shapes.render import CLIP_FPS, FRAME_TIMES, NUM_FRAMES
from v2l_fast.shapes.vlm import (
    IMAGE_SIZE,
    Prompts,
    cache_visual_tokens,
    recorded_visual_tokens,
)
from v2l_fast.shapes.widen import varied_videos
from v2l_fast.shapes.world import (
    MAX_OBJECTS,
    Recording,
    Scene,
    has_held_out_pair,
    has_held_out_place,
    sample_scenes,
)
from v2l_fast.tensor_files import load_tensors, save_tensors
from v2l_fast.training.config import TrainConfig
from v2l_fast.training.sources import base_model
from v2l_fast.training.trainer import train
from v2l_fast.video import sample_indices
from v2l_fast.vlm import Prompt, VideoChunk
from v2l_fast.vlm.smolvlm import SmolVLM

DEFAULT_VIDEOS = 16384
MAX_FRAMES = len(FRAME_TIMES)
# How the frozen model's captions and detailed descriptions are computed.
_CAPTION_TOKENS, _DETAIL_TOKENS, _CAPTION_BATCH = 64, 64, 256
_DESCRIPTIONS = 4


@dataclass(frozen=True)
class ClipChunk:
    """One of the equal chunks of a clip, sampled as if its frames were a separate file.

    Attributes:
        ids: int64 [S], prompt of the context pass.
        frames: indices of its sampled frames in the whole clip.
        chunk_span: its start and end as fractions of the clip.
    """

    ids: Tensor
    frames: tuple[int, ...]
    chunk_span: tuple[float, float]


def clip_chunks(backbone: SmolVLM, count: int, instruction: str) -> tuple[ClipChunk, ...]:
    """The `count` chunks of any clip of this world, sampled as `v2l_fast.video` samples files."""
    parts = []
    for index in range(count):
        first, stop = (NUM_FRAMES * i // count for i in (index, index + 1))
        duration = (stop - first) / CLIP_FPS
        sampled = sample_indices(stop - first, CLIP_FPS, duration, MAX_FRAMES).tolist()
        times = [frame / CLIP_FPS for frame in sampled]
        ids = backbone.prompt_builder.video_prompt(times, duration, 0, 0, instruction, False)
        frames = tuple(first + frame for frame in sampled)
        parts.append(ClipChunk(torch.tensor(ids), frames, (index / count, (index + 1) / count)))
    return tuple(parts)


def token_pairs(
    prompts: Prompts, pairs: Sequence[QAPair], second_turn_share: float, rng: random.Random
) -> tuple[tuple[list[int], list[int]], ...]:
    """Token ids of questions and answers about one video; a share of the questions follows another
    one and its answer, as the second turn of a conversation."""
    result = []
    for number, pair in enumerate(pairs):
        question = prompts.question(pair.question)
        others = [*pairs[:number], *pairs[number + 1 :]]
        # Nothing is drawn without the option: its runs keep their choices.
        if others and second_turn_share and rng.random() < second_turn_share:
            before = rng.choice(others)
            question = prompts.second_turn(before.question, before.answer, pair.question)
        result.append((question, prompts.answer(pair.answer)))
    return tuple(result)


@dataclass(frozen=True)
class ShapesSource:
    """Scenes with their visual tokens (see :class:`~v2l_fast.data.readers.Source`).

    Attributes:
        scenes: the videos.
        features: bf16 [videos, frames, T, D], connector outputs.
        columns: index of a frame in its clip -> its column in `features`.
        chunks: number of chunks -> the chunks; each load draws a number.
        prompts: token ids of the base model's prompts.
        questions: number of questions in a sample, besides one caption.
        second_turn_share: see :class:`~v2l_fast.training.config.DataConfig`.
        seed: with the step and the video's index, determines every choice.
    """

    scenes: Sequence[Scene]
    features: Tensor
    columns: Mapping[int, int]
    chunks: Mapping[int, tuple[ClipChunk, ...]]
    prompts: Prompts
    questions: int = 3
    second_turn_share: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int, step: int) -> Sample:
        """A caption of scene `index` and questions about it, which depend on the step."""
        rng = random.Random(f"{self.seed}/{step}/{index}")
        pairs = self.qa_pairs(index, rng)
        chunks = self.chunks[rng.choice(sorted(self.chunks))]
        prompts = self.prompts
        return Sample(
            video=f"scene {index}",
            chunks=tuple(
                Context(
                    ids=chunk.ids,
                    features=self.features[index, [self.columns[i] for i in chunk.frames]],
                    chunk_span=chunk.chunk_span,
                )
                for chunk in chunks
            ),
            prompt_prefix=prompts.text_prefix,
            qa_pairs=token_pairs(prompts, pairs, self.second_turn_share, rng),
            task_types=tuple("caption" if p.kind == "caption" else "question" for p in pairs),
            frames=sum(len(chunk.frames) for chunk in chunks),
        )

    def qa_pairs(self, index: int, rng: random.Random) -> list[QAPair]:
        """A caption, then questions of different kinds."""
        scene = self.scenes[index]
        return [ask(scene, "caption", rng), *ask_several(scene, self.questions, rng)]


@dataclass(frozen=True)
class RecordedSource:
    """Recordings of any duration with their visual tokens.

    Attributes:
        scenes, recordings: the videos.
        features: bf16 [F, T, D] per video, connector outputs.
        prompts: token ids of the base model's prompts.
        captions: (prompt, answer) of the frozen model's caption of each video, then of its detailed
            descriptions; None trains on correct captions and answers.
        captions_per_sample: number of these in a sample, the caption among them.
        binding_questions: number of questions that name an object by its shape or color.
        question_weights: see :class:`~v2l_fast.training.config.DataConfig`.
        second_turn_share: see :class:`~v2l_fast.training.config.DataConfig`.
        seed: with the step and the video's index, determines every choice.
    """

    scenes: Sequence[Scene]
    recordings: Sequence[Recording]
    features: Sequence[Tensor]
    prompts: Prompts
    captions: Sequence[Sequence[Sequence[str]]] | None = None
    captions_per_sample: int = 1
    binding_questions: int = 1
    question_weights: Mapping[str, float] = field(default_factory=dict)
    second_turn_share: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.scenes)

    def load(self, index: int, step: int) -> Sample:
        """The captions of scene `index`, or a caption and questions, which depend on the step."""
        rng = random.Random(f"{self.seed}/{step}/{index}")
        pairs, prompts = self.qa_pairs(index, rng), self.prompts
        ids = torch.tensor(prompts.recorded_context(self.recordings[index]))
        return Sample(
            video=f"scene {index}",
            chunks=(Context(ids=ids, features=self.features[index]),),
            prompt_prefix=prompts.text_prefix,
            qa_pairs=token_pairs(prompts, pairs, self.second_turn_share, rng),
            task_types=tuple(
                "caption" if p.kind in ("caption", "details") else "question" for p in pairs
            ),
            frames=len(self.features[index]),
        )

    def qa_pairs(self, index: int, rng: random.Random) -> list[QAPair]:
        """The model's caption and some of its descriptions; or a correct caption, questions (of any
        kind, about objects named by shape or color, about an absent object, and a further one) and
        a description."""
        scene = self.scenes[index]
        if self.captions is not None:
            caption, *details = self.captions[index]
            chosen = rng.sample(details, self.captions_per_sample - 1)
            return [QAPair("caption", *caption), *(QAPair("details", *pair) for pair in chosen)]
        weights = self.question_weights
        drawn = (ask_bound(scene, rng, weights=weights) for _ in range(self.binding_questions))
        binding = [pair for pair in drawn if pair is not None]
        others = 1 + self.binding_questions - len(binding)
        pairs = [ask(scene, "caption", rng), *ask_several(scene, others, rng)]
        absent = ask_absent(scene, rng, max_objects=MAX_OBJECTS)
        return [*pairs, *binding, absent, ask_further(scene, rng), describe(scene, rng)]


def recorded_sources(
    config: TrainConfig, backbone: SmolVLM
) -> tuple[RecordedSource, RecordedSource | None]:
    """As :func:`shapes_sources`, of recordings of 2 to 64 s with up to three objects in any look.

    With `data.source` "shapes-captions", the targets are the caption and the detailed descriptions
    that the frozen model writes with the video in context, the descriptions at temperature 1, of
    scenes without what :mod:`~v2l_fast.shapes.world` holds out.

    Raises:
        ConfigError: a value of `data` is not possible in this world.
    """
    data, seed = config.data, config.run.seed
    if data.longest_edge != IMAGE_SIZE:
        raise ConfigError(
            f"data.longest_edge must be {IMAGE_SIZE} in the shapes world, got {data.longest_edge}"
        )
    if tuple(data.chunks) != (1,):
        raise ConfigError(f"data.chunks must be [1] for {data.source}, got {list(data.chunks)}")
    own_captions = data.source == "shapes-captions"
    if own_captions:
        contents, least, most = "a caption and descriptions", 1, 1 + _DESCRIPTIONS
    else:
        contents = (
            "a caption, a question, one about a named object, one about an absent object, "
            "a further question, a description"
        )
        least, most = 6, None
    if data.prompts_per_video < least or (most and data.prompts_per_video > most):
        bounds = f"{least} to {most}" if most else f"at least {least}"
        raise ConfigError(
            f"data.prompts_per_video must be {bounds} for {data.source} ({contents}), "
            f"got {data.prompts_per_video}"
        )
    folder = config.feature_folder

    def source(split: str, count: int) -> RecordedSource:
        if own_captions:
            scenes, recordings = varied_videos(split, count, seed, _is_seen_in_captions)
        else:
            scenes, recordings = varied_videos(split, count, seed)
        with progress_bar(f"videos of the {split} split") as bar:
            features = recorded_visual_tokens(
                backbone.model, scenes, recordings, seed if split == "train" else None,
                lambda done: bar("visual tokens, video", done, count),
            )  # fmt: skip
            captions = None
            if own_captions:
                captions = stored_captions(
                    backbone, recordings, features, folder,
                    lambda done: bar("the model's captions, video", done, count),
                )  # fmt: skip
        return RecordedSource(
            scenes,
            recordings,
            features,
            Prompts(backbone.tokenizer),
            captions,
            captions_per_sample=data.prompts_per_video,
            binding_questions=data.prompts_per_video - least + 1,
            question_weights=data.question_weights,
            second_turn_share=data.second_turn_share,
            seed=seed,
        )

    training = source("train", data.videos or DEFAULT_VIDEOS)
    return training, source("val", data.val_videos) if data.val_videos else None


def _is_seen_in_captions(scene: Scene) -> bool:
    return not (has_held_out_pair(scene) or has_held_out_place(scene))


def stored_captions(
    backbone: SmolVLM,
    recordings: Sequence[Recording],
    features: Sequence[Tensor],
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
) -> list[list[list[str]]]:
    """For each video, [prompt, answer] of the frozen model's greedy caption and of its detailed
    descriptions, drawn at temperature 1, with the video in context; written once to a file in
    `folder`, named by a fingerprint of model and videos."""
    fingerprint = hashlib.sha256(repr(recordings).encode())
    for value in (*features, *backbone.model.state_dict().values()):
        fingerprint.update(value.float().cpu().numpy().tobytes())
    path = folder / f"descriptions-{fingerprint.hexdigest()[:16]}.json"
    if path.is_file():
        stored: list[list[list[str]]] = read_json(path, LARGE_BYTES, CheckpointError, kind=list)
        return stored
    texts: list[list[list[str]]] = [[] for _ in recordings]

    def prompt(index: int, text: str) -> Prompt:
        recording = recordings[index]
        chunk = VideoChunk(features[index], recording.timestamps, recording.duration, 0, 0)
        return backbone.video_prompt(chunk, text)

    for start in range(0, len(recordings), _CAPTION_BATCH):
        report(start)
        members = range(start, min(start + _CAPTION_BATCH, len(recordings)))
        for prompts, params in (
            (CAPTION_PROMPTS, SamplingParams(max_new_tokens=_CAPTION_TOKENS)),
            (
                DETAIL_PROMPTS,
                SamplingParams(
                    max_new_tokens=_DETAIL_TOKENS,
                    temperature=1.0,
                    seed=start * _DESCRIPTIONS,
                    n=_DESCRIPTIONS,
                ),
            ),
        ):
            questions = [prompts[index % len(prompts)] for index in members]
            builders = [partial(prompt, *pair) for pair in zip(members, questions, strict=True)]
            answers = answer_prompts(backbone, builders, [None] * len(builders), params)
            for number, answer in enumerate(answers):
                row = number // params.n
                texts[members[row]].append([questions[row], answer.text])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, texts)
    return texts


def shapes_sources(
    config: TrainConfig, backbone: SmolVLM
) -> tuple[ShapesSource, ShapesSource | None]:
    """Augmented scenes of the train split, and scenes of the val split as they are.

    The visual tokens of the train split are cached in `config.feature_folder`.

    Raises:
        ConfigError: a value of `data` is not possible in this world.
    """
    data, seed = config.data, config.run.seed
    for name, value in (("max_frames", MAX_FRAMES), ("longest_edge", IMAGE_SIZE)):
        if getattr(data, name) != value:
            raise ConfigError(
                f"data.{name} must be {value} in the shapes world, got {getattr(data, name)}"
            )
    if data.prompts_per_video < 2:
        raise ConfigError(
            "data.prompts_per_video must be at least 2 in the shapes world (a caption and a "
            f"question), got {data.prompts_per_video}"
        )
    if any(count not in (1, 2, 4, 8) for count in data.chunks):
        raise ConfigError(
            f"data.chunks must be of 1, 2, 4 and 8 in the shapes world, got {list(data.chunks)}"
        )
    chunks = {count: clip_chunks(backbone, count, data.instruction) for count in data.chunks}
    frames = tuple(sorted({i for cut in chunks.values() for chunk in cut for i in chunk.frames}))

    def source(scenes: list[Scene], features: Tensor) -> ShapesSource:
        return ShapesSource(
            scenes=scenes,
            features=features,
            columns={frame: column for column, frame in enumerate(frames)},
            chunks=chunks,
            prompts=Prompts(backbone.tokenizer),
            questions=data.prompts_per_video - 1,
            second_turn_share=data.second_turn_share,
            seed=seed,
        )

    times = [frame / NUM_FRAMES for frame in frames]
    scenes = sample_scenes("train", data.videos or DEFAULT_VIDEOS, seed)
    folder = config.feature_folder
    training = source(scenes, _cached_tokens(backbone, scenes, times, seed, folder))
    if not data.val_videos:
        return training, None
    unseen = sample_scenes("val", data.val_videos, seed)
    tokens = cache_visual_tokens(backbone.model, unseen, None, times).to(torch.bfloat16)
    return training, source(unseen, tokens)


def train_shapes(
    config: TrainConfig, resume: bool | None = None, console: Console | None = None
) -> dict[str, Any]:
    """:func:`~v2l_fast.training.trainer.train` on this world; without `model.base`, the base model
    is trained first."""
    sources = shapes_sources if config.data.source == "shapes" else recorded_sources
    return train(config, resume, console=console, find_base=prepare_base, find_sources=sources)


def prepare_base(config: TrainConfig) -> str | Path:
    """The frozen model: `model.base`, or else the run's own tiny VLM, trained first if it is
    missing."""
    if config.model.base or config.data.source != "shapes":
        return base_model(config)
    # Slow to import, and not needed if the model exists.
    from v2l_fast.shapes.train import train_vlm

    folder = Path(config.run.folder)
    # Written last, so the model is complete if it exists.
    if not (folder / "base" / "preprocessor_config.json").exists():
        note(
            f"model.base is empty: training the base VLM first, in {folder / 'base'} (about 20 "
            "minutes on one core); set model.base=shapes to use the shipped one"
        )
        threads = config.run.threads or torch.get_num_threads()
        train_vlm(folder, folder / "vlm.json", seed=config.run.seed, threads=threads)
    return folder / "base"


def _cached_tokens(
    backbone: SmolVLM, scenes: list[Scene], times: list[float], seed: int, folder: Path
) -> Tensor:
    """Visual tokens of the scenes' augmented frames, computed once; the name of their file is a
    fingerprint of everything that they depend on."""
    fingerprint = hashlib.sha256(repr((len(scenes), times, seed)).encode())
    for name, value in sorted(backbone.model.model.state_dict().items()):
        if name.startswith(("vision_model.", "connector.")):
            fingerprint.update(value.float().cpu().numpy().tobytes())
    path = folder / f"{fingerprint.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return load_tensors(path, CheckpointError)[0]["features"]
    tokens = cache_visual_tokens(backbone.model, scenes, seed, times).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({"features": tokens}, path)
    return tokens
