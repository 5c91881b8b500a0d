"""Scenes: deterministic sampling and splits that share nothing."""

from collections import Counter

import pytest

from v2l_fast.shapes.world import MOTIONS, SPLITS, Scene, SceneObject, sample_scenes


def one(motion: str, center=(0.5, 0.5)) -> SceneObject:
    return SceneObject("large", "red", "disc", motion, 0.17, center, 0.5)


def test_same_seed_same_scenes():
    assert sample_scenes("train", 50, 3) == sample_scenes("train", 50, 3)
    assert sample_scenes("train", 50, 3) != sample_scenes("train", 50, 4)


def test_a_longer_sample_starts_with_the_shorter_one():
    assert sample_scenes("val", 60, 0)[:20] == sample_scenes("val", 20, 0)


def test_splits_share_no_combination():
    result = {s: {x.combination for x in sample_scenes(s, 1500, 0)} for s in SPLITS}
    assert not result["train"] & result["val"]
    assert not result["train"] & result["test"]
    assert not result["val"] & result["test"]


def test_split_depends_on_names_only():
    first = Scene("black", (one("left", (0.4, 0.5)),))
    second = Scene("black", (one("left", (0.6, 0.45)),))
    assert first.split == second.split


def test_every_name_is_used_about_equally():
    scenes = sample_scenes("train", 4000, 1)
    objects = [item for scene in scenes for item in scene.objects]
    colors = Counter(item.color for item in objects)
    assert max(colors.values()) < 1.3 * min(colors.values())
    single = sum(len(scene.objects) == 1 for scene in scenes) / len(scenes)
    assert single == pytest.approx(0.35, abs=0.04)
    still = sum(item.motion == "still" for item in objects) / len(objects)
    assert still == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize(
    ("motion", "start", "end"),
    [
        ("left", ("middle", "right"), ("middle", "left")),
        ("right", ("middle", "left"), ("middle", "right")),
        ("up", ("bottom", "center"), ("top", "center")),
        ("down", ("top", "center"), ("bottom", "center")),
        ("still", ("middle", "center"), ("middle", "center")),
    ],
)
def test_places_follow_the_motion(motion, start, end):
    assert motion in MOTIONS
    assert one(motion).place(0.0) == start
    assert one(motion).place(1.0) == end


def test_objects_share_the_time_in_order():
    first, second = one("left"), one("up")
    scene = Scene("gray", (first, second))
    assert scene.at(0.0) == (first, 0.0)
    assert scene.at(0.25) == (first, 0.5)
    assert scene.at(0.5) == (second, 0.0)
    assert scene.at(0.75) == (second, 0.5)
    assert Scene("gray", (first,)).at(0.75) == (first, 0.75)
