"""Scenes to pixels: a vectorized anti-aliased renderer, H.264 files and augmentation.

Responsible for drawing. `v2l_fast.video` samples the frames of a file; `FRAME_TIMES` repeats its
choice for such a file, so that training can skip the codec.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from v2l_fast.shapes.looks import PLAIN, Look, texture
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
    background: Tensor,
    color: Tensor,
    shape: Tensor,
    radius: Tensor,
    center: Tensor,
    size: int,
    looks: Sequence[Look] | None = None,
) -> Tensor:
    """Frames with one object each: float32 [N, 3, size, size] in 0..255.

    background, color, shape: int64 [N] indices into the names of `world`; radius float [N] and
    center float [N, 2] (x, y) as fractions of the frame; looks: of each frame, by default plain
    ones. Coverage is the signed distance to the outline in pixels, clipped to +-1/2: one pixel of
    anti-aliasing at any size.
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
    paint = COLOR_RGB[color][:, :, None, None]
    ground = BACKGROUND_RGB[background][:, :, None, None]
    if looks is None:
        coverage = (0.5 - outline * size).clamp_(0, 1)[:, None]
        return ground + coverage * (paint - ground)
    return _draw_looks(looks, outline, paint, ground, r, center, size)


def _draw_looks(
    looks: Sequence[Look],
    outline: Tensor,
    paint: Tensor,
    ground: Tensor,
    radius: Tensor,
    center: Tensor,
    size: int,
) -> Tensor:
    """Frames with one object each, as their looks have it.

    outline: [N, size, size], signed distance to the object's outline; paint, ground: [N, 3, 1, 1];
    radius: [N, 1, 1]; center: [N, 2].
    """
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x = axis[None, None, :] - center[:, 0, None, None]
    y = axis[None, :, None] - center[:, 1, None, None]

    def drawn(style: str) -> Tensor:
        return torch.tensor([look.style == style for look in looks])[:, None, None]

    fields = {look: texture(look, size) for look in dict.fromkeys(looks)}
    ground = (ground + torch.stack([fields[look] for look in looks])[:, None]).clamp(0, 255)
    edge = torch.where(drawn("soft"), outline / 0.07, outline * size)
    coverage = (0.5 - edge).clamp(0, 1)
    # The shadow of any outline: the object's own, shifted by a thirtieth of the frame.
    shift = max(1, round(size / 30))
    shadow = F.pad(coverage, (shift, 0, shift, 0))[:, :size, :size]
    ground = ground * (1 - 0.5 * shadow * drawn("shadow"))[:, None]
    light = torch.ones_like(outline)
    light = torch.where(drawn("outlined") & (outline > -0.2 * radius), 0.4, light)
    light = torch.where(drawn("shaded"), (0.85 - 0.3 * (x + y) / (2 * radius)).clamp(0.4, 1), light)
    stripes = 0.75 + 0.25 * torch.sin(2 * math.pi * (x + y) / 0.1)
    light = torch.where(drawn("striped"), stripes, light)
    frames = ground + coverage[:, None] * (paint * light[:, None] - ground)
    for index, look in enumerate(looks):
        if (post := look.post) is not None:
            hidden = (axis - post.center).abs() - post.width / 2
            hidden = (0.5 - hidden * size).clamp(0, 1)
            hidden = hidden[None, None, :] if post.vertical else hidden[None, :, None]
            frames[index] += hidden * (post.gray - frames[index])
    return frames


def render(scenes: Sequence[Scene], size: int, times: Sequence[float] = FRAME_TIMES) -> Tensor:
    """Videos uint8 [B, F, 3, size, size] at `times` (fractions of the video, 0 <= t < 1)."""
    background, color, shape, radius, center = [], [], [], [], []
    looks = [scene.look for scene in scenes for _ in times]
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
        None if all(look == PLAIN for look in looks) else looks,
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
