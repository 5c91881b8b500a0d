"""Spans of a small folder in FineVideo's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.video.clips import encode, shown_index
from v2l_fast.data.finevideo import (
    FineVideoError,
    Pools,
    Span,
    build_manifest,
    mix_spans,
    read_pools,
    seconds,
    video_spans,
)
from v2l_fast.data.manifest import load_manifest, split_by_video, video_key
from v2l_fast.data.teach import REQUIRED
from v2l_fast.video import FrameSampling
from v2l_fast.video.reader import load_spans


def stamp(value: float) -> str:
    return f"{int(value // 3600):02d}:{int(value % 3600 // 60):02d}:{value % 60:06.3f}"


def metadata(bounds, duration: int = 6) -> dict:
    """As the data set publishes it, the fields that matter and some that do not."""
    return {
        "content_parent_category": "Test",
        "duration_seconds": duration,
        "youtube_title": "A clip",
        "content_metadata": {
            "description": "Bars of light.",
            "fps": 10.0,
            "qAndA": [{"question": "What is red?", "answer": "The corner."},
                      {"question": " ", "answer": ""}],
            "scenes": [
                {
                    "sceneId": i + 1,
                    "title": f"Scene {i + 1}",
                    "activities": [{"description": "Bars change", "timestamp": {}}],
                    "timestamps": {"start_timestamp": stamp(a), "end_timestamp": stamp(b)},
                }
                for i, (a, b) in enumerate(bounds)
            ],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finevideo")
    first = encode(root / "video-0.mp4", 60)
    for number in range(8):
        path = root / ("more" if number > 5 else ".") / f"video-{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(first.read_bytes())
        told = metadata([(0, 1.5), (1.5, 3.2), (3.2, 6.0)])
        path.with_suffix(".json").write_text(json.dumps(told))
    return root


def test_pools(folder):
    pools = read_pools(folder)
    assert pools.videos == 8 and not pools.left_out
    assert {pool: len(spans) for pool, spans in pools.spans.items()} == {
        "scene": 24, "adjacent": 24, "full": 8,
    }  # fmt: skip
    assert pools.spans["scene"][1].start == 1.5 and pools.spans["full"][0].start is None
    triple = next(s for s in pools.spans["adjacent"] if len(s.scenes) == 3)
    assert (triple.start, triple.end) == (0, 6.0)
    assert "more/video-7.mp4" in {span.video for span in pools.spans["full"]}
    assert len({s.id for spans in pools.spans.values() for s in spans}) == 56


@pytest.mark.parametrize(
    ("bounds", "scenes", "adjacent"),
    [
        ([(0, 2), (2, 4)], 2, 1),
        ([(0, 2), (4, 6)], 2, 0),
        ([(0, 2), (2, 2), (2, 4)], 2, 0),
        ([(4, 6), (0, 2)], 2, 0),
        ([(0, 2), (2, 99)], 2, 1),
        ([(8, 9)], 0, 0),
        ([], 0, 0),
    ],
)
def test_scenes_that_make_no_sense_give_no_span(bounds, scenes, adjacent):
    actual = list(video_spans("a.mp4", metadata(bounds)))
    assert [sum(s.pool == pool for s in actual) for pool in ("scene", "adjacent", "full")] == [
        scenes, adjacent, 1,
    ]  # fmt: skip
    assert all(s.end <= 7 for s in actual if s.end is not None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("00:01:02.500", 62.5), ("1:00:00", 3600), ("02:03", 123), ("90:00.0", 5400), ("12", None),
     ("00:00:61", None), ("-1:00", None), ("soon", None), (None, None), ("1:x:2", None)],
)  # fmt: skip
def test_timestamps(text, value):
    assert seconds(text) == value


def test_the_mixture_is_sixty_thirty_ten(folder):
    pools = read_pools(folder)
    chosen = mix_spans(pools)
    assert len(chosen) == 40
    counts = {pool: sum(s.pool == pool for s in chosen) for pool in pools.spans}
    assert counts == {"scene": 24, "adjacent": 12, "full": 4}
    assert len({s.id for s in chosen}) == 40
    assert mix_spans(pools) == chosen and mix_spans(pools, seed=1) != chosen
    seven = mix_spans(pools, 7)
    assert len(seven) == 7 and sum(s.pool == "scene" for s in seven) == 4
    only = mix_spans(pools, 8, {"full": 1})
    assert {s.pool for s in only} == {"full"}
    with pytest.raises(FineVideoError, match="100 spans need 60 of the pool 'scene', which has 24"):
        mix_spans(pools, 100)
    with pytest.raises(FineVideoError, match="too small for the mix"):
        mix_spans(Pools({"scene": [Span("a", "scene")], "adjacent": [], "full": []}))


def test_the_manifest_reads_the_spans_without_cutting(folder, tmp_path):
    out = tmp_path / "lists" / "train.jsonl"
    built = build_manifest(folder, out, total=20, val_share=0.3, questions=5)
    examples = load_manifest(out, required=REQUIRED)
    assert len(examples) == len(built.rows) == 22 and sum(not e.is_caption for e in examples) == 2
    assert {e.prompt for e in examples if not e.is_caption} == {"What is red?"}
    train, val = split_by_video(examples, 0.5)
    assert len(train) + len(val) == 22 and val
    assert not {video_key(e) for e in train} & {video_key(e) for e in val}
    assert [p.name for p in out.parent.iterdir()] == ["train.jsonl"]
    spanned = next(e for e in examples if e.span == (1.5, 3.2))
    (clip,) = load_spans(spanned.path, FrameSampling(99, 4096, exact_frames=True), spanned.span)
    shown = [shown_index(frame.movedim(0, -1).numpy()) for frame in clip.frames]
    assert shown == list(range(15, 32))


def test_the_cards_own_layout(tmp_path):
    for name in ("videos", "metadata", "more"):
        (tmp_path / name).mkdir()
    for number in range(3):
        (tmp_path / f"videos/sample_{number}.mp4").touch()
        told = tmp_path / f"metadata/sample_{number}.json"
        told.write_text(json.dumps(metadata([(0, 1)])))
    # Two videos of one name, neither beside the metadata: which is meant is not known.
    (tmp_path / "more/sample_2.mp4").touch()
    actual = read_pools(tmp_path).spans["full"]
    assert [span.video for span in actual] == ["videos/sample_0.mp4", "videos/sample_1.mp4"]


def test_names_that_differ_in_their_folder_alone_have_ids_of_their_own(tmp_path):
    for name in ("a/b", "a-b"):
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        path.with_suffix(".json").write_text(json.dumps(metadata([(0, 1)])))
    pools = read_pools(tmp_path)
    ids = [span.id for spans in pools.spans.values() for span in spans]
    assert len(ids) == len(set(ids)) > 2


def test_a_missing_folder_says_where_the_data_is(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FineVideoError, match="huggingface.co/datasets/HuggingFaceFV/finevideo"):
            read_pools(folder)


def test_bad_metadata_leaves_a_video_out(tmp_path):
    for name, text in (("a", "{"), ("b", "[]"), ("c", json.dumps(metadata([])))):
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.json").write_text(text)
    pools = read_pools(tmp_path)
    assert list(pools.left_out) == ["a.mp4", "b.mp4", "c.mp4"]
    assert [len(spans) for spans in pools.spans.values()] == [0, 0, 1]
