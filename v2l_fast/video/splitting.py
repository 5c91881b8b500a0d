"""A clip in memory as several, each a clip of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from v2l_fast.video.clip import Clip


def split_clip(clip: Clip, parts: int) -> list[Clip]:
    """The clip's frames, in order, in `parts` parts of equal duration and (to one) equal count.

    At most as many parts as frames. As with `load_spans`, a part's times count from its start and
    its duration is its own; its frame `indices` stay those of the source.
    """
    groups = np.array_split(np.arange(len(clip.frames)), min(parts, len(clip.frames)))
    length = clip.duration / len(groups)
    return [
        replace(
            clip,
            frames=clip.frames[group],
            indices=clip.indices[group],
            timestamps=tuple(max(0.0, clip.timestamps[i] - number * length) for i in group),
            duration=length,
            num_frames=max(1, round(clip.num_frames / len(groups))),
            presentation_times=clip.presentation_times[group[0] : group[-1] + 1],
        )
        for number, group in enumerate(groups)
    ]
