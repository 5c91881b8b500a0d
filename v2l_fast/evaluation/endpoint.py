"""Requests to an OpenAI-compatible endpoint: retries, refusals, tokens and dollars.

Responsible for one request at a time, from any number of threads. What is asked and what a reply
means is `judge`'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from threading import Lock
from typing import Any

from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.evaluation.rubrics import Messages


class JudgeError(V2LError):
    """No judgment at all can be had from the endpoint."""


@dataclass(frozen=True)
class JudgeSettings:
    """How the judge is reached. The defaults are the paper's (Appendix A) where it has one.

    Attributes:
        url: base of the API, such as http://localhost:8000/v1.
        model: the name it is served under.
        key: API key; the environment's OPENAI_API_KEY when None.
        max_tokens: longest reply.
        timeout: seconds a request may take.
        retries: of requests that time out, are limited (Retry-After is obeyed) or fail there.
        corrections: times a reply without a valid judgment is sent back.
        workers: requests at a time.
        json_mode: ask for ``response_format`` JSON; some servers do not know it.
        prices: dollars per million input and output tokens.
    """

    url: str
    model: str = "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8"
    key: str | None = None
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 5
    corrections: int = 2
    workers: int = 8
    json_mode: bool = True
    prices: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "timeout", "workers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"judge: {name} must be positive, not {getattr(self, name)}")
        if self.retries < 0 or self.corrections < 0:
            raise ConfigError("judge: retries and corrections must be 0 or more")


@dataclass
class Usage:
    """Counted over an endpoint's life."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Failure(Exception):
    """One judgment cannot be had; `kind` is one of the failures listed at ``judge.Verdict``."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Endpoint:
    """The judge's server.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise ConfigError(
                'the judge needs the openai package: pip install "v2l_fast[eval]"'
            ) from None
        self.settings = settings
        self.usage = Usage()
        self._lock = Lock()
        self._client = OpenAI(
            base_url=settings.url,
            # A local server wants none, the client insists on one.
            api_key=settings.key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        )

    def request(self, messages: Messages) -> str:
        """The reply's text.

        Raises:
            Failure: this request has no reply.
            JudgeError: no request will have one.
        """
        import openai

        conversation: Any = messages
        options: dict[str, Any] = {}
        if self.settings.json_mode:
            options["response_format"] = {"type": "json_object"}
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.settings.model,
                messages=conversation,
                temperature=0,
                max_tokens=self.settings.max_tokens,
                **options,
            )
            completion = response.parse()
        except (ValueError, openai.APIResponseValidationError) as error:
            raise Failure("malformed", f"the response is not a completion: {error}") from None
        except openai.APITimeoutError as error:
            raise Failure("timeout", f"no reply within {self.settings.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise JudgeError(
                f"{self.settings.url}: the judge cannot be reached ({error.__cause__ or error}); "
                "start it and run again: what was judged is kept"
            ) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        used = getattr(completion, "usage", None)
        with self._lock:
            self.usage.requests += 1
            self.usage.retries += response.retries_taken
            if used is not None:
                self.usage.prompt_tokens += used.prompt_tokens
                self.usage.completion_tokens += used.completion_tokens
        return _content(completion)

    def _refusal(self, error: Any) -> Exception:
        """Of one request, or of everything: a wrong key or name fails all the same way."""
        status, detail = error.status_code, str(error)[:200]
        if status in (401, 403, 404):
            return JudgeError(
                f"{self.settings.url}: the judge answers {status} ({detail}); check the key "
                f"(OPENAI_API_KEY), the URL and the model's name ({self.settings.model})"
            )
        if status == 429:
            return Failure("rate limited", detail)
        return Failure("server error" if status >= 500 else "rejected", f"{status}: {detail}")


def _content(completion: Any) -> str:
    """The reply's text. Raises Failure where there is none."""
    choices = getattr(completion, "choices", None) or [None]
    message = getattr(choices[0], "message", None)
    if message is None or not isinstance(message.content, str | None):
        raise Failure("malformed", f"the response is not a completion: {str(completion)[:80]!r}")
    if not message.content or message.refusal or choices[0].finish_reason == "content_filter":
        raise Failure("refused", message.refusal or "an empty reply")
    # Thoughts may stand there without a mark; a score drafted in them is no judgment.
    begun = message.content.lstrip().startswith(("{", "```")) or "</think>" in message.content
    if choices[0].finish_reason == "length" and not begun:
        raise Failure("malformed", "cut off before the judgment, allow more tokens")
    return message.content
