"""The commands that prepare training data: their output and their errors."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.training.broken import write_folder
from v2l_fast.cli import app
from v2l_fast.data.internalize import CorpusSettings
from v2l_fast.data.readers import ClipReader
from v2l_fast.data.teach import TeacherSettings
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.hypernet.config import HypernetConfig
from v2l_fast.loading import ASSETS, training_sampling
from v2l_fast.video import FrameSampling

runner = CliRunner()
SMALL = ("--max-frames", "8", "--longest-edge", "48", "--device", "cpu")


@pytest.fixture
def manifest(tmp_path):
    return write_folder(tmp_path / "videos", 3, ("text",))[0]


def run(*arguments: object) -> dict:
    done = runner.invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_teach_then_cache(manifest, tmp_path):
    out = tmp_path / "taught"
    taught = run("teach", "--manifest", manifest, "--out", out, *SMALL, "--max-new-tokens", 4)
    assert taught["answers"] == 4 and len(taught["failures"]) == 1
    cache = tmp_path / "features"
    stored = run("cache", "--manifest", taught["manifest"], "--cache", cache, *SMALL,
                 "--chunks", 1, "--chunks", 2)  # fmt: skip
    assert stored == {"cache": str(cache), "videos": 2, "failures": []}
    again = ["cache", "--manifest", str(manifest), "--cache", str(cache), *SMALL]
    plain = runner.invoke(app, again)
    assert "2 of 3 videos stored" in plain.stdout and "not a video" in plain.stderr


def test_transcode(manifest, tmp_path):
    out = tmp_path / "small"
    copied = run("transcode", "--manifest", manifest, "--out", out, "--longest-edge", 32)
    assert copied["videos"] == 2 and copied["bytes"] > 0 and len(copied["failures"]) == 1
    again = ["transcode", "--manifest", str(manifest), "--out", str(out), "--longest-edge", "32"]
    plain = runner.invoke(app, again)
    assert "2 videos, 0.0 MB" in plain.stdout and "not a video" in plain.stderr


def test_internalize_a_manifest(manifest, tmp_path):
    store = tmp_path / "store"
    result = run("internalize", "--manifest", manifest, "--out", store, "--device", "cpu")
    assert result["adapters"] == 2 and len(result["failures"]) == 1
    assert len(list((store / "adapters").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("internalize", "--out", "x"),
        ("internalize", "a.mp4", "--manifest", "m.jsonl", "--out", "x"),
        ("internalize", "--manifest", "m.jsonl", "--out", "x", "--engine", "spark"),
        ("internalize", "--manifest", "m.jsonl", "--out", "x", "--dtype", "int8"),
        ("teach", "--manifest", "m.jsonl", "--out", "x", "--engine", "spark"),
        ("teach", "--manifest", "m.jsonl", "--out", "x", "--dtype", "float64"),
        ("teach", "--manifest", "m.jsonl", "--out", "x", "--device", "tpu"),
        ("cache", "--manifest", "m.jsonl"),
        ("transcode", "--manifest", "m.jsonl", "--out", "x", "--longest-edge", "1"),
        ("finevideo", "build", "f", "--out", "x", "--mix", "0", "0", "0"),
        ("finevideo", "build", "f", "--out", "x", "--val-share", "1"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert runner.invoke(app, list(arguments)).exit_code == 2


def test_all_problems_of_a_manifest_are_listed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("{}\n[]\n")
    done = runner.invoke(app, ["teach", "--manifest", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, V2LError)
    assert "line 1: field 'id'" in str(done.exception) and "line 2" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_finevideo_build(tmp_path):
    from tests.data.test_finevideo import metadata

    for number in range(2):
        (tmp_path / f"v{number}.mp4").touch()
        (tmp_path / f"v{number}.json").write_text(json.dumps(metadata([(0, 1), (1, 2), (2, 3)])))
    done = run("finevideo", "build", tmp_path, "--out", tmp_path / "spans.jsonl", "--total", 10)
    assert done["pools"] == {"scene": 6, "adjacent": 3, "full": 1} and done["videos"] == 2
    again = ["finevideo", "build", str(tmp_path), "--out", str(tmp_path / "spans.jsonl")]
    plain = runner.invoke(app, [*again, "--force"])
    assert "10 rows (6 scene, 3 adjacent, 1 full) of 2 videos" in plain.stdout


def test_frames_are_those_of_the_base(tmp_path, pair):
    """Those of the shipped base, not of SmolVLM2; for a folder, those of the network beside it."""
    shipped = HypernetConfig.load(ASSETS / "shapes" / "hypernet").sampling
    for base in ("shapes", ASSETS / "shapes" / "base"):
        assert training_sampling(base) == shipped == FrameSampling(8, 48)
    assert training_sampling(pair / "base") == HypernetConfig.load(pair / "hypernet").sampling
    # Without a network beside it: the paper's, no larger than the base's own frames.
    shutil.copytree(ASSETS / "shapes" / "base", tmp_path / "alone" / "base")
    assert training_sampling(tmp_path / "alone" / "base") == FrameSampling(12, 48)
    (tmp_path / "alone" / "base" / "preprocessor_config.json").unlink()
    assert training_sampling(tmp_path / "alone" / "base") == FrameSampling(12, 384)


@pytest.mark.parametrize("command", ["teach", "cache"])
@pytest.mark.parametrize("options", [{}, {"max_frames": 4}, {"longest_edge": 24, "target_fps": 2}])
def test_commands_use_them_if_omitted(command, options, manifest, tmp_path, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        seen.extend(a for a in [*args, *kwargs.values()] if isinstance(a, ClipReader))
        seen.extend(a.reader for a in args if isinstance(a, TeacherSettings))
        raise Stop

    monkeypatch.setattr("v2l_fast.data.teach.teach", stop)
    monkeypatch.setattr("v2l_fast.data.feature_cache.FeatureCache", stop)
    changes = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    out = "--out" if command == "teach" else "--cache"
    result = runner.invoke(
        app, [command, "--manifest", str(manifest), out, str(tmp_path / "out"), *changes]
    )
    assert isinstance(result.exception, Stop)
    expected = FrameSampling(8, 48).override(**options)
    assert seen == [ClipReader(expected)]


def test_zero_is_not_the_default():
    with pytest.raises(ConfigError, match="max_frames must be at least 1, got 0"):
        FrameSampling(8, 48).override(max_frames=0)
    with pytest.raises(ConfigError, match="longest_edge must be at most 4096, got 5000"):
        FrameSampling(8, 48).override(longest_edge=5000)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        CorpusSettings("shapes", max_frames=0)


@pytest.mark.parametrize("command", [("teach",), ("cache",), ("finevideo", "build")])
def test_help_has_examples(command):
    done = runner.invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and f"v2l {' '.join(command)}" in done.stdout
