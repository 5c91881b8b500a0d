"""Append-only answers: on disk at once, whole after a crash."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.journal import Journal


def test_entries_are_there_when_opened_again(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    journal.append({"a": {"text": "ä\n"}, "b": 2})
    journal.append({"b": 3})
    again = Journal(path)
    assert len(again) == 2 and again["a"] == {"text": "ä\n"} and again["b"] == 3
    assert "c" not in again


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_the_rest_goes_on(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    Journal(path).append({"a": "first", "b": "the second entry"})
    path.write_bytes(path.read_bytes()[:-torn])
    journal = Journal(path)
    assert "a" in journal and "b" not in journal
    journal.append({"b": "again"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_other_damage_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a", "value": 1}\nnonsense\n{"key": "b", "value": 1}\n')
    with pytest.raises(ConfigError, match=r"journal\.jsonl: line 2: not JSON .* delete the line"):
        Journal(path)
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match="line 1"):
        Journal(path)


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: journal.append({str(i): "x" * 1000}), range(100)))
    assert len(Journal(path)) == 100


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.append({"a": 1})
    assert journal["a"] == 1 and list(tmp_path.iterdir()) == []
