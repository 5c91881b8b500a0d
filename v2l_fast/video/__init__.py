"""Reads and writes video files, samples frames and turns them into the views of a vision tower.

Every failure to read a file raises a one-line `v2l_fast.errors.VideoError` that names it.
"""

from functools import partial

from v2l_fast._deprecated import renamed
from v2l_fast.video.clip import Clip
from v2l_fast.video.info import Limits, VideoInfo, fallbacks
from v2l_fast.video.preprocess import (
    PREPROCESSING_VERSION,
    FrameSampling,
    FrameViews,
    frame_views,
    normalize,
    resize_lanczos,
    resized_size,
    sample_indices,
)
from v2l_fast.video.reader import decode, load_spans, load_video, probe

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

__getattr__ = partial(renamed, __name__)
