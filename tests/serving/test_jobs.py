"""Cancelling ends a job and its processes and removes its files, without affecting others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving import hostile_tasks
from tests.serving.checks import QUESTION, nothing_left, refused
from tests.serving.conftest import Running
from tests.waiting import LIMIT, wait_until
from v2l_fast.serving import sandbox
from v2l_fast.serving.internalize import WORKERS


def start(live: Running, path: Path, **fields: object) -> str:
    """Id of the job of an upload."""
    with open(path, "rb") as file:
        answer = live.http.post("/v1/videos", files={"file": file}, data=fields)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def cancel(live: Running, job: str) -> None:
    answer = live.http.delete(f"/v1/videos/{job}")
    assert answer.json() == {"id": job, "object": "video.deleted", "deleted": True}


def status(live: Running, job: str) -> str:
    return live.http.get(f"/v1/videos/{job}").json()["status"]


def assert_cancelled(live: Running, job: str) -> None:
    video = live.http.get(f"/v1/videos/{job}").json()
    assert (video["status"], video["adapter_id"], video["error"]) == ("cancelled", None, None)
    refused(live.http.get(f"/v1/videos/{job}/adapter"), 409, "video_cancelled")
    refused(
        live.http.post("/v1/chat/completions", json={**QUESTION, "model": job}),
        409, "video_cancelled",
    )  # fmt: skip
    assert job not in [v["id"] for v in live.http.get("/v1/videos").json()["data"]]
    # Cancelling twice has no effect.
    cancel(live, job)


def test_while_decoding(serve, videos, monkeypatch):
    """The processes that read are killed, and a job that waits for them never begins."""
    live = serve()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_load", hostile_tasks.load_forever)
        frames = range(1, WORKERS + 2)
        jobs = [start(live, videos[0], max_frames=count) for count in frames]
        folder = live.server.videos.folder
        begun = wait_until(
            lambda: len(markers := list(folder.glob("*/*.begun"))) == WORKERS and markers
        )
        # The kept file is all jobs'; each is in use by its own.
        for job in reversed(jobs):
            assert status(live, job) in ("queued", "decoding")
            cancel(live, job)
            assert_cancelled(live, job)
    for marker in begun:
        wait_until(lambda pid=marker.suffixes[-2][1:]: not Path(f"/proc/{pid}").exists())
    nothing_left(live)
    wait_until(lambda: not live.engine.stats().jobs)
    metrics = live.http.get("/metrics").text
    assert f'v2l_videos_total{{result="cancelled"}} {WORKERS + 1}.0' in metrics
    video = live.internalize(videos[0])
    assert video["status"] == "completed" and not video["cached"]


def test_while_the_model_works(serve, videos, monkeypatch):
    """No further unit of work runs."""
    live = serve()
    interleaver = live.engine._interleaver
    run_unit, units, gate = interleaver.run_unit, [], threading.Event()

    def held() -> bool:
        if not gate.is_set():
            return False
        units.append(run_unit())
        return units[-1]

    with monkeypatch.context() as patch:
        patch.setattr(interleaver, "run_unit", held)
        job = start(live, videos[0])
        wait_until(lambda: len(interleaver))
        cancel(live, job)
        assert_cancelled(live, job)
        gate.set()
        wait_until(lambda: not len(interleaver))
    nothing_left(live)
    assert units.count(True) == 1
    assert live.internalize(videos[0])["status"] == "completed"


def test_while_its_adapter_is_stored(serve, videos, monkeypatch):
    """Too late to cancel: the adapter is deleted."""
    live = serve()
    put, storing, gate = live.server.store.put, threading.Event(), threading.Event()

    def held(adapter) -> str:
        storing.set()
        gate.wait(LIMIT)
        return put(adapter)

    monkeypatch.setattr(live.server.store, "put", held)
    job = start(live, videos[0])
    assert storing.wait(LIMIT)
    with ThreadPoolExecutor(1) as threads:
        deleting = threads.submit(live.http.delete, f"/v1/videos/{job}")
        wait_until(lambda: status(live, job) == "generating")
        gate.set()
        assert deleting.result().status_code == 200
    assert live.http.get(f"/v1/videos/{job}").status_code == 404
    nothing_left(live)


@pytest.mark.parametrize("at_once", [False, True])
def test_equal_uploads_share_a_job(serve, videos, at_once):
    """Each request withdraws one of them; the last one cancels the job."""
    hold = threading.Event()
    live = serve(stand_in={"hold": hold})
    with ThreadPoolExecutor(3 if at_once else 1) as threads:
        (job,) = set(threads.map(lambda _: start(live, videos[0]), range(3)))
    for _ in range(2):
        cancel(live, job)
        assert status(live, job) in ("queued", "decoding")
    other = start(live, videos[1])
    cancel(live, job)
    assert_cancelled(live, job)
    # A later upload starts a new job.
    again = start(live, videos[0])
    assert again != job
    hold.set()
    for one in (again, other):
        wait_until(lambda one=one: status(live, one) == "completed")
    assert_cancelled(live, job)
    assert len(live.server.store.list()) == 2


def test_a_finished_job_is_its_adapter(serve, videos):
    live = serve(stand_in={})
    job = start(live, videos[0])
    wait_until(lambda: status(live, job) == "completed")
    answer = live.http.delete(f"/v1/videos/{job}").json()
    assert answer["deleted"] and live.http.get(f"/v1/videos/{job}").status_code == 404
    nothing_left(live)
