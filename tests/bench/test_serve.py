"""The serving benchmarks run and judge: tiny weights, a second of load."""

from __future__ import annotations

import pytest
import torch

from bench import report, serve_http, serve_load, serve_ways
from bench.end_to_end import TINY
from bench.http_client import Ask
from bench.latency import Latencies


def test_every_way_answers_alike_and_is_timed():
    asked = serve_ways.random_weights(TINY, "cpu", torch.float32, compile=False)
    found = serve_ways.compare(asked, new_tokens=4, seconds=0.01)
    assert found["passed"] and found["question_tokens"] == 32
    assert set(found["ways"]) == {name for group in serve_ways.AGREE for name in group}
    assert all(min(times.values()) > 0 for times in found["ways"].values())


def test_tokens_a_second_against_the_weights(monkeypatch):
    asked = serve_ways.random_weights(TINY, "cpu", torch.float32, compile=False)
    monkeypatch.setattr(serve_ways, "_bandwidth", lambda device: 1e9)
    found = serve_ways.compare(asked, new_tokens=2, seconds=0.01)
    decoder = asked.backbone.decoder
    count = sum(p.numel() for p in decoder.text_model.layers.parameters())
    count += decoder.lm_head.weight.numel()
    for times in found["ways"].values():
        reached = times["tokens_per_second"] * 4 * count / 1e9
        assert times["weight_floor_share"] == pytest.approx(reached)


def test_no_times_where_answers_differ(monkeypatch):
    ways = {name: lambda count: [1] for group in serve_ways.AGREE for name in group}
    ways["adapter, merged"] = lambda count: [2]
    monkeypatch.setattr(serve_ways, "_ways", lambda *_: ways)
    asked = serve_ways.random_weights(TINY, "cpu", torch.float32, compile=False)
    found = serve_ways.compare(asked, new_tokens=2, seconds=0.01)
    assert found["disagree"] == ["adapter, merged"]
    assert not found["passed"] and not found["ways"]


def test_rounding_is_no_error_once_the_ways_have_agreed(monkeypatch):
    asked = serve_ways.random_weights(TINY, "cpu", torch.float32, compile=False)
    assert serve_ways.disagreeing(asked, 12) == []
    ways = {name: lambda count: [1] for group in serve_ways.AGREE for name in group}
    ways["adapter, merged"] = lambda count: [2]
    monkeypatch.setattr(serve_ways, "_ways", lambda *_: ways)
    assert serve_ways.disagreeing(asked, 12) == ["adapter, merged"]
    found = serve_ways.compare(asked, new_tokens=2, seconds=0.01, checked=True)
    assert found["passed"] and found["disagree"] == ["adapter, merged"]
    assert len(found["ways"]) == len(ways)


def test_load_is_checked_answer_by_answer(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(serve_load, "QUESTIONS_PER_VIDEO", 2)
    monkeypatch.setattr(serve_load, "ROUNDS", 1)
    found = serve_load.run(0.02, clients=6, videos=2, seed=0, say=said.append)
    assert found["load"]["requests"] > 6 and said
    assert found["passed"]["no_error"] and found["passed"]["no_wrong_answer"]
    assert found["load"]["time_to_first_token"]["count"] == found["load"]["requests"]
    alone = serve_load.alone
    monkeypatch.setattr(serve_load, "alone", lambda *asked: alone(*asked) + "!")
    wrong = serve_load.run(0.01, clients=2, videos=2, seed=0, say=said.append)
    assert wrong["load"]["wrong_answers"] == wrong["load"]["requests"] > 0
    assert not wrong["passed"]["no_wrong_answer"]


def test_load_over_http_is_checked_answer_by_answer(monkeypatch):
    """A real server, real clients, and requests whose right answer is another."""
    monkeypatch.setattr(serve_http, "LARGE_SIZE", (320, 240))
    monkeypatch.setattr(serve_http, "CLIENT_PROCESSES", 1)
    monkeypatch.setattr(serve_load, "QUESTIONS_PER_VIDEO", 1)
    lines: list[str] = []
    expected = serve_http._expected

    def others(*arguments):
        asks, extreme = expected(*arguments)
        return [Ask(ask.body, "another") for ask in asks], extreme

    monkeypatch.setattr(serve_http, "_expected", others)
    record = serve_http.run(0.05, clients=3, videos=1, seed=0, threads=1, say=lines.append)
    load, passed = record["load"], record["passed"]
    assert passed["none_lost"] and passed["server_ended_well"] and lines
    # Slow readers get the requests of the others, whose answers are wrong on purpose.
    assert all("slow readers" in problem for problem in record["problems"]), record["problems"]
    assert load["requests"] == load["started"] == load["time_to_first_token"]["count"] > 0
    assert record["odd"]["extreme parameters"] and record["clip_8k"]["seconds"] > 0
    assert load["wrong_answers"] == load["requests"] and not passed["no_wrong_answer"]
    assert "clients over HTTP" in report._serve_http(record)


def test_percentiles_within_a_percent():
    latencies = Latencies()
    for value in range(1, 1001):
        latencies.add(value / 1e3)
    for share in (0.5, 0.95):
        assert latencies.percentile(share) == pytest.approx(share, rel=0.02)
    assert latencies.summary()["count"] == 1000
