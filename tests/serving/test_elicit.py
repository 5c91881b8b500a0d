"""Conversations that ask, over HTTP: the official client, and nothing of a person is stored."""

from __future__ import annotations

import json
import logging

import openai
import pytest
from prometheus_client import generate_latest

from v2l_fast.conversation import LexiconModel
from v2l_fast.conversation.models import ModelError, NgramEncoder
from v2l_fast.serving.elicit import Elicitor
from v2l_fast.shapes.render import write_clip
from v2l_fast.shapes.viewers import ambiguous_scenes
from v2l_fast.shapes.world import sample_scenes

SECRET = "Ottilie"
FOCUS = "Do you mean the first or the second object?"


@pytest.fixture
def asking(serve):
    """A server with a reasoner, and the official client."""
    server = serve()
    registry = server.server.metrics.registry
    server.server.elicitor = Elicitor(LexiconModel(), NgramEncoder(), registry)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return server, client


def talk(client, model, said, extra=None, **options):
    """A conversation: the replies, the persona and the fields of the last response."""
    messages, replies = [], []
    extra = {"elicit": {"schema": "shapes"}, **(extra or {})}
    for text in said:
        messages.append({"role": "user", "content": text})
        done = client.chat.completions.create(
            model=model, messages=messages, extra_body=extra, **options
        )
        replies.append(done)
        messages.append({"role": "assistant", "content": done.choices[0].message.content})
        returned = done.model_extra
        kept = {name: returned["elicit"][name] for name in ("asked", "last_action", "stopped")}
        extra = {"elicit": {**extra["elicit"], **kept}, "persona": returned["persona"]}
    return replies, extra


def test_the_official_client_is_asked_and_answered_and_nothing_is_stored(
    asking, tmp_path, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    server, client = asking
    scene = ambiguous_scenes(sample_scenes("test", 8, 0))[0]
    video = server.internalize(write_clip(scene, tmp_path / "clip.mp4"))["adapter_id"]
    said = [
        "What color is the object?",
        f"The second one, says my aunt {SECRET}.",
        "How does the object move?",
    ]
    replies, extra = talk(client, video, said)
    assert replies[0].choices[0].message.content == FOCUS
    assert [r.model_extra["elicit"]["action"] for r in replies] == ["ask", "answer", "answer"]
    assert extra["elicit"]["asked"] == {"focus": 1}
    (fact,) = extra["persona"]["facts"]
    assert (fact["slot"], fact["value"]) == ("focus", "second") and SECRET in fact["utterance"]
    assert replies[1].model_extra["gap"]["video"] is not None
    # The persona carried over saves the question, in another conversation.
    (again,), _ = talk(client, video, said[:1], {"persona": extra["persona"]})
    assert again.model_extra["elicit"]["action"] == "answer"
    assert again.choices[0].message.content == replies[1].choices[0].message.content
    # Keys and values, store, logs, output, metrics.
    assert not len(server.server.engine._prefix_cache)
    for path in (tmp_path / "store").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in caplog.text and SECRET not in "".join(capfd.readouterr())
    metrics = generate_latest(server.server.metrics.registry).decode()
    assert SECRET not in metrics and 'v2l_elicit_turns_total{action="ask"} 1.0' in metrics
    assert SECRET not in repr(vars(server.server)) + repr(vars(server.server.elicitor))


def test_without_a_video_the_reasoner_talks_alone(serve):
    server = serve(stand_in={})
    server.server.elicitor = Elicitor(
        LexiconModel("uniform"), NgramEncoder(), server.server.metrics.registry
    )
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    said = ["A drama, please.", "Dark.", "Alone.", "Hello."]
    replies, extra = talk(client, "shapes", said, {"elicit": {"schema": "movies"}})
    assert [r.model_extra["elicit"]["action"] for r in replies] == ["ask", "ask", "ask", "answer"]
    values = {fact["slot"]: fact["value"] for fact in extra["persona"]["facts"]}
    assert values == {"genre": "drama", "mood": "dark", "company": "alone"}
    chunks = list(
        client.chat.completions.create(
            model="shapes", messages=[{"role": "user", "content": "Hi."}], stream=True,
            stream_options={"include_usage": True}, extra_body={"elicit": {"schema": "movies"}},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.content.endswith("?")
    assert chunks[1].model_extra["elicit"]["action"] == "ask"
    assert chunks[0].usage is None and chunks[-1].usage.total_tokens == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"elicit": {"schema": "/etc/passwd"}}, "elicit.schema"),
        ({"elicit": {"schema": {"slots": {}}}}, "elicit.schema"),
        ({"elicit": {"candidates": 99}}, "elicit.candidates"),
        ({"elicit": {"extra": 1}}, "elicit.extra"),
        ({"elicit": {}, "persona": {"format": "x"}}, "persona"),
        ({"elicit": {}, "messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(serve, fields, param):
    server = serve(stand_in={})
    body = {"model": "shapes", "messages": [{"role": "user", "content": "Hi"}], **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "elicit"
    server.server.elicitor = Elicitor(
        LexiconModel(), NgramEncoder(), server.server.metrics.registry
    )
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_an_error_of_the_reasoner_quotes_nothing(serve, caplog):
    class Failing:
        def complete(self, messages, **options):
            raise ModelError(json.dumps(messages))

    server = serve(stand_in={})
    server.server.elicitor = Elicitor(Failing(), NgramEncoder(), server.server.metrics.registry)
    body = {"model": "shapes", "messages": [{"role": "user", "content": SECRET}], "elicit": {}}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 503 and SECRET not in answer.text and SECRET not in caplog.text
