"""Manifests: every problem named before anything runs, and no video on both sides of a split."""

from __future__ import annotations

import json
import os

import pytest

from v2l_fast.data.manifest import (
    LISTED,
    Example,
    ManifestError,
    group_by_video,
    load_manifest,
    split_by_video,
    video_key,
    write_manifest,
)


def row(number: int, **changes) -> dict:
    return {
        "id": f"example-{number}",
        "video_path": "a.mp4",
        "task_type": "caption",
        "prompt": "What happens?",
        "target_text": "A disc moves.",
        "dataset": "test",
        "split": None,
        "metadata": {},
    } | changes


def write(folder, rows) -> object:
    for name in {r["video_path"] for r in rows if isinstance(r.get("video_path"), str)}:
        if name and not name.startswith("missing"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
    path = folder / "manifest.jsonl"
    write_manifest(path, rows)
    return path


def problems(path, **options) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, **options)
    return str(caught.value)


def test_fields_round_trip(tmp_path):
    rows = [row(0), row(1, task_type="qa", metadata={"span": [1, 2.5], "note": "kept"})]
    path = write(tmp_path, rows)
    examples = load_manifest(path)
    assert [example.row() for example in examples] == rows
    assert examples[0].path == str(tmp_path / "a.mp4")
    assert examples[0].span is None and examples[1].span == (1.0, 2.5)
    assert examples[0].is_caption and not examples[1].is_caption


def test_root_and_split(tmp_path):
    (tmp_path / "videos").mkdir()
    path = write(tmp_path, [row(0, split="train"), row(1, split="val", video_path="videos/b.mp4")])
    (kept,) = load_manifest(path, split="val")
    assert kept.id == "example-1"
    (tmp_path / "videos/a.mp4").write_bytes(b"x")
    assert "no such file" in problems(path, root=tmp_path / "videos")
    assert "no example of split 'test'" in problems(path, split="test")


def test_the_released_cut_positions_are_accepted(tmp_path):
    path = write(tmp_path, [row(0, clip_start_sec=3.0, clip_end_sec=8.0)])
    assert load_manifest(path)[0].span is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "line 1: field 'prompt' is missing or empty"),
        ({"target_text": " "}, "line 1: field 'target_text' is blank"),
        ({"target_text": 3}, "line 1: field 'target_text' is 3; write a text"),
        ({"video_path": "missing.mp4"}, "give the folder of the videos with --root"),
        ({"split": "dev"}, "field 'split' is 'dev'; write train, val, test"),
        ({"metadata": []}, "field 'metadata' is []; write an object"),
        ({"metadata": {"span": [5, 2]}}, "field 'metadata.span' is [5, 2]; write [start, end]"),
        ({"metadata": {"span": [0, True]}}, "field 'metadata.span'"),
        ({"metadata": {"span": "0-5"}}, "field 'metadata.span'"),
        ({"promt": "x"}, "field 'promt' is unknown; did you mean 'prompt'?"),
        ({"weight_of_it": 1}, "field 'weight_of_it' is unknown; put it under 'metadata'"),
    ],
)
def test_a_fault_is_named_with_its_remedy(tmp_path, changes, message):
    actual = problems(write(tmp_path, [row(0, **changes)]))
    assert message in actual and "manifest.jsonl: 1 problem" in actual


def test_all_problems_are_listed_up_to_a_limit(tmp_path):
    path = write(tmp_path, [row(0), *(row(i, prompt="") for i in range(1, LISTED + 6))])
    lines = problems(path).splitlines()
    assert len(lines) == 2 + LISTED
    assert lines[0].endswith(f": {LISTED + 5} problems")
    assert "line 2:" in lines[1] and lines[-1].strip() == "and 5 more"


def test_what_is_no_manifest(tmp_path):
    path = tmp_path / "manifest.jsonl"
    assert "no such file" in problems(path)
    path.write_text("")
    assert "holds no example" in problems(path)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problems(path)
    path.write_text('{"id": \n[1]\n')
    actual = problems(path)
    assert "line 1: not JSON" in actual and "line 2: a JSON list" in actual


def test_repeated_ids(tmp_path):
    assert "line 2: field 'id': 'example-0' is line 1's too" in problems(
        write(tmp_path, [row(0), row(0)])
    )


@pytest.mark.parametrize("other", ["Example-0", "EXAMPLE-0"])
def test_ids_that_differ_only_in_case(tmp_path, other):
    assert f"field 'id': '{other}' is line 1's too" in problems(
        write(tmp_path, [row(0), row(1, id=other)])
    )


def test_ids_that_look_the_same(tmp_path):
    path = write(tmp_path, [row(0, id="caf\u00e9"), row(1, id="cafe\u0301")])
    assert "is line 1's too" in problems(path)


@pytest.mark.parametrize(
    "bad",
    [
        "../../x",
        "..",
        ".",
        "a/../b",
        "/etc/passwd",
        "a//b",
        "a/",
        "a/.",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "a\\..\\b",
        "C:\\x",
        " a",
        "a\u2003",
        "a\u2028b",
        "x" * 256,
        "é" * 128,
        "x" * 1_000_000,
    ],
    ids=lambda bad: ascii(bad[:12]).replace("\\", "|"),
)
def test_ids_that_lead_elsewhere(tmp_path, bad):
    """Also where lines need no id: what an example is called may become a file's name."""
    for options in ({}, {"required": ("video_path",)}):
        text = problems(write(tmp_path, [row(0, id=bad), row(1)]), **options)
        (line,) = text.splitlines()[1:]
        assert line.startswith("  line 1: field 'id' is ") and "write at most 255 bytes" in line
        assert len(line) < 400 and line.isprintable()


@pytest.mark.parametrize(
    "good", ["Video-MME/001-1", "a b", "..a", "a..b", "a.", "é😀", "x" * 255, "dQw4w9WgXcQ", "#1"]
)
def test_ids_that_are_accepted(tmp_path, good):
    assert load_manifest(write(tmp_path, [row(0, id=good)]))[0].id == good


WRONG = [True, False, 3, 0, 1.5, [], ["a"], {}, {"a": 1}, "x" * 1_000_000]


@pytest.mark.parametrize("name", [*row(0), "clip_start_sec", "clip_end_sec"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:9])
def test_a_value_of_another_type_is_one_line(tmp_path, name, value):
    kind = dict if name == "metadata" else (int, float) if name.startswith("clip") else str
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and not (isinstance(value, str) and name in ("id", "split", "video_path"))
    ):
        load_manifest(write(tmp_path, [row(0, **{name: value})]))
        return
    path = write(tmp_path, [row(0)])
    write_manifest(path, [row(0), row(1, **{name: value})])
    text = problems(path)
    (line,) = text.splitlines()[1:]
    assert line.startswith(f"  line 2: field '{name}'") and ";" in line
    assert len(line) < 1200


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"span": {}}, "span"),
        ({"span": [1]}, "span"),
        ({"span": [0, [1]]}, "span"),
        ({"span": [-1, 2]}, "span"),
        ({"span": "x" * 1_000_000}, "span"),
        ({"video_id": ["a"]}, "video_id"),
        ({"video_id": True}, "video_id"),
        ({"video_id": {"a": "b" * 1_000_000}}, "video_id"),
        ({"truncated": "no"}, "truncated"),
        ({"truncated": 0}, "truncated"),
    ],
)
def test_metadata_of_another_type(tmp_path, metadata, name):
    (line,) = problems(write(tmp_path, [row(0, metadata=metadata)])).splitlines()[1:]
    assert line.startswith(f"  line 1: field 'metadata.{name}' is ") and len(line) < 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested more than"),
        ('{"metadata": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested more than"),
        ('{"id": ' + "1" * 5_000 + "}", "does not fit 64 bits"),
        ('{"metadata": {"span": [0, 1e999]}}', "not finite"),
        ('{"metadata": {"span": [0, NaN]}}', "NaN is not a finite number"),
        ('{"id": "a", "id": "b"}', "key 'id' appears twice"),
        (r'{"prompt": "\ud83d"}', "half of a surrogate pair"),
        ("x" * 1_000_000, "not JSON"),
        ('"' + "x" * 1_000_000 + '"', "a JSON str"),
        ("3", "a JSON int"),
        ("null", "a JSON NoneType"),
        ('{"' + "x" * 1_000_000 + '": 1}', "is unknown"),
    ],
    ids=lambda text: text[:20].replace("\\", "|"),
)
def test_lines_that_are_no_example(tmp_path, line, message):
    path = write(tmp_path, [row(0)])
    with open(path, "a") as file:
        file.write(line + "\n")
    text = problems(path)
    assert message in text
    assert all(len(part) < 1200 and part.isprintable() for part in text.splitlines())
    assert "line 2:" in text and "line 1:" not in text


def test_a_byte_order_mark_and_other_line_ends(tmp_path):
    path = write(tmp_path, [row(0), row(1)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert [example.id for example in load_manifest(path)] == ["example-0", "example-1"]


def test_videos_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "manifest.jsonl"
    videos = ["pipe", ".", "/dev/zero", "a\0b", "x" * 5000, "http://a/b.mp4"]
    write_manifest(path, [row(i, video_path=video) for i, video in enumerate(videos)])
    lines = problems(path).splitlines()[1:]
    words = ["regular file"] * 3 + ["control characters"] + ["no such file"] * 2
    # Fields are checked before files are looked for, line by line.
    for number, (line, expected) in enumerate(zip(lines, words, strict=True), 1):
        assert line.startswith(f"  line {number}: field 'video_path'") and expected in line


def test_problems_without_end(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text("x\n" * 50_000)
    text = problems(path)
    assert len(text.splitlines()) == LISTED + 2 and "problems" in text


def test_targets_and_ids_can_be_left_to_others(tmp_path):
    path = tmp_path / "manifest.jsonl"
    (tmp_path / "a.mp4").write_bytes(b"x")
    path.write_text(json.dumps({"video_path": "a.mp4"}) + "\n")
    (example,) = load_manifest(path, required=("video_path",))
    assert (example.id, example.prompt, example.target_text) == ("line-1", "", "")
    actual = problems(path)
    assert "'target_text' is missing" in actual and "v2l teach" in actual


def examples(count: int) -> list[Example]:
    return [
        Example(f"{i}", f"clip-{i // 2}.mp4", f"/x/clip-{i // 2}.mp4", "qa", "q", "a")
        for i in range(count)
    ]


def test_splits_share_no_video_and_stay_when_lines_are_added():
    train, val = split_by_video(examples(400), 0.2, seed=1)
    assert not {video_key(e) for e in train} & {video_key(e) for e in val}
    assert len(train) + len(val) == 400 and 50 <= len(val) <= 110
    more_train, more_val = split_by_video(examples(600), 0.2, seed=1)
    assert {e.id for e in val} <= {e.id for e in more_val}
    assert {e.id for e in train} <= {e.id for e in more_train}
    assert split_by_video(examples(400), 0.2, seed=2)[1] != val
    assert split_by_video(examples(4), 0.0)[1] == []


def test_a_named_split_is_kept_and_must_not_share_a_video(tmp_path):
    rows = [
        row(0, split="train"),
        row(1, split="val", video_path="b.mp4"),
        row(2, split="test", video_path="c.mp4"),
    ]
    train, val = split_by_video(load_manifest(write(tmp_path, rows)), 0.5)
    assert [e.id for e in train] == ["example-0"] and [e.id for e in val] == ["example-1"]
    rows[1]["video_path"] = "./a.mp4"
    assert "a video belongs to one split" in problems(write(tmp_path, rows))
    rows[1]["video_path"] = "b.mp4"
    rows[0]["metadata"] = rows[1]["metadata"] = {"video_id": "same"}
    assert "a video belongs to one split" in problems(write(tmp_path, rows))


def test_grouping_is_by_file_and_span(tmp_path):
    rows = [
        row(0), row(1, metadata={"span": [0, 2]}), row(2),
        row(3, metadata={"span": [0, 2]}), row(4, video_path="b.mp4"),
    ]  # fmt: skip
    groups = group_by_video(load_manifest(write(tmp_path, rows)))
    assert [[e.id[-1] for e in g.examples] for g in groups] == [["0", "2"], ["1", "3"], ["4"]]
    assert [g.name for g in groups] == ["a.mp4", "a.mp4#0-2", "b.mp4"]
