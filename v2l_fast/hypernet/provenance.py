"""What an adapter was generated from: the record in its file's header, as JSON.

The types describe files of this version. Files of others may lack fields or have more, so what is
read from a file is checked by :func:`~v2l_fast.hypernet.adapter_files.check_provenance`.
"""

from __future__ import annotations

from typing import TypedDict


class VideoSource(TypedDict, total=False):
    """The frames of one chunk.

    Attributes:
        name: file name without its folder; None for frames in memory.
        sha256: of the file's bytes, or of the frames in memory.
        frame_indices, timestamps: of the sampled frames; seconds.
        fps, duration, num_frames: of the whole video; duration in seconds.
        place: start and end of the chunk as fractions of the video.
    """

    name: str | None
    sha256: str
    frame_indices: list[int]
    timestamps: list[float]
    fps: float
    duration: float
    num_frames: int
    place: list[float]


class PreprocessingRecord(TypedDict, total=False):
    """How the frames became a context.

    Attributes:
        version: of the preprocessing of this model family.
        longest_edge: pixels.
        exact_frames: whether sampling took exactly the maximum number of frames.
        instruction: text that follows the video.
        span: start and end in seconds, where a manifest selects a part of the file.
    """

    version: str
    longest_edge: int
    exact_frames: bool
    instruction: str
    span: list[float]


class Provenance(TypedDict, total=False):
    """The record of one adapter.

    Attributes:
        source, preprocessing: of an adapter of one chunk.
        hypernetwork: fingerprint of the network that generated it.
        base_model: name of the frozen VLM.
        chunks: records of the chunks of a composed adapter, in the order of time.
        pruned: arguments (keep, by, seed) of :meth:`~v2l_fast.hypernet.adapter.Adapter.prune`.
        without_layers: layers whose update was removed.
    """

    source: VideoSource
    preprocessing: PreprocessingRecord
    hypernetwork: str
    base_model: str
    chunks: list[Provenance]
    pruned: list[int | str]
    without_layers: list[int]
