"""The same targets from a cluster of two workers, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pytest

from tests.cluster import cluster
from tests.training.broken import write_folder
from v2l_fast.data import teach as teaching
from v2l_fast.data.readers import ClipReader
from v2l_fast.data.shards import ShardError, Shards
from v2l_fast.data.teach import TeacherSettings, teach
from v2l_fast.errors import VideoError
from v2l_fast.video import FrameSampling


@pytest.fixture(scope="module")
def ray():
    import ray

    # Workers get this module's classes by value: they cannot import tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with cluster():
        yield ray


class Killed(teaching.Teacher):
    """Dies once, with a shard computed and not yet written."""

    def __init__(self, marker, videos, settings) -> None:
        super().__init__(videos, settings)
        self.marker = marker

    def __call__(self, numbers):
        lines = super().__call__(numbers)
        if numbers[0] > 0:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return lines
            os.kill(os.getpid(), signal.SIGKILL)
        return lines


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_targets_are_those_of_one_machine(
    ray, tmp_path, monkeypatch
):
    manifest, _ = write_folder(tmp_path / "videos", 9, ("text",))
    settings = TeacherSettings(
        "shapes",
        ClipReader(FrameSampling(8, 48)),
        max_new_tokens=24,
        batch=4,
        videos_per_shard=2,
        device="cpu",
    )
    alone = teach(manifest, tmp_path / "alone", settings)
    marker = tmp_path / "killed"
    monkeypatch.setattr(teaching, "Teacher", partial(Killed, marker))
    seen = []
    together = teach(
        manifest, tmp_path / "together", settings, engine="ray", workers=2,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert marker.exists()
    assert seen[0] == (0, 9) and seen[-1] == (9, 9)
    assert together.answers == alone.answers == 16
    assert together.manifest.read_text() == alone.manifest.read_text()
    for name in ("quarantine.jsonl", "run.json"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()


class Failing:
    def __call__(self, numbers):
        raise VideoError("clip.mp4: one clear line")


def test_an_error_of_the_work_is_raised_unchanged(ray, tmp_path):
    from v2l_fast.data.shards import run_on_ray

    shards = Shards.open(tmp_path, {}, 2, 1)
    with pytest.raises(ShardError, match="^clip.mp4: one clear line$"):
        run_on_ray(shards, Failing, (), 1, 0, lambda done, total: None)
