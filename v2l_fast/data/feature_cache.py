"""Connector outputs on disk, so that later epochs neither decode videos nor run the vision tower.

The cache is a folder of safetensors files; files are added and never changed. A tensor's name is a
hash of everything that determines it (the file's bytes, frames, resolution, preprocessing, vision
weights, dtype). The header of each file lists the video, span and sampling of its tensors; these
headers are the only index. Any number of processes may add at the same time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from v2l_fast.data.manifest import VideoExamples
from v2l_fast.data.readers import ClipReader, Failure, read_ahead
from v2l_fast.data.shards import Progress
from v2l_fast.errors import V2LError, VideoError
from v2l_fast.files import file_sha256, json_sha256, parse_json
from v2l_fast.tensor_files import TensorHeader, read_header, save_tensors
from v2l_fast.vlm import Backbone, VideoChunk

log = logging.getLogger(__name__)

_RECORDS = "v2l_features"


class CacheError(V2LError):
    """A feature cache cannot be used."""


@dataclass(frozen=True)
class _Stored:
    """The safetensors file of a video's chunks, and a record of each chunk."""

    file: Path
    chunks: tuple[dict[str, Any], ...]


class FeatureCache:
    """Connector outputs of videos for one model and one sampling.

    Picklable; each process opens the files itself.

    Args:
        folder: created when something is stored.
        reader: reads frames in the sampling of the cache.
        model: :func:`vision_fingerprint` of the model.
    """

    def __init__(self, folder: str | os.PathLike, reader: ClipReader, model: str) -> None:
        self.folder = Path(folder)
        self.reader = reader
        self.model = model
        self._stored: dict[str, _Stored] = {}
        # (path, bytes, modification time) -> sha256, so that known files are not read again.
        self._digests: dict[tuple[str, int, int], str] = {}
        self._handles: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._learn(path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}

    def __len__(self) -> int:
        """Number of stored videos and spans, of every model and sampling."""
        return len(self._stored)

    def check(self) -> None:
        """Raises CacheError if nothing is stored for this model and sampling."""
        setting = self._setting()
        if not any(stored.startswith(setting) for stored in self._stored):
            raise CacheError(
                f"{self.folder}: none of its {len(self)} entries is for this model, dtype, "
                "frame count and resolution; fill it by v2l cache with the same settings"
            )

    def find(self, video: VideoExamples, chunks: int) -> list[VideoChunk] | None:
        """The video's chunks with features, or None if they are not stored."""
        stored = self._stored.get(self._request(video, chunks))
        if stored is None:
            return None
        if stored.file not in self._handles:
            self._handles[stored.file] = safe_open(stored.file, framework="pt")
        handle = self._handles[stored.file]
        return [
            VideoChunk(
                handle.get_tensor(chunk["tensor"]),
                tuple(chunk["timestamps"]),
                chunk["duration"],
                chunk["rows"],
                chunk["cols"],
                tuple(chunk["indices"]),
            )
            for chunk in stored.chunks
        ]

    def holds(self, video: VideoExamples, chunks: int) -> bool:
        """Whether the video is stored in `chunks` chunks."""
        return self._request(video, chunks) in self._stored

    def add(self, entries: Sequence[tuple[VideoExamples, int, list[VideoChunk]]]) -> None:
        """Store (video, number of chunks requested, chunks with features) in one new file.

        Raises:
            CacheError: the file cannot be written; nothing is stored.
        """
        tensors: dict[str, Tensor] = {}
        records = []
        for video, count, chunks in entries:
            described = []
            for chunk in chunks:
                name = json_sha256(self._digest(video.path), self._setting(), chunk.indices)
                tensors[name] = chunk.visual
                fields = {k: v for k, v in vars(chunk).items() if k != "visual"}
                described.append({"tensor": name, **fields})
            status = os.stat(video.path)
            records.append(
                {
                    "request": self._request(video, count),
                    "path": video.path,
                    "bytes": status.st_size,
                    "modified_ns": status.st_mtime_ns,
                    "sha256": self._digest(video.path),
                    "chunks": described,
                }
            )
        # Named by its content, so that processes which store the same videos write the same file.
        path = (
            self.folder / f"{json_sha256(sorted(r['request'] for r in records))[:32]}.safetensors"
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, path, {_RECORDS: json.dumps(records)})
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path}: cannot be written ({error})") from None
        self._learn(path)

    # --- index ------------------------------------------------------------------------------------

    def _learn(self, path: Path) -> None:
        """Add the records of a file's header to the index."""
        try:
            header = read_header(path, CacheError)
            records = parse_json(header.metadata.get(_RECORDS, ""), f"{path}: records", CacheError)
            stored, digests = {}, {}
            for record in records:
                if all(_is_chunk(chunk, header) for chunk in record["chunks"]):
                    stored[record["request"]] = _Stored(path, tuple(record["chunks"]))
                    known = (record["path"], record["bytes"], record["modified_ns"])
                    digests[known] = str(record["sha256"])
        except (CacheError, LookupError, TypeError) as error:
            log.warning(
                "%s: not a complete feature file (%s); v2l cache stores it again", path, error
            )
            return
        self._stored |= stored
        self._digests |= digests

    def _setting(self) -> str:
        """16 hexadecimal digits of everything but the video that determines its features."""
        return json_sha256(self.model, asdict(self.reader.sampling))[:16]

    def _request(self, video: VideoExamples, chunks: int) -> str:
        return self._setting() + json_sha256(self._digest(video.path), video.span, chunks)[:32]

    def _digest(self, path: str) -> str:
        """sha256 of a file, "" if it cannot be read."""
        try:
            status = os.stat(path)
            version = (path, status.st_size, status.st_mtime_ns)
            if version not in self._digests:
                self._digests[version] = file_sha256(path)
        except OSError:
            return ""
        return self._digests[version]


def fill_cache(
    cache: FeatureCache,
    backbone: Backbone,
    videos: Sequence[VideoExamples],
    chunks: Sequence[int] = (1,),
    videos_per_file: int = 64,
    threads: int = 2,
    progress: Progress = lambda done, total: None,
) -> list[Failure]:
    """Store the missing ones of `videos` in each number of `chunks`; returns those that failed.

    An interruption costs at most `videos_per_file` videos.
    """
    missing = [
        (video, counts)
        for video in videos
        if (counts := [count for count in chunks if not cache.holds(video, count)])
    ]
    failures: list[Failure] = []
    batch: list[tuple[VideoExamples, int, list[VideoChunk]]] = []

    def read(item: tuple[VideoExamples, list[int]]) -> list[list[VideoChunk]] | Failure:
        video, counts = item
        try:
            return [cache.reader.views(video, n, backbone.prompt_builder.tile_size) for n in counts]
        except VideoError as error:
            return Failure(video.name, str(error))

    done = len(videos) - len(missing)
    progress(done, len(videos))
    for (video, counts), result in zip(missing, read_ahead(read, missing, threads), strict=True):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            for count, parts in zip(counts, result, strict=True):
                batch.append((video, count, list(_encoded(backbone, parts))))
        done += 1
        if len(batch) >= videos_per_file:
            cache.add(batch)
            batch = []
        progress(done, len(videos))
    if batch:
        cache.add(batch)
    return failures


def vision_fingerprint(backbone: Backbone) -> str:
    """Hash of everything in a model that determines features: preprocessing, weights, dtype."""
    decoder = backbone.decoder
    text = {id(p) for part in (decoder.text_model, decoder.lm_head) for p in part.parameters()}
    digest = hashlib.sha256(
        f"{backbone.preprocessing}/{backbone.prompt_builder.tile_size}".encode()
    )
    for name, parameter in backbone.model.named_parameters():
        if id(parameter) not in text:
            digest.update(f"{name}/{parameter.dtype}/{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def _is_chunk(chunk: Any, header: TensorHeader) -> bool:
    """Whether a record of a chunk has this format, and its tensor is in the file."""
    sizes = (chunk["rows"], chunk["cols"], *chunk["indices"])
    times = (chunk["duration"], *chunk["timestamps"])
    return (
        chunk["tensor"] in header.tensors
        and all(type(size) is int for size in sizes)
        and all(type(time) in (int, float) for time in times)
    )


def _encoded(backbone: Backbone, chunks: Iterable[VideoChunk]) -> Iterator[VideoChunk]:
    for chunk in chunks:
        yield replace(chunk, visual=backbone.encode_views(chunk.visual).cpu())
