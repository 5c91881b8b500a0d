"""JSON in the replies of language models."""

import pytest

from v2l_fast.conversation.prompts import ReplyError, json_object


@pytest.mark.parametrize(
    "reply",
    [
        '{"a": 1}',
        'Sure! Here it is:\n```json\n{"a": 1}\n```\nAnything else?',
        '<think>{"a": 2} or {"a": 3}?</think>{"a": 1}',
        'no opening tag {"a": 2}</think> {"a": 1}',
        "{'a': 1,}",
        '{"b": 0} {"a": 1}',
        '{broken {"a": 1}',
    ],
)
def test_the_object_with_the_field_is_read(reply):
    assert json_object(reply, "a")["a"] == 1


@pytest.mark.parametrize(
    "reply", ["", "none", '{"b": 1}', '{"a": ', '<think>{"a": 1}', "[" * 100_000, "{" * 100_000]
)
def test_a_reply_without_the_field_is_refused(reply):
    with pytest.raises(ReplyError, match="no JSON object with 'a'"):
        json_object(reply, "a")
