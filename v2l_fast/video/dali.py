"""Frames through DALI, on the GPU's video engines; PyAV still opens, counts and describes.

Three parts: the source, which hands DALI only files that it decodes exactly (by index, color and
size) and leaves the rest to PyAV; the colors, because DALI decodes every stream with BT.601's
matrix; and the decoder, one pipeline that batches the calls of several threads and keeps one file's
failure from the others of its batch. The file has passed PyAV's checks.

Pixels differ from PyAV's by at most two levels where neighbors have the same chroma (each library
rounds on its own, and a corrected matrix rounds twice). They differ more at edges of color, because
DALI interpolates chroma, and in saturated colors of BT.709 streams (see :func:`corrected`).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from v2l_fast.errors import VideoError
from v2l_fast.video.info import Limits, Orientation, fallbacks
from v2l_fast.video.pyav import Decoded, PyAVSource

# The codecs that each operator decodes; a given GPU may lack one of them.
_CODECS = {
    "cpu": {"vp9", "mjpeg"},
    "cuda": {"h264", "hevc", "vp9", "av1", "mjpeg"},
}
# DALI holds the whole file in memory and counts its bytes in 31 bits.
_FILE_BYTES = 1 << 30
# Decoded bytes of one call, before frames are resized.
_CALL_BYTES = 256 << 20
# The first frame is compared with PyAV's by means over blocks, in which interpolated chroma
# cancels. A misread range differs by 16 levels at black and 20 at white, correct frames by far less
# than half of that.
_BLOCK = 16
_FIRST_FRAME_LEVELS = 8

# (device, codec) that this process's GPU has refused: trying again would cost a batch each time.
_refused: set[tuple[torch.device, str]] = set()


class _Refused(Exception):
    """Why DALI does not decode this file: one of a few reasons, and details of the file."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class DaliSource(PyAVSource):
    """A PyAVSource whose pixels come from DALI and are on `device`.

    fallback: read a file that DALI does not decode exactly by PyAV, on the CPU, and count it in
    `fallbacks`; if False, raise VideoError.
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
        """As PyAVSource.read; `transform` gets several frames at once."""
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
        """Raise _Refused for files that DALI would decode wrongly without an error, or not at all.

        DALI counts packets in the order of their times and ignores edit lists; its color kernel
        handles 8-bit 4:2:0 frames with even sides.
        """
        info, frame = self.info, self._first_frame
        if info.codec not in _CODECS[self.device.type] or (self.device, info.codec) in _refused:
            raise _Refused(f"codec {info.codec} on {self.device.type}")
        timeline = self._timeline
        if not self.packets.plain or timeline is None or timeline.index_of(frame.pts) != 0:
            raise _Refused("packet times do not locate its frames")
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
        # Frame 0 is also decoded, for the comparison with PyAV's.
        requested = np.concatenate(([0], indices)).astype(np.int32)
        for start in range(0, len(requested), step):
            self.deadline.check()
            try:
                frames = shared_decoder(self.device)(encoded, requested[start : start + step])
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
        return Decoded(frames.contiguous(), tuple(self.packets.seconds[indices].tolist()), None)

    def _check_first(self, image: torch.Tensor) -> None:
        """Raise _Refused when uint8 [H, W, 3] differs from the first frame that PyAV decodes.

        A driver may read some streams otherwise than FFmpeg does: range tags of the container,
        streams that rely on concealment.
        """
        expected = torch.from_numpy(self._first_frame.to_ndarray(format="rgb24")).to(image.device)
        mean, expected_mean = (
            F.avg_pool2d(i.movedim(-1, 0).float(), _BLOCK, ceil_mode=True)
            for i in (image, expected)
        )
        difference = (mean - expected_mean).abs().mean().item()
        if difference > _FIRST_FRAME_LEVELS:
            raise _Refused("its first frame differs from PyAV's", f"{difference:.0f} levels")


def _upright(frames: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """As Orientation.apply, for uint8 [F, H, W, 3]."""
    if orientation.transpose:
        frames = frames.transpose(1, 2)
    flipped = [axis for axis, flip in ((1, orientation.flip_y), (2, orientation.flip_x)) if flip]
    return frames.flip(flipped) if flipped else frames


# --- colors ----------------------------------------------------------------------------------

# Frames corrected at a time, which bounds the float32 copies.
_CORRECTED_FRAMES = 8

# Luma weights of red and blue (ISO/IEC 23091-2, table 4), by FFmpeg's name of the matrix. swscale,
# and with it the released checkpoints' reader, takes an untagged stream for BT.601.
_WEIGHTS = {
    "unspecified": (0.299, 0.114), "bt470bg": (0.299, 0.114), "smpte170m": (0.299, 0.114),
    "bt709": (0.2126, 0.0722), "fcc": (0.30, 0.11), "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
}  # fmt: skip


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """The matrix [3, 3] from (Y, Pb, Pr) to RGB."""
    green = 1 - red - blue
    u, v = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, v], [1, -u * blue / green, -v * red / green], [1, u, 0]])


def supported(color_space: str) -> bool:
    """Whether the stream's colors can be corrected by a matrix."""
    return color_space in _WEIGHTS


def correction(color_space: str) -> np.ndarray:
    """The matrix [3, 3] float64 from RGB decoded as BT.601 to RGB of `color_space`."""
    return _to_rgb(*_WEIGHTS[color_space]) @ np.linalg.inv(_to_rgb(*_WEIGHTS["smpte170m"]))


def corrected(frames: torch.Tensor, color_space: str) -> torch.Tensor:
    """Frames uint8 [F, H, W, 3] decoded as BT.601, converted to the stream's own matrix.

    Rounding twice costs one level. A channel that DALI clipped cannot be recovered: its true value
    lies between 0 (or 255) and what the clipped value is corrected to, and the middle is used. Over
    all RGB colors of a BT.709 stream, of which 16% are clipped, a channel is off by at most 19 and
    the worst channel by 1.1 on average (uncorrected: 37 and 12).
    """
    matrix = correction(color_space)
    if np.allclose(matrix, np.eye(3)):
        return frames
    rows = [[float(weight) for weight in row] for row in matrix]
    out = torch.empty_like(frames)
    for start in range(0, len(frames), _CORRECTED_FRAMES):
        part = frames[start : start + _CORRECTED_FRAMES]
        channels = part.to(torch.float32).unbind(-1)
        for index, (channel, row) in enumerate(zip(channels, rows, strict=True)):
            # Not a matrix product: on a GPU that may be rounded to TF32.
            value = sum(weight * other for weight, other in zip(row, channels, strict=True))
            value = torch.where(channel == 0, value / 2, value)
            value = torch.where(channel == 255, (value + 255) / 2, value)
            out[start : start + _CORRECTED_FRAMES, ..., index] = value.round_().clamp_(0, 255)
    return out


# --- decoder ---------------------------------------------------------------------------------

# Maximum files in a batch: the video engines of an H100 or H200, and a few more to queue.
BATCH = 8
# Threads that demux (and, on the CPU, decode) the files of a batch.
_THREADS = 4


class DaliError(Exception):
    """DALI could not decode a file, or could not start; the message is its reason, in one line."""


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """A request for frames of one file.

    encoded: uint8 [bytes], the file. indices: int32 [F], frames in presentation order, all of them
    in the file: DALI returns black frames for others.
    """

    encoded: np.ndarray
    indices: np.ndarray
    result: Future[torch.Tensor] = field(default_factory=Future)


class DaliDecoder:
    """One pipeline on one device: NVDEC ("mixed" operator) on a GPU, its own FFmpeg on the CPU.

    Raises DaliError when DALI cannot be started here.
    """

    def __init__(self, device: torch.device, batch: int = BATCH) -> None:
        self.device = device
        self.batch = batch
        self.num_batches = 0
        self._lock = threading.Lock()
        self._waiting: deque[DecodeRequest] = deque()
        self._pipeline = self._build()

    def __call__(self, encoded: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        """Decode frames, uint8 [F, H, W, 3] on the device, as coded.

        Calls of several threads share batches. Raises DaliError.
        """
        request = DecodeRequest(encoded, indices)
        self._waiting.append(request)
        with self._lock:
            # The thread that gets the lock decodes for those that wait for it.
            while not request.result.done():
                count = min(self.batch, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(count)]
                try:
                    self._decode(batch)
                except BaseException as error:
                    # Interrupted: no thread may wait for a result that never comes.
                    for waiting in batch:
                        if not waiting.result.done():
                            waiting.result.set_exception(error)
                    raise
        return request.result.result()

    def _decode(self, requests: Sequence[DecodeRequest]) -> None:
        """Set the result or the error of each request."""
        try:
            frames = self._run(requests)
        except RuntimeError as error:
            # A pipeline is invalid after a failure, and the error does not say which file failed.
            self._pipeline = self._build()
            if len(requests) > 1:
                for request in requests:
                    self._decode([request])
            else:
                requests[0].result.set_exception(DaliError(_reason(error)))
            return
        for request, result in zip(requests, frames, strict=True):
            request.result.set_result(result)

    def _run(self, requests: Sequence[DecodeRequest]) -> list[torch.Tensor]:
        self.num_batches += 1
        # Without a stream, DALI may write to a buffer again while work of PyTorch's still reads it.
        on_gpu = self.device.type == "cuda"
        (out,) = self._pipeline.run(
            torch.cuda.current_stream(self.device) if on_gpu else None,
            encoded=[request.encoded for request in requests],
            indices=[request.indices for request in requests],
        )
        # With the dynamic executor outputs are never overwritten: nothing is copied.
        return [torch.from_dlpack(out[i]) for i in range(len(requests))]

    def _build(self):
        try:
            from nvidia.dali import fn, pipeline_def, types
        except (ImportError, OSError) as error:
            raise DaliError(
                f'cannot be imported, {_first_line(error)}; pip install "v2l_fast[dali]"'
            ) from None
        on_gpu = self.device.type == "cuda"

        # Depth 1: each batch is requested on its own, and the caller reads ahead.
        @pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
            return fn.decoders.video(encoded, frames=indices, device="mixed" if on_gpu else "cpu")

        index = self.device.index
        if on_gpu and index is None:
            index = torch.cuda.current_device()
        compiled = pipeline(
            batch_size=self.batch,
            num_threads=min(_THREADS, os.cpu_count() or 1),
            device_id=index if on_gpu else None,
        )
        try:
            compiled.build()
        except RuntimeError as error:
            raise DaliError(_reason(error)) from None
        return compiled


def shared_decoder(device: torch.device) -> DaliDecoder:
    """The process's decoder for a device: pipelines hold memory and are slow to start."""
    return _decoder_of(device, os.getpid())


@cache
def _decoder_of(device: torch.device, process: int) -> DaliDecoder:
    """By process, because threads do not survive a fork. A data worker builds its own decoder and
    leaves its parent's alone: destroying that one in the worker breaks both."""
    return DaliDecoder(device)


def _reason(error: RuntimeError) -> str:
    """The line of a DALI error that states what happened."""
    _, _, after = str(error).rpartition("encountered:")
    return _first_line(RuntimeError(after.strip()))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
