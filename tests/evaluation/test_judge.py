"""The judge's client against a stub server that misbehaves: nothing is lost, nothing becomes 0."""

import json
import time
from collections import Counter

import openai
import pytest

from tests.evaluation.judge_stub import Reply, StubJudge, scored
from tests.waiting import LIMIT
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.judge import (
    Judge,
    JudgeError,
    JudgeSettings,
    JudgeTask,
    Preference,
    Verdict,
)


@pytest.fixture
def serve():
    """Starts stubs and stops them."""
    started = []

    def start(behave):
        started.append(StubJudge(behave))
        return started[-1]

    yield start
    for stub in started:
        stub.close()


def judge(stub, cache=None, **settings):
    defaults = {"model": "stub", "timeout": LIMIT, "retries": 2, "workers": 4, "corrections": 1}
    return Judge(JudgeSettings(stub.url, **{**defaults, **settings}), cache)


def tasks(count, is_caption=False):
    return [JudgeTask(f"question {i}", f"reference {i}", is_caption) for i in range(count)]


def candidate_of(request):
    return request["messages"][1]["content"].rpartition("Candidate:\n")[2]


def test_scores_are_rescaled_in_order(serve):
    stub = serve(lambda request, attempt: scored(int(candidate_of(request))))
    result = judge(stub).score(tasks(5), ["1", "2", "3", "4", "5"])
    assert [v.score for v in result] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for request in stub.requests:
        assert request["temperature"] == 0 and request["max_tokens"] == 1024
        assert request["response_format"] == {"type": "json_object"}
        assert request["model"] == "stub"


def test_every_kind_of_misbehavior(serve, monkeypatch):
    """One example each; what can be mended is, the rest fails under its own name."""
    bad = {
        "fenced": lambda attempt: Reply('```json\n{"score": 5}\n```'),
        "malformed once": lambda attempt: scored(5) if attempt else Reply("I would say good."),
        "malformed": lambda attempt: Reply("I would say good."),
        "not a completion": lambda attempt: Reply(body=b"<html>"),
        "empty completion": lambda attempt: Reply(body=b"{}"),
        "no message": lambda attempt: Reply(body=b'{"choices": [{"index": 0}]}'),
        "a list": lambda attempt: Reply(body=b'{"choices": [{"message": {"content": [1]}}]}'),
        "out of range once": lambda attempt: scored(5 if attempt else 9),
        "out of range": lambda attempt: scored(0),
        "slow once": lambda attempt: scored(5) if attempt else Reply("late", delay=LIMIT),
        "slow": lambda attempt: Reply("late", delay=LIMIT),
        "limited once": lambda attempt: (
            scored(5) if attempt else Reply(status=429, headers={"Retry-After": "0.05"})
        ),
        "limited": lambda attempt: Reply(status=429, headers={"Retry-After": "0.05"}),
        "down once": lambda attempt: (
            scored(5) if attempt else Reply(status=503, headers={"Retry-After": "0.05"})
        ),
        "down": lambda attempt: Reply(status=500, headers={"Retry-After": "0.05"}),
        "rejected": lambda attempt: Reply(status=400),
        "cut off": lambda attempt: Reply('Is it {"score": 5}? No,', finish_reason="length"),
        "cut off behind it": lambda attempt: Reply('{"score": 5, "r', finish_reason="length"),
        "refused": lambda attempt: Reply(refusal="I cannot help with that."),
        "filtered": lambda attempt: Reply("...", finish_reason="content_filter"),
        "silent": lambda attempt: Reply(""),
    }
    stub = serve(lambda request, attempt: bad[candidate_of(request)](attempt))
    client = judge(stub, retries=1, workers=8)
    # The client that openai brings, whichever library that is from.
    send, sent = openai.DefaultHttpxClient.send, Counter()

    def impatiently(self, request, **options):
        """A request that gets no answer ends soon, the others however late theirs is."""
        name = candidate_of(json.loads(request.content))
        sent[name] += 1
        if name == "slow" or (name, sent[name]) == ("slow once", 1):
            request.extensions["timeout"]["read"] = 0.2
        return send(self, request, **options)

    monkeypatch.setattr(openai.DefaultHttpxClient, "send", impatiently)
    result = dict(zip(bad, client.score(tasks(len(bad)), list(bad)), strict=True))

    assert all((v.fields is None) == (v.failure is not None) for v in result.values())
    assert {name for name, v in result.items() if v.score == 1.0} == {
        "fenced",
        "malformed once",
        "out of range once",
        "slow once",
        "limited once",
        "down once",
        "cut off behind it",
    }
    failed = {name: v.failure for name, v in result.items() if v.failure is not None}
    assert failed == {
        "malformed": "malformed",
        "not a completion": "malformed",
        "empty completion": "malformed",
        "no message": "malformed",
        "a list": "malformed",
        "out of range": "out of range",
        "slow": "timeout",
        "limited": "rate limited",
        "down": "server error",
        "rejected": "rejected",
        "cut off": "malformed",
        "refused": "refused",
        "filtered": "refused",
        "silent": "refused",
    }
    # Nothing is lost, and no failure became a number.
    assert len(result) == len(bad) and all(result[name].score is None for name in failed)
    counted = client.report()["failures"]
    assert sum(counted.values()) == len(failed)
    assert counted["malformed"] == 6 and counted["refused"] == 3


def test_retry_after_is_obeyed(serve):
    times = []

    def behave(request, attempt):
        times.append(time.monotonic())
        return scored(3) if attempt else Reply(status=429, headers={"Retry-After": "0.4"})

    (verdict,) = judge(serve(behave)).score(tasks(1), ["x"])
    assert verdict.score == 0.5 and len(times) == 2
    assert times[1] - times[0] >= 0.4


def test_a_bad_reply_is_sent_back_with_the_complaint(serve):
    stub = serve(lambda request, attempt: scored(4) if attempt else Reply("pretty good"))
    client = judge(stub)
    (verdict,) = client.score(tasks(1), ["x"])
    assert verdict.score == 0.75
    first, second = (request["messages"] for request in stub.requests)
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[:2] == first and second[2]["content"] == "pretty good"
    assert client.report()["corrections"] == 1


def test_cost_is_counted(serve):
    client = judge(serve(lambda request, attempt: scored(4)), prices=(2.0, 30.0))
    client.score(tasks(10), ["x"] * 10)
    report = client.report()
    assert report["requests"] == 10
    assert report["prompt_tokens"] == 1000 and report["completion_tokens"] == 100
    assert report["dollars"] == pytest.approx((1000 * 2 + 100 * 30) / 1e6)


def test_judging_resumes_from_the_cache_and_retries_failures(serve, tmp_path):
    """Half of the judgments fail the first time; the second run asks for those alone."""
    healthy = False

    def behave(request, attempt):
        if healthy or int(candidate_of(request)) % 2:
            return scored(3)
        return Reply("no idea")

    stub = serve(behave)
    cache = tmp_path / "judgments.jsonl"
    texts = [str(i) for i in range(10)]
    first = judge(stub, cache, corrections=0).score(tasks(10), texts)
    assert [v.failure for v in first] == ["malformed", None] * 5
    requests = len(stub.requests)
    assert requests == 10

    healthy = True
    client = judge(stub, cache, corrections=0)
    second = client.score(tasks(10), texts)
    assert all(v.score == 0.5 for v in second)
    assert len(stub.requests) == requests + 5
    assert client.report()["from_cache"] == 5

    # Another judge, reference or candidate is another judgment.
    judge(stub, cache, model="other").score(tasks(1), ["0"])
    judge(stub, cache).score([JudgeTask("question 0", "another", False)], ["0"])
    judge(stub, cache).score(tasks(1, is_caption=True), ["0"])
    assert len(stub.requests) == requests + 8


def test_equal_requests_are_sent_once(serve):
    stub = serve(lambda request, attempt: scored(2))
    result = judge(stub).score(tasks(1) * 6, ["same"] * 6)
    assert [v.score for v in result] == [0.25] * 6 and len(stub.requests) == 1


def test_a_torn_cache_line_is_judged_again(serve, tmp_path):
    cache = tmp_path / "judgments.jsonl"
    stub = serve(lambda request, attempt: scored(4))
    judge(stub, cache).score(tasks(3), ["a", "b", "c"])
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-20])
    assert all(v.score == 0.75 for v in judge(stub, cache).score(tasks(3), ["a", "b", "c"]))
    assert len(stub.requests) == 4
    assert len(cache.read_text().splitlines()) == 3
    for line in cache.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_name_stops_everything(serve, status):
    stub = serve(lambda request, attempt: Reply(status=status))
    with pytest.raises(JudgeError, match=rf"replies {status} .*OPENAI_API_KEY.*stub"):
        judge(stub, workers=1).score(tasks(20), ["x"] * 20)
    assert len(stub.requests) < 5


def test_an_unreachable_judge_is_named(serve, tmp_path):
    stub = serve(lambda request, attempt: scored(1))
    client = judge(stub, tmp_path / "cache.jsonl", retries=0)
    stub.close()
    with pytest.raises(JudgeError, match="cannot be reached"):
        client.score(tasks(3), ["a", "b", "c"])


def test_pairs_are_anonymous_and_their_order_is_drawn(serve):
    """A judge that always prefers the good answer is understood whatever the order, one that always
    says A prefers neither system."""

    def fair(request, attempt):
        text = request["messages"][1]["content"]
        a_is_good = text.index("good") < text.index("poor")
        scores = {"score_a": 5 if a_is_good else 1, "score_b": 1 if a_is_good else 5}
        return Reply(json.dumps({**scores, "preferred": "A" if a_is_good else "B"}))

    def biased(request, attempt):
        return Reply('{"score_a": 5, "score_b": 1, "preferred": "A"}')

    count = 24
    result = judge(serve(fair)).compare(tasks(count), ["good"] * count, ["poor"] * count)
    assert result == [Preference(1.0, 0.0, 1)] * count
    swapped = judge(serve(fair)).compare(tasks(count), ["poor"] * count, ["good"] * count)
    assert swapped == [Preference(0.0, 1.0, -1)] * count

    stub = serve(biased)
    result = judge(stub).compare(tasks(count), ["good"] * count, ["poor"] * count, seed=1)
    first_is_a = sum(p.preferred == 1 for p in result)
    assert 0.25 * count < first_is_a < 0.75 * count
    again = judge(serve(biased)).compare(tasks(count), ["good"] * count, ["poor"] * count, seed=1)
    assert again == result
    other = judge(serve(biased)).compare(tasks(count), ["good"] * count, ["poor"] * count, seed=2)
    assert other != result


def test_failed_pairs_are_verdicts(serve):
    result = judge(serve(lambda request, attempt: Reply("both fine"))).compare(tasks(2), "ab", "cd")
    assert all(isinstance(v, Verdict) and v.failure == "malformed" for v in result)


def test_misuse_is_named():
    with pytest.raises(ConfigError, match="workers must be positive, got 0"):
        JudgeSettings("http://localhost", workers=0)
    with pytest.raises(ConfigError, match="retries"):
        JudgeSettings("http://localhost", retries=-1)
