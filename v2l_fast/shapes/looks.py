"""How a scene is drawn beyond its attributes: the style of objects, the texture of the background,
and a post in front.

No caption or question mentions a look, and none changes an answer. Photographs are those of
scikit-image; one style and some photographs are held out of training.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from v2l_fast.errors import ConfigError

STYLES = ("flat", "outlined", "shaded", "soft", "shadow")
HELD_OUT_STYLE = "striped"
TEXTURES = ("plain", "gradient", "checker", "stripes", "noise", "photo")
PHOTOS = ("astronaut", "brick", "camera", "coffee", "coins", "grass", "hubble_deep_field", "rocket")
HELD_OUT_PHOTOS = ("chelsea", "gravel", "immunohistochemistry", "moon")

_FLAT_SHARE, _PLAIN_SHARE, _POST_SHARE = 0.35, 0.35, 0.3
# Half of the difference between the lightest and the darkest pixel of a texture, of 255.
_CONTRAST = (15.0, 40.0)
_PHOTO_EDGE = 192


@dataclass(frozen=True)
class Post:
    """A bar across the whole frame that hides what is behind it.

    Attributes:
        vertical: from the top to the bottom, else from left to right.
        center, width: fractions of the frame.
        gray: its red, green and blue, 0 to 255.
    """

    vertical: bool
    center: float
    width: float
    gray: int


@dataclass(frozen=True)
class Look:
    """The look of a whole video.

    Attributes:
        style: one of :data:`STYLES`, or :data:`HELD_OUT_STYLE`.
        texture: one of :data:`TEXTURES`.
        contrast: of the texture, see :func:`texture`.
        photo: name of the photograph of the texture "photo".
        seed: with `texture`, determines the texture.
        post: the bar in front of the objects, if any.
    """

    style: str = "flat"
    texture: str = "plain"
    contrast: float = 0.0
    photo: str = ""
    seed: int = 0
    post: Post | None = None


PLAIN = Look()


def sample_look(rng: random.Random, photos: tuple[str, ...] = PHOTOS) -> Look:
    """A look of the training videos, with one of these photographs."""
    style = "flat" if rng.random() < _FLAT_SHARE else rng.choice(STYLES[1:])
    kind = "plain" if rng.random() < _PLAIN_SHARE else rng.choice(TEXTURES[1:])
    return Look(
        style=style,
        texture=kind,
        contrast=rng.uniform(*_CONTRAST),
        photo=rng.choice(photos),
        seed=rng.randrange(2**31),
        post=sample_post(rng) if rng.random() < _POST_SHARE else None,
    )


def sample_post(rng: random.Random) -> Post:
    """A post near the middle of the frame, narrower than every object."""
    return Post(
        vertical=rng.random() < 0.5,
        center=rng.uniform(0.25, 0.75),
        width=rng.uniform(0.03, 0.06),
        gray=rng.choice((60, 190)),
    )


# --- textures -------------------------------------------------------------------------------------


def texture(look: Look, size: int) -> Tensor:
    """What the look adds to the background's red, green and blue: float32 [size, size], within
    +-`look.contrast` and with a mean near 0.

    Raises:
        ConfigError: the look has a photograph, and scikit-image is not installed.
    """
    rng = random.Random(look.seed)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    angle, phase = rng.uniform(0, 2 * math.pi), rng.random()
    along = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
    cells = rng.uniform(4, 10)
    match look.texture:
        case "plain":
            return torch.zeros(size, size)
        case "gradient":
            field = along * math.sqrt(2)
        case "checker":
            field = torch.sign(
                torch.sin(math.pi * (cells * x + phase)) * torch.sin(math.pi * (cells * y + phase))
            )
        case "stripes":
            field = torch.sin(2 * math.pi * (cells * along + phase))
        case "noise":
            generator = torch.Generator().manual_seed(look.seed)
            grid = torch.rand(1, 1, round(cells), round(cells), generator=generator) * 2 - 1
            field = F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)[0, 0]
        case "photo":
            field = _crop(photograph(look.photo), rng, size)
        case _:
            raise ValueError(f"unknown texture {look.texture!r}")
    return field.clamp(-1, 1) * look.contrast


def _crop(photo: Tensor, rng: random.Random, size: int) -> Tensor:
    """A random square of a photograph, with mean 0 and a standard deviation of 1/2."""
    edge = round(min(photo.shape) * rng.uniform(0.4, 1.0))
    top, left = (rng.randrange(n - edge + 1) for n in photo.shape)
    square = photo[top : top + edge, left : left + edge]
    (square,) = F.interpolate(
        square[None, None], (size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]
    return (square - square.mean()) / (2 * square.std()).clamp_min(1e-3)


@cache
def photograph(name: str) -> Tensor:
    """A photograph of scikit-image in gray: float32 [H, W] in 0..1, the shorter side
    192 pixels.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ConfigError(
            f"the photograph {name!r} is part of scikit-image, which is not installed; "
            "pip install 'v2l_fast[shapes]'"
        ) from error
    pixels = torch.from_numpy(np.array(getattr(data, name)(), dtype=np.float32) / 255)
    gray = pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)
    scale = _PHOTO_EDGE / min(gray.shape)
    shape = tuple(max(_PHOTO_EDGE, round(n * scale)) for n in gray.shape)
    return F.interpolate(
        gray[None, None], shape, mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
