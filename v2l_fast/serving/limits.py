"""Bounds on what one caller may cost the server, and the body limit that enforces the first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2l_fast.video import Limits

UPLOAD_PATH = "/v1/videos"
# Boundaries, part headers and the fields beside the file.
_FORM_OVERHEAD = 64 << 10


@dataclass(frozen=True)
class ServerLimits:
    """Upper bounds; a request beyond one is refused with a 4xx that names it.

    Attributes:
        upload_bytes: size of an uploaded video.
        body_bytes: size of any other request body.
        duration: seconds of a video.
        pixels: width x height of its frames.
        frames: frames one video is internalized from.
        longest_edge: pixels to which frames may be resized.
        new_tokens: tokens of one answer.
        uploads: files received, or hashed where they lie, at the same time; others wait.
        uploads_waiting: files that wait for that; more get 503.
        jobs: videos waiting or being internalized at the same time; more get 503.
        kept_video_bytes: uploaded videos kept for questions with the video in context; the least
            recently used go first.
        answer_seconds: time for one answer.
        probe_seconds: time for looking into one video before it is accepted.
        decode_seconds: time for decoding the frames of one video.
        decode_bytes: memory that looking into one video, or decoding it on the CPU, may take.
        idle_seconds: longest silence of a client that is sending a body.
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

    @property
    def probing(self) -> Limits:
        """The bounds for looking into a video file."""
        return Limits(
            max_pixels=self.pixels,
            max_duration=self.duration,
            max_frames=self.frames,
            max_seconds=self.probe_seconds,
        )

    @property
    def decoding(self) -> Limits:
        """The bounds for decoding one; its frames are copied once, and decoders hold some, too."""
        return replace(
            self.probing, max_seconds=self.decode_seconds, max_bytes=self.decode_bytes // 4
        )


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, announced or not; 408 for one that stops.

    The limits are those of :class:`ServerLimits`.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, idle = self.limits.body_bytes, self.limits.idle_seconds
        if scope["path"] == UPLOAD_PATH and _is_form(scope):
            limit = self.limits.upload_bytes + _FORM_OVERHEAD
        received, complete = 0, False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                # What still comes is the news that the client has left.
                return await receive()
            try:
                async with asyncio.timeout(idle):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {idle:g} s; send it again") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise HTTPException(413, f"the request body is larger than {limit} bytes")
            return message

        await self.app(scope, bounded, send)


def _is_form(scope: Scope) -> bool:
    kind = next((v for k, v in scope["headers"] if k == b"content-type"), b"")
    return kind.lower().startswith(b"multipart/")
