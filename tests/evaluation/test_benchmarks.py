"""Manifests from small files in the published formats: prompts, references, sampling, errors."""

import csv
import json

import pytest

from tests.video.clips import encode
from v2l_fast.data.manifest import load_manifest
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.benchmark_manifests import BENCHMARKS, BenchmarkError, build


def json_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def videos(folder, *names):
    """Files with video names; what is in them matters to span-cutting benchmarks only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"video")


def activitynet_captions(folder):
    json_file(
        folder / "val_1.json",
        {
            "v_aa": {"duration": 20.0, "timestamps": [[4.39, 9], [4.17, 20]],
                     "sentences": ["A man sits.", "  He stands up."]},
            "v_bb": {"duration": 5.0, "timestamps": [[0, 5]], "sentences": ["A dog runs."]},
        },
    )  # fmt: skip
    videos(folder / "videos", "v_aa.mp4", "v_bb.mkv")


def plm_rdcap(folder):
    parts = [
        {"start_frame": 51, "end_frame": 90, "caption": "She waves."},
        {"start_frame": 0, "end_frame": 50, "caption": "She walks in."},
    ]
    row = {"uid": 7, "video": "sav_000001.mp4", "masklet_id": 2, "total_frames": 91}
    lines_file(folder / "rdcap" / "plm_rdcap_test.jsonl", [{**row, "dense_captions": parts}])
    videos(folder, "sav_000001.mp4")


def plm_rcap(folder):
    row = {"uid": 8, "video": "sav_000001.mp4", "masklet_id": 0, "total_frames": 40}
    last = {**row, "uid": 9, "start_frame": 30, "end_frame": 39, "caption": "He leaves."}
    first = {**row, "start_frame": 0, "end_frame": 9, "caption": "He comes."}
    lines_file(folder / "rcap" / "plm_rcap_test.jsonl", [first, last])
    folder.joinpath("sav").mkdir()
    encode(folder / "sav" / "sav_000001.mp4", 20, fps=5)


def plm_sgqa(folder):
    row = {"uid": "1", "video": "9a_4_31.mp4", "question": "Is it on?", "answer": "Yes, it is."}
    lines_file(folder / "sgqa" / "plm_sgqa_test.jsonl", [{**row, "domain": "cooking"}])
    videos(folder / "videos" / "sgqa", "9a_4_31.mp4")


def vdc(folder):
    styles = ("short", "detailed", "camera", "background", "main_object")
    rows = [
        {"video_id": name[:-4], "video_source": "mixkit", "video_name": name}
        | {f"{style}_caption": f"{style} of {i}" for style in styles}
        for i, name in enumerate(("clip.0.mp4", "clip.1.MP4", "clip.2.mp4"))
    ]
    lines_file(folder / "VDC_1k.jsonl", rows)
    videos(folder, "clip.0.mp4", "clip.1.MP4", "clip.2.mkv")


def carebench(folder):
    row = {
        "video": "v_00000001_0.mp4", "caption": "A boy waters plants.",
        "events": ["pouring water", "setting down the can"], "objects": ["a boy", "a can"],
        "spatial_caption": "The boy is left.", "temporal_caption": "He pours, then stops.",
        "category": "Household Activities", "subcategory": "water_plants",
    }  # fmt: skip
    texts = {"video": "v_00000001_3.mp4", "events": "pouring water; leaving", "objects": "a can"}
    json_file(folder / "json" / "metadata.json", [row, {**row, **texts}])
    videos(folder / "videos", "v_00000001_0.mp4", "v_00000001_3.mp4")


def nextqa(folder):
    path = folder / "dataset" / "nextqa" / "test.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        header = "video,frame_count,width,height,question,answer,qid,type"
        writer.writerow(header.split(","))
        writer.writerow([4010069381, 369, 640, 480, "what happens", "a, b and c", 9, "TC"])
        writer.writerow([4010069381, 369, 640, 480, "why does she walk", "help", 3, "CW"])
    videos(folder / "NExTVideo" / "1164", "4010069381.mp4")


def activitynet_qa(folder):
    json_file(
        folder / "test_q.json",
        [{"video_name": "aa", "question": "is it outdoors", "question_id": "v_aa_1"},
         {"video_name": "bb", "question": "how many", "question_id": "v_bb_1"}],
    )  # fmt: skip
    json_file(
        folder / "test_a.json",
        [{"answer": "2", "type": 7, "question_id": "v_bb_1"},
         {"answer": "yes", "type": 3, "question_id": "v_aa_1"}],
    )  # fmt: skip
    videos(folder, "v_aa.mp4", "bb.webm")


def vidcapbench(folder):
    pairs = [
        {"question": "What is the weather like?", "answer": "Rainy.", "sub_category": "background",
         "primary_category": "video content"},
        {"question": "Which lens?", "answer": "A wide one.", "sub_category": "cinematography",
         "primary_category": "video aesthetics"},
    ]  # fmt: skip
    names = ("clip_0.mp4", "clip_1.mp4", "/authors/videos/clip_2.mp4", "/authors/videos/clip_3.mp4")
    rows = [{"video_dir": name, "QA_pairs": pairs} for name in names]
    unasked = {"video_dir": "clip_4.mp4", "QA_pairs": []}
    lines_file(folder / "VidCapBench-AE_QA.jsonl", [*rows, unasked])
    videos(folder / "videos", *(f"clip_{i}.mp4" for i in range(4)))


MAKERS = {
    "activitynet-captions": activitynet_captions,
    "plm-rdcap": plm_rdcap,
    "plm-rcap": plm_rcap,
    "plm-sgqa": plm_sgqa,
    "vdc": vdc,
    "carebench": carebench,
    "nextqa": nextqa,
    "activitynet-qa": activitynet_qa,
    "vidcapbench": vidcapbench,
}
EXAMPLES = {
    "activitynet-captions": 2, "plm-rdcap": 1, "plm-rcap": 2, "plm-sgqa": 1, "vdc": 15,
    "carebench": 10, "nextqa": 2, "activitynet-qa": 2, "vidcapbench": 8,
}  # fmt: skip


@pytest.fixture
def built(tmp_path):
    """Make a benchmark's folder, build its manifest, read it as evaluations do."""

    def make(name, **options):
        folder = tmp_path / "data"
        folder.mkdir()
        MAKERS[name](folder)
        build(name, folder, tmp_path / "out" / "manifest.jsonl", **options)
        return load_manifest(tmp_path / "out" / "manifest.jsonl")

    return make


def test_all_nine_are_covered():
    assert set(MAKERS) == set(BENCHMARKS) and len(MAKERS) == 9


@pytest.mark.parametrize("name", MAKERS)
def test_the_manifest_is_valid_and_complete(built, name):
    examples = built(name)
    assert len(examples) == EXAMPLES[name]
    assert {e.dataset for e in examples} == {BENCHMARKS[name].title}
    assert {e.split for e in examples} == {BENCHMARKS[name].split}
    prompts = [e.prompt for e in examples if not e.is_caption]
    questions = name in ("nextqa", "activitynet-qa", "plm-sgqa", "vidcapbench")
    assert len(prompts) == (len(examples) if questions else 0)
    assert all(text.endswith(" Answer only the question, in one sentence.") for text in prompts)


def test_activitynet_paragraphs(built):
    first, second = built("activitynet-captions")
    assert first.target_text == "A man sits. He stands up."
    assert first.prompt == "Describe what is happening in this video."
    assert second.path.endswith("v_bb.mkv")


def test_dense_captions_are_in_the_order_of_time(built):
    (example,) = built("plm-rdcap")
    assert example.target_text == "She walks in. She waves."
    assert example.metadata["masklet_id"] == 2 and example.span is None


def test_region_captions_are_about_their_span(built):
    first, last = built("plm-rcap")
    # 20 frames at 5 a second last 4 s; the annotation counts 40 frames over them.
    assert first.span == (0.0, 1.0) and last.span == (3.0, 4.0)
    assert first.prompt == "Describe what happens in this video clip."
    assert first.id != last.id


def test_styles_and_subsets_have_their_prompts(built):
    examples = built("vdc")
    assert {e.metadata["subset"] for e in examples} == {
        "short",
        "detailed",
        "camera",
        "background",
        "main_object",
    }
    camera = next(e for e in examples if e.metadata["subset"] == "camera")
    assert camera.prompt == "Describe the camera work, framing, and viewpoint in this video."
    assert camera.target_text == "camera of 0" and camera.path.endswith("clip.0.mp4")


def test_lists_become_one_reference(built):
    examples = built("carebench")
    by_subset = {e.metadata["subset"]: e for e in examples[:5]}
    assert by_subset["events"].target_text == "pouring water; setting down the can"
    assert examples[6].target_text == "pouring water; leaving"
    assert by_subset["objects"].target_text == "a boy; a can"
    assert by_subset["caption"].target_text == "A boy waters plants."
    assert len({e.prompt for e in by_subset.values()}) == 5


def test_questions_keep_their_answers_and_kinds(built):
    first, second = built("activitynet-qa")
    assert (first.target_text, second.target_text) == ("yes", "2")
    assert first.metadata["kind"] == 3 and first.path.endswith("v_aa.mp4")
    assert first.prompt == "is it outdoors Answer only the question, in one sentence."


def test_commas_in_csv_answers(built):
    first, _ = built("nextqa")
    assert first.target_text == "a, b and c" and first.metadata["kind"] == "TC"


# --- sampling -------------------------------------------------------------------------------------


def test_the_limit_is_for_each_subset_and_drawn_by_the_seed(built, tmp_path):
    examples = built("vdc", limit=2, seed=3)
    counts = {}
    for example in examples:
        counts.setdefault(example.metadata["subset"], []).append(example.id)
    assert {len(ids) for ids in counts.values()} == {2} and len(counts) == 5
    again = tmp_path / "again.jsonl"
    build("vdc", tmp_path / "data", again, limit=2, seed=3)
    assert [e.id for e in load_manifest(again)] == [e.id for e in examples]


def test_vidcapbench_limits_videos_with_all_their_questions(built):
    examples = built("vidcapbench", limit=3)
    assert len(examples) == 6 and len({e.path for e in examples}) == 3
    assert BENCHMARKS["vidcapbench"].limit == 100


def test_zero_takes_all(built):
    assert len(built("vidcapbench", limit=0)) == 8


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_file_says_which_and_where_it_is_published(tmp_path, name):
    with pytest.raises(BenchmarkError) as caught:
        build(name, tmp_path, tmp_path / "out.jsonl")
    message, benchmark = str(caught.value), BENCHMARKS[name]
    assert benchmark.files[0] in message and benchmark.published in message
    assert "http" in benchmark.published and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_missing_videos_are_named_with_their_source(tmp_path, name):
    MAKERS[name](tmp_path)
    gone = [p for p in tmp_path.rglob("*") if p.suffix.lower() in (".mp4", ".mkv", ".webm")]
    gone[0].unlink()
    with pytest.raises(BenchmarkError) as caught:
        build(name, tmp_path, tmp_path / "out.jsonl")
    assert BENCHMARKS[name].videos in str(caught.value) and "--skip-missing" in str(caught.value)
    if len(gone) == 1:
        with pytest.raises(BenchmarkError, match="all videos of .* are missing"):
            build(name, tmp_path, tmp_path / "out.jsonl", skip_missing=True)
        return
    result = build(name, tmp_path, tmp_path / "out.jsonl", skip_missing=True)
    assert len(result.missing) == 1 and 0 < result.examples < EXAMPLES[name]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("vdc", "VDC_1k.jsonl", '{"video_name": "a"}\n', "line 1 has no 'short_caption'"),
        ("vdc", "VDC_1k.jsonl", '{"video_name": "a"\n', "line 1: not JSON"),
        ("carebench", "metadata.json", "{}", r"must hold a JSON list, got \{\}"),
        ("carebench", "metadata.json", '[{"video": "a.mp4"}]', "entry 1 has no 'caption'"),
        ("activitynet-captions", "val_1.json", "[]", r"must hold a JSON object, got \[\]"),
        ("activitynet-captions", "val_1.json", '{"v_a": {}}', "v_a has no 'sentences'"),
        ("nextqa", "test.csv", "video,question\n1,why\n", "line 2 has no 'qid'"),
        ("vidcapbench", "VidCapBench-AE_QA.jsonl", '{"video_dir": "a"}', "no 'QA_pairs'"),
    ],
)
def test_another_format_is_named_with_its_place(tmp_path, name, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(BenchmarkError, match=message) as caught:
        build(name, tmp_path, tmp_path / "out.jsonl")
    assert file in str(caught.value)


def test_answers_of_another_split_are_noticed(tmp_path):
    activitynet_qa(tmp_path)
    json_file(tmp_path / "test_a.json", [{"answer": "no", "type": 3, "question_id": "v_cc_1"}])
    with pytest.raises(BenchmarkError, match="no answer to v_aa_1"):
        build("activitynet-qa", tmp_path, tmp_path / "out.jsonl")


def test_unknown_benchmarks_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown benchmark 'vcd'; choose from activitynet-captions"
    ):
        build("vcd", tmp_path, tmp_path / "out.jsonl")
