"""Answers that match a JSON schema, from a model whose tokens are bytes."""

from __future__ import annotations

import json
import sys

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.serving.conftest import running
from v2l_fast.errors import ConfigError
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.grammar import ANY_OBJECT, JsonGrammars
from v2l_fast.vlm.smolvlm import SmolVLM

SCHEMA = {
    "type": "object",
    "properties": {
        "moves": {"type": "boolean"},
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["moves", "color", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA}}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = [*tiny.SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return tiny.with_special_tokens(core)


@pytest.fixture(scope="module")
def model() -> Video2LoRA:
    words = byte_tokenizer()
    base = SmolVLM(tiny.vlm(len(words)), words, "tiny/base")
    return Video2LoRA(base, tiny.hypernetwork())


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    pytest.importorskip("llguidance")
    with (
        running(model, tmp_path_factory.mktemp("store")) as live,
        openai.OpenAI(base_url=live.url + "/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **options):
    options.setdefault("response_format", FORMAT)
    return client.chat.completions.create(
        model="shapes", messages=[{"role": "user", "content": "which color?"}], **options
    )


def check(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == {"moves", "color", "count"} and isinstance(value["moves"], bool)
    assert value["color"] in ("red", "green", "blue") and 0 <= value["count"] <= 9


def test_an_answer_matches_its_schema(client):
    answer = ask(client)
    check(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    chunks = ask(client, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_several_drawn_answers_match_it_and_text_stays_text(client):
    drawn = ask(client, n=4, temperature=2, seed=1, logprobs=True)
    texts = [choice.message.content for choice in drawn.choices]
    for text in texts:
        check(text)
    assert len(set(texts)) > 1
    # From the logits before the mask: other tokens may be more likely.
    tokens = drawn.choices[0].logprobs.content
    assert len(tokens) >= len(texts[0]) and all(one.logprob < 0 for one in tokens)
    plain = ask(client, response_format={"type": "text"}, max_tokens=8)
    assert plain.choices[0].message.content != ask(client, max_tokens=8).choices[0].message.content


def test_any_object(client):
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=64)
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"$ref": "http://127.0.0.1/x"}, {"pattern": "(", "type": "string"},
     {"type": "object", "description": "x" * 70_000}],
)  # fmt: skip
def test_a_schema_that_cannot_be_used(client, schema):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, response_format={"type": "json_schema", "json_schema": {
            "name": "x", "schema": schema}})  # fmt: skip
    assert refused.value.param == "response_format" and "schema" in refused.value.message


def test_without_the_package(model, monkeypatch):
    for name in ("llguidance", "llguidance.hf"):
        monkeypatch.setitem(sys.modules, name, None)
    grammars = JsonGrammars(model.backbone.tokenizer, tuple(model.backbone.stop_ids))
    with pytest.raises(ConfigError, match=r"pip install .v2l_fast\[json\]"):
        grammars.constraint(ANY_OBJECT)


def test_a_vocabulary_without_braces(shapes):
    pytest.importorskip("llguidance")
    grammars = JsonGrammars(shapes.backbone.tokenizer, tuple(shapes.backbone.stop_ids))
    with pytest.raises(ConfigError, match="cannot write JSON"):
        grammars.constraint(ANY_OBJECT)
