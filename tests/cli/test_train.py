"""`v2l train` from the command line."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from v2l_fast.cli import app
from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.network import HyperNetwork

SMALL = (
    "model.base=shapes", "data.videos=8", "data.val_videos=2", "optim.steps=2",
    "optim.batch_size=4", "optim.micro_batch_size=2", "run.trackers=[]",
)  # fmt: skip


def test_the_shapes_preset_trains_on_the_shipped_base(tmp_path):
    """The real command in its own process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "v2l_fast", "train", "-c", "shapes", "--json"]
    done = subprocess.run(
        [*command, f"run.folder={folder}", *SMALL], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["validation"]["val_loss"] > 0
    assert "step 2/2" in done.stderr
    assert HyperNetwork.from_pretrained(folder / "hypernet").config.rank == 8


def test_settings_can_be_shown():
    result = CliRunner().invoke(app, ["train", "--config", "smolvlm2-500m", "optim.lr=1", "--show"])
    shown = json.loads(result.stdout)
    assert result.exit_code == 0
    assert shown["optim"]["lr"] == 1.0 and shown["optim"]["steps"] == 9000


def test_help_shows_how_to_launch():
    text = CliRunner().invoke(app, ["train", "--help"]).stdout
    for part in ("accelerate launch", "v2l train --config shapes", "--fresh", "SECTION.KEY=VALUE"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "shaps"], "did you mean shapes"),
        (["--config", "shapes", "optim.lrr=1"], "did you mean optim.lr"),
        (["--config", "smolvlm2-500m"], "data.manifests is empty"),
        (["--config", "shapes", "run.device=cuda"], "no usable GPU"),
        (["--config", "shapes", "optim.micro_batch_size=0"], "must be at least 1, got 0"),
    ],
)
def test_wrong_settings_fail_at_once(arguments, message, tmp_path):
    extra = [f"run.folder={tmp_path}", "run.trackers=[]", "model.base=shapes"]
    result = CliRunner().invoke(app, ["train", *arguments, *extra])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_no_config_is_wrong_usage():
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2
