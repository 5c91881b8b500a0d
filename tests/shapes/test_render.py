"""Rendering: determinism, what is where, and real files."""

import av
import numpy as np
import pytest
import torch

from v2l_fast.shapes.render import (
    FRAME_TIMES,
    NUM_FRAMES,
    SAMPLED_INDICES,
    TIMESTAMPS,
    render,
    write_clip,
)
from v2l_fast.shapes.world import BACKGROUNDS, COLORS, MOTIONS, Scene, SceneObject, sample_scenes
from v2l_fast.video import frame_views, load_video, sample_indices


def scene_of(shape: str, motion: str = "still", color: str = "red") -> Scene:
    item = SceneObject("large", color, shape, motion, 0.2, (0.5, 0.5), 0.5)
    return Scene("black", (item,))


def centroid(frame: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Mean (x, y) of what differs from the background, as fractions of the frame."""
    weight = (frame.float() - background.float()[:, None, None]).abs().sum(0)
    axis = (torch.arange(frame.shape[-1]) + 0.5) / frame.shape[-1]
    return torch.stack([(weight.sum(0) * axis).sum(), (weight.sum(1) * axis).sum()]) / weight.sum()


def test_same_scenes_same_pixels_alone_or_together():
    scenes = sample_scenes("train", 6, 0)
    videos = render(scenes, 48)
    assert videos.dtype == torch.uint8 and videos.shape == (6, 8, 3, 48, 48)
    assert all(torch.equal(render([s], 48)[0], v) for s, v in zip(scenes, videos, strict=True))


def test_colors_are_the_named_ones():
    for name, rgb in COLORS.items():
        frame = render([scene_of("disc", color=name)], 48)[0, 0]
        assert tuple(frame[:, 24, 24].tolist()) == rgb
        assert tuple(frame[:, 0, 0].tolist()) == BACKGROUNDS["black"]


@pytest.mark.parametrize("size", [48, 96, 193])
def test_shapes_cover_their_area_at_any_size(size):
    r = 0.2
    areas = {
        "disc": np.pi * r**2,
        "ring": np.pi * r**2 * (1 - 0.56**2),
        "bar": 4 * 1.25 * 0.42 * r**2,
        "pillar": 4 * 1.25 * 0.42 * r**2,
    }
    for shape, area in areas.items():
        frame = render([scene_of(shape)], size)[0, 0, 0].double()
        low, high = BACKGROUNDS["black"][0], COLORS["red"][0]
        covered = ((frame - low) / (high - low)).mean().item()
        assert covered == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_move_as_named(motion):
    frames = render([scene_of("disc", motion)], 96)[0]
    ground = torch.tensor(BACKGROUNDS["black"])
    moved = centroid(frames[-1], ground) - centroid(frames[0], ground)
    expected = torch.tensor(MOTIONS[motion]) * 0.5 * (FRAME_TIMES[-1] - FRAME_TIMES[0])
    assert torch.allclose(moved, expected.float(), atol=0.005)


def test_sampled_times_are_what_the_video_package_picks():
    result = sample_indices(NUM_FRAMES, 4.0, 8.0, max_frames=8)
    assert tuple(result.tolist()) == SAMPLED_INDICES
    assert tuple(int(t) for t in TIMESTAMPS) == tuple(range(8))


def test_clip_is_a_real_h264_file(tmp_path):
    (scene,) = sample_scenes("test", 1, 0)
    path = write_clip(scene, tmp_path / "clip.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, float(stream.average_rate)) == (192, 192, 4.0)
        assert sum(1 for _ in container.decode(stream)) == NUM_FRAMES

    clip = load_video(path, max_frames=8)
    assert clip.timestamps == TIMESTAMPS and clip.duration == 8.0
    views = frame_views(clip.frames, 48, 48).views
    direct = render([scene], 48)[0]
    assert views.shape == direct.shape
    # Codec, chroma subsampling and resizing only; measured 1 to 4 of 255.
    assert (views.float() - direct.float()).abs().mean() < 6


def test_a_failed_write_leaves_nothing(tmp_path):
    (scene,) = sample_scenes("test", 1, 0)
    with pytest.raises(av.FFmpegError):
        write_clip(scene, tmp_path / "clip.mp4", size=33)
    assert list(tmp_path.iterdir()) == []
