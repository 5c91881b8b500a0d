"""Resizing equals Pillow bit for bit; views and sizes follow transformers 4.51.3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from v2l_fast.errors import ConfigError
from v2l_fast.video import frame_views, normalize, resize_lanczos, resized_size
from v2l_fast.video import preprocess as module


def pillow(image: torch.Tensor, height: int, width: int, passes: int = 2) -> torch.Tensor:
    """Pillow's result; in two passes it is the same in every release (13 may swap them)."""
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if passes == 2:
        pil = pil.resize((width, pil.height), Image.Resampling.LANCZOS)
    pil = pil.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values at both ends of the range, where ringing clips, and in between."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 384, shape, generator=generator)
    return x.clamp_(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1080, 1920), (216, 384)),
        ((216, 384), (512, 512)),
        ((640, 360), (384, 216)),  # portrait
        ((384, 216), (384, 384)),  # one axis only
        ((97, 131), (97, 60)),
        ((1, 1), (7, 5)),
        ((1, 300), (2, 384)),
        ((300, 1), (33, 1)),
        ((5, 3), (1, 1)),
        ((501, 333), (17, 1023)),
        ((64, 64), (64, 64)),
    ],
)
def test_resize_equals_pillow(source, target):
    image = noise(3, *source)
    assert torch.equal(resize_lanczos(image, *target), pillow(image, *target))


@pytest.mark.parametrize(
    ("source", "target"),
    [((360, 640), (216, 384)), ((1280, 720), (384, 216)), ((1024, 1904), (206, 384)),
     ((384, 216), (512, 512)), ((432, 768), (512, 1024)), ((1, 300), (2, 384))],
)  # fmt: skip
def test_resize_equals_one_call_of_pillow(source, target):
    image = noise(3, *source)
    assert torch.equal(resize_lanczos(image, *target), pillow(image, *target, passes=1))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 120)] * 4),
    seed=st.integers(0, 1000),
)
def test_resize_equals_pillow_for_any_size(sizes, seed):
    height, width, new_height, new_width = sizes
    image = noise(3, height, width, seed=seed)
    assert torch.equal(
        resize_lanczos(image, new_height, new_width), pillow(image, new_height, new_width)
    )


def test_resize_does_not_depend_on_batching_or_strides(monkeypatch):
    frames = noise(2, 5, 3, 40, 50)
    expected = torch.stack([pillow(f, 30, 70) for f in frames.flatten(0, 1)]).unflatten(0, (2, 5))
    assert torch.equal(resize_lanczos(frames, 30, 70), expected)
    channels_last = frames.movedim(2, -1).contiguous().movedim(-1, 2)
    assert torch.equal(resize_lanczos(channels_last, 30, 70), expected)
    monkeypatch.setattr(module, "_CHUNK_CPU", 1)
    assert torch.equal(resize_lanczos(frames, 30, 70), expected)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_resize_refuses_other_inputs(bad):
    with pytest.raises(ConfigError, match="must be uint8"):
        resize_lanczos(bad, 2, 2)


def test_resize_refuses_empty_sizes():
    with pytest.raises(ConfigError, match="at least 1"):
        resize_lanczos(noise(3, 4, 4), 0, 2)


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((360, 640), 384, (216, 384)),
        ((720, 1280), 384, (216, 384)),
        ((1024, 1904), 384, (206, 384)),
        ((480, 640), 384, (288, 384)),
        ((640, 480), 384, (384, 288)),
        ((100, 100), 384, (384, 384)),
        ((101, 100), 384, (384, 380)),
        ((333, 1000), 385, (128, 385)),  # only the short side is made even
        ((1, 1000), 384, (1, 384)),
        ((1000, 2000), 5000, (2048, 4096)),
    ],
)
def test_resized_size(size, edge, expected):
    assert resized_size(*size, edge) == expected


def test_small_frames_become_one_square():
    frames = noise(2, 3, 36, 64)
    views = frame_views(frames, longest_edge=38, tile_size=48)
    assert (views.rows, views.cols, views.per_frame) == (0, 0, 1)
    for view, frame in zip(views.views, frames, strict=True):
        assert torch.equal(view, pillow(pillow(frame, 22, 38), 48, 48))


@pytest.mark.parametrize("portrait", [False, True])
def test_large_frames_become_tiles_and_a_global_view(portrait):
    frames = noise(2, 3, 36, 64)
    grid = (2, 3)
    if portrait:
        frames, grid = frames.transpose(2, 3), grid[::-1]
    result = frame_views(frames, longest_edge=140, tile_size=48)
    assert (result.rows, result.cols) == grid
    assert result.views.shape == (2 * result.per_frame, 3, 48, 48)
    per_frame = result.views.unflatten(0, (2, result.per_frame))
    for views, frame in zip(per_frame, frames, strict=True):
        first = resized_size(*frame.shape[1:], 140)
        whole = pillow(pillow(frame, *first), grid[0] * 48, grid[1] * 48)
        for i in range(grid[0] * grid[1]):
            y, x = (i // grid[1]) * 48, (i % grid[1]) * 48
            assert torch.equal(views[i], whole[:, y : y + 48, x : x + 48])
        assert torch.equal(views[-1], pillow(whole, 48, 48))


@pytest.mark.parametrize(
    ("tile", "edge", "views"), [(512, 768, 5), (512, 1024, 5), (384, 768, 5), (384, 1024, 7)]
)
def test_views_of_a_wide_frame_in_the_resolution_sweep(tile, edge, views):
    assert frame_views(noise(1, 3, 36, 64), edge, tile).per_frame == views


def test_frame_views_refuses_empty_sizes():
    with pytest.raises(ConfigError, match="must be at least 1, got 0 and 32"):
        frame_views(noise(1, 3, 4, 4), 0, 32)


def test_normalize_is_the_exact_map():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = normalize(u8, torch.float32)
    exact = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    assert torch.equal(x, exact.to(torch.float32))
    assert torch.equal(normalize(u8, torch.bfloat16), x.to(torch.bfloat16))
    assert u8[3] == 3
