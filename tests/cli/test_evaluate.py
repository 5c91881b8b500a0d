"""``v2l evaluate`` and ``v2l manifest`` on a tiny pair and video files."""

import json

import pytest

from tests import tiny
from tests.cli.commands import fail, run
from tests.evaluation.judge_stub import StubJudge, scored
from tests.evaluation.test_benchmarks import vdc
from tests.video.clips import encode
from v2l_fast.data.manifest import load_manifest, write_manifest


@pytest.fixture
def manifest(tmp_path):
    """Two files, one of them as two spans."""
    rows = []
    for index, span in ((0, [0.0, 1.0]), (0, [1.0, 2.0]), (1, None)):
        path = tmp_path / "videos" / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            encode(path, 20, fps=10)
        for task in ("caption", "qa"):
            rows.append(
                {
                    "id": str(len(rows)), "video_path": f"videos/{index}.mp4", "task_type": task,
                    "prompt": "what happens", "target_text": "red circle", "dataset": "D",
                    "metadata": {} if span is None else {"span": span},
                }
            )  # fmt: skip
    write_manifest(tmp_path / "manifest.jsonl", rows)
    return tmp_path / "manifest.jsonl"


@pytest.fixture
def options(pair, manifest):
    return ["evaluate", "--manifest", manifest, "--model", pair, "--device", "cpu",
            "--max-new-tokens", 4]  # fmt: skip


def test_evaluate_writes_its_results_and_resumes(options, tmp_path):
    folder = tmp_path / "out"
    output = run(*options, "--out", folder)
    assert (
        "| D | 6 |" in output and "**Exact match**" in output and str(folder / "table.md") in output
    )
    answers = (folder / "answers" / "adapter.jsonl").read_text()
    record = json.loads(run(*options, "--out", folder, "--json"))
    assert record == json.loads((folder / "result.json").read_text())
    assert record["examples"] == 6 and record["videos"] == 3
    assert record["settings"]["max_frames"] == tiny.CONFIG.max_frames
    assert (folder / "answers" / "adapter.jsonl").read_text() == answers


def test_results_are_in_runs_by_default(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*options, "--batch", 1)
    assert (tmp_path / "runs" / "evaluate-manifest" / "result.json").exists()


def test_judging(options, tmp_path):
    stub = StubJudge(lambda request, attempt: scored(2))
    try:
        record = json.loads(
            run(
                *options,
                "--out",
                tmp_path / "out",
                "--judge",
                stub.url,
                "--judge-model",
                "stub",
                "--judge-prices",
                1,
                2,
                "--judge-tokens",
                4096,
                "--no-judge-json",
                "--json",
            )
        )
    finally:
        stub.close()
    assert record["metrics"]["judge"]["rows"][0]["system"] == 0.25
    assert record["judge"]["model"] == "stub" and record["judge"]["dollars"] > 0
    assert all("response_format" not in request for request in stub.requests)
    assert all(request["max_tokens"] == 4096 for request in stub.requests)


def test_failures_are_one_line(options, tmp_path, monkeypatch, capsys):
    code, stderr = fail(monkeypatch, capsys, *options[:1], "--manifest", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl: no such file" in stderr
    run(*options, "--out", tmp_path / "out")
    code, stderr = fail(monkeypatch, capsys, *options, "--out", tmp_path / "out", "--max-frames", 2)
    assert code == 1 and "made with settings.max_frames=" in stderr


def test_manifest_command(tmp_path, monkeypatch, capsys):
    vdc(tmp_path / "data")
    out = tmp_path / "vdc.jsonl"
    result = json.loads(run("manifest", "vdc", tmp_path / "data", "--out", out, "--json"))
    assert result == {"manifest": str(out), "examples": 15, "videos": 3, "missing": []}
    assert len(load_manifest(out)) == 15
    (tmp_path / "data" / "clip.2.mkv").unlink()
    code, stderr = fail(
        monkeypatch, capsys, "manifest", "vdc", tmp_path / "data", "--out", out, "--force"
    )
    assert code == 1 and "1 videos of VDC are missing (clip.2)" in stderr
    output = run("manifest", "vdc", tmp_path / "data", "--out", out, "--skip-missing", "--force")
    assert "10 examples about 2 videos, 1 videos are missing" in output
    again = ("manifest", "vdc", tmp_path / "data", "--skip-missing", "--out")
    code, stderr = fail(monkeypatch, capsys, *again, out)
    assert code == 1 and "exists already" in stderr
    for path in (tmp_path / "data").rglob("*.*"):
        before = path.read_bytes()
        code, stderr = fail(monkeypatch, capsys, *again, path, "--force")
        assert code == 1 and "is the input" in stderr, path
        assert path.read_bytes() == before
