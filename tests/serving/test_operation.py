"""Operating a server: keys, logs, metrics, health, the page and the documents."""

from __future__ import annotations

import json
import logging
import re
import time

import httpx

from tests.serving.checks import QUESTION, refused
from tests.waiting import LIMIT, wait_until
from v2l_fast.serving import chat, monitoring
from v2l_fast.serving.api import PAGE
from v2l_fast.video.info import Fallbacks

PROTECTED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/shapes"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/videos"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos/x"),
    ("DELETE", "/v1/videos/x"),
    ("GET", "/v1/videos/x/peft"),
    ("GET", "/v1/videos/x/adapter"),
    ("GET", "/metrics"),
)


def test_keys(serve):
    live = serve(keys=("first", "second"), stand_in={"words": ["yes"]})
    client = httpx.Client(base_url=live.url, timeout=LIMIT)
    bad = (b"", b"Bearer", b"Bearer wrong", b"bearer first x", b"Basic first", b"Bearer \xff\xfe")
    for value in (None, *bad):
        headers = {} if value is None else {"Authorization": value}
        for method, path in PROTECTED:
            answer = client.request(method, path, headers=headers)
            refused(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        for method, path in PROTECTED:
            assert client.request(method, path, headers=headers).status_code != 401
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    # Every route is in one of the two lists.
    routes = {
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    assert len(routes) == len(PROTECTED) + 2


def test_logs_contain_no_user_content(serve, videos, caplog):
    live = serve(keys=("hidden-key",))
    with caplog.at_level(logging.INFO):
        with open(videos[0], "rb") as file:
            live.http.post("/v1/videos", files={"file": ("hidden name.mp4", file)})
        live.http.post("/v1/videos", files={"file": ("hidden name.mp4", b"hidden bytes")})
        video = live.internalize(videos[0])["adapter_id"]
        chat = {"model": video, "messages": [{"role": "user", "content": "hidden question"}]}
        answer = live.http.post("/v1/chat/completions", json=chat).json()
        live.http.post("/v1/chat/completions", json={**chat, "model": "hidden model"})
        live.http.get("/hidden/path")
    text = answer["choices"][0]["message"]["content"]
    lines = [json.dumps([r.getMessage(), getattr(r, "fields", {})]) for r in caplog.records]
    lines = [line for line, r in zip(lines, caplog.records, strict=True) if r.name != "httpx"]
    assert len(lines) > 6
    assert not any("hidden" in line or text in line for line in lines)
    ended = [r.fields for r in caplog.records if r.getMessage() == "answer"]
    assert ended[0]["source"] == "adapter" and ended[0]["visual_tokens"] == 0
    requests = [r.fields for r in caplog.records if r.getMessage() == "request"]
    assert {"request_id", "route", "status", "seconds"} <= set(requests[0])


def test_metrics(serve, videos):
    live = serve()
    video = live.internalize(videos[0])["adapter_id"]
    live.http.post("/v1/chat/completions", json={**QUESTION, "model": video})
    live.http.post("/v1/chat/completions", json=QUESTION)
    # An answer reaches its client before the engine has retired its row.
    wait_until(lambda: "v2l_engine_running 0.0" in live.http.get("/metrics").text)
    text = live.http.get("/metrics").text
    for line in (
        'v2l_answers_total{end="stop",source="adapter"} 1.0',
        'v2l_answers_total{end="stop",source="plain"} 1.0',
        'v2l_time_to_first_token_seconds_count{source="adapter"} 1.0',
        'v2l_videos_total{result="internalized"} 1.0',
        'v2l_internalize_seconds_count{stage="decoding"} 1.0',
        "v2l_engine_running 0.0",
        "v2l_store_adapters 1.0",
    ):
        assert line in text.splitlines(), line


class Clock:
    """Replaces the time module."""

    time = staticmethod(time.time)

    def __init__(self, tick: float) -> None:
        self.tick, self._now = tick, 0.0

    def perf_counter(self) -> float:
        self._now += self.tick
        return self._now


def test_the_time_between_tokens_is_a_distribution(serve, monkeypatch):
    """Every gap of every answer, streamed or not: about 30 ms each here, then one of 250 ms."""
    words = ["word "] * 6
    live = serve(stand_in={"words": words})
    # Time passes with each reading of the clock, about two for a piece.
    clock = Clock(1 / 64)
    monkeypatch.setattr(chat, "time", clock)
    for stream in (False, True):
        body = {**QUESTION, "stream": stream}
        assert live.http.post("/v1/chat/completions", json=body).is_success
    clock.tick, live.engine.words = 1 / 8, words[:2]
    assert live.http.post("/v1/chat/completions", json=QUESTION).is_success
    gaps = {}
    for line in live.http.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        gaps[name] = float(value) if name.startswith("v2l_inter_token_seconds") else 0.0
    bucket = 'v2l_inter_token_seconds_bucket{le="%s",source="plain"}'
    assert gaps['v2l_inter_token_seconds_count{source="plain"}'] == 11
    assert gaps[bucket % "0.015"] == 0 and gaps[bucket % "0.2"] == 10
    assert gaps[bucket % "+Inf"] == 11
    assert gaps['v2l_inter_token_seconds_sum{source="plain"}'] >= 10 / 32 + 1 / 4


def test_videos_left_to_the_cpu_are_counted(serve, monkeypatch):
    counted = Fallbacks()
    monkeypatch.setattr(monitoring, "fallbacks", counted)
    live = serve(stand_in={})
    for path in ("a.mp4", "b.mp4", "a.mp4"):
        counted.add(path, "codec av1 on cuda")
    line = 'v2l_decoder_fallbacks_total{reason="codec av1 on cuda"} 2.0'
    assert line in live.http.get("/metrics").text.splitlines()


def test_not_ready_until_the_engine_is(serve):
    live = serve(stand_in={})
    live.engine.ready = False
    answer = live.http.get("/health")
    assert answer.status_code == 503 and answer.json()["status"] == "starting"
    live.engine.ready = True
    answer = live.http.get("/health")
    assert answer.status_code == 200 and answer.json()["status"] == "ok"


def test_the_documents_load_nothing_from_elsewhere(serve):
    live = serve(stand_in={})
    answer = live.http.get("/docs")
    named = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", answer.text)
    assert len(named) >= 4 and "://" not in "".join(named)
    for address in named:
        assert live.http.get(address).is_success, address
    assert "cdn" not in answer.text
    assert live.http.get("/redoc").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(serve):
    answer = serve(stand_in={}).http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert answer.text == PAGE.read_text()
    for outside in ("://", "@import", "src=", "<link", "import("):
        assert outside not in answer.text, outside
    assert "url(" not in answer.text.partition("</style>")[0]
