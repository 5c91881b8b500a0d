"""Scenes to pixels: a vectorized anti-aliased renderer, H.264 files and augmentation.

Responsible for drawing. `v2l_fast.video` samples the frames of a file; `FRAME_TIMES` repeats its
choice for such a file, so that training can skip the codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from v2l_fast.shapes.world import BACKGROUNDS, COLORS, SHAPES, Scene
from v2l_fast.video.writer import write_video

CLIP_SECONDS = 8
CLIP_FPS = 4
NUM_FRAMES = CLIP_SECONDS * CLIP_FPS
SAMPLED_INDICES = tuple(
    int(i) for i in np.unique(np.linspace(0, NUM_FRAMES - 1, CLIP_SECONDS, dtype=int))
)
FRAME_TIMES = tuple(index / NUM_FRAMES for index in SAMPLED_INDICES)
TIMESTAMPS = tuple(index / CLIP_FPS for index in SAMPLED_INDICES)

BACKGROUND_RGB = torch.tensor(tuple(BACKGROUNDS.values()), dtype=torch.float32)
COLOR_RGB = torch.tensor(tuple(COLORS.values()), dtype=torch.float32)


def draw_frames(
    background: Tensor, color: Tensor, shape: Tensor, radius: Tensor, center: Tensor, size: int
) -> Tensor:
    """Frames with one object each: float32 [N, 3, size, size] in 0..255.

    background, color, shape: int64 [N] indices into the names of `scene`; radius float [N] and
    center float [N, 2] (x, y) as fractions of the frame. Coverage is the signed distance to the
    outline in pixels, clipped to +-1/2: one pixel of anti-aliasing at any size.
    """
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    dx = (axis[None, None, :] - center[:, 0, None, None]).abs()
    dy = (axis[None, :, None] - center[:, 1, None, None]).abs()
    r = radius[:, None, None]
    distance = (dx.square() + dy.square()).sqrt()
    outlines = {
        "disc": distance - r,
        "ring": (distance - 0.78 * r).abs() - 0.22 * r,
        "bar": torch.maximum(dx - 1.25 * r, dy - 0.42 * r),
        "pillar": torch.maximum(dx - 0.42 * r, dy - 1.25 * r),
    }
    stacked = torch.stack([outlines[name] for name in SHAPES], dim=1)
    outline = stacked[torch.arange(len(shape)), shape]
    coverage = (0.5 - outline * size).clamp_(0, 1)[:, None]
    paint = COLOR_RGB[color][:, :, None, None]
    ground = BACKGROUND_RGB[background][:, :, None, None]
    return ground + coverage * (paint - ground)


def render(scenes: Sequence[Scene], size: int, times: Sequence[float] = FRAME_TIMES) -> Tensor:
    """Videos uint8 [B, F, 3, size, size] at `times` (fractions of the video, 0 <= t < 1)."""
    background, color, shape, radius, center = [], [], [], [], []
    names = tuple(BACKGROUNDS), tuple(COLORS)
    for scene in scenes:
        for time in times:
            item, progress = scene.at(time)
            background.append(names[0].index(scene.background))
            color.append(names[1].index(item.color))
            shape.append(SHAPES.index(item.shape))
            radius.append(item.radius)
            center.append(item.position(progress))
    frames = draw_frames(
        torch.tensor(background),
        torch.tensor(color),
        torch.tensor(shape),
        torch.tensor(radius, dtype=torch.float32),
        torch.tensor(center, dtype=torch.float32),
        size,
    )
    return frames.round_().to(torch.uint8).view(len(scenes), len(times), 3, size, size)


def write_clip(
    scene: Scene,
    path: str | Path,
    size: int = 192,
    fps: int = CLIP_FPS,
    seconds: int = CLIP_SECONDS,
) -> Path:
    """Write the scene as an H.264 file of fps * seconds frames, atomically."""
    count = fps * seconds
    frames = render([scene], size, [index / count for index in range(count)])[0]
    images = frames.permute(0, 2, 3, 1).contiguous().numpy()
    return write_video(path, images, (size, size), Fraction(fps))


# --- augment --------------------------------------------------------------------------------------


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, gain, offset and noise of float frames [N, 3, H, W] in 0..255.

    Trained on such frames, the models are not sensitive to codec noise and resizing.
    """
    count = len(frames)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    soft = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = torch.lerp(frames, soft, uniform(-0.15, 0.4))
    mixed = mixed * uniform(0.96, 1.04) + uniform(-6.0, 6.0)
    noise = torch.randn(frames.shape, generator=generator) * uniform(0.0, 5.0)
    return (mixed + noise).clamp_(0, 255)
