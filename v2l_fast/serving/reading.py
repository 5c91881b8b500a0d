"""Reading the videos people send: looked into, and decoded on the CPU, in processes of their own.

A GPU decodes in the server's process: its driver's state cannot be shared, and frames stay on the
device. By then the file has been looked into apart. Files the GPU leaves to FFmpeg are decoded
apart again.
"""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from v2l_fast.errors import V2LError, VideoError
from v2l_fast.serving import isolation
from v2l_fast.serving.isolation import Isolation
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.requests import Cancellation
from v2l_fast.video import Clip, Limits, VideoInfo, fallbacks, load_video, probe
from v2l_fast.video.reading import resolved

if TYPE_CHECKING:
    from v2l_fast.model import Video2LoRA

# What reading a file imports, and what each process imports again: the command it was started by.
PRELOAD = ("v2l_fast.serving.reading", "v2l_fast.video.pyav_source", "v2l_fast.cli.entry")
# Files looked into at the same time; whoever decodes bounds that itself.
PROBES = 4


class VideoReader:
    """What a server reads video files with.

    Args:
        model: what samples are taken for.
        limits: of a file, and of the process that reads it.
    """

    def __init__(self, model: Video2LoRA, limits: ServerLimits) -> None:
        self._config, self._device = model.config, model.backbone.decoder.device
        self._limits = limits
        self._isolation = Isolation(limits.decode_bytes, PRELOAD)
        self._probing = threading.Semaphore(PROBES)

    @staticmethod
    def prepare() -> None:
        """Start importing what the first file would wait for, before there is a model."""
        isolation.prepare(PRELOAD)

    def probe(self, path: str | os.PathLike) -> VideoInfo:
        """:func:`v2l_fast.video.probe`, apart.

        Raises:
            VideoError: it is no video, beyond the limits, or harms whoever reads it.
            V2LError: the reader has been closed, or there can be no process.
        """
        with self._probing:
            found, _ = self._isolation.run(_probe, path, self._limits.probing)
        return VideoInfo(**found)

    def load(
        self,
        path: str | os.PathLike,
        max_frames: int,
        longest_edge: int,
        exact_frames: bool,
        cancellation: Cancellation | None = None,
    ) -> Clip:
        """:func:`v2l_fast.video.load_video` on the CPU, apart; raises as :meth:`probe`.

        Raises:
            JobCancelled: ``cancellation`` was requested.
        """
        options = max_frames, self._config.target_fps, exact_frames, longest_edge
        found, frames = self._isolation.run(
            _load, path, self._limits.decoding, *options, cancellation=cancellation
        )
        return Clip(
            frames=torch.from_numpy(frames),
            indices=np.array(found.pop("indices"), dtype=np.int64),
            timestamps=tuple(found.pop("timestamps")),
            presentation_times=tuple(found.pop("presentation_times")),
            **found,
        )

    def load_clip(
        self,
        path: str | os.PathLike,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        exact_frames: bool = False,
        cancellation: Cancellation | None = None,
    ) -> Clip:
        """:meth:`Video2LoRA.load_clip` of a file: by the GPU where it can, else :meth:`load`; the
        frames are on the model's device. The GPU reads to the end whatever is cancelled."""
        sampling = self._config.sampling.override(max_frames, longest_edge)
        frames, edge = sampling.max_frames, sampling.longest_edge
        if resolved("auto", self._device) == "dali":
            try:
                return load_video(
                    path,
                    frames,
                    self._config.target_fps,
                    exact_frames=exact_frames,
                    limits=self._limits.decoding,
                    backend="dali",
                    longest_edge=edge,
                    device=self._device,
                )
            except VideoError as error:
                fallbacks.add(os.fspath(path), "not by the GPU", str(error))
        clip = self.load(path, frames, edge, exact_frames, cancellation)
        return replace(clip, frames=clip.frames.to(self._device))

    def close(self, reason: V2LError) -> None:
        """End what is being read apart, and whatever comes, with ``reason``."""
        self._isolation.close(reason)


# --- in the other process ---------------------------------------------------------------------


def _probe(path: str, limits: Limits) -> tuple[dict[str, Any], None]:
    return asdict(probe(path, limits)), None


def _load(
    path: str,
    limits: Limits,
    max_frames: int,
    target_fps: float,
    exact_frames: bool,
    longest_edge: int,
) -> tuple[dict[str, Any], torch.Tensor]:
    clip = load_video(
        path, max_frames, target_fps, exact_frames, limits, "pyav", longest_edge=longest_edge
    )
    found = {
        "indices": clip.indices.tolist(),
        "timestamps": clip.timestamps,
        "presentation_times": clip.presentation_times,
        "fps": clip.fps,
        "duration": clip.duration,
        "num_frames": clip.num_frames,
        "sha256": clip.sha256,
        "path": clip.path,
    }
    return found, clip.frames
