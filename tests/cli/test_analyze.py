"""``v2l analyze`` and ``v2l sweep`` on the shipped pair and video files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import fail, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips, their manifest and adapters."""
    folder = tmp_path_factory.mktemp("analyze")
    run("shapes", "render", folder, "--count", 2, "--size", 48)
    run("internalize", *sorted(folder.glob("*.mp4")), "--out", folder / "adapters")
    return folder


@pytest.fixture(scope="module")
def manifest(folder) -> Path:
    return folder / "manifest.jsonl"


@pytest.mark.parametrize(
    "name, options",
    [
        ("rank", ["-k", 1, "-k", 4, "--max-new-tokens", 4]),
        ("layers", []),
        ("logits", ["--max-frames", 4]),
        ("chunks", ["-c", 2, "--max-new-tokens", 4]),
    ],
)
def test_analyses(name, options, manifest, tmp_path):
    result = run(
        "analyze", name, "--manifest", manifest, "--limit", 1, "--out", tmp_path, "--json", *options
    )
    record = json.loads(result)
    assert record["rows"] and record == json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.csv").read_text().count("\n") == len(record["rows"]) + 1
    assert (tmp_path / f"{name}.png").stat().st_size > 2000
    if name == "rank":
        assert [row["k"] for row in record["rows"]] == [0, 1, 4, 8]
    if name == "chunks":
        assert [row["rank"] for row in record["rows"]] == [8, 16]


def test_efficiency(manifest, tmp_path):
    """One command measures several budgets (Figure 4)."""
    arguments = ("analyze", "efficiency", "--manifest", manifest, "--limit", 1, "--out", tmp_path,
                 "--repeats", 1, "--max-new-tokens", 4, "--max-frames", 4, "--json")  # fmt: skip
    (one,) = json.loads(run(*arguments))["budgets"]
    assert (one["frames"], one["longest_edge"]) == (4, None) and len(one["rows"]) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "efficiency.csv", "efficiency.json", "efficiency.png"
    ]  # fmt: skip
    more = ("--max-frames", 8, "--longest-edge", 48, "--force")
    result = json.loads(run(*arguments, *more))["budgets"]
    assert [(b["frames"], b["longest_edge"], b["visual_tokens"]) for b in result] == [
        (4, 48, 16), (8, 48, 32)
    ]  # fmt: skip
    assert (tmp_path / "budgets.png").stat().st_size > 2000
    assert (tmp_path / "efficiency.csv").read_text().count("\n") == 2 * 8 + 1


def test_norms(folder, tmp_path):
    files = sorted((folder / "adapters").iterdir())
    record = json.loads(run("analyze", "norms", *files, "--out", tmp_path, "--json"))
    assert record["adapters"] == 2 and len(record["modules"]["down_proj"]["rank_norms"]) == 4
    assert "down_proj" in run("analyze", "norms", files[0], "--out", tmp_path, "--force")


def test_effect(folder):
    file = folder / "adapters" / "test_0000.safetensors"
    assert "with the adapter:" in run("analyze", "effect", file, "What happens?")


def test_sweep(manifest, tmp_path):
    arguments = ("sweep", "--manifest", manifest, "--limit", 1, "--out", tmp_path,
                 "-f", 4, "-f", 64, "-r", 48, "--max-new-tokens", 4)  # fmt: skip
    first, second = json.loads(run(*arguments, "--json"))["rows"]
    assert first["frames"] == 4 and first["token_reduction"] > 1
    assert second["failed"] == "no video has 64 frames"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cells", "sweep.csv", "sweep.json", "sweep.png"
    ]  # fmt: skip
    # One row per cell, which fits a terminal of 80 columns.
    output = run(*arguments).splitlines()
    assert max(map(len, output[:-2])) <= 80
    assert output[-2] == "64 frames, 48 px: no video has 64 frames"


def test_help():
    listed = run("analyze", "--help")
    for name in ("effect", "norms", "rank", "layers", "logits", "chunks", "efficiency"):
        assert name in listed
        assert "v2l analyze" in run("analyze", name, "--help")
    assert "v2l sweep" in run("sweep", "--help")


def test_failures(monkeypatch, capsys, folder, manifest, tmp_path):
    code, stderr = fail(monkeypatch, capsys, "analyze", "norms", tmp_path / "no.safetensors")
    assert code == 1 and "no such file" in stderr
    code, stderr = fail(
        monkeypatch, capsys, "analyze", "rank", "--manifest", manifest, "--split", "none",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "none" in stderr
    code, stderr = fail(
        monkeypatch, capsys, "analyze", "efficiency", "--manifest", manifest, "--keep", 0,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "keep must be above 0" in stderr
    code, stderr = fail(monkeypatch, capsys, "sweep")
    assert code == 2 and "--manifest" in stderr
    code, _ = fail(monkeypatch, capsys, "analyze", "rank", "--manifest", manifest, "-k", 0)
    assert code == 2


def test_part_of_a_file(manifest, tmp_path, monkeypatch, capsys):
    """Ablations read spans; analyses that need whole files refuse them."""
    row = json.loads(manifest.read_text().splitlines()[0])
    row["metadata"] = {"span": [2.0, 6.0]}
    row["video_path"] = str(manifest.parent / row["video_path"])
    spans = tmp_path / "spans.jsonl"
    spans.write_text(json.dumps(row) + "\n")
    result = json.loads(run("analyze", "layers", "--manifest", spans, "--out", tmp_path, "--json"))
    assert result["examples"] == 1
    code, stderr = fail(monkeypatch, capsys, "sweep", "--manifest", spans)
    assert code == 1 and "is a span of a file" in stderr


@pytest.mark.parametrize(
    "command", [("analyze", "layers"), ("analyze", "efficiency"), ("sweep", "-r", 48, "-f", 4)]
)
def test_existing_results_are_not_replaced(command, manifest, tmp_path, monkeypatch, capsys):
    """Refused before anything is loaded, unless forced; an input is never replaced."""
    name = command[1] if command[0] == "analyze" else "sweep"
    (tmp_path / f"{name}.csv").write_text("mine")
    arguments = (*command, "--manifest", manifest, "--out", tmp_path)
    code, stderr = fail(monkeypatch, capsys, *arguments)
    assert code == 1 and f"{name}.csv: exists already" in stderr
    own = tmp_path / f"{name}.json"
    own.write_bytes(manifest.read_bytes())
    (tmp_path / f"{name}.csv").unlink()
    code, stderr = fail(
        monkeypatch, capsys, *command, "--manifest", own, "--out", tmp_path, "--force"
    )
    assert code == 1 and "is the input" in stderr
    assert own.read_bytes() == manifest.read_bytes()
