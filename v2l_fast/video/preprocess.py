"""From a video to the square views that a vision tower reads: which frames, at what size.

The default indices are those of transformers 4.51.3's `smolvlm_sample_indices_fn`, and the views
equal its SmolVLM image path bit for bit; the released checkpoints were trained with them. Frames
stay uint8 until `normalize`. Everything runs on the frames' device, and no file is touched.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from v2l_fast.errors import ConfigError, VideoError

# Incremented whenever a pixel of any view would change; part of an adapter's provenance.
PREPROCESSING_VERSION = 1
# Transformers 4.51.3 makes no frame larger, whatever is asked for.
MAX_EDGE = 4096

# Pixels of the frames resized in one work unit: one 8K frame.
GROUP_PIXELS = 7680 * 4320
# Pillow's fixed point: coefficients are multiples of 2^-22.
_ONE = 1 << 22
_LOBES = 3.0
# Outputs per matrix product: wider bands multiply more zeros, narrower ones need more products
# (on one core, 16 is the best or nearly so from 216p to 1080p).
_BAND = 16
# Float64 elements of one temporary: within a CPU's cache (at 1080p twice as fast as eight times as
# many), few launches on a GPU.
_CHUNK_CPU, _CHUNK_GPU = 1 << 19, 1 << 26


# --- frames ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model sees, and at what size.

    Attributes:
        max_frames, target_fps, exact_frames: as of :func:`sample_indices`.
        longest_edge: of a resized frame, in pixels, at most 4,096.

    Raises:
        ConfigError: a value is out of range.
    """

    max_frames: int
    longest_edge: int
    target_fps: float = 1.0
    exact_frames: bool = False

    def __post_init__(self) -> None:
        limits = {"max_frames": (1, math.inf), "longest_edge": (2, MAX_EDGE)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, got {value}")
            if value > high:
                raise ConfigError(f"{name} must be at most {high}, got {value}")
        if not 0 < self.target_fps < math.inf:
            raise ConfigError(f"target_fps must be a positive number, got {self.target_fps!r}")

    def override(
        self,
        max_frames: int | None = None,
        longest_edge: int | None = None,
        target_fps: float | None = None,
        exact_frames: bool | None = None,
    ) -> FrameSampling:
        """A copy in which arguments that are not None replace the values.

        Raises:
            ConfigError: a value is out of range.
        """
        return FrameSampling(
            self.max_frames if max_frames is None else max_frames,
            self.longest_edge if longest_edge is None else longest_edge,
            self.target_fps if target_fps is None else target_fps,
            self.exact_frames if exact_frames is None else exact_frames,
        )

    def indices(self, num_frames: int, fps: float, duration: float) -> np.ndarray:
        """:func:`sample_indices` of a source of ``duration`` seconds with these settings."""
        return sample_indices(
            num_frames,
            fps,
            duration,
            self.max_frames,
            self.target_fps,
            exact_frames=self.exact_frames,
        )


def sample_indices(
    num_frames: int,
    fps: float,
    duration: float,
    max_frames: int,
    target_fps: float = 1.0,
    skip_secs: float = 1.0,
    exact_frames: bool = False,
) -> np.ndarray:
    """Frame indices to decode, int64, sorted and unique.

    num_frames, fps, duration: of the source; duration in seconds.
    Default: k = max(1, min(round(target_fps * duration), max_frames)) indices evenly spaced over
    the clip, whose first and last `skip_secs` are left out when it is longer than
    2 * skip_secs + max_frames * target_fps seconds.
    exact_frames: min(max_frames, num_frames) indices over the whole clip whatever its duration, so
    a large `max_frames` gives every frame; target_fps and skip_secs are not used.

    Raises VideoError for a source without frames or length, ConfigError for max_frames < 1.
    """
    if max_frames < 1:
        raise ConfigError(f"max_frames must be at least 1, got {max_frames}")
    if num_frames < 1:
        raise VideoError(f"cannot sample a video of {num_frames} frames: it must hold at least one")
    if exact_frames:
        # Integer arithmetic: floating-point spacing could merge two neighbours.
        k = min(max_frames, num_frames)
        return np.arange(k, dtype=np.int64) * (num_frames - 1) // max(k - 1, 1)
    if not (math.isfinite(duration) and duration > 0 and math.isfinite(fps) and fps > 0):
        raise VideoError(f"cannot sample a video of duration {duration} s at {fps} frames/s")

    k = max(1, min(int(round(target_fps * duration)), max_frames))
    start, end = 0, num_frames - 1
    if skip_secs > 0 and duration - 2 * skip_secs > max_frames * target_fps:
        start = max(0, int(skip_secs * fps))
        end = min(int(num_frames - skip_secs * fps), num_frames - 1)
        if start >= end:
            start, end = 0, num_frames - 1
    return np.unique(np.linspace(start, end, k, dtype=np.int64))


# --- views ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _bands(
    n_in: int, n_out: int, device: torch.device
) -> tuple[tuple[int, int, torch.Tensor], ...]:
    """Pillow's Lanczos coefficients as (first input, end input, float64 [<= _BAND, inputs])."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = _LOBES * stretch
    center = (np.arange(n_out) + 0.5) * scale
    low = np.maximum((center - support + 0.5).astype(np.int64), 0)
    high = np.minimum((center + support + 0.5).astype(np.int64), n_in)
    bands = []
    for start in range(0, n_out, _BAND):
        rows = slice(start, min(start + _BAND, n_out))
        first, end = int(low[rows.start]), int(high[rows.stop - 1])
        source = np.arange(first, end)
        inside = (source >= low[rows, None]) & (source < high[rows, None])
        x = (source - center[rows, None] + 0.5) / stretch
        weight = np.where(inside & (np.abs(x) < _LOBES), np.sinc(x) * np.sinc(x / _LOBES), 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
        fixed = np.trunc(weight * _ONE + np.copysign(0.5, weight))
        bands.append((first, end, torch.from_numpy(fixed / _ONE).to(device)))
    return tuple(bands)


def _round_u8(acc: torch.Tensor) -> torch.Tensor:
    """Pillow's (sum + 2^21) >> 22 clamped to 0..255; acc (overwritten) is the sum / 2^22."""
    return acc.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _resize_width(images: torch.Tensor, width: int) -> torch.Tensor:
    out = images.new_empty(*images.shape[:-1], width)
    for i, (first, end, weight) in enumerate(_bands(images.shape[-1], width, images.device)):
        acc = images[..., first:end].to(torch.float64) @ weight.T
        out[..., i * _BAND : i * _BAND + len(weight)] = _round_u8(acc)
    return out


def _resize_height(images: torch.Tensor, height: int) -> torch.Tensor:
    out = images.new_empty(*images.shape[:-2], height, images.shape[-1])
    for i, (first, end, weight) in enumerate(_bands(images.shape[-2], height, images.device)):
        acc = weight @ images[..., first:end, :].to(torch.float64)
        out[..., i * _BAND : i * _BAND + len(weight), :] = _round_u8(acc)
    return out


def resize_lanczos(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [..., 3, H, W] to [..., 3, height, width] exactly as Pillow's LANCZOS does.

    Pillow (Resample.c, 8 bits per channel) resizes the width, rounds to uint8, then the height;
    a pass that keeps its size is skipped. (Newer releases, 12.3 among them, swap the two where the
    height shrinks and the width grows or shrinks far less. The released checkpoints are older, and
    width first is the definition here.) The integer sums are multiples of 2^-22 below 2^9 in
    magnitude, which float64 holds exactly whatever the order of a matrix product's additions: the
    result does not depend on device, threads or chunking.

    Raises ConfigError for other inputs or an empty size.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ConfigError(
            f"images must be uint8 [..., 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    if min(height, width, *images.shape[-2:]) < 1:
        raise ConfigError(
            f"cannot resize {images.shape[-1]}x{images.shape[-2]} to {width}x{height}: "
            "sides must be at least 1"
        )
    in_height, in_width = images.shape[-2:]
    frames = images.reshape(-1, 3, in_height, in_width)
    out = frames.new_empty(len(frames), 3, height, width)
    # The largest temporaries: one band's inputs, for all rows (first pass) or columns (second).
    reach = _BAND + 2 * _LOBES
    wide = in_height * min(in_width, reach * max(1.0, in_width / width))
    tall = width * min(in_height, reach * max(1.0, in_height / height))
    budget = _CHUNK_CPU if frames.device.type == "cpu" else _CHUNK_GPU
    chunk = max(1, int(budget / (3 * max(wide, tall))))
    for start in range(0, len(frames), chunk):
        part = frames[start : start + chunk]
        if width != in_width:
            part = _resize_width(part, width)
        if height != in_height:
            part = _resize_height(part, height)
        out[start : start + chunk] = part
    return out.reshape(*images.shape[:-2], height, width)


def resized_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) with longest side `longest_edge`, the other rounded up to an even number.

    As `get_resize_output_image_size` of transformers 4.51.3: sides are in 1..4096.
    """
    aspect = width / height
    if width >= height:
        width = longest_edge
        height = int(width / aspect)
        height += height % 2
    else:
        height = longest_edge
        width = int(height * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > MAX_EDGE:
        height, width = int(MAX_EDGE / aspect), MAX_EDGE
    elif height > width and height > MAX_EDGE:
        height, width = MAX_EDGE, int(MAX_EDGE * aspect)
    return max(height, 1), max(width, 1)


def shrunk_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) of a frame that :func:`frame_views` may get in place of a larger one.

    That is `resized_size`, the first step of `frame_views`, if it is smaller and `frame_views`
    leaves it as it is; otherwise the size itself.
    """
    small = resized_size(height, width, longest_edge)
    if small[0] * small[1] >= height * width or resized_size(*small, longest_edge) != small:
        return height, width
    return small


def _multiple_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """Sides rounded up to multiples of `tile` (4.51.3, `resize_for_vision_encoder`)."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = max(1, math.ceil(int(width / aspect) / tile)) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = max(1, math.ceil(int(height * aspect) / tile)) * tile
    return height, width


@dataclass(frozen=True, eq=False)
class FrameViews:
    """Views of frames for a vision tower that reads M x M.

    views: uint8 [F * per_frame, 3, M, M]; a frame's tiles row-major, then its global view.
    rows, cols: tiles of a frame, 0 and 0 if it is not split.
    """

    views: torch.Tensor
    rows: int
    cols: int

    @property
    def per_frame(self) -> int:
        """Number of views of a frame."""
        return self.rows * self.cols + 1


def frame_tiles(height: int, width: int, longest_edge: int, tile_size: int) -> tuple[int, int]:
    """(rows, cols) of the tiles that :func:`frame_views` cuts a frame into, or (0, 0) for none."""
    size = _multiple_size(*resized_size(height, width, longest_edge), tile_size)
    rows, cols = (side // tile_size for side in size)
    return (0, 0) if rows * cols == 1 else (rows, cols)


def frame_views(frames: torch.Tensor, longest_edge: int, tile_size: int) -> FrameViews:
    """Views of frames uint8 [F, 3, H, W] for a vision tower that reads M x M, M = `tile_size`.

    The longest side becomes `longest_edge`, then both sides are stretched up to multiples of M.
    A frame that is then M x M is its only view; a larger one is cut into tiles, followed by the
    whole frame resized to M x M. (transformers 4.51.3 with do_image_splitting, which its video path
    uses, too; later releases never split videos.)

    Raises ConfigError for a longest_edge or tile_size below 1.
    """
    if longest_edge < 1 or tile_size < 1:
        raise ConfigError(
            f"longest_edge and tile_size must be at least 1, got {longest_edge} and {tile_size}"
        )
    height, width = resized_size(frames.shape[-2], frames.shape[-1], longest_edge)
    frames = resize_lanczos(frames, height, width)
    frames = resize_lanczos(frames, *_multiple_size(height, width, tile_size))
    rows, cols = (side // tile_size for side in frames.shape[-2:])
    if rows * cols == 1:
        return FrameViews(frames, 0, 0)
    tiles = frames.unfold(2, tile_size, tile_size).unfold(3, tile_size, tile_size)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    whole = resize_lanczos(frames, tile_size, tile_size).unsqueeze(1)
    return FrameViews(torch.cat([tiles, whole], dim=1).flatten(0, 1), rows, cols)


def frame_views_in_groups(
    frames: torch.Tensor, longest_edge: int, tile_size: int
) -> Generator[tuple[int, int], None, FrameViews]:
    """:func:`frame_views` in work units of a few frames; yields (done, total) between them."""
    at_once = max(1, GROUP_PIXELS // max(1, frames.shape[-1] * frames.shape[-2]))
    groups: list[FrameViews] = []
    for group in frames.split(at_once):
        if groups:
            yield len(groups) * at_once, len(frames)
        groups.append(frame_views(group, longest_edge, tile_size))
    if len(groups) == 1:
        return groups[0]
    views = torch.cat([group.views for group in groups])
    return FrameViews(views, groups[0].rows, groups[0].cols)


def normalize(views: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(x - 127.5) / 127.5 of uint8 `views` in [-1, 1], computed in float32, cast to `dtype`."""
    return views.to(torch.float32).sub_(127.5).div_(127.5).to(dtype)
