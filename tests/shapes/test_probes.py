"""The probes: their questions, clips and scores."""

from __future__ import annotations

import pytest

from v2l_fast.model import Video2LoRA
from v2l_fast.shapes import probes, report_page
from v2l_fast.shapes.language import caption, parse_caption
from v2l_fast.shapes.looks import HELD_OUT_PHOTOS, PLAIN
from v2l_fast.shapes.world import (
    SHAPES,
    Recording,
    has_held_out_pair,
    has_held_out_place,
    sample_scenes,
)

SCENES = sample_scenes("test", 60, 3)


@pytest.fixture(scope="module")
def clips():
    return probes.rendered_clips(SCENES[:2])


def test_binding_asks_about_both_objects_what_differs():
    """An answer that ignores the shape is correct for one question of each pair."""
    questions = list(probes.binding_probes(SCENES))
    assert {p.kind for p in questions} == {"color", "size", "motion"}
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        assert (first.clip, first.kind) == (second.clip, second.kind)
        assert first.answer != second.answer and first.question != second.question
        shapes = [item.shape for item in SCENES[first.clip].objects]
        assert len(set(shapes)) == 2
        for one, item in zip((first, second), SCENES[first.clip].objects, strict=True):
            assert item.shape in one.question and getattr(item, one.kind) == one.answer
    assert all(
        probes._caption_answers(parse_caption(caption(SCENES[p.clip])), p) for p in questions
    ), "a right caption answers every question"
    assert not any(probes._caption_answers({}, p) for p in questions)


def test_absent_probes_name_what_is_not_there():
    questions = list(probes.absent_probes(SCENES, 0))
    assert len({p.clip for p in questions}) == len(SCENES)
    for p in questions:
        named = [shape for shape in SHAPES if shape in p.question]
        present = {item.shape for item in SCENES[p.clip].objects}
        if "second object" in p.question:
            assert len(SCENES[p.clip].objects) == 1 and not named
        else:
            assert len(named) == 1 and named[0] not in present
        assert p.answer == ""


@pytest.mark.parametrize("text", ["None.", "there is no ring", "nothing", "Zero", "no", "It isn't"])
def test_denials(text):
    assert probes.denies(text)


@pytest.mark.parametrize("text", ["red", "", "still", "north", "one"])
def test_no_denials(text):
    assert not probes.denies(text)


def test_further_questions_are_true():
    kinds = {}
    for p in probes.further_probes(SCENES, 0):
        kinds.setdefault(p.kind, []).append(p)
    assert len(kinds) == 7
    for p in kinds["which comes second"]:
        assert p.answer == SCENES[p.clip].objects[1].shape in p.question
    for p in kinds['"the color of"']:
        assert p.answer in {item.color for item in SCENES[p.clip].objects}
    assert all(p.question.startswith("Where does the") for p in kinds["where an object ends"])


@pytest.mark.parametrize(
    ("seconds", "frames", "last"), [(2, 2, 1.75), (8, 8, 7.75), (16, 8, 15.0), (64, 8, 63.0)]
)
def test_clips_are_sampled_as_files_of_their_duration(seconds, frames, last):
    clip = probes.sampled_clips(SCENES[:1], seconds)[0]
    assert clip.frames.shape[0] == len(clip.timestamps) == frames
    assert clip.duration == seconds and clip.timestamps[-1] == last
    assert clip.num_frames == seconds * 4
    if seconds == 8:
        assert (clip.frames == probes.rendered_clips(SCENES[:1])[0].frames).all()


def test_restamping_changes_times_alone(clips):
    slow = probes.restamped(clips[0], 16.0)
    assert slow.duration == 16.0 and (slow.frames is clips[0].frames)
    assert slow.timestamps == tuple(2 * t for t in clips[0].timestamps)


def test_questions_about_random_recordings_have_every_kind():
    kinds = {p.kind: p for p in probes.kind_probes(SCENES, 0)}
    assert kinds["absent"].answer == "none"
    assert {"binding", "an only object by name", "order", "motion"} <= kinds.keys()
    assert {"where it starts", "which comes second", *probes.NEVER_ASKED} <= kinds.keys()


def test_a_share_of_nothing_is_left_out():
    """What an adapter keeps is undefined where the video in context helps no more than nothing."""
    members = [probes.Probe("color", clip, "What color is the disc?", "red") for clip in range(4)]
    names = (probes.BASELINE, probes.SYSTEM, probes.OTHER, probes.NONE)

    def rows(direct: str) -> list[dict]:
        texts = {**dict.fromkeys(names, ["blue"] * 4), probes.BASELINE: [direct] * 4}
        return probes.question_rows(lambda questions: texts, members)

    assert rows("red")[0]["kept"] == {probes.SYSTEM: 0.0}
    assert rows("blue")[0]["kept"] == {}


def test_a_recording_is_sampled_as_its_file_would_be():
    recording = Recording(5.0, 10.0, 3, exact=True)
    (clip,) = probes.recorded_clips(SCENES[:1], [recording])
    assert clip.timestamps == (0.0, 2.4, 4.9)
    assert (clip.num_frames, clip.duration, clip.frames.shape[0]) == (50, 5.0, 3)


def test_groups_of_looks_have_what_they_are_named_after():
    groups = probes.look_groups(12, 0)
    assert all(len(scene.objects) == 3 for scene in groups["three objects"])
    assert all(scene.look.post for scene in groups["a post in front"])
    assert {scene.look.photo for scene in groups["photographs, held out"]} <= {*HELD_OUT_PHOTOS}
    assert {scene.split for scenes in groups.values() for scene in scenes} == {"test"}
    for name, kept in (("color and shape", has_held_out_pair), ("place", has_held_out_place)):
        assert all(map(kept, groups[f"a {name} held out of captions only"]))
    for scene in groups["two objects, plain"] + groups["three objects"]:
        assert scene.look == PLAIN


@pytest.mark.slow
def test_every_probe_of_the_shipped_pair(monkeypatch):
    """Rows come worst first, and the goals are read off them."""
    monkeypatch.setattr(probes, "SECONDS", (8, 16))
    monkeypatch.setattr(probes, "RESTAMPED", (8, 16))
    monkeypatch.setattr(probes, "RETRIEVED", 4)
    monkeypatch.setattr(probes, "LOOK_VIDEOS", 8)
    pair = Video2LoRA.from_pretrained("shapes", device="cpu")
    result = probes.probe(pair, SCENES[:24], captions_only=pair)
    for rows in (result["durations"], result["restamped"]):
        assert [row["seconds"] for row in rows] == ["16", "8"]
        slow, trained = (row["captions"]["adapter"]["estimate"] for row in rows)
        assert trained > 0.9 > slow
    for name in ("kinds", "binding", "binding_captions", "further", "absent"):
        scores = [row["score"]["adapter"]["estimate"] for row in result[name]]
        assert scores == sorted(scores) and all(row["questions"] for row in result[name])
    scores = [row["captions"]["adapter"]["estimate"] for row in result["looks"]]
    assert scores == sorted(scores) and {row["videos"] for row in result["looks"]} == {8}
    assert result["descriptions"]["adapter"]["estimate"] < 0.5
    assert all(report_page.probe_tables(result))
    # An honest interval: no answer denies, which does not show that none ever would.
    denied = result["absent"][0]["score"]["adapter"]
    assert denied["estimate"] == 0 < denied["high"]
    read = result["binding_captions"][0]["score"]["adapter"]["estimate"]
    assert read > result["binding"][-1]["score"]["adapter"]["estimate"]
    assert result["retrieval"]["adapter"]["first"]["estimate"] >= 0.5
    gaps = [
        float(row["worst value"]) - float(row["at least"]) for row in report_page.goal_rows(result)
    ]
    assert gaps == sorted(gaps)
