"""A file that harms its reader ends that process; the server goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from tests.serving import hostile_tasks
from tests.serving.checks import QUESTION, children, nothing_left, processes, refused
from tests.serving.conftest import running, start_forking
from tests.waiting import LIMIT, wait_until
from v2l_fast.errors import VideoError
from v2l_fast.serving import sandbox
from v2l_fast.serving.request import EngineClosed
from v2l_fast.serving.sandbox import VideoReader
from v2l_fast.serving.schemas import ServerLimits
from v2l_fast.video import Clip, FrameSampling, Limits, load_spans, probe
from v2l_fast.video.info import Fallbacks

HARMS = {
    "abort": "crashed the decoder (SIGABRT)",
    "segfault": "crashed the decoder (SIGSEGV)",
    "exit": "crashed the decoder (exit code 0)",
    "memory": "takes more than 2 GB of memory",
    "tensor": "takes more than 2 GB of memory",
}
LIMITS = ServerLimits(decode_bytes=2_000_000_000)


@pytest.fixture(scope="module", autouse=True)
def forking():
    start_forking()


@pytest.fixture
def reader(shapes):
    reader = VideoReader(shapes, ServerLimits())
    yield reader
    reader.close(EngineClosed("closed"))


def test_results_equal_those_of_this_process(reader, videos):
    assert reader.probe(videos[0]) == probe(videos[0])
    for sampling in (FrameSampling(8, 64), FrameSampling(20, 48, exact_frames=True)):
        clip = reader.load(videos[0], sampling)
        (expected,) = load_spans(videos[0], sampling)
        for name in Clip.__dataclass_fields__:
            one, other = getattr(clip, name), getattr(expected, name)
            if name == "frames":
                assert torch.equal(one, other) and one.is_contiguous()
            elif name == "indices":
                assert one.dtype == other.dtype and (one == other).all()
            else:
                assert type(one) is type(other) and one == other, name


def test_a_probed_file_is_walked_once(reader, videos, tmp_path, monkeypatch):
    first = tmp_path / "upload"
    first.write_bytes(Path(videos[0]).read_bytes())
    options = []
    run = reader._sandbox.run

    def spy(task, path, limits, *rest, **keywords):
        options.append(rest)
        return run(task, path, limits, *rest, **keywords)

    monkeypatch.setattr(reader._sandbox, "run", spy)
    reader.probe(first)
    kept = first.rename(tmp_path / "kept.mp4")
    (expected,) = load_spans(videos[0], FrameSampling(8, 64))
    for probed in (True, False):
        assert torch.equal(reader.load(kept, FrameSampling(8, 64)).frames, expected.frames)
        assert (options[-1][-1] is not None) is probed


def test_errors_equal_those_of_this_process(reader, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    for call in (probe, reader.probe):
        with pytest.raises(VideoError, match="bad.mp4: not a video that can be read"):
            call(bad)
    with pytest.raises(VideoError, match=r"nowhere.mp4: no such file"):
        reader.load(tmp_path / "nowhere.mp4", FrameSampling(8, 64))


def test_a_gpu_decodes_in_this_process(reader, videos, monkeypatch):
    decoded = []

    def by_the_gpu(path, sampling, **options) -> list[Clip]:
        assert options["backend"] == "dali"
        if path == videos[1]:
            raise VideoError(f"{path}: DALI does not decode it")
        decoded.append(path)
        return load_spans(path, sampling, **{**options, "backend": "pyav"})

    monkeypatch.setattr(sandbox, "resolve_backend", lambda backend, device: "dali")
    monkeypatch.setattr(sandbox, "load_spans", by_the_gpu)
    monkeypatch.setattr(sandbox, "fallbacks", Fallbacks())
    sampling = FrameSampling(3, 64, exact_frames=True)
    for path in videos[:2]:
        (expected,) = load_spans(path, sampling)
        assert torch.equal(reader.load_clip(path, sampling).frames, expected.frames)
    assert decoded == videos[:1] and sandbox.fallbacks.reasons() == {"not by the GPU": 1}


@pytest.fixture(scope="module")
def hurt(shapes, tmp_path_factory):
    """A server that does the harm which an uploaded file names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_probe", hostile_tasks.read_or_suffer)
        folder = tmp_path_factory.mktemp("store")
        with running(shapes, folder, LIMITS, stand_in={"words": ["yes"]}) as live:
            yield live


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmful_file_is_refused(hurt, videos, harm):
    answer = hurt.http.post("/v1/videos", files={"file": ("a.mp4", harm.encode())})
    message = refused(answer, 400, "invalid_video")["message"]
    assert message.startswith("reading it") and HARMS[harm] in message
    nothing_left(hurt)
    assert hurt.server.reader.probe(videos[0]) == probe(videos[0])
    assert hurt.http.post("/v1/chat/completions", json=QUESTION).is_success


@pytest.mark.parametrize("harm", ["hang", "slow"])
def test_a_file_that_takes_too_long(shapes, tmp_path, monkeypatch, harm):
    monkeypatch.setattr(sandbox, "_probe", hostile_tasks.read_or_suffer)
    (tmp_path / "a.mp4").write_bytes(harm.encode())
    reader = VideoReader(shapes, ServerLimits(probe_seconds=0.1))
    with pytest.raises(VideoError, match=r"a.mp4: reading it takes more than 0.1 s"):
        reader.probe(tmp_path / "a.mp4")


def test_harmful_files_do_not_affect_others(hurt, videos):
    """Harmful and sound files at the same time."""

    def upload(content: bytes) -> int:
        return hurt.http.post("/v1/videos", files={"file": ("a.mp4", content)}).status_code

    sound = videos[0].read_bytes()
    sent = [b"abort", sound, b"segfault", sound, b"exit"]
    with ThreadPoolExecutor(len(sent)) as threads:
        codes = list(threads.map(upload, sent))
    assert [code in (200, 202) for code in codes] == [content is sound for content in sent]
    for record in hurt.server.store.list():
        hurt.server.delete(record.id)


def test_a_crash_while_decoding_fails_the_job(serve, videos, monkeypatch):
    live = serve()
    with monkeypatch.context() as patch, open(videos[0], "rb") as file:
        patch.setattr(sandbox, "_load", crash)
        job = live.http.post("/v1/videos", files={"file": file}).json()
        wait_until(lambda: live.http.get(f"/v1/videos/{job['id']}").json()["status"] == "failed")
    error = live.http.get(f"/v1/videos/{job['id']}").json()["error"]
    assert error["code"] == "invalid_video" and "SIGABRT" in error["message"]
    wait_until(lambda: not live.server.videos._in_use)
    assert live.internalize(videos[0])["status"] == "completed"


def crash(path: str, limits: Limits, *options: object) -> None:
    hostile_tasks.abort()


def test_a_crash_while_decoding_for_a_question(serve, videos, monkeypatch):
    live = serve()
    video = live.internalize(videos[0])["adapter_id"]
    direct = {**QUESTION, "model": video, "video_mode": "context"}
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_load", crash)
        refused(live.http.post("/v1/chat/completions", json=direct), 400, "invalid_video")
    assert live.http.post("/v1/chat/completions", json=direct).is_success


def test_closing_ends_reading(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_probe", hostile_tasks.read_or_suffer)
    slow = tmp_path / "slow.mp4"
    slow.write_bytes(b"slow")
    reader = VideoReader(shapes, ServerLimits())
    ended = []

    def read() -> None:
        with pytest.raises(EngineClosed):
            reader.probe(slow)
        ended.append(time.monotonic())

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: list(tmp_path.glob("*.begun")))
    (reading_it,) = reader._sandbox._running
    reader.close(EngineClosed("closed"))
    thread.join(LIMIT)
    assert ended
    wait_until(lambda: reading_it.pid not in processes())
    with pytest.raises(EngineClosed):
        reader.probe(slow)


def test_the_fork_server_is_restarted(reader, videos):
    expected = reader.probe(videos[0])
    dying = forkserver._forkserver._forkserver_pid
    os.kill(dying, signal.SIGKILL)
    os.waitid(os.P_PID, dying, os.WEXITED | os.WNOWAIT)
    assert reader.probe(videos[0]) == expected


@pytest.mark.parametrize("how", ["kill", pytest.param("end", marks=pytest.mark.slow)])
def test_no_process_is_left(tmp_path, how):
    """After kill -9, and after an exit that closes nothing, while files are being read."""
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    process = context.Process(
        target=hostile_tasks.read_forever, args=(tmp_path, [b"slow", b"hang"], stop)
    )
    process.start()
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    # Includes the fork server.
    started = children(process.pid)
    assert len(started) >= 3
    if how == "kill":
        process.kill()
    else:
        stop.set()
    process.join(LIMIT)
    assert process.exitcode == (-signal.SIGKILL if how == "kill" else 0)
    wait_until(lambda: not started & processes().keys())
