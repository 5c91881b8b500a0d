"""JSON files of a run."""

import json

from v2l_fast.training.records import append_line, cut_lines, read_lines, write_record


def test_records_are_written_whole(tmp_path):
    write_record(tmp_path / "a" / "record.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "record.json").read_text()) == {"x": 1}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["record.json"]


def test_lines_are_cut_back_to_a_step(tmp_path):
    path = tmp_path / "log.jsonl"
    cut_lines(path, 3)
    assert not path.exists() and read_lines(path) == []
    for step in range(1, 6):
        append_line(path, {"step": step, "loss": step / 3})
    cut_lines(path, 3)
    assert read_lines(path) == [{"step": step, "loss": step / 3} for step in (1, 2, 3)]


def test_half_a_line_is_forgotten(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    cut_lines(path, 5)
    append_line(path, {"step": 2})
    assert [line["step"] for line in read_lines(path)] == [1, 2]
