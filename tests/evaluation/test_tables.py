"""Rows of records as columns, Markdown and CSV."""

from __future__ import annotations

import csv

from v2l_fast.evaluation.tables import columns, markdown, write_csv

ROWS = [
    {"k": 1, "score": {"estimate": 0.5, "low": 0.25, "high": 0.75}, "by": {"a": 0.123456}},
    {"k": 2, "by": {"a": 123456.7, "b": None}, "names": ["x", "y"]},
]


def test_columns():
    assert columns(ROWS) == {
        "k": ["1", "2"],
        "score": ["0.500 [0.250, 0.750]", "-"],
        "by.a": ["0.1235", "123457"],
        "by.b": ["-", "-"],
        "names": ["-", "x, y"],
    }


def test_markdown():
    lines = markdown(ROWS).splitlines()
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
