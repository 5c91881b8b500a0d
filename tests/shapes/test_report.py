"""The report: every section is measured once; one page with its plots."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from v2l_fast import cli
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.model import Video2LoRA
from v2l_fast.shapes import probes
from v2l_fast.shapes import report as module
from v2l_fast.shapes.language import caption
from v2l_fast.shapes.report import MEASUREMENTS, SHARES, ShapesReport, accuracy, measure
from v2l_fast.shapes.report_page import SECTIONS, write_page
from v2l_fast.shapes.world import sample_scenes


@pytest.fixture(scope="module")
def pair() -> Video2LoRA:
    return Video2LoRA.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def small():
    """One cell, one budget, few chunks."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "BUDGETS", ((4, 48),))
    patch.setattr(module, "SWEEP_FRAMES", (4,))
    patch.setattr(module, "SWEEP_EDGES", (48,))
    patch.setattr(module, "CHUNKS", (1, 2))
    patch.setattr(probes, "SECONDS", (8, 16))
    patch.setattr(probes, "RESTAMPED", (8, None))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def measured(pair, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    return folder, measure(ShapesReport(pair, folder, videos=2))


@pytest.mark.slow
def test_every_section(measured):
    folder, records = measured
    assert set(records) == set(MEASUREMENTS) == set(SECTIONS) == set(SHARES)
    for name, record in records.items():
        assert record == json.loads((folder / f"{name}.json").read_text())
        assert record["videos"] == 2 and "torch" in record["machine"]
    full = records["rank"]["rows"][-1]
    assert full["k"] == 8 and full["top"]["estimate"] > 0.8
    assert records["rank"]["rows"][0]["top"]["estimate"] < 0.6
    (single, *composed) = records["chunks"]["networks"]["zero-shot"]["rows"]
    assert [row["rank"] for row in composed] == [16] and single["rank"] == 8
    fused = [r for r in records["efficiency"]["budgets"][0]["rows"] if "FrameFusion" in r["method"]]
    assert len(fused) == 3 and all(row["merged"] + row["pruned"] > 0 for row in fused)
    layers = records["layers"]
    assert len(layers["controls"]) == 2
    assert all(layers["score"]["estimate"] > s["estimate"] for s in layers["controls"].values())


@pytest.mark.slow
def test_a_network_trained_on_chunks_is_compared(pair, small, tmp_path):
    config = dataclasses.replace(pair.config, chunk_position=True)
    trained = Video2LoRA(pair.backbone, HyperNetwork(config))
    result = ShapesReport(pair, tmp_path, videos=2, trained=trained).section("chunks")["networks"]
    assert {name: record["chunk_position"] for name, record in result.items()} == {
        "zero-shot": False, "trained on chunks": True
    }  # fmt: skip
    page = write_page(ShapesReport(pair, tmp_path).records(), tmp_path / "page").read_text()
    assert "**trained on chunks**" in page and "`v2l shapes report --only chunks`" in page
    with pytest.raises(ConfigError, match="made with trained="):
        measure(ShapesReport(pair, tmp_path, videos=2), ["chunks"])


@pytest.mark.slow
def test_sections_are_not_measured_again(pair, measured, monkeypatch):
    folder, records = measured

    def again(report, count):
        raise AssertionError("measured twice")

    monkeypatch.setattr(module, "MEASUREMENTS", dict.fromkeys(MEASUREMENTS, again))
    assert measure(ShapesReport(pair, folder, videos=2)) == records
    assert ShapesReport(pair, folder).records() == records
    with pytest.raises(ConfigError, match="made with videos=2, now it is 64"):
        measure(ShapesReport(pair, folder, videos=64), ["rank"])
    other = Video2LoRA(pair.backbone, HyperNetwork(pair.config))
    with pytest.raises(ConfigError, match="of another model"):
        ShapesReport(other, folder).records()


@pytest.mark.slow
def test_page(measured, tmp_path):
    _, records = measured
    page = write_page(records, tmp_path / "page")
    text = page.read_text()
    for name in MEASUREMENTS:
        assert f"`v2l shapes report --only {name}`" in text
    for image in (tmp_path / "page").glob("*.png"):
        assert f"]({image.name})" in text and image.stat().st_size < 60_000
    assert text.count("![") == len(list((tmp_path / "page").glob("*.png"))) == 9
    failed = {"frames": 64, "longest_edge": 48, "failed": "no video holds 64 frames"}
    sweep = records["sweep"] | {"rows": [*records["sweep"]["rows"], failed]}
    swept = write_page({"sweep": sweep}, tmp_path / "sweep").read_text()
    assert "64 frames, 48 px: no video holds 64 frames." in swept
    # The worst comes first.
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## What works and what does not"
    only = write_page({"rank": records["rank"]}, tmp_path / "one").read_text()
    assert only.count("## ") == 1 and "## Rank directions" in only


@pytest.mark.slow
def test_command(measured, tmp_path):
    folder, _ = measured
    arguments = ["shapes", "report", "--records", str(folder), "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, [*arguments, "--videos", "2", "--only", "norms"])
    assert result.exit_code == 0, result.output
    assert "## Efficiency" in (tmp_path / "README.md").read_text()
    result = CliRunner().invoke(cli.app, [*arguments, "--only", "nothing", "--force"])
    assert isinstance(result.exception, ConfigError) and "unknown section" in str(result.exception)


def test_accuracy():
    scene = sample_scenes("test", 1, 0)[0]
    text = caption(scene)
    assert accuracy(text, text) == 1 and accuracy("nothing", text) == 0
    wrong = text.replace(scene.background, "black" if scene.background != "black" else "white")
    assert 0 < accuracy(wrong, text) < 1
    assert accuracy("Red.", "red") == 1 and accuracy("blue", "red") == 0
