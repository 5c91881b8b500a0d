"""Sampling, text and pixels against what of transformers' own SmolVLM processing runs without
torchvision.

Its image processor is the path 4.51.3 sends video frames through (later releases do not split
video frames, so their video processor follows other rules above one tile). Its methods are called
on stand-ins where building the real object needs torchvision or a hub.
"""

from __future__ import annotations

import types

import jinja2
import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from v2l_fast.video import frame_views, normalize, resized_size, sample_indices
from v2l_fast.vlm.smolvlm import (
    FAKE_TOKEN,
    GLOBAL_TOKEN,
    IMAGE_TOKEN,
    chat,
    frame_text,
    video_text,
)

# Older releases of transformers import torchvision here.
FOLDER = "transformers.models.smolvlm"
reference, images, videos = (
    pytest.importorskip(f"{FOLDER}.{name}", exc_type=ImportError)
    for name in ("processing_smolvlm", "image_processing_pil_smolvlm", "video_processing_smolvlm")
)
SmolVLMImageProcessorPil = images.SmolVLMImageProcessorPil
SmolVLMVideoProcessor = videos.SmolVLMVideoProcessor
get_resize_output_image_size = videos.get_resize_output_image_size


def processor_stand_in(tokens_per_view: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        image_seq_len=tokens_per_view,
        image_token=IMAGE_TOKEN,
        fake_image_token=FAKE_TOKEN,
        global_image_token=GLOBAL_TOKEN,
    )


@pytest.mark.parametrize("max_frames", [1, 12, 64])
@pytest.mark.parametrize("target_fps", [1, 0.5, 2])
def test_sampled_indices(max_frames, target_fps):
    for fps in (1.0, 7.5, 24.0, 30000 / 1001, 60.0):
        for num_frames in (1, 2, 5, 29, 30, 91, 359, 420, 421, 449, 1800, 54_000):
            metadata = VideoMetadata(
                total_num_frames=num_frames, fps=fps, duration=num_frames / fps
            )
            expected = SmolVLMVideoProcessor.sample_frames(
                types.SimpleNamespace(), metadata, num_frames=max_frames, fps=target_fps
            )
            ours = sample_indices(num_frames, fps, num_frames / fps, max_frames, target_fps)
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 25.0), (300, 30.0), (100_000, 24.0)])
def test_video_text(num_frames, fps):
    duration = num_frames / fps
    indices = sample_indices(num_frames, fps, duration, max_frames=12)
    metadata = VideoMetadata(
        total_num_frames=num_frames, fps=fps, duration=duration, frames_indices=indices
    )
    inputs = {"pixel_values": np.empty((1, len(indices))), "video_metadata": [metadata]}
    expected = reference.SmolVLMProcessor.replace_video_token(
        processor_stand_in(64), inputs, video_idx=0
    )
    timestamps = tuple(float(i / fps) for i in indices)
    assert video_text(len(indices), timestamps, duration, 0, 0, 64) == expected


@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 2), (2, 1), (2, 3)])
def test_frame_text(rows, cols):
    expected = reference.get_image_prompt_string(
        rows, cols, 81, FAKE_TOKEN, IMAGE_TOKEN, GLOBAL_TOKEN
    )
    assert frame_text(rows, cols, 81) == expected


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chat(add_generation_prompt):
    template = jinja2.Template(reference.DEFAULT_CHAT_TEMPLATE, keep_trailing_newline=True)
    content = [{"type": "text", "text": "intro and frames"}, {"type": "text", "text": "question?"}]
    expected = template.render(
        messages=[{"role": "user", "content": content}],
        add_generation_prompt=add_generation_prompt,
    )
    assert chat("intro and framesquestion?", add_generation_prompt) == expected


# (height, width), longest edge, M: one tile, up- and downscaled, portrait, odd, and split ones.
SHAPES = [
    ((36, 64), 48, 64),
    ((360, 640), 48, 64),
    ((64, 36), 64, 64),
    ((101, 67), 50, 32),
    ((36, 64), 96, 32),
    ((64, 37), 65, 32),
    ((50, 50), 64, 32),
    ((20, 90), 70, 32),
]


def pixels_of(frames: torch.Tensor, edge: int, tile: int) -> dict:
    """transformers' image processor with image splitting on `frames` as one video."""
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": edge},
        max_image_size={"longest_edge": tile},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        return_row_col_info=True,
    )
    return processor(list(frames.numpy()), return_tensors="pt", input_data_format="channels_first")


@pytest.mark.parametrize(("size", "edge", "tile"), SHAPES)
def test_views_and_pixels(size, edge, tile):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
    expected = pixels_of(frames, edge, tile)
    ours = frame_views(frames, edge, tile)
    assert [[ours.rows] * 2, [ours.cols] * 2] == [expected["rows"][0], expected["cols"][0]]
    pixels = expected["pixel_values"][0]
    # Dividing by 255 first rounds differently in float32; bfloat16 hides the difference.
    torch.testing.assert_close(normalize(ours.views, torch.float32), pixels, rtol=0, atol=1.2e-7)
    assert torch.equal(normalize(ours.views, torch.bfloat16), pixels.to(torch.bfloat16))
    assert torch.equal(ours.views, ((pixels + 1) * 127.5).round().to(torch.uint8))


def test_every_pixel_value():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = pixels_of(frames, edge=16, tile=16)["pixel_values"][0]
    assert torch.equal(frame_views(frames, 16, 16).views, frames)
    assert torch.equal(normalize(frames, torch.bfloat16), expected.to(torch.bfloat16))


def test_first_resize():
    rng = np.random.default_rng(0)
    for height, width, edge in rng.integers(1, 2500, (2000, 3)).tolist():
        expected = get_resize_output_image_size(torch.empty(1).expand(height, width), edge)
        assert resized_size(height, width, edge) == tuple(expected)
