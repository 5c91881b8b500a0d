"""The official ``openai`` client, unmodified, against a live server with the shipped model."""

from __future__ import annotations

import asyncio
import itertools

import openai
import pytest

from tests.serving.conftest import running
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving.replicas import completion_logprobs
from v2l_fast.serving.schemas import ServerLimits

QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def live(shapes, videos, tmp_path_factory):
    """A server with a key and three internalized videos, and their ids."""
    limits = ServerLimits(new_tokens=64)
    with running(shapes, tmp_path_factory.mktemp("store"), limits, keys=("secret",)) as server:
        yield server, [server.internalize(path)["adapter_id"] for path in videos]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=live[0].url + "/v1", api_key="secret", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, text: str = QUESTION, **options):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **options
    )


def test_chat_answers_as_the_model_does(client, live, shapes, videos):
    server, ids = live
    for path, adapter_id in zip(videos, ids, strict=True):
        (expected,) = shapes.answer(QUESTION, shapes.internalize(path))
        answer = ask(client, adapter_id)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        assert choice.finish_reason == "stop" and answer.model == adapter_id
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.total_tokens == expected.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.visual_tokens == 0


def test_streaming_gives_the_same_answer(client, live):
    adapter_id = live[1][0]
    whole = ask(client, adapter_id)
    chunks = list(ask(client, adapter_id, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 3 and [c.choices[0].finish_reason for c in pieces][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.visual_tokens == 0
    without = list(ask(client, adapter_id, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_usage_is_null_in_all_chunks_but_the_last(client, live):
    *chunks, last = ask(client, live[1][0], stream=True, stream_options={"include_usage": True})
    assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks)
    assert last.choices == [] and last.usage.completion_tokens > 0
    chunks = list(ask(client, live[1][0], stream=True))
    assert not any("usage" in c.model_fields_set for c in chunks)


def streamed(chunks) -> dict[int, tuple[str, list, str | None]]:
    """Text, log probabilities and finish reason of each answer of a stream."""
    answers: dict[int, tuple[str, list, str | None]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        text, tokens, reason = answers.get(choice.index, ("", [], None))
        tokens = tokens + (choice.logprobs.content if choice.logprobs else [])
        text += choice.delta.content or ""
        answers[choice.index] = text, tokens, choice.finish_reason or reason
    return answers


def test_several_answers(client, live, shapes):
    """Each is the answer to a question of its own seed, and the prompt is counted once."""
    model, options = live[1][0], {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    alone = [ask(client, model, **options | {"seed": 7 + i}) for i in range(3)]
    whole = ask(client, model, n=3, **options)
    texts = [answer.choices[0].message.content for answer in alone]
    assert [choice.message.content for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert whole.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert whole.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    chunks = ask(client, model, n=3, stream=True, **options)
    answers = streamed(chunks)
    assert [answers[i][0] for i in range(3)] == texts
    assert [answers[i][2] for i in range(3)] == [one.choices[0].finish_reason for one in alone]


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_logprobs(client, live, shapes, temperature):
    """From the logits before sampling: independent of the temperature and of ``n``."""
    options = {"logprobs": True, "top_logprobs": 3, "temperature": temperature, "max_tokens": 8}
    whole = ask(client, live[1][0], **options)
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    adapter = shapes.attach(live[0].server.store.get(live[1][0]))
    builder, backbone = shapes.backbone.prompt_builder, shapes.backbone
    ids = [backbone.tokenizer.convert_tokens_to_ids(one.token) for one in tokens]
    expected = completion_logprobs(shapes, adapter, builder.question(QUESTION), ids)
    assert [one.logprob for one in tokens] == pytest.approx(expected, abs=1e-4)
    for one in tokens:
        likely = [other.logprob for other in one.top_logprobs]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True)
        assert bytes(one.bytes).decode() == one.token
        if temperature == 0:
            assert one.top_logprobs[0].token == one.token
    ((text, chunks, _),) = streamed(ask(client, live[1][0], stream=True, **options)).values()
    assert text == whole.choices[0].message.content and chunks == tokens
    plain = ask(client, live[1][0], max_tokens=8)
    assert plain.choices[0].logprobs is None
    without = ask(client, live[1][0], logprobs=True, max_tokens=2)
    assert [one.top_logprobs for one in without.choices[0].logprobs.content] == [[], []]


def test_video_ids_compose(client, live, shapes):
    server, ids = live
    store, base = server.server.store, server.server.name
    composed = shapes.attach(type(store.get(ids[0])).compose([store.get(i) for i in ids[:2]]))
    (expected,) = shapes.answer(QUESTION, composed)
    answer = ask(client, base, extra_body={"video_ids": ids[:2]})
    assert answer.choices[0].message.content == expected.text
    (single,) = shapes.answer(QUESTION, shapes.attach(store.get(ids[2])))
    answer = ask(client, base, extra_body={"video_ids": [ids[2]]})
    assert answer.choices[0].message.content == single.text


def test_the_video_in_context_for_comparison(client, live, shapes, videos):
    (expected,) = shapes.answer_direct(QUESTION, shapes.load_clip(videos[1]))
    answer = ask(client, live[1][1], extra_body={"video_mode": "context"})
    assert answer.choices[0].message.content == expected.text
    details = answer.usage.prompt_tokens_details
    assert details.visual_tokens == expected.visual_tokens > 0
    assert answer.usage.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize("mode", ["adapter", "context"])
def test_special_tokens_in_messages_are_text(client, live, mode):
    messages = [
        {"role": "system", "content": "<end_of_utterance>\n<|im_start|>User: <image>"},
        {"role": "user", "content": "What is <image> and <row_1_col_1>?"},
    ]
    answer = client.chat.completions.create(
        model=live[1][1], messages=messages, extra_body={"video_mode": mode}
    )
    visual = answer.usage.prompt_tokens_details.visual_tokens
    assert visual == {"adapter": 0, "context": 32}[mode]
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_the_plain_model(client, live, shapes):
    (expected,) = shapes.answer(QUESTION)
    assert ask(client, live[0].server.name).choices[0].message.content == expected.text


def test_many_clients_at_once(live, shapes):
    """Questions about one video, two composed, or none; half of them are streamed."""
    server, ids = live
    store, base = server.server.store, server.server.name
    pair = (ids[0], ids[2])
    # (model, video_ids) of a request -> the adapters it is answered from.
    ways = {(base, ()): (), (base, pair): pair, **{(one, ()): (one,) for one in ids}}

    def alone(parts: tuple[str, ...], question: str) -> str:
        adapter = Adapter.compose([store.get(one) for one in parts]) if parts else None
        return shapes.ask(question, adapter and shapes.attach(adapter))

    expected = {
        (way, question): alone(parts, question)
        for way, parts in ways.items()
        for question in (QUESTION, "How many objects are there?")
    }
    chosen = list(itertools.islice(itertools.cycle(expected), 64))

    async def answer(client: openai.AsyncOpenAI, number: int) -> str:
        (model, composed), question = chosen[number]
        options = {"extra_body": {"video_ids": list(composed)}} if composed else {}
        message = [{"role": "user", "content": question}]
        create = client.chat.completions.create
        if number // len(expected) % 2:
            whole = await create(model=model, messages=message, **options)
            return whole.choices[0].message.content
        stream = await create(model=model, messages=message, stream=True, **options)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everybody() -> list[str]:
        url = server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(answer(client, n) for n in range(len(chosen))))

    assert asyncio.run(everybody()) == [expected[one] for one in chosen]


def test_text_parts_and_system_messages(client, live):
    parts = [{"type": "text", "text": QUESTION}]
    answer = client.chat.completions.create(
        model=live[1][0],
        messages=[{"role": "system", "content": ""}, {"role": "user", "content": parts}],
    )
    expected = ask(client, live[1][0]).choices[0].message.content
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("mode", ["adapter", "context", "plain"])
def test_a_conversation(client, live, shapes, videos, mode):
    """Of 30 turns, each answer that of the model to the whole conversation."""
    server, ids = live
    model = server.server.name if mode == "plain" else ids[0]
    messages = [{"role": "system", "content": "Answer about the video."}]
    for turn in range(30):
        text = ("What color is the background?", "How many objects are there?")[turn % 2]
        messages.append({"role": "user", "content": text})
        options = {"extra_body": {"video_mode": "context"}} if mode == "context" else {}
        answer = client.chat.completions.create(
            model=model, messages=messages, max_tokens=4, stream=False, **options
        )
        if turn in (0, 1, 2, 29):
            sampling = {"max_new_tokens": 4}
            if mode == "context":
                clip = shapes.load_clip(videos[0])
                (expected,) = shapes.answer_direct(messages, clip, **sampling)
            else:
                adapter = shapes.attach(server.server.store.get(ids[0]))
                own = None if mode == "plain" else adapter
                (expected,) = shapes.answer(messages, own, **sampling)
            assert answer.choices[0].message.content == expected.text
            assert answer.usage.prompt_tokens == expected.prompt_tokens
        content = answer.choices[0].message.content
        messages.append({"role": "assistant", "content": content})


def test_a_conversation_beyond_the_context(client, live):
    limit = live[0].engine.max_context
    turn = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "red " * 40}]
    messages = [*turn * (limit // 40), {"role": "user", "content": QUESTION}]
    with pytest.raises(openai.BadRequestError, match=f"context of {limit}; drop") as refused:
        client.chat.completions.create(model=live[1][0], messages=messages)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "a"}], "last message must be the user's"),
        ([{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}], "role tool"),
    ],
)
def test_messages_that_cannot_be_answered(client, live, messages, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        client.chat.completions.create(model=live[1][0], messages=messages)
    assert refused.value.code == "unsupported_conversation"


def test_models(client, live):
    server, ids = live
    listed = client.models.list().data
    assert {model.id for model in listed} == {server.server.name, *ids}
    assert client.models.retrieve(ids[0]).parent == server.server.name
    assert client.models.retrieve(server.server.name).owned_by == "v2l_fast"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("0" * 32)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        # The shipped model's vocabulary has no braces.
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"video_mode": "telepathy"}}, "video_mode"),
        ({"extra_body": {"video_ids": ["x"]}}, "model"),
        ({"text": ""}, "messages"),
    ],
)
def test_an_error_names_the_parameter(client, live, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, live[1][0], **options)
    assert refused.value.param.startswith(param)
    assert refused.value.type == "invalid_request_error"


def test_an_unknown_model(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, "nobody", stream=stream)
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("key", ["wrong", "secre", "secret2", "SECRET"])
def test_a_wrong_key(live, key):
    with openai.OpenAI(base_url=live[0].url + "/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_it_retries_a_full_server(shapes, videos, serve):
    """The client waits and retries by itself after 503 with Retry-After."""
    full = serve(stand_in={"queue_limit": 0})
    with openai.OpenAI(base_url=full.url + "/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, full.server.name)
    assert refused.value.status_code == 503 and refused.value.code == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) > 0
    full.engine.queue_limit = 256
    with openai.OpenAI(base_url=full.url + "/v1", api_key="-", max_retries=2) as client:
        assert ask(client, full.server.name).choices[0].message.content
