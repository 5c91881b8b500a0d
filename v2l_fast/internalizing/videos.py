"""Videos to adapters: their parts through the model together, what is recorded, what failed.

Responsible for which adapter, or error, each video gets; reading parts is `parts`', the passes over
several of them `batches`'.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from v2l_fast.errors import VideoError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.internalizing.batches import iter_generate
from v2l_fast.internalizing.parts import Part, Reading, Video
from v2l_fast.vlm import Backbone
from v2l_fast.work_units import WorkUnit


class VideoInternalizer:
    """A frozen VLM and a hypernetwork that no longer trains: its weights are read once.

    Attributes:
        bias: the bias adapter that all adapters share.
        fingerprint: of the hypernetwork.
    """

    def __init__(self, backbone: Backbone, hypernet: HyperNetwork) -> None:
        self._backbone, self._hypernet = backbone, hypernet
        self.bias = hypernet.bias_adapter()
        self.fingerprint = hypernet.fingerprint

    def steps(
        self, videos: Sequence[Video | VideoError], reading: Reading, batch_tokens: int
    ) -> Generator[WorkUnit, None, list[Adapter | VideoError]]:
        """What becomes of each video, in units of work (see :mod:`v2l_fast.work_units`).

        Args:
            videos: files, clips, or the error of one that could not be read.
            batch_tokens: as of :func:`~v2l_fast.internalizing.batches.iter_generate`.

        Returns:
            For each video its adapter, composed of its parts', or the error that names it.
        """
        parts: list[Part] = []
        owners: list[int] = []
        failed: dict[int, VideoError] = {}
        for number, video in enumerate(videos):
            if isinstance(video, VideoError):
                failed[number] = video
                continue
            yield "decode", number, len(videos)
            try:
                found = reading.parts(video)
            except VideoError as error:
                failed[number] = error
                continue
            parts += found
            owners += [number] * len(found)
        adapters = yield from iter_generate(
            self._backbone, self._hypernet, parts, reading.longest_edge, batch_tokens
        )
        made: list[list[Adapter]] = [[] for _ in videos]
        for number, part, adapter in zip(owners, parts, adapters, strict=True):
            if adapter is None:
                failed[number] = VideoError(
                    f"{part.clip.path or 'frames in memory'}: the context gives NaN or infinite "
                    "factors; are the base model's weights and dtype sound? float16 overflows: "
                    "use bfloat16 or float32"
                )
                continue
            record = self._provenance(part, reading)
            made[number].append(replace(adapter, bias=self.bias, provenance=record))
        return [
            failed[number] if number in failed else _whole(own) for number, own in enumerate(made)
        ]

    def _provenance(self, part: Part, reading: Reading) -> dict[str, Any]:
        clip, config = part.clip, self._hypernet.config
        return {
            "source": {
                "name": None if clip.path is None else Path(clip.path).name,
                "sha256": clip.sha256,
                "frame_indices": [int(i) for i in clip.indices],
                "timestamps": [round(t, 6) for t in clip.timestamps],
                "fps": clip.fps,
                "duration": clip.duration,
                "num_frames": clip.num_frames,
                "place": list(part.place),
            },
            "preprocessing": {
                "version": self._backbone.preprocessing,
                "longest_edge": reading.longest_edge,
                "exact_frames": reading.exact_frames,
                "instruction": config.instruction,
            },
            "hypernetwork": self.fingerprint,
            "base_model": config.base_model_name_or_path or self._backbone.name_or_path,
        }


def _whole(parts: list[Adapter]) -> Adapter:
    return parts[0] if len(parts) == 1 else Adapter.compose(parts)
