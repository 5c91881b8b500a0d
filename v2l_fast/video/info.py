"""What is known about a video file before its frames are decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a file's video stream: FFmpeg's best one, cover pictures excluded.

    num_frames counts what the file holds, not what its header claims: the stream's packets that
    are shown (those an edit list cuts away are not counted). A frame index means the position in
    presentation order, for variable frame rate too. Damaged packets may still fail to decode;
    whoever decodes finds out.
    fps: average frames/s; of a raw stream what its headers state, or 25 with a warning. A clock
    that starts again or jumps (joined recordings) is one that goes on.
    duration: num_frames / fps, seconds.
    width, height: as displayed, after rotation; non-square pixels are not stretched.
    rotation: clockwise degrees (0, 90, 180, 270) that decoding applies, after a left-right
    mirroring where `mirrored`.
    codec: FFmpeg's name. color_space: matrix coefficients ("bt709", "smpte170m", ...,
    "unspecified"). color_range: "tv" (16..235), "pc" (0..255) or "unspecified".
    """

    path: str
    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    mirrored: bool
    codec: str
    color_space: str
    color_range: str
