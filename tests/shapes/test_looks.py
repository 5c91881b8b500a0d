"""Looks: any style, texture and post, at any size, and never another answer."""

import random
import sys
from dataclasses import replace

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.shapes import looks
from v2l_fast.shapes.language import attributes, caption
from v2l_fast.shapes.looks import (
    HELD_OUT_PHOTOS,
    HELD_OUT_STYLE,
    PLAIN,
    STYLES,
    TEXTURES,
    Look,
    Post,
)
from v2l_fast.shapes.render import render
from v2l_fast.shapes.world import (
    BACKGROUNDS,
    sample_recordings,
    sample_scenes,
    sample_varied_recordings,
    sample_varied_scenes,
)

SCENE = sample_scenes("test", 1, 0)[0]
TIMES = (0.1, 0.6)


@pytest.mark.parametrize("style", [*STYLES, HELD_OUT_STYLE])
def test_styles_differ_and_keep_the_background(style):
    plain, styled = render([SCENE, replace(SCENE, look=Look(style=style))], 48, TIMES)
    assert torch.equal(plain, styled) == (style == "flat")
    assert torch.equal(plain[..., 0, 0], styled[..., 0, 0])


@pytest.mark.parametrize("kind", TEXTURES)
@pytest.mark.parametrize("size", [32, 48, 97])
def test_textures_stay_around_the_color_of_the_background(kind, size):
    for seed in range(4):
        look = Look(texture=kind, contrast=30.0, photo=HELD_OUT_PHOTOS[seed], seed=seed)
        field = looks.texture(look, size)
        assert field.shape == (size, size) and field.abs().max() <= 30.0
        assert abs(field.mean()) < 10.0
        assert (field.std() > 1.0) == (kind != "plain")
        assert torch.equal(field, looks.texture(look, size))


def test_a_texture_is_the_same_in_all_frames_of_a_video():
    look = Look(texture="noise", contrast=30.0, seed=3)
    scene = replace(SCENE, background="gray", look=look)
    (video,) = render([scene], 48, TIMES)
    corner = video[:, :, :4, :4]
    assert torch.equal(corner[0], corner[1]) and corner.float().std() > 0
    mean = video.float().mean((0, 2, 3))
    assert (mean - torch.tensor(BACKGROUNDS["gray"])).abs().max() < 25


@pytest.mark.parametrize("vertical", [False, True])
def test_a_post_hides_what_is_behind_it(vertical):
    post = Post(vertical, 0.5, 0.25, 190)
    (video,) = render([replace(SCENE, look=Look(post=post))], 48, TIMES)
    bar = video[..., 20:28] if vertical else video[..., 20:28, :]
    assert (bar == 190).all()
    assert (video[..., 0, 0] != 190).any()


def test_looks_of_one_batch_are_drawn_as_alone():
    scenes = sample_varied_scenes("train", 24, 0)
    together = render(scenes, 48, TIMES)
    for scene, video in zip(scenes, together, strict=True):
        assert torch.equal(render([scene], 48, TIMES)[0], video)


def test_varied_scenes_are_of_their_split_and_reproducible():
    scenes = sample_varied_scenes("test", 200, 0)
    assert scenes == sample_varied_scenes("test", 200, 0)
    assert {scene.split for scene in scenes} == {"test"}
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    drawn = [scene.look for scene in scenes]
    assert {look.style for look in drawn} == set(STYLES)
    assert {look.texture for look in drawn} == set(TEXTURES)
    assert drawn.count(PLAIN) > 30 and sum(look.post is not None for look in drawn) > 20
    three = next(scene for scene in scenes if len(scene.objects) == 3)
    assert caption(three).count(", then ") == 2 and attributes(three)["count"] == "3"
    spans = [three.span(index) for index in range(3)]
    assert [three.at(start)[0] for start, _ in spans] == list(three.objects)


def test_three_objects_are_recorded_in_at_least_six_frames():
    scenes = sample_varied_scenes("train", 300, 0)
    recordings = sample_varied_recordings(scenes, "train", 0)
    plain = sample_recordings("train", 300, 0)
    for scene, recording, other in zip(scenes, recordings, plain, strict=True):
        if len(scene.objects) == 3:
            assert len(recording.indices) >= 6
        else:
            assert recording == other


def test_without_scikit_image_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    looks.photograph.cache_clear()
    with pytest.raises(ConfigError, match=r"v2l_fast\[shapes\]"):
        looks.photograph("camera")


def test_the_sampled_looks_have_no_held_out_style_or_photograph():
    rng = random.Random(0)
    drawn = [looks.sample_look(rng) for _ in range(500)]
    assert HELD_OUT_STYLE not in {look.style for look in drawn}
    assert not {look.photo for look in drawn} & set(HELD_OUT_PHOTOS)
