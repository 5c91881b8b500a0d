"""Internalize a whole manifest of videos into an adapter store, on one machine or a cluster.

Videos are read ahead in shards that resume after an interruption; failures are listed and left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from v2l_fast.data.manifest import VideoExamples, group_by_video, load_manifest
from v2l_fast.data.readers import ClipReader, Failure, read_ahead
from v2l_fast.data.shards import Line, Progress, Shards, run_on_ray
from v2l_fast.errors import ConfigError, VideoError
from v2l_fast.files import write_jsonl
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_files import PreprocessingRecord, Provenance
from v2l_fast.model import BATCH_SIZE, Video2LoRA
from v2l_fast.store.adapter_store import AdapterStore
from v2l_fast.video import Clip, FrameSampling
from v2l_fast.video.reader import BACKENDS, Backend


@dataclass(frozen=True)
class CorpusSettings:
    """The model, and how it reads videos.

    Attributes:
        model, base, device, dtype: as of :meth:`~v2l_fast.model.Video2LoRA.from_pretrained`, the
            dtype by name.
        max_frames, longest_edge: None takes those of the hypernetwork's training.
        exact_frames: take exactly `max_frames` frames, whatever the duration.
        seconds: longest time one file may take to read.
        videos_per_shard: the most work that an interruption can cost.
        threads: number that read videos ahead; they share the batches of a GPU's decoder.
        decoder: as `backend` of :func:`~v2l_fast.video.load_video`; "auto" prefers the GPU. Files
            that it leaves to the CPU are counted in ``v2l_fast.video.fallbacks``.
        batch_size: videos that go through the model together.

    Raises:
        ConfigError: an unknown decoder, or ``batch_size`` is less than 1.
    """

    model: str
    base: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_frames: int | None = None
    longest_edge: int | None = None
    exact_frames: bool = False
    seconds: float = 60.0
    videos_per_shard: int = 64
    threads: int = 4
    decoder: Backend = "auto"
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        # Otherwise every video would fail and be left out.
        if self.decoder not in BACKENDS:
            raise ConfigError(f"decoder must be one of {', '.join(BACKENDS)}, got {self.decoder!r}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        # Raises if a value is out of range; the defaults do not matter here.
        FrameSampling(1, 2).override(self.max_frames, self.longest_edge)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that adapters depend on."""
        free = {"device", "seconds", "videos_per_shard", "threads", "decoder", "batch_size"}
        return {k: v for k, v in asdict(self).items() if k not in free}


@dataclass(frozen=True)
class Corpus:
    """The list of adapters (JSONL), their number, and the videos that failed."""

    listing: Path
    adapters: int
    failures: list[Failure]


class CorpusInternalizer:
    """The work of a shard: numbers of videos -> a line for each adapter or failure."""

    def __init__(
        self, videos: Sequence[VideoExamples], store: str | os.PathLike, settings: CorpusSettings
    ) -> None:
        self.videos = videos
        self.settings = settings
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        self.model = Video2LoRA.from_pretrained(
            settings.model, settings.base, settings.device, dtype
        )
        self.reader = ClipReader(
            self.model.config.sampling.override(
                settings.max_frames, settings.longest_edge, exact_frames=settings.exact_frames
            ),
            settings.seconds,
            settings.decoder,
            str(self.model.backbone.decoder.device),
        )
        self.store = AdapterStore(store)

    def __call__(self, numbers: Sequence[int]) -> list[Line]:
        videos = [self.videos[number] for number in numbers]
        threads, batch_size = self.settings.threads, self.settings.batch_size
        # The next batch is read while one is computed.
        clips = read_ahead(self._read, videos, threads, max(2 * threads, batch_size))
        adapters = self.model.internalize_each(
            clips,
            sampling=self.reader.sampling,
            batch_size=batch_size,
        )
        return [self._line(*pair) for pair in zip(videos, adapters, strict=True)]

    def close(self) -> None:
        self.store.close()

    def _read(self, video: VideoExamples) -> Clip | VideoError:
        try:
            return self.reader.read(video)[0]
        except VideoError as error:
            return error

    def _line(self, video: VideoExamples, adapter: Adapter | VideoError) -> Line:
        if isinstance(adapter, VideoError):
            return {"failure": asdict(Failure(video.name, str(adapter)))}
        if video.span is not None:
            # The adapter of a part must not be taken for that of the whole file.
            preprocessing: PreprocessingRecord = {
                **adapter.provenance["preprocessing"],
                "span": list(video.span),
            }
            provenance: Provenance = {**adapter.provenance, "preprocessing": preprocessing}
            adapter = replace(adapter, provenance=provenance)
        return {
            "video_path": video.examples[0].video_path,
            "span": video.span,
            "ids": [example.id for example in video.examples],
            "adapter": self.store.put(adapter),
        }


def internalize_corpus(
    manifest: str | os.PathLike,
    store: str | os.PathLike,
    settings: CorpusSettings,
    root: str | os.PathLike | None = None,
    engine: str = "local",
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Corpus:
    """Internalize every video (or span) of a manifest once; continues an interrupted run.

    Args:
        manifest: a line needs ``video_path`` alone; ``metadata.span`` is honored.
        store: folder of an :class:`~v2l_fast.store.adapter_store.AdapterStore`, which
            servers may use at the same time. The run's own files are under ``corpora/`` in it,
            among them ``adapters.jsonl``: video path, span, example ids and adapter id.
        engine: "local" in this process, or "ray" in `workers` processes of a Ray cluster.
        progress: called with the number of videos done and their total.

    Raises:
        ManifestError: the manifest cannot be used.
        ShardError, StoreError: a folder cannot be written, or the cluster did not finish.
        CheckpointError, ConfigError: the model cannot be loaded.
    """
    videos = group_by_video(load_manifest(manifest, root, required=("video_path",)))
    listed = [[v.examples[0].video_path, v.span, [e.id for e in v.examples]] for v in videos]
    fingerprint = settings.fingerprint()
    content = json.dumps({**fingerprint, "videos": listed})
    digest = hashlib.sha256(content.encode()).hexdigest()
    store = Path(store).resolve()
    folder = store / "corpora" / f"{Path(manifest).stem}-{digest[:12]}"
    shards = Shards.open(
        folder, fingerprint | {"digest": digest}, len(videos), settings.videos_per_shard
    )
    if engine == "ray":
        gpus = 0 if settings.device == "cpu" else None
        run_on_ray(shards, CorpusInternalizer, (videos, store, settings), workers, gpus, progress)
    elif shards.missing():
        with closing(CorpusInternalizer(videos, store, settings)) as work:
            shards.run(work, progress)
    lines = list(shards.lines())
    failures = [Failure(**line["failure"]) for line in lines if "failure" in line]
    adapters = [line for line in lines if "failure" not in line]
    listing = folder / "adapters.jsonl"
    write_jsonl(listing, adapters)
    return Corpus(listing, len(adapters), failures)
