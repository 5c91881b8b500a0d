"""The load benchmark judges every answer: a real server, and seconds of load."""

from __future__ import annotations

import pytest

from bench import report
from bench.runs import serve
from bench.runs.serve_clients import CheckedRequest, Latencies


@pytest.mark.slow
def test_answers_are_checked_one_by_one(monkeypatch):
    """Here the right answer of every ordinary request is another one."""
    monkeypatch.setattr(serve, "LARGE_HEIGHT", 240)
    monkeypatch.setattr(serve, "CLIENT_PROCESSES", 1)
    monkeypatch.setattr(serve, "QUESTIONS_PER_VIDEO", 1)
    lines: list[str] = []
    checked_requests = serve.checked_requests

    def others(*arguments):
        requests, extreme = checked_requests(*arguments)
        return [CheckedRequest(one.body, "another") for one in requests], extreme

    monkeypatch.setattr(serve, "checked_requests", others)
    record = serve.run(0.05, clients=3, videos=1, seed=0, threads=1, say=lines.append)
    load, passed = record["load"], record["passed"]
    assert passed["none_lost"] and passed["server_ended_well"] and lines
    # Slow readers send the requests of the ordinary clients, whose answers are wrong on purpose.
    assert all("slow readers" in problem for problem in record["problems"]), record["problems"]
    assert load["requests"] == load["started"] == load["time_to_first_token"]["count"] > 0
    assert record["odd"]["extreme parameters"] and record["clip_8k"]["seconds"] > 0
    assert load["wrong_answers"] == load["requests"] and not passed["no_wrong_answer"]
    page = report.report([{"benchmark": "serve_http", **record}])
    assert "clients over HTTP" in page


def test_percentiles_within_a_percent():
    latencies = Latencies()
    for value in range(1, 1001):
        latencies.add(value / 1e3)
    for share in (0.5, 0.95):
        assert latencies.percentile(share) == pytest.approx(share, rel=0.02)
    assert latencies.summary()["count"] == 1000
