"""``v2l serve`` is killed at any moment and started again on the same folder."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest

from tests.serving import hostile_tasks
from tests.serving.checks import QUESTION, begin_upload, children, processes
from tests.waiting import LIMIT, wait_until
from v2l_fast.files import file_sha256
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.store.adapter_store import content_id

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.tiny", "tests.serving.test_restart"])


def serve_forever(folder: Path, sending: Connection, drain_seconds: float, endless: bool) -> None:
    """Run the command and send its port; with ``endless``, decoding a video never ends."""
    import torch

    from v2l_fast.cli import serve as cli
    from v2l_fast.serving import http, sandbox

    if endless:
        sandbox._load = hostile_tasks.load_forever
    bind = http.bind

    def bound(host: str, port: int) -> socket.socket:
        taken = bind(host, port)
        sending.send(taken.getsockname()[1])
        return taken

    http.bind = bound
    torch.set_num_threads(1)
    cli.serve(store=folder, port=0, device="cpu", log_level="error", drain_seconds=drain_seconds)


@contextlib.contextmanager
def served(
    folder: Path, drain_seconds: float = LIMIT, endless: bool = False
) -> Iterator[tuple[multiprocessing.Process, httpx.Client]]:
    """The command in a process of its own, once it answers."""
    receiving, sending = PROCESSES.Pipe(duplex=False)
    arguments = folder, sending, drain_seconds, endless
    process = PROCESSES.Process(target=serve_forever, args=arguments)
    process.start()
    sending.close()
    # A connection that is kept may be closed by the server at the moment it is used again.
    limits = httpx.Limits(max_keepalive_connections=0)
    try:
        assert receiving.poll(LIMIT)
        url = f"http://127.0.0.1:{receiving.recv()}"
        with httpx.Client(base_url=url, timeout=LIMIT, limits=limits) as http:

            def answers() -> bool:
                assert process.is_alive()
                with contextlib.suppress(httpx.ConnectError):
                    return bool(http.get("/health").status_code)
                return False

            wait_until(answers)
            yield process, http
    finally:
        process.kill()
        process.join()


def variant(data: bytes, number: int) -> bytes:
    """The same video with other bytes: a free box at the end of the MP4."""
    return data + (16).to_bytes(4) + b"free" + number.to_bytes(8)


def upload_until_it_dies(
    http: httpx.Client, data: bytes, numbers: Iterator[int], finished: list[str]
) -> None:
    """Internalize one video after the other; record the adapters that the server reports."""
    with contextlib.suppress(httpx.TransportError):
        for number in numbers:
            files = {"file": ("clip.mp4", variant(data, number))}
            video = http.post("/v1/videos", files=files).raise_for_status().json()
            while video["status"] != "completed":
                assert video["status"] != "failed", video
                video = http.get(f"/v1/videos/{video['id']}").raise_for_status().json()
            finished.append(video["adapter_id"])


def half_an_upload(http: httpx.Client, data: bytes) -> socket.socket:
    """An upload that never ends."""
    client = socket.create_connection((http.base_url.host, http.base_url.port))
    begin_upload(client, data)
    return client


def stored_files(folder: Path) -> list[Path]:
    return list((folder / "adapters").iterdir())


def check(http: httpx.Client, folder: Path, finished: list[str], expected: str) -> None:
    """Every finished adapter is there and right, and nothing is half-written."""
    listed = http.get("/v1/videos", params={"limit": 1000}).json()["data"]
    assert {video["status"] for video in listed} <= {"completed"}
    ids = {video["id"] for video in listed}
    assert set(finished) <= ids
    for adapter_id in ids:
        stored = folder / "adapters" / f"{adapter_id}.safetensors"
        assert content_id(Adapter.load(stored)) == adapter_id
    assert {path.stem for path in (folder / "adapters").iterdir()} == ids
    assert not any((folder / "corrupt").iterdir())
    # Videos whose jobs were lost are removed.
    sources = {Adapter.load(path).provenance["source"]["sha256"] for path in stored_files(folder)}
    for video in (folder / "videos").iterdir():
        assert file_sha256(video / "video") == video.name and video.name in sources
    # Of the staging folders only the living process's is left, empty.
    (staging,) = (p for p in (folder / "staging").iterdir() if p.is_dir())
    assert not any(staging.iterdir())
    for adapter_id in finished[-3:]:
        answer = http.post("/v1/chat/completions", json={**QUESTION, "model": adapter_id})
        assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("lives", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_moment(shapes, videos, tmp_path, lives):
    rng = random.Random(0)
    folder = tmp_path / "store"
    data = videos[0].read_bytes()
    text = QUESTION["messages"][0]["content"]
    expected = shapes.ask(text, shapes.internalize(videos[0]))
    finished: list[str] = []
    for life in range(lives):
        with served(folder) as (process, http):
            check(http, folder, finished, expected)
            enough = len(finished) + 2
            numbers = iter(range(1000 * life, 1000 * life + 1000))
            threads = [
                threading.Thread(target=upload_until_it_dies, args=(http, data, numbers, finished))
                for _ in range(2)
            ]
            with half_an_upload(http, data):
                for thread in threads:
                    thread.start()
                wait_until(lambda: len(finished) >= enough or not process.is_alive())  # noqa: B023
                time.sleep(rng.uniform(0.0, 0.1))
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL
            for thread in threads:
                thread.join()
    assert len(set(finished)) == len(finished) >= 2 * lives
    with served(folder) as (process, http):
        check(http, folder, finished, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_finishes_its_jobs(videos, tmp_path, number):
    folder = tmp_path / "store"
    with served(folder) as (process, http):
        with open(videos[0], "rb") as file:
            http.post("/v1/videos", files={"file": file}).raise_for_status()
        os.kill(process.pid, number)
        wait_until(lambda: not process.is_alive())
    with served(folder) as (process, http):
        (video,) = http.get("/v1/videos").json()["data"]
        assert video["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_endless_video_keeps_no_process_alive(videos, tmp_path, number):
    """A stopped server waits for its drain time; a killed one cannot clean up."""
    with served(tmp_path / "store", drain_seconds=0.5, endless=True) as (process, http):
        for count in (4, 8):
            with open(videos[0], "rb") as file:
                files, data = {"file": file}, {"max_frames": count}
                http.post("/v1/videos", files=files, data=data).raise_for_status()
        wait_until(lambda: len(list(tmp_path.glob("store/videos/*/*.begun"))) == 2)
        # Includes the fork server.
        started = children(process.pid)
        assert len(started) >= 3
        os.kill(process.pid, number)
        process.join(LIMIT)
        assert process.exitcode in ((0, -number) if number == signal.SIGTERM else (-number,))
        wait_until(lambda: not started & processes().keys())
    with served(tmp_path / "store") as (process, http):
        assert http.get("/v1/videos").json()["data"] == []
        with open(videos[0], "rb") as file:
            http.post("/v1/videos", files={"file": file}).raise_for_status()
