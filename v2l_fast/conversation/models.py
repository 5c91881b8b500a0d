"""Chat models behind one interface: an OpenAI-compatible endpoint, a transformers model, or the
frozen VLM that answers from a video's adapter.

A model completes messages and knows nothing about personas or gaps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from v2l_fast.errors import ConfigError, V2LError

if TYPE_CHECKING:
    from v2l_fast.hypernet import Adapter
    from v2l_fast.model import Video2LoRA

Message = Mapping[str, str]


class ModelError(V2LError):
    """A chat model gives no reply."""


@dataclass(frozen=True)
class ModelReply:
    """A reply.

    Attributes:
        text: the reply.
        prompt_tokens, new_tokens: its cost; 0 where the model does not say.
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


def openai_client(url: str, key: str | None = None, timeout: float = 120.0) -> Any:
    """A client of an OpenAI-compatible server.

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
    return OpenAI(base_url=url, api_key=key, timeout=timeout)


class EndpointModel:
    """A model behind an OpenAI-compatible API.

    Where the server has no ``n``, n requests are sent at the same time with seeds of their own. The
    same holds for ``response_format``: a server that refuses it is not asked again.

    Args:
        url: base of the API, such as http://localhost:8000/v1.
        model: name the model is served under.
        key: API key; the environment's OPENAI_API_KEY when None.
        timeout: seconds a request may take.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, timeout: float = 120.0
    ) -> None:
        self.url, self.model = url, model
        self._client = openai_client(url, key, timeout)
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
        """The replies; without the fields that the server refuses to accept."""
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
            self._model = AutoModelForCausalLM.from_pretrained(name_or_path).to(device).eval()
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

        inputs = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        drawn = temperature > 0
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if drawn else {}
        replies = []
        for i in range(n if drawn else 1):
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + i)
                ids = self._model.generate(**inputs, max_new_tokens=max_tokens, **options)
            text = self._tokenizer.decode(ids[0, length:], skip_special_tokens=True)
            replies.append(ModelReply(text, length, ids.shape[1] - length))
        return replies if drawn else replies * n


class VideoModel:
    """The frozen VLM with a video's adapter: answers the last user message from the adapter alone.

    Args:
        model: the VLM with its hypernetwork.
        adapter: of the video.
    """

    def __init__(self, model: Video2LoRA, adapter: Adapter | str | os.PathLike) -> None:
        self._model = model
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
