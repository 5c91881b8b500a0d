"""Connector outputs on disk, so that later epochs neither decode videos nor run the vision tower.

A folder of safetensors files that are only ever added. A tensor is named by what it was made from
(the file's bytes, frames, resolution, preprocessing, vision weights, dtype); each file's header
also says which video, span and sampling its tensors answer. The headers are the whole index: it is
read when the folder is opened and cannot be lost, nor disagree with the tensors. Any number of
processes may add at the same time.
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
from v2l_fast.data.readers import ClipReader, read_ahead
from v2l_fast.data.samples import Failure
from v2l_fast.data.shards import Progress
from v2l_fast.errors import V2LError, VideoError
from v2l_fast.files import file_sha256, parse_json
from v2l_fast.tensor_files import TensorHeader, read_header, save_tensors
from v2l_fast.vlm import Backbone, VideoChunk

log = logging.getLogger(__name__)

_RECORDS = "v2l_features"


class CacheError(V2LError):
    """A feature cache cannot be used."""


@dataclass(frozen=True)
class _Stored:
    """Where a video's chunks lie: the safetensors file and each chunk's description."""

    file: Path
    chunks: tuple[dict[str, Any], ...]


class FeatureCache:
    """Connector outputs of videos, as one model sees them in one sampling.

    Picklable; workers open files of their own.

    Args:
        folder: of the cache; made when something is stored.
        reader: sampling and resolution.
        model: :func:`vision_fingerprint` of the model.
    """

    def __init__(self, folder: str | os.PathLike, reader: ClipReader, model: str) -> None:
        self.folder = Path(folder)
        self.reader = reader
        self.model = model
        self._stored: dict[str, _Stored] = {}
        # (path, bytes, modification time) -> sha256: a file known by these is not read again.
        self._digests: dict[tuple[str, int, int], str] = {}
        self._handles: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._learn(path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}

    def __len__(self) -> int:
        """Videos and spans stored, of every model and sampling."""
        return len(self._stored)

    def check(self) -> None:
        """Raises CacheError when nothing here was made by this model in this sampling."""
        setting = self._setting()
        if not any(stored.startswith(setting) for stored in self._stored):
            raise CacheError(
                f"{self.folder}: none of its {len(self)} entries was made by this model, dtype, "
                "frame count and resolution; fill it with v2l cache and the same settings"
            )

    def find(self, video: VideoExamples, chunks: int) -> list[VideoChunk] | None:
        """The video's chunks with features, or None when they are not stored."""
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
        """Whether the video is stored in that many chunks."""
        return self._request(video, chunks) in self._stored

    def add(self, entries: Sequence[tuple[VideoExamples, int, list[VideoChunk]]]) -> None:
        """Store (video, chunks asked for, chunks with features) in a new file, or nothing at all.

        Raises:
            CacheError: the disk is full or the folder not writable.
        """
        tensors: dict[str, Tensor] = {}
        records = []
        for video, count, chunks in entries:
            described = []
            for chunk in chunks:
                name = _hash(self._digest(video.path), self._setting(), chunk.indices)
                tensors[name] = chunk.visual
                told = {k: v for k, v in vars(chunk).items() if k != "visual"}
                described.append({"tensor": name, **told})
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
        # Named by what it holds: two processes that store the same write the same file.
        path = self.folder / f"{_hash(sorted(r['request'] for r in records))[:32]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, path, {_RECORDS: json.dumps(records)})
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path}: cannot be written ({error})") from None
        self._learn(path)

    # --- index ------------------------------------------------------------------------------------

    def _learn(self, path: Path) -> None:
        """Take up a file's records from its header."""
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
            log.warning("%s: not a whole feature file (%s); v2l cache stores it again", path, error)
            return
        self._stored |= stored
        self._digests |= digests

    def _setting(self) -> str:
        """16 hexadecimal digits of everything but the video that decides its features."""
        how = {"seconds", "decoder", "device"}
        reader = {k: v for k, v in asdict(self.reader).items() if k not in how}
        return _hash(self.model, reader)[:16]

    def _request(self, video: VideoExamples, chunks: int) -> str:
        return self._setting() + _hash(self._digest(video.path), video.span, chunks)[:32]

    def _digest(self, path: str) -> str:
        """sha256 of a file, "" when it cannot be read."""
        try:
            status = os.stat(path)
            known = (path, status.st_size, status.st_mtime_ns)
            if known not in self._digests:
                self._digests[known] = file_sha256(path)
        except OSError:
            return ""
        return self._digests[known]


def fill_cache(
    cache: FeatureCache,
    backbone: Backbone,
    videos: Sequence[VideoExamples],
    chunks: Sequence[int] = (1,),
    videos_per_file: int = 64,
    threads: int = 2,
    progress: Progress = lambda done, total: None,
) -> list[Failure]:
    """Store what is missing of `videos` in every count of `chunks`; returns those unreadable.

    Interrupted, it loses at most the file it was gathering, and goes on from there.
    """
    missing = [
        (video, counts)
        for video in videos
        if (counts := [count for count in chunks if not cache.holds(video, count)])
    ]
    failures: list[Failure] = []
    gathered: list[tuple[VideoExamples, int, list[VideoChunk]]] = []

    def read(item: tuple[VideoExamples, list[int]]) -> list[list[VideoChunk]] | Failure:
        video, counts = item
        try:
            return [cache.reader.views(video, n, backbone.prompt_builder.tile_size) for n in counts]
        except VideoError as error:
            return Failure(video.name, str(error))

    done = len(videos) - len(missing)
    progress(done, len(videos))
    for (video, counts), found in zip(missing, read_ahead(read, missing, threads), strict=True):
        if isinstance(found, Failure):
            failures.append(found)
        else:
            for count, parts in zip(counts, found, strict=True):
                gathered.append((video, count, list(_encoded(backbone, parts))))
        done += 1
        if len(gathered) >= videos_per_file:
            cache.add(gathered)
            gathered = []
        progress(done, len(videos))
    if gathered:
        cache.add(gathered)
    return failures


def vision_fingerprint(backbone: Backbone) -> str:
    """Hash of everything in a model that turns frames into features: rules, weights, dtype."""
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
    """Whether a record's chunk is one of this format, its tensor in the file."""
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


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
