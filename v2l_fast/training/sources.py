"""Videos of a manifest as training samples, read in data workers.

`ManifestSource` decides which questions and chunks a step sees and builds their token ids, equal to
those that `Video2LoRA.ask` and `Video2LoRA.internalize` build. Reading files is `data.readers`'.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from v2l_fast.console import progress_bar
from v2l_fast.data.feature_cache import FeatureCache, fill_cache, vision_fingerprint
from v2l_fast.data.manifest import (
    Example,
    ManifestError,
    VideoExamples,
    group_by_video,
    load_manifest,
    split_by_video,
    trained_on,
    video_share,
)
from v2l_fast.data.readers import ClipReader, Failure, Sample, Source
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.loading import shipped
from v2l_fast.pipeline import Context, chunk_spans
from v2l_fast.training.checkpoint import RunFolder, read_progress
from v2l_fast.training.config import DataConfig, TrainConfig
from v2l_fast.training.distributed import Distributed
from v2l_fast.video.reader import resolve_backend
from v2l_fast.vlm import Backbone, VideoChunk
from v2l_fast.vlm.base import PromptBuilder, Question

# Class -> largest number of answer tokens, without the stop token.
LENGTHS = {"short": 16, "medium": 64, "long": None}


def length_class(tokens: int) -> str:
    """The class of an answer of `tokens` tokens."""
    return next(name for name, most in LENGTHS.items() if most is None or tokens <= most)


def with_length(prompt: str, length: str) -> str:
    """The prompt, asking for a "short", "medium" or "long" answer in the words of training.

    A hypernetwork trained on answers of one length gives that length to every question. With
    `data.answer_length_tags`, training mixes lengths and a user asks for one:
    ``model.ask(with_length(question, "short"), adapter)``.

    Raises:
        ConfigError: `length` is none of these.
    """
    if length not in LENGTHS:
        raise ConfigError(f"length must be one of {', '.join(LENGTHS)}, got {length!r}")
    return f"{prompt} ({length} answer)"


# Share of the questions that state their answer's length where the option is on. The others teach
# the model to answer prompts without a tag.
TAGGED = 0.5


@dataclass(frozen=True)
class ManifestSource:
    """A :class:`~v2l_fast.data.readers.Source` of a manifest's videos; holds no weights.

    Attributes:
        videos: the videos with their examples.
        prompt_builder: the backbone's.
        reader: reads frames in the run's sampling.
        instruction, prompts_per_video, caption_share, answer_length_tags,
            second_turn_share, chunks: see :class:`~v2l_fast.training.config.DataConfig`.
        seed: of all random choices, with the step and the video's index.
        cache: stored connector outputs, used instead of the file where there are any.
        teacher: give samples of one chunk the prefix of a teacher that sees the video. (Its text
            has a space before the question that `Video2LoRA.ask_direct` does not write, because
            the questions are the same token ids for both models.)
        feature_bytes: of the connector outputs of one view.
        resize_on_device: samples hold frames, which the model's device resizes for the vision
            tower, in place of views. The views have the same bits.
    """

    videos: Sequence[VideoExamples]
    prompt_builder: PromptBuilder
    reader: ClipReader
    instruction: str
    prompts_per_video: int = 4
    caption_share: float = 0.5
    answer_length_tags: bool = False
    second_turn_share: float = 0.0
    chunks: tuple[int, ...] = (1,)
    seed: int = 0
    cache: FeatureCache | None = None
    teacher: bool = False
    feature_bytes: int = 0
    resize_on_device: bool = False

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def on_gpu(self) -> bool:
        """Whether frames are decoded on a GPU, which data workers must not use."""
        return torch.device(self.reader.device).type == "cuda"

    @property
    def chunk_views(self) -> int:
        """Maximum number of views of one chunk."""
        sampling, tile = self.reader.sampling, self.prompt_builder.tile_size
        # A square frame has most tiles; a tiled one also has a view of the whole.
        tiles = math.ceil(sampling.longest_edge / tile) ** 2
        return sampling.max_frames * (tiles + (tiles > 1))

    @property
    def video_bytes(self) -> int:
        """Maximum bytes of one video's views, or of its features if they are stored."""
        pixels = 3 * self.prompt_builder.tile_size**2
        each = self.feature_bytes if self.cache is not None else pixels
        return self.chunk_views * max(self.chunks) * each

    @property
    def stored_bytes(self) -> int:
        """Maximum bytes of all videos' features in every number of chunks."""
        return len(self) * self.chunk_views * sum(self.chunks) * self.feature_bytes

    def load(self, index: int, step: int) -> Sample | Failure:
        """Read video `index`; a file that cannot be read within `reader.seconds` is a Failure."""
        video = self.videos[index]
        rng = random.Random(f"{self.seed}/{step}/{index}")
        chunks = rng.choice(self.chunks)
        examples = self._choose(video.examples, rng)
        prefix, pairs = self._qa_pairs(examples, rng)
        started = time.perf_counter()
        try:
            parts = self._parts(video, chunks)
        except VideoError as error:
            return Failure(video.name, str(error))
        return Sample(
            video=video.name,
            chunks=self._contexts(parts),
            prompt_prefix=prefix,
            qa_pairs=pairs,
            task_types=tuple(example.task_type for example in examples),
            frames=sum(len(part.timestamps) for part in parts),
            decode_seconds=time.perf_counter() - started,
            teacher_prefix=self._teacher_prefix(parts, prefix) if self.teacher else None,
        )

    # --- questions and answers --------------------------------------------------------------------

    def _choose(self, examples: Sequence[Example], rng: random.Random) -> list[Example]:
        """Captions, then questions, drawn without replacement."""
        total = min(self.prompts_per_video, len(examples))
        captions = [example for example in examples if example.is_caption]
        questions = [example for example in examples if not example.is_caption]
        share = total * self.caption_share
        count = int(share) + (rng.random() < share % 1)
        count = min(len(captions), max(count, total - len(questions)))
        return rng.sample(captions, count) + rng.sample(questions, total - count)

    def _qa_pairs(
        self, examples: Sequence[Example], rng: random.Random
    ) -> tuple[list[int], tuple[tuple[list[int], list[int]], ...]]:
        """The ids that all questions start with, and the rest of each with its answer."""
        questions, answers = [], []
        for number, example in enumerate(examples):
            finished = not example.metadata.get("truncated", False)
            answer = self.prompt_builder.answer(example.target_text.strip(), finished)
            prompt = example.prompt
            if self.answer_length_tags and rng.random() < TAGGED:
                prompt = with_length(prompt, length_class(len(answer) - finished))
            question: Question = prompt
            others = [*examples[:number], *examples[number + 1 :]]
            # Nothing is drawn without the option: its runs keep their choices.
            if others and self.second_turn_share and rng.random() < self.second_turn_share:
                before = rng.choice(others)
                question = [
                    {"role": "user", "content": before.prompt},
                    {"role": "assistant", "content": before.target_text.strip()},
                    {"role": "user", "content": prompt},
                ]
            questions.append(self.prompt_builder.question(question))
            answers.append(answer)
        # Whole prompts are tokenized, then cut, because a tokenizer may merge across the cut. Each
        # question keeps a token of its own, which predicts the first token of its answer.
        shared = len(os.path.commonprefix([question[:-1] for question in questions]))
        pairs = tuple((q[shared:], a) for q, a in zip(questions, answers, strict=True))
        return questions[0][:shared], pairs

    # --- contexts ---------------------------------------------------------------------------------

    def _parts(self, video: VideoExamples, chunks: int) -> list[VideoChunk]:
        """The video's chunks: their stored features, else their views or frames."""
        stored = None if self.cache is None else self.cache.find(video, chunks)
        tile = self.prompt_builder.tile_size
        return stored or self.reader.views(video, chunks, tile, not self.resize_on_device)

    def _contexts(self, parts: Sequence[VideoChunk]) -> tuple[Context, ...]:
        return tuple(
            Context.build(self.prompt_builder, part, self.instruction, span)
            for part, span in zip(parts, chunk_spans(len(parts)), strict=True)
        )

    def _teacher_prefix(self, parts: Sequence[VideoChunk], prefix: list[int]) -> list[int] | None:
        opening = self.prompt_builder.text_prefix()
        if len(parts) > 1 or prefix[: len(opening)] != opening:
            return None
        with_video = self.prompt_builder.text_prefix_with_video(*parts[0].layout)
        return with_video + prefix[len(opening) :]


def manifest_sources(
    data: DataConfig, backbone: Backbone, seed: int, teacher: bool = False
) -> tuple[ManifestSource, ManifestSource | None]:
    """The videos to train on, and those to validate on (None if there are none).

    teacher: prepare samples for a KL teacher, see :class:`ManifestSource`.

    Raises:
        ManifestError: a manifest cannot be used, or a video is in both parts.
        CacheError: the feature cache holds nothing of this model and sampling.
    """
    examples = [e for path in data.manifests for e in load_manifest(path)]
    if data.val_manifests:
        train = [e for e in examples if e.split in ("train", None)]
        val = [e for path in data.val_manifests for e in load_manifest(path)]
    else:
        train, val = split_by_video(examples, data.val_share, seed)
    # Each manifest was checked by itself; several may disagree.
    if shared := trained_on(train, val):
        raise ManifestError(
            f"{', '.join(data.val_manifests or data.manifests)}: {len(shared)} of its videos are "
            f"trained on, {shared[0]} among them; a video belongs to one split"
        )
    if not train:
        splits = sorted({str(e.split) for e in examples if e.split not in ("train", None)})
        remedy = (
            f"all are of the splits {', '.join(splits)}; set split to train or leave it out"
            if splits and all(e.split not in ("train", None) for e in examples)
            else "lower data.val_share or add videos"
        )
        raise ManifestError(f"{', '.join(data.manifests)}: no example to train on; {remedy}")
    device = backbone.decoder.device
    on_gpu = resolve_backend(data.decoder, device) == "dali"
    reader = ClipReader(
        data.sampling, decoder=data.decoder, device=str(device) if on_gpu else "cpu"
    )
    cache = None
    if data.feature_cache not in ("", "auto", "off"):
        cache = FeatureCache(data.feature_cache, reader, vision_fingerprint(backbone))
        cache.check()

    def source(examples: Sequence[Example], limit: int) -> ManifestSource:
        return ManifestSource(
            videos=_limited(group_by_video(examples), limit, seed),
            prompt_builder=backbone.prompt_builder,
            reader=reader,
            instruction=data.instruction,
            prompts_per_video=data.prompts_per_video,
            caption_share=data.caption_share,
            answer_length_tags=data.answer_length_tags,
            second_turn_share=data.second_turn_share,
            chunks=data.chunks,
            seed=seed,
            cache=cache,
            teacher=teacher,
            feature_bytes=view_feature_bytes(backbone),
            # A GPU resizes in no time; on a CPU, the step would wait for what workers do ahead.
            resize_on_device=device.type == "cuda" and not on_gpu,
        )

    keep = bool(val) and data.val_videos > 0
    return source(train, data.videos), source(val, data.val_videos) if keep else None


# Largest share of the free space that "auto" takes: checkpoints and other runs need some, too.
_DISK_SHARE = 0.5


def worth_storing(
    config: TrainConfig, train: ManifestSource, val: ManifestSource | None
) -> tuple[bool, str]:
    """Whether `data.feature_cache` "auto" stores features, and one line that says why."""
    reads = config.optim.steps * config.optim.batch_size / len(train)
    if reads <= 1:
        return False, "features are not stored: no video is read more than once"
    need = train.stored_bytes + (0 if val is None else val.stored_bytes)
    folder = config.feature_folder
    exists = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(exists).free
    size = f"{need / 1e9:.3g} GB at most, {free / 1e9:.3g} GB are free"
    if need > _DISK_SHARE * free:
        return False, (
            f"features are not stored in {folder}: they would take more than half of the free "
            f"space ({size}); name a folder on another disk with v2l cache and data.feature_cache"
        )
    return True, (
        f"features are stored in {folder} ({size}), because each video is read {reads:.1f} times; "
        "data.feature_cache=off reads videos instead"
    )


def view_feature_bytes(backbone: Backbone) -> int:
    """Bytes of the connector outputs of one view."""
    decoder = backbone.decoder
    width = decoder.text_model.config.hidden_size
    return backbone.prompt_builder.tokens_per_view * width * decoder.dtype.itemsize


def _limited(videos: list[VideoExamples], limit: int, seed: int) -> list[VideoExamples]:
    """`limit` of the videos (0: all), chosen by hash, in their order."""
    if not 0 < limit < len(videos):
        return videos
    chosen = sorted(range(len(videos)), key=lambda i: video_share(videos[i].name, seed))[:limit]
    return [videos[i] for i in sorted(chosen)]


# The videos to train on, and those to validate on if there are any.
Sources = tuple[Source, Source | None]


def base_model(config: TrainConfig) -> str | Path:
    """Where the frozen model lies: a folder or a hub id.

    Raises:
        ConfigError: `model.base` is empty.
    """
    if not config.model.base:
        raise ConfigError("model.base is empty; name the frozen VLM, a folder or a hub id")
    return shipped(config.model.base, "base") or config.model.base


def open_sources(config: TrainConfig, backbone: Backbone) -> Sources:
    """The videos of the manifests that `config.data` names.

    Raises:
        ConfigError: no manifest is named, or a task type in them has no weight.
        V2LError: a manifest or the feature cache cannot be used.
    """
    if config.data.source != "manifest":
        raise ConfigError(
            f"data.source={config.data.source} has a trainer of its own: use v2l train, or "
            "v2l_fast.shapes.source.train_shapes"
        )
    if not config.data.manifests:
        raise ConfigError('data.manifests is empty; give data.manifests=["train.jsonl"]')
    loss = config.loss
    train, val = manifest_sources(config.data, backbone, config.run.seed, loss.kl_weight > 0)
    videos = [*train.videos, *(val.videos if val is not None else ())]
    task_types = {example.task_type for video in videos for example in video.examples}
    if loss.kind_weights and (missing := sorted(task_types - loss.kind_weights.keys())):
        raise ConfigError(
            f"loss.kind_weights has no weight for task_type {', '.join(missing)} of the manifests; "
            f"add loss.kind_weights.{missing[0]}=1, or leave kind_weights out"
        )
    return train, val


# --- stored features ------------------------------------------------------------------------------


def decide_features(
    config: TrainConfig, sources: Sources, folder: RunFolder, distributed: Distributed
) -> tuple[bool, str]:
    """Whether this run stores features because `data.feature_cache` is "auto", and one line on why.

    A resumed run does what it did before its checkpoint (the line is then empty), because features
    of videos encoded alone differ by rounding from those of a batch.
    """
    train, val = sources
    if (
        config.data.feature_cache != "auto"
        or not isinstance(train, ManifestSource)
        or not (val is None or isinstance(val, ManifestSource))
    ):
        return False, ""
    latest = folder.latest()
    if latest is None:
        decision = worth_storing(config, train, val)
    else:
        progress = read_progress(latest)
        unfinished = progress["step"] < config.optim.steps
        decision = unfinished and bool(progress.get("features", False)), ""
    # The disk that the main process sees decides.
    return distributed.gather(decision)[0]


def store_features(
    config: TrainConfig, backbone: Backbone, sources: Sources, distributed: Distributed
) -> Sources:
    """Store the missing features of all videos, each process a part; the sources that read them.

    A video that cannot be read is left out; training meets it again and quarantines it.

    Raises:
        CacheError: a file cannot be written.
    """
    model = vision_fingerprint(backbone)
    parts = [part for part in sources if isinstance(part, ManifestSource)]
    with progress_bar("storing features") if distributed.is_main else nullcontext() as report:
        for part in parts:
            fill_cache(
                FeatureCache(config.feature_folder, part.reader, model),
                backbone,
                part.videos[distributed.rank :: distributed.count],
                part.chunks,
                threads=max(1, config.data.workers),
                progress=lambda done, total: report and report("videos", done, total),
            )
    distributed.wait_for_all()
    train, *val = (
        replace(part, cache=FeatureCache(config.feature_folder, part.reader, model))
        for part in parts
    )
    return train, val[0] if val else None
