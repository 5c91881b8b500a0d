"""Clients that disconnect or flood, damaged files and full disks do not hurt the server."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.serving.checks import QUESTION, begin_upload, nothing_left, raw, refused
from tests.serving.conftest import Running, running
from tests.waiting import LIMIT, wait_until
from v2l_fast.errors import VideoError
from v2l_fast.serving import chat
from v2l_fast.serving.schemas import ChatRequest, ServerLimits

# Until it is cancelled.
ENDLESS = {"pause": 0.01, "words": itertools.repeat("word ")}


# --- clients that disconnect ---------------------------------------------------------------------


def test_disconnecting_from_a_stream_frees_the_row(serve):
    live = serve(stand_in=ENDLESS)
    with live.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as s:
        lines = s.iter_lines()
        assert any("word" in next(lines) for _ in range(10))
        assert len(live.engine.running) == 1
    wait_until(lambda: live.engine.ended == ["cancelled"] and not live.engine.running)
    assert 'v2l_answers_total{end="cancelled",source="plain"} 1.0' in live.http.get("/metrics").text


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("prefill", [False, True])
def test_disconnecting_while_waiting_frees_the_row(serve, reset, prefill):
    """Before the first word (a long prefill), and before the complete answer."""
    live = serve(stand_in={**ENDLESS, "hold": threading.Event() if prefill else None})
    body = json.dumps(QUESTION).encode()
    with closing(raw(live)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: len(live.engine.running) == 1)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: live.engine.ended == ["cancelled"])


def test_disconnecting_as_the_question_is_submitted_frees_the_row(serve, monkeypatch):
    """The thread has finished, and its result is lost with the task that awaits it."""
    live = serve(stand_in=ENDLESS)

    async def lost(function):
        function()
        raise asyncio.CancelledError

    async def internalize(request):
        return request

    monkeypatch.setattr(chat, "run_in_threadpool", lost)
    media = SimpleNamespace(internalize=internalize)
    answer = chat.Completion(live.server, ChatRequest(**QUESTION), media)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(answer.begin())
    wait_until(lambda: live.engine.ended == ["cancelled"])


def test_disconnecting_frees_a_row_of_the_real_engine(model, tmp_path, monkeypatch):
    """A random model answers up to its limit unless it is cancelled."""
    body = {**QUESTION, "stream": True, "max_tokens": 1500}
    with running(model, tmp_path / "store", ServerLimits(new_tokens=1500)) as live:
        runner, submitted = live.engine._scheduler.runner, []
        submit, decode = live.engine.submit, runner.decode

        def recorded(request):
            submitted.append(submit(request))
            return submitted[-1]

        def limited(adapters=None):
            """Wait for the cancellation, or a slow client would come too late."""
            if runner.requests and len(runner.requests[0].tokens) > 100:
                wait_until(lambda: submitted[0].cancelled)
            return decode(adapters)

        monkeypatch.setattr(live.engine, "submit", recorded)
        monkeypatch.setattr(runner, "decode", limited)
        with live.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert any("content" in next(lines) for _ in range(20))
        wait_until(lambda: live.engine.stats().requests["cancelled"] == 1)
        stats = live.engine.stats()
        assert stats.running == stats.waiting == 0 and stats.completion_tokens < 1500


def test_a_cut_upload_leaves_nothing(serve, videos):
    live = serve()
    with closing(raw(live)) as client:
        begin_upload(client, videos[0].read_bytes())
        wait_until(lambda: len(list(live.server.store.staging.folder.iterdir())) == 1)
    nothing_left(live)
    assert live.internalize(videos[0])["status"] == "completed"


@pytest.mark.parametrize(
    ("path", "kind", "begins"),
    [
        ("videos", "multipart/form-data; boundary=b", "--b\r\n"),
        ("videos", "application/json", "{"),
        ("chat/completions", "application/json", "{"),
    ],
)
def test_a_client_that_stops_sending(serve, path, kind, begins):
    live = serve(limits=ServerLimits(idle_seconds=0.2), stand_in={})
    with closing(raw(live)) as client:
        client.sendall(
            f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            f"Content-Type: {kind}\r\n\r\n{begins}".encode()
        )
        assert b" 408 " in client.recv(4096)
    nothing_left(live)


# --- limits -------------------------------------------------------------------------------------


def test_an_oversized_upload(serve, videos):
    live = serve(limits=ServerLimits(upload_bytes=1000))
    data = videos[0].read_bytes()
    assert len(data) > 1000
    refused(live.http.post("/v1/videos", files={"file": ("a.mp4", data)}), 413)
    endless = httpx.post(
        live.url + "/v1/videos",
        content=(b"\0" * 65536 for _ in range(64)),
        headers={"Content-Type": "multipart/form-data; boundary=b"},
        timeout=LIMIT,
    )
    assert endless.status_code in (400, 413)
    root = serve(folder=live.server.store.folder.parent / "other", root=videos[0].parent,
                 limits=ServerLimits(upload_bytes=1000))  # fmt: skip
    refused(root.http.post("/v1/videos", json={"path": videos[0].name}), 413)
    nothing_left(live)


@pytest.mark.parametrize("announced", [True, False])
def test_an_oversized_question(serve, announced):
    live = serve(limits=ServerLimits(body_bytes=1000, media_bytes=0), stand_in={"words": ["a"]})
    body = json.dumps({**QUESTION, "user": "x" * 2000}).encode()
    content = body if announced else iter([body[:500], body[500:]])
    headers = {"Content-Type": "application/json"}
    refused(live.http.post("/v1/chat/completions", content=content, headers=headers), 413)


@pytest.mark.parametrize(
    ("limit", "word"),
    [
        ({"pixels": 1000}, "pixels"),
        ({"duration": 1.0}, "s long"),
        ({"frames": 4}, "max_frames"),
        ({"longest_edge": 4}, "longest_edge"),
    ],
)
def test_a_video_beyond_the_limits(serve, videos, limit, word):
    live = serve(limits=ServerLimits(**limit))
    with open(videos[0], "rb") as file:
        answer = live.http.post(
            "/v1/videos", files={"file": file}, data={"max_frames": 8, "longest_edge": 8}
        )
    assert word in refused(answer, 400)["message"]
    nothing_left(live)


def test_an_answer_that_takes_too_long(serve):
    live = serve(limits=ServerLimits(answer_seconds=0.3), stand_in=ENDLESS)
    refused(live.http.post("/v1/chat/completions", json=QUESTION), 503, "timeout")
    wait_until(lambda: live.engine.ended == ["cancelled"])


def test_a_streamed_answer_that_takes_too_long(serve, monkeypatch):
    """The status has been sent, so the last event is the error."""
    live = serve(limits=ServerLimits(answer_seconds=10 * LIMIT), stand_in=ENDLESS)
    passed = 0.0
    clock = SimpleNamespace(time=time.time, perf_counter=lambda: time.perf_counter() + passed)
    monkeypatch.setattr(chat, "time", clock)
    with live.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as s:
        lines = s.iter_lines()
        assert s.status_code == 200 and any("word" in next(lines) for _ in range(10))
        passed = 20 * LIMIT
        *_, last = filter(None, lines)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: live.engine.ended == ["cancelled"])


def test_a_video_that_takes_too_long_for_its_question(serve, monkeypatch):
    """The time limit of an answer counts from the arrival of the question."""
    live = serve(limits=ServerLimits(answer_seconds=0.3), stand_in=ENDLESS)
    question, proceed = live.server.question, threading.Event()

    def slowly(chat):
        proceed.wait(LIMIT)
        return question(chat)

    monkeypatch.setattr(live.server, "question", slowly)
    refused(live.http.post("/v1/chat/completions", json=QUESTION), 503, "timeout")
    proceed.set()
    wait_until(lambda: live.engine.ended == ["cancelled"])


def test_decoding_leaves_threads_for_other_requests(serve, videos, monkeypatch, tmp_path):
    """More questions and files than the web server has threads, all waiting for a decoder."""
    live = serve(root=Path("/"), stand_in={"words": ["a"]})
    video = live.internalize(videos[0])["adapter_id"]
    gate = threading.Event()

    def stuck(*_, **options):
        gate.wait(LIMIT)
        raise VideoError("not a video")

    for way in ("load", "probe"):
        monkeypatch.setattr(live.server.reader, way, stuck)
    direct = {**QUESTION, "model": video, "video_mode": "context"}
    paths = [*videos[1:], *(tmp_path / f"{number}.mp4" for number in range(38))]
    for number, path in enumerate(paths[2:]):
        path.write_bytes(b"%d" % number)
    sent = [("/v1/chat/completions", direct)] * 40
    sent += [("/v1/videos", {"path": str(path)}) for path in paths]
    with ThreadPoolExecutor(len(sent)) as threads:
        calls = [threads.submit(live.http.post, path, json=body) for path, body in sent]
        # Questions beyond the first eight are refused, videos wait their turn.
        wait_until(lambda: sum(call.done() for call in calls) >= 40 - 8)
        assert all(refused(call.result(), 503, "queue_full") for call in calls if call.done())
        for path in ("/health", "/metrics", "/v1/models"):
            assert live.http.get(path).is_success
        assert live.http.post("/v1/chat/completions", json=QUESTION).is_success
        gate.set()
    assert {call.result().status_code for call in calls} == {400, 503}


def test_full_queues(serve, videos):
    hold = threading.Event()
    engine = {"hold": hold, "queue_limit": 1, "words": ["a"]}
    limits = ServerLimits(jobs=1, uploads=1, uploads_waiting=0)
    live = serve(limits=limits, stand_in=engine)
    waiting = threading.Thread(
        target=live.http.post, args=("/v1/chat/completions",), kwargs={"json": QUESTION}
    )
    waiting.start()
    wait_until(lambda: len(live.engine.running) == 1)
    answer = live.http.post("/v1/chat/completions", json=QUESTION)
    refused(answer, 503, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    with open(videos[0], "rb") as file:
        assert live.http.post("/v1/videos", files={"file": file}).status_code == 202
    with open(videos[1], "rb") as file:
        refused(live.http.post("/v1/videos", files={"file": file}), 503, "queue_full")
    with closing(raw(live)) as client:
        client.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        wait_until(lambda: len(list(live.server.store.staging.folder.iterdir())) == 1)
        with open(videos[1], "rb") as file:
            refused(live.http.post("/v1/videos", files={"file": file}), 503, "queue_full")
    hold.set()
    waiting.join()


def post(live: Running, data: bytes, name: str = "a.mp4", **fields: object) -> httpx.Response:
    return live.http.post("/v1/videos", files={"file": (name, data)}, data=fields)


@pytest.mark.parametrize("uploads", [64, 2])
def test_equal_uploads_at_once_are_one_job(serve, videos, uploads):
    """Of fifty clients that send one file none is refused, and all follow the same job."""
    live = serve(limits=ServerLimits(uploads=uploads), stand_in={"pause": 0.5})
    data = videos[0].read_bytes()
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: post(live, data), range(50)))
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    live.internalize(videos[0])
    assert len(live.server.store.list()) == 1
    internalized = live.server.metrics._videos.labels("internalized")._value
    wait_until(lambda: internalized.get() == 1)


def test_different_uploads_at_once_are_all_accepted(serve, videos):
    live = serve(stand_in={})
    data = videos[0].read_bytes()
    with ThreadPoolExecutor(40) as threads:
        box = (16).to_bytes(4) + b"free"
        sent = [data + box + number.to_bytes(8) for number in range(40)]
        answers = list(threads.map(lambda content: post(live, content), sent))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 40


def test_equal_uploads_at_once_are_refused_alike(serve):
    live = serve()
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: post(live, b"no video"), range(20)))
    assert {refused(answer, 400, "invalid_video")["message"] for answer in answers}
    nothing_left(live)


def test_a_refused_upload_displaces_no_video(serve, videos, monkeypatch):
    """A file that is not a video, or fails later, takes no space from a kept video."""
    size = videos[0].stat().st_size
    live = serve(limits=ServerLimits(kept_video_bytes=size + 100))
    video = live.internalize(videos[0])["adapter_id"]
    refused(post(live, b"no video" * 50), 400, "invalid_video")
    refused(post(live, videos[1].read_bytes(), max_frames=10**6), 400)
    monkeypatch.setattr(live.server.reader, "probe", lambda path: None)
    job = post(live, b"fails later").json()
    wait_until(lambda: live.http.get(f"/v1/videos/{job['id']}").json()["status"] == "failed")
    wait_until(lambda: len(list(live.server.videos.folder.iterdir())) == 1)
    assert live.http.get(f"/v1/videos/{job['id']}").json()["name"] == "a.mp4"
    assert live.http.get(f"/v1/videos/{video}").json()["in_context"]


def test_the_last_name_of_a_video_counts(serve, videos):
    live = serve(stand_in={})
    data = videos[0].read_bytes()
    video = live.internalize(videos[0])["adapter_id"]
    answer = post(live, data, "another name.mp4").json()
    assert answer["cached"] and (answer["id"], answer["name"]) == (video, "another name.mp4")
    assert live.http.get(f"/v1/videos/{video}").json()["name"] == "another name.mp4"


# --- damage and full disks ----------------------------------------------------------------------


def test_a_damaged_adapter_is_not_served(serve, videos):
    live = serve()
    video = live.internalize(videos[0])["adapter_id"]
    path = live.server.store.file(video)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    live.stop()
    live = serve()
    for _ in range(2):
        answer = live.http.post("/v1/chat/completions", json={**QUESTION, "model": video})
        assert str(path.parent) not in refused(answer, 404)["message"]
    assert live.http.get("/v1/videos").json()["data"] == []
    healed = live.internalize(videos[0])
    assert healed["adapter_id"] == video and not healed["cached"]
    assert live.http.post("/v1/chat/completions", json={**QUESTION, "model": video}).is_success


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "step", ["v2l_fast.serving.api.HashedFile.write", "v2l_fast.serving.videos.os.rename"]
)
def test_no_space_for_an_upload(serve, videos, monkeypatch, step):
    live = serve()
    with monkeypatch.context() as patch, open(videos[0], "rb") as file:
        patch.setattr(step, full)
        answer = live.http.post("/v1/videos", files={"file": file})
        assert answer.headers["retry-after"]
        refused(answer, 503, "storage")
    nothing_left(live)
    assert live.internalize(videos[0])["status"] == "completed"


def test_no_space_for_an_adapter(serve, videos, monkeypatch):
    live = serve()
    with monkeypatch.context() as patch, open(videos[0], "rb") as file:
        patch.setattr("v2l_fast.tensor_files.save_file", full)
        job = live.http.post("/v1/videos", files={"file": file}).json()
        wait_until(lambda: live.http.get(f"/v1/videos/{job['id']}").json()["status"] == "failed")
    failed = live.http.get(f"/v1/videos/{job['id']}").json()
    assert failed["error"]["code"] == "storage"
    wait_until(lambda: not live.server.videos._in_use)
    nothing_left(live)
    assert live.internalize(videos[0])["status"] == "completed"


# --- the end ----------------------------------------------------------


def test_the_drain_time_is_shared(serve, monkeypatch):
    """A client that reads an endless answer uses it up; nothing is left for the engine."""
    live = serve(stand_in=ENDLESS, drain_seconds=1.0)
    close, timeouts = live.engine.close, []

    def recorded(drain: bool, timeout: float) -> None:
        timeouts.append(timeout)
        close(drain, timeout)

    monkeypatch.setattr(live.engine, "close", recorded)
    with live.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as s:
        lines = s.iter_lines()
        assert any("word" in next(lines) for _ in range(10))
        live.stop()
    assert len(timeouts) == 1 and timeouts[0] < 0.5


def test_stopping_finishes_what_is_under_way(serve, videos):
    live = serve(stand_in={"pause": 0.05, "words": ["word "] * 20})
    with open(videos[0], "rb") as file:
        job = live.http.post("/v1/videos", files={"file": file}).json()
    with live.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as s:
        lines = s.iter_lines()
        next(lines)
        stopping = threading.Thread(target=live.stop)
        stopping.start()
        rest = "\n".join(lines)
    stopping.join()
    assert rest.count("word ") >= 19 and rest.rstrip().endswith("data: [DONE]")
    assert live.engine.closed and live.engine.ended == ["stop"]
    assert job["id"] and not live.server.store.staging.folder.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(live.url + "/health", timeout=LIMIT)
    assert len(serve().http.get("/v1/videos").json()["data"]) == 1
