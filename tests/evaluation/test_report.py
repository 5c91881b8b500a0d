"""Rows, averages, controls and the Markdown table, from scores that are easy to check."""

import csv
import json

import pytest

from v2l_fast.data.manifest import Example
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.answers import BASELINE, OTHER, SYSTEM
from v2l_fast.evaluation.plots import plot_distributions
from v2l_fast.evaluation.report import (
    average,
    compare,
    mark,
    markdown,
    markdown_table,
    pooled,
    summarize,
    table_columns,
    text_scores,
    write_csv,
)
from v2l_fast.evaluation.statistics import required_videos


def example(id_, dataset="D", task="caption", target="a red disc", **metadata):
    return Example(id_, f"{id_}.mp4", f"{id_}.mp4", task, "?", target, dataset, "test", metadata)


def table_of(summary, metric):
    return {(row["benchmark"], row["subset"]): row for row in summary[metric]["rows"]}


def test_a_row_counts_what_both_systems_have():
    result = compare({"a": 0.5, "b": 0.7, "x": 1.0}, {"a": 0.4, "b": 0.4, "y": 0.0}, VIDEOS, 0.05)
    assert (result.examples, result.videos) == (2, 2)
    assert result.system == pytest.approx(0.6) and result.baseline == pytest.approx(0.4)
    assert result.difference.estimate == pytest.approx(0.2)
    # Two videos prove nothing, however large the difference.
    assert not (result.enough or result.non_inferior or result.equivalent)
    assert result.as_json()["recovery"] == pytest.approx(1.5)
    assert result.as_json()["kept"] is None and result.as_json(0.2)["kept"] == pytest.approx(2.0)
    assert result.as_json(0.4)["kept"] is None
    with pytest.raises(ConfigError, match="share no scored example"):
        compare({"a": 1.0}, {"b": 1.0}, VIDEOS, 0.05)


VIDEOS = dict.fromkeys("ab", "one") | {"b": "two", "x": "one", "y": "one", "c": "two"}


@pytest.mark.parametrize("margin", [0.05, 0.15])
def test_a_claim_needs_enough_videos(margin):
    """Equal scores on few videos are no equivalence, and neither are nearly equal ones."""
    enough = required_videos(margin)
    for count, holds in ((1, False), (2, False), (enough - 1, False), (enough, True)):
        names = {str(i): str(i) for i in range(count)}
        for shift in (0.0, 0.001):
            baseline = {name: 0.5 + shift * (int(name) % 2) for name in names}
            result = compare(dict.fromkeys(names, 0.5), baseline, names, margin)
            assert result.non_inferior is result.equivalent is holds
            assert result.as_json()["enough"] is holds
    # Many questions about one video are one video.
    scores = {str(i): 0.5 for i in range(1000)}
    result = compare(scores, scores, dict.fromkeys(scores, "one"), margin)
    assert (result.examples, result.videos, result.equivalent) == (1000, 1, False)


def test_the_pooled_average_weighs_examples():
    small, large = {"a": 1.0}, {"b": 0.5, "c": 0.5}
    rows = [(small, {"a": 0.0}), (large, large)]
    result = pooled(rows, VIDEOS, 0.05)
    assert (result.system, result.baseline) == pytest.approx((2 / 3, 1 / 3))
    assert result.difference.estimate == pytest.approx(1 / 3)


def test_marks_say_what_holds_only_alone():
    row = {"enough": True, "equivalent": True, "equivalent_holm": True}
    assert mark(row, "equivalent") == "Y"
    assert mark(row | {"equivalent_holm": False}, "equivalent") == "(Y)"
    assert mark(row | {"equivalent": False, "equivalent_holm": False}, "equivalent") == "–"
    assert mark(row | {"enough": False}, "equivalent") == "few"


def test_a_zero_baseline_has_no_recovery():
    assert compare({"a": 0.5}, {"a": 0.0}, VIDEOS, 0.05).as_json()["recovery"] is None


def test_an_average_weighs_benchmarks_and_not_examples():
    small = ({"a": 1.0}, {"a": 0.0})
    large = ({"b": 0.5, "c": 0.5}, {"b": 0.5, "c": 0.5})
    result = average([small, large], VIDEOS, 0.05)
    assert result.difference.estimate == pytest.approx(0.5)
    assert (result.examples, result.videos) == (3, 2)
    assert (result.baseline, result.system) == (0.25, 0.75)


@pytest.fixture
def result():
    examples = [
        *(example(f"s{i}", "VDC", subset="short") for i in range(4)),
        *(example(f"c{i}", "VDC", subset="camera") for i in range(4)),
        *(example(f"q{i}", "NExT-QA", task="qa", target="red") for i in range(4)),
    ]
    answers = {
        BASELINE: {e.id: "red" for e in examples},
        SYSTEM: {e.id: "a red disc" for e in examples if e.id != "s3"},
        OTHER: {e.id: "nothing" for e in examples},
    }
    scores = text_scores(examples, answers)
    scores["judge"] = {
        BASELINE: {"s0": 0.5, "s1": 0.5, "q0": 1.0},
        SYSTEM: {"s0": 0.75, "q0": 0.0, "q1": 1.0},
        OTHER: {"s0": 0.0},
    }
    return examples, scores, summarize(examples, {e.id: e.path for e in examples}, scores)


def test_rows_are_benchmarks_subsets_and_the_average(result):
    _, scores, summary = result
    rows = table_of(summary, "token_f1")
    assert list(rows) == [
        ("VDC", None),
        ("VDC", "short"),
        ("VDC", "camera"),
        ("NExT-QA", None),
        ("Average", None),
        ("Pooled", None),
    ]
    # "red" against "red disc": precision 1, recall 1/2.
    assert rows["VDC", None]["baseline"] == pytest.approx(2 / 3)
    assert rows["VDC", None]["examples"] == 7 and rows["VDC", "short"]["examples"] == 3
    assert rows["NExT-QA", None]["difference"] == pytest.approx(2 / 3 - 1)
    assert rows["Average", None]["system"] == pytest.approx((1 + 2 / 3) / 2)
    assert rows["Pooled", None]["system"] == pytest.approx((7 + 4 * 2 / 3) / 11)
    assert {row["controls"][OTHER] for row in rows.values()} == {0.0}
    # Captions have no exact match.
    assert list(table_of(summary, "exact_match")) == [("NExT-QA", None)]
    assert set(scores["exact_match"][SYSTEM]) == {"q0", "q1", "q2", "q3"}


def test_failed_judgments_are_left_out_and_not_zero(result):
    rows = table_of(result[2], "judge")
    assert rows["VDC", None]["examples"] == 1 and rows["NExT-QA", None]["examples"] == 1
    assert rows["VDC", None]["system"] == 0.75
    assert rows["VDC", None]["controls"] == {OTHER: 0.0} and rows["NExT-QA", None]["controls"] == {}
    assert ("VDC", "camera") not in rows and rows["Average", None]["controls"] == {}
    assert result[2]["judge"]["margin"] == 0.15


def test_the_table_shows_every_number_and_marks_as_the_paper_does(result):
    summary = result[2]
    lines = markdown(summary, ["a note"]).splitlines()
    assert lines[0] == "**Token-F1** (margin 0.05)"
    assert lines[2] == (
        "| Benchmark | n | Base | V2L | Δ | 95% CI | Eq | NI | kept above chance "
        "| another video's adapter |"
    )
    # Seven videos without spread: an interval as wide as they leave open, and no mark.
    row = "| VDC | 7 | 0.667 | 1.000 | +0.333 | [-0.213, +0.606] | few | few | – | 0.000 |"
    assert row in lines
    assert any(line.startswith("| · short | 3 |") for line in lines)
    assert lines[-1] == "- a note"
    assert lines.count("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|") == 3
    # A reading without the table says the same.
    again = json.loads(json.dumps(summary))
    assert markdown(again, ["a note"]) == "\n".join(lines) + "\n"


def test_plots_are_drawn_for_what_was_compared(result, tmp_path):
    examples, scores, _ = result
    scores = {**scores, "judge": {BASELINE: {}, SYSTEM: {}}}
    files = plot_distributions(examples, scores, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exact_match.png", "token_f1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


# --- tables ---------------------------------------------------------------------------------------

ROWS = [
    {"k": 1, "score": {"estimate": 0.5, "low": 0.25, "high": 0.75}, "by": {"a": 0.123456}},
    {"k": 2, "by": {"a": 123456.7, "b": None}, "names": ["x", "y"]},
]


def test_columns():
    assert table_columns(ROWS) == {
        "k": ["1", "2"],
        "score": ["0.500 [0.250, 0.750]", "-"],
        "by.a": ["0.1235", "123457"],
        "by.b": ["-", "-"],
        "names": ["-", "x, y"],
    }


def test_markdown():
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == "| k | score | by.a | by.b | names |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[3] == "| 2 | - | 123457 | - | x, y |"


def test_csv(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, ROWS)
    with open(path, newline="") as file:
        first, second = csv.DictReader(file)
    assert first["score.low"] == "0.25" and second["score.low"] == ""
    assert second["names"] == "x y" and second["by.a"] == "123456.7"
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]
