"""LLM judge: an OpenAI-compatible endpoint that scores answers against references.

Responsible for requests, retries, corrections, the cache and the counts of tokens, dollars and
failures. Wording and parsing are `rubrics`'s.

A failed judgment is named, counted and left out; it never becomes a score. Judgments are cached on
disk under a hash of everything they depend on, so a resumed run and repeated answers cost nothing;
failures are not cached and are tried again by the next run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from v2l_fast.conversation.models import openai_client
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.evaluation import rubrics
from v2l_fast.evaluation.rubrics import InvalidReply, JudgeTask, Messages
from v2l_fast.files import json_sha256
from v2l_fast.outputs import Journal

JudgeProgress = Callable[[int, int], None]
Parser = Callable[[str], dict[str, Any]]


class JudgeError(V2LError):
    """The endpoint cannot give judgments."""


@dataclass(frozen=True)
class JudgeSettings:
    """Address and limits of the judge. The defaults are the paper's (Appendix A) where it has any.

    Attributes:
        url: base URL of the API, such as http://localhost:8000/v1.
        model: name under which the judge is served.
        key: API key; None reads OPENAI_API_KEY from the environment.
        max_tokens: maximum length of a reply.
        timeout: maximum duration of a request, seconds.
        retries: after a timeout, a rate limit (Retry-After is respected) or a server error.
        corrections: maximum number of times that an invalid reply is sent back.
        workers: concurrent requests.
        json_mode: request ``response_format`` JSON; not every server supports it.
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
                raise ConfigError(f"judge: {name} must be positive, got {getattr(self, name)}")
        if self.retries < 0 or self.corrections < 0:
            raise ConfigError(
                "judge: retries and corrections must be at least 0, "
                f"got {self.retries} and {self.corrections}"
            )


@dataclass
class JudgeUsage:
    """Requests and tokens over the lifetime of an endpoint."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class FailedJudgment(Exception):
    """One judgment failed; `kind` is one of the failures listed at :class:`Verdict`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Endpoint:
    """Client of the judge's server; thread-safe.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.usage = JudgeUsage()
        self._lock = Lock()
        self._client = openai_client(settings.url, settings.key, settings.timeout, settings.retries)

    def request(self, messages: Messages) -> str:
        """The text of the reply.

        Raises:
            FailedJudgment: this request failed.
            JudgeError: every request would fail.
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
            raise FailedJudgment(
                "malformed", f"the response is not a completion: {error}"
            ) from None
        except openai.APITimeoutError as error:
            raise FailedJudgment(
                "timeout", f"no reply within {self.settings.timeout:g} s"
            ) from error
        except openai.APIConnectionError as error:
            raise JudgeError(
                f"{self.settings.url}: the judge cannot be reached ({error.__cause__ or error}); "
                "start it and run again; judgments so far are kept"
            ) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        usage = getattr(completion, "usage", None)
        with self._lock:
            self.usage.requests += 1
            self.usage.retries += response.retries_taken
            if usage is not None:
                self.usage.prompt_tokens += usage.prompt_tokens
                self.usage.completion_tokens += usage.completion_tokens
        return _content(completion)

    def _refusal(self, error: Any) -> Exception:
        """The error of an HTTP status: JudgeError if every request would fail, such as with a wrong
        key or model name, else FailedJudgment."""
        status, detail = error.status_code, str(error)[:200]
        if status in (401, 403, 404):
            return JudgeError(
                f"{self.settings.url}: the judge replies {status} ({detail}); check the key "
                f"(OPENAI_API_KEY), the URL and the model's name ({self.settings.model})"
            )
        if status == 429:
            return FailedJudgment("rate limited", detail)
        return FailedJudgment(
            "server error" if status >= 500 else "rejected", f"{status}: {detail}"
        )


def _content(completion: Any) -> str:
    """The text of the reply. Raises FailedJudgment if it has none."""
    choices = getattr(completion, "choices", None) or [None]
    message = getattr(choices[0], "message", None)
    if message is None or not isinstance(message.content, str | None):
        raise FailedJudgment(
            "malformed", f"the response is not a completion: {str(completion)[:80]!r}"
        )
    if not message.content or message.refusal or choices[0].finish_reason == "content_filter":
        raise FailedJudgment("refused", message.refusal or "an empty reply")
    # Reasoning may come without tags; a score drafted in it is not a judgment.
    has_judgment = (
        message.content.lstrip().startswith(("{", "```")) or "</think>" in message.content
    )
    if choices[0].finish_reason == "length" and not has_judgment:
        raise FailedJudgment("malformed", "cut off before the judgment; allow more tokens")
    return message.content


# --- judgments ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A judgment, or the reason why it failed.

    Attributes:
        fields: fields of the reply with validated scores; None after a failure.
        failure: "timeout", "rate limited", "server error", "rejected", "refused", "malformed" or
            "out of range"; None without a failure.
        detail: message of the failure.
    """

    fields: Mapping[str, Any] | None
    failure: str | None = None
    detail: str = ""

    @property
    def score(self) -> float | None:
        """0 to 1; None after a failure."""
        return None if self.fields is None else rubrics.rescaled(self.fields["score"])


@dataclass(frozen=True)
class Preference:
    """Judgment of two answers to one task side by side.

    Attributes:
        first, second: scores, 0 to 1.
        preferred: 1 for the first, -1 for the second, 0 for a tie.
    """

    first: float
    second: float
    preferred: int


class Judge:
    """Scores answers through one endpoint.

    Args:
        cache: file of judgments; None keeps them in memory.

    Raises:
        ConfigError: the openai package is missing.
    """

    def __init__(self, settings: JudgeSettings, cache: Path | None = None) -> None:
        self.settings = settings
        self._endpoint = Endpoint(settings)
        self._cache = Journal(cache)
        self._lock = Lock()
        self._corrections = 0
        self._cached = 0
        self._failures: Counter[str] = Counter()

    def score(
        self,
        tasks: Sequence[JudgeTask],
        candidates: Sequence[str],
        progress: JudgeProgress = lambda done, total: None,
    ) -> list[Verdict]:
        """Judge each candidate on its own (the paper's primary metric).

        Raises:
            JudgeError: the endpoint cannot be reached, or refuses the key or the model. Judgments
                so far are kept.
        """
        messages = [
            rubrics.single_messages(task, text)
            for task, text in zip(tasks, candidates, strict=True)
        ]
        return self._judge_all(messages, rubrics.single_verdict, progress)

    def compare(
        self,
        tasks: Sequence[JudgeTask],
        firsts: Sequence[str],
        seconds: Sequence[str],
        seed: int = 0,
        progress: JudgeProgress = lambda done, total: None,
    ) -> list[Preference | Verdict]:
        """Judge pairs side by side, as an audit of :meth:`score`.

        The judge sees the answers as A and B. Which one is A is drawn from the seed and the task,
        so it depends neither on the order of the pairs nor on the systems.

        Returns:
            For each pair a :class:`Preference` or the failed :class:`Verdict`.
        """
        swaps = [_swapped(task, seed) for task in tasks]
        messages = [
            rubrics.pair_messages(task, *((b, a) if swap else (a, b)))
            for task, a, b, swap in zip(tasks, firsts, seconds, swaps, strict=True)
        ]
        verdicts = self._judge_all(messages, rubrics.pair_verdict, progress)
        return [_preference(v, swap) for v, swap in zip(verdicts, swaps, strict=True)]

    def report(self) -> dict[str, Any]:
        """Requests, tokens, dollars and failures so far, JSON-ready."""
        usage, (price_in, price_out) = self._endpoint.usage, self.settings.prices
        dollars = usage.prompt_tokens * price_in + usage.completion_tokens * price_out
        return {
            "model": self.settings.model,
            "url": self.settings.url,
            "requests": usage.requests,
            "retries": usage.retries,
            "corrections": self._corrections,
            "from_cache": self._cached,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "dollars": dollars / 1e6,
            "failures": dict(self._failures),
        }

    # --- requests -------------------------------------------------------------------------------

    def _judge_all(
        self, batch: Sequence[Messages], parse: Parser, progress: JudgeProgress
    ) -> list[Verdict]:
        keys = [self._key(messages) for messages in batch]
        # Identical requests are sent once.
        waiting = {k: m for k, m in zip(keys, batch, strict=True) if k not in self._cache}
        self._cached += len(batch) - len(waiting)
        failed: dict[str, Verdict] = {}
        done = len(batch) - len(waiting)
        progress(done, len(batch))
        with ThreadPoolExecutor(self.settings.workers, thread_name_prefix="judge") as pool:
            futures = {pool.submit(self._judge, k, m, parse): k for k, m in waiting.items()}
            try:
                for future in as_completed(futures):
                    verdict = future.result()
                    if verdict.failure is not None:
                        failed[futures[future]] = verdict
                    done += 1
                    progress(done, len(batch))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        verdicts = [failed.get(key) or Verdict(self._cache[key]) for key in keys]
        self._failures.update(v.failure for v in verdicts if v.failure is not None)
        return verdicts

    def _judge(self, key: str, messages: Messages, parse: Parser) -> Verdict:
        try:
            fields = self._converse(messages, parse, self.settings.corrections)
        except FailedJudgment as failure:
            return Verdict(None, failure.kind, str(failure))
        self._cache.append({key: fields})
        return Verdict(fields)

    def _converse(self, messages: Messages, parse: Parser, corrections: int) -> dict[str, Any]:
        """Request a judgment; send an invalid reply back, at most `corrections` times."""
        reply = self._endpoint.request(messages)
        try:
            return parse(reply)
        except InvalidReply as error:
            if corrections == 0:
                raise FailedJudgment(error.kind, str(error)) from None
        with self._lock:
            self._corrections += 1
        complaint = [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": rubrics.CORRECTION},
        ]
        return self._converse([*messages, *complaint], parse, corrections - 1)

    def _key(self, messages: Messages) -> str:
        """Hash of everything that the judgment depends on."""
        settings = self.settings
        return json_sha256(rubrics.VERSION, settings.model, settings.max_tokens, messages)


def _swapped(task: JudgeTask, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}/{task.prompt}/{task.reference}".encode()).digest()
    return bool(digest[0] & 1)


def _preference(verdict: Verdict, swapped: bool) -> Preference | Verdict:
    if verdict.fields is None:
        return verdict
    a, b = (rubrics.rescaled(verdict.fields[name]) for name in ("score_a", "score_b"))
    preferred = {"A": 1, "B": -1, "tie": 0}[verdict.fields["preferred"]]
    return Preference(b, a, -preferred) if swapped else Preference(a, b, preferred)
