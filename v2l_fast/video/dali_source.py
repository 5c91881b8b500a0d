"""Frames through DALI, on the GPU's video engines; PyAV still opens, counts and describes.

Responsible for handing DALI only files it decodes exactly (by index, color and size), for the
stream's colors and orientation, and for PyAV doing the rest. The file has passed PyAV's checks.

Pixels differ from PyAV's by at most two levels where neighbors have the same chroma (each library
rounds on its own, and a corrected matrix rounds twice); at edges of color they differ more, for
DALI interpolates chroma, and so do saturated colors of BT.709 streams (see `dali_color`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from v2l_fast.errors import VideoError
from v2l_fast.video.dali_color import corrected, supported
from v2l_fast.video.dali_decoder import DaliError, shared_decoder
from v2l_fast.video.fallbacks import fallbacks
from v2l_fast.video.limits import Limits
from v2l_fast.video.orientation import Orientation
from v2l_fast.video.pyav_source import Decoded, PyAVSource

# What each operator can decode at best; a GPU of its generation may lack one of them.
_CODECS = {
    "cpu": {"vp9", "mjpeg"},
    "cuda": {"h264", "hevc", "vp9", "av1", "mjpeg"},
}
# DALI holds the whole file in memory and counts its bytes in 31 bits.
_FILE_BYTES = 1 << 30
# Decoded bytes of one call, before they are shrunk.
_CALL_BYTES = 256 << 20
# The first frame is compared with PyAV's by means over blocks: there interpolated chroma cancels.
# A range misread is 16 levels at black and 20 at white; what is right stays far below half of it.
_BLOCK = 16
_FIRST_FRAME_LEVELS = 8

# (device, codec) this process's GPU has refused: asking again would cost a batch each time.
_refused: set[tuple[torch.device, str]] = set()


class _Refused(Exception):
    """Why this file is not for DALI: one of few reasons, and what is particular to the file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class DaliSource(PyAVSource):
    """PyAVSource whose pixels come from DALI and lie on `device`.

    fallback: a file DALI cannot decode exactly is read by PyAV, on the CPU, and noted in
    `fallbacks`; without, it is a VideoError.
    """

    def __init__(
        self, path: str | os.PathLike, limits: Limits, device: torch.device, fallback: bool
    ) -> None:
        super().__init__(path, limits)
        self.device = device
        self.fallback = fallback

    def read(
        self,
        indices: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Decoded:
        """As PyAVSource.read; `transform` is given several frames at once."""
        self.check_count(len(indices))
        try:
            self._check_suited(indices)
            return self._read(indices, transform)
        except _Refused as refused:
            if not self.fallback:
                detail = f" ({refused.detail})" if refused.detail else ""
                raise VideoError(
                    f"{self.path}: DALI does not decode it: {refused.reason}{detail}; "
                    "use decoder 'auto' or 'pyav'"
                ) from None
            fallbacks.add(self.path, refused.reason, refused.detail)
        return super().read(indices, transform)

    def _check_suited(self, indices: np.ndarray) -> None:
        """Raise _Refused for whatever DALI would decode wrongly without saying so, or not at all.

        DALI counts packets in the order of their times and knows no edit lists; its color kernel
        is for 8-bit 4:2:0 frames of even sides.
        """
        info, frame = self.info, self._first_frame
        if info.codec not in _CODECS[self.device.type] or (self.device, info.codec) in _refused:
            raise _Refused(f"codec {info.codec} on {self.device.type}")
        timeline = self._timeline
        if not self._packets.plain or timeline is None or timeline.index_of(frame.pts) != 0:
            raise _Refused("frames are not found by packet times")
        if indices[-1] >= info.num_frames:
            raise _Refused("frames beyond its end", f"it has {info.num_frames}")
        if frame.format.name not in ("yuv420p", "yuvj420p", "nv12"):
            raise _Refused(f"pixel format {frame.format.name}")
        if frame.interlaced_frame:
            raise _Refused("interlaced")
        if frame.width % 2 or frame.height % 2:
            raise _Refused("odd width or height", f"{frame.width}x{frame.height}")
        if not supported(info.color_space):
            raise _Refused(f"color space {info.color_space}")
        if os.path.getsize(self.path) > _FILE_BYTES:
            raise _Refused("a file of more than 1 GiB")

    def _read(
        self, indices: np.ndarray, transform: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Decoded:
        encoded = np.fromfile(self.path, dtype=np.uint8)
        kept: list[torch.Tensor] = []
        step = max(1, _CALL_BYTES // (3 * self.info.width * self.info.height))
        # Frame 0 comes along, to be compared with PyAV's.
        asked = np.concatenate(([0], indices)).astype(np.int32)
        for start in range(0, len(asked), step):
            self.deadline.check()
            try:
                frames = shared_decoder(self.device)(encoded, asked[start : start + step])
            except DaliError as error:
                if "not supported on this GPU" in str(error):
                    _refused.add((self.device, self.info.codec))
                raise _Refused("DALI failed", str(error)) from None
            coded = self._first_frame
            if frames.shape[1:3] != (coded.height, coded.width):
                raise _Refused(
                    "another frame size", f"{frames.shape[2]}x{frames.shape[1]} from DALI"
                )
            images = corrected(frames, self.info.color_space)
            if start == 0:
                self._check_first(images[0])
                images = images[1:]
            if len(images):
                images = _upright(images, self.orientation)
                kept.append(images if transform is None else transform(images))
                self.check_memory(len(indices), kept[0][0].shape)
        self.deadline.check()
        frames = kept[0] if len(kept) == 1 else torch.cat(kept)
        return Decoded(frames.contiguous(), tuple(self._packets.seconds[indices].tolist()), None)

    def _check_first(self, image: torch.Tensor) -> None:
        """Raise _Refused when uint8 [H, W, 3] is not what PyAV sees in the first frame.

        That is for what a driver may read otherwise than FFmpeg: range tags of the container,
        streams that lean on concealment.
        """
        wanted = torch.from_numpy(self._first_frame.to_ndarray(format="rgb24")).to(image.device)
        found, wanted = (
            F.avg_pool2d(i.movedim(-1, 0).float(), _BLOCK, ceil_mode=True) for i in (image, wanted)
        )
        difference = (found - wanted).abs().mean().item()
        if difference > _FIRST_FRAME_LEVELS:
            raise _Refused("its first frame differs from PyAV's", f"{difference:.0f} levels")


def _upright(frames: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """Orientation.apply for uint8 [F, H, W, 3]."""
    if orientation.transpose:
        frames = frames.transpose(1, 2)
    flipped = [axis for axis, flip in ((1, orientation.flip_y), (2, orientation.flip_x)) if flip]
    return frames.flip(flipped) if flipped else frames
