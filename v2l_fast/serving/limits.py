"""Bounds on what callers may cost the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from v2l_fast.video import Limits


@dataclass(frozen=True)
class ServerLimits:
    """Upper bounds; a request that exceeds one is refused with a 4xx that names it.

    Attributes:
        upload_bytes: size of an uploaded video.
        body_bytes: size of any other request body.
        duration: length of a video in seconds.
        pixels: width x height of a frame.
        frames: frames sampled from one video.
        longest_edge: size in pixels to which frames may be resized.
        new_tokens: tokens of one answer.
        uploads: files received, or hashed in place, at the same time; further ones wait.
        uploads_waiting: files that may wait for that; further ones get 503.
        jobs: videos waiting or being internalized; further ones get 503.
        kept_video_bytes: uploaded videos kept for questions with the video in context; the least
            recently used are removed first.
        answer_seconds: time for one answer.
        probe_seconds: time for examining one video before it is accepted.
        decode_seconds: time for decoding the frames of one video.
        decode_bytes: memory that a process may take to examine or decode one video on the CPU.
        idle_seconds: longest silence of a client that is sending a body.
        connections: clients connected at the same time; further ones get 503.
        head_seconds: time for a request's line and headers, from its connection or first byte.
        keep_alive_seconds: how long a connection stays open after a response.
        stalled_seconds: how long a client may read nothing of a response.
    """

    upload_bytes: int = 1 << 30
    body_bytes: int = 1 << 20
    duration: float = 2 * 3600.0
    pixels: int = 7680 * 4320
    frames: int = 1024
    longest_edge: int = 2048
    new_tokens: int = 1024
    uploads: int = 64
    uploads_waiting: int = 256
    jobs: int = 64
    kept_video_bytes: int = 20 << 30
    answer_seconds: float = 300.0
    probe_seconds: float = 60.0
    decode_seconds: float = 600.0
    decode_bytes: int = 8 << 30
    idle_seconds: float = 30.0
    connections: int = 4096
    head_seconds: float = 10.0
    keep_alive_seconds: float = 5.0
    stalled_seconds: float = 60.0

    @property
    def probing(self) -> Limits:
        """The bounds for examining a video file."""
        return Limits(
            max_pixels=self.pixels,
            max_duration=self.duration,
            max_frames=self.frames,
            max_seconds=self.probe_seconds,
        )

    @property
    def decoding(self) -> Limits:
        """The bounds for decoding one. Frames take a quarter of the memory: they are copied once,
        and decoders hold some."""
        return replace(
            self.probing, max_seconds=self.decode_seconds, max_bytes=self.decode_bytes // 4
        )
