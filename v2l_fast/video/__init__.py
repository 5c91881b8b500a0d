"""Video files in, sampled frames and vision-tower views out.

Every failure to read a file is a `v2l_fast.errors.VideoError` of one line that names it.
"""

from v2l_fast._deprecated import warn_renamed
from v2l_fast.video.clip import Clip
from v2l_fast.video.fallbacks import fallbacks
from v2l_fast.video.info import VideoInfo
from v2l_fast.video.limits import Limits
from v2l_fast.video.preprocess import (
    PREPROCESSING_VERSION,
    FrameViews,
    frame_views,
    normalize,
    resize_lanczos,
    resized_size,
)
from v2l_fast.video.reading import decode, probe
from v2l_fast.video.sampling import FrameSampling, sample_indices
from v2l_fast.video.spans import load_spans, load_video

__all__ = [
    "PREPROCESSING_VERSION",
    "FrameSampling",
    "FrameViews",
    "Limits",
    "Clip",
    "VideoInfo",
    "decode",
    "fallbacks",
    "frame_views",
    "load_spans",
    "load_video",
    "normalize",
    "probe",
    "resize_lanczos",
    "resized_size",
    "sample_indices",
]


def __getattr__(name: str) -> object:
    if name == "VideoClip":
        warn_renamed(f"{__name__}.VideoClip", f"{__name__}.Clip", stacklevel=3)
        return Clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
