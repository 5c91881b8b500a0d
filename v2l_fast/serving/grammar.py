"""Answers that match a JSON schema: each token is chosen among those that the schema allows next.

llguidance compiles the schema and computes the masks, in threads of this module. The engine's
thread runs its pass at the same time and asks for the mask when it has the logits.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from v2l_fast.errors import ConfigError, V2LError

# Threads that compute masks.
WORKERS = 2
# Maximum characters of a schema, and number of compiled schemas in the cache.
_MAX_SCHEMA, _KEPT = 1 << 16, 64
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonGrammars:
    """The grammars of one model's answers; thread-safe.

    Args:
        tokenizer: of the model.
        stop_ids: token ids that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._matchers: OrderedDict[str, Any] = OrderedDict()
        self._workers = ThreadPoolExecutor(WORKERS, "v2l-grammar")

    def constraint(self, schema: dict[str, Any]) -> Callable[[], JsonConstraint]:
        """A function that makes the constraint of one answer, which then matches a schema.

        Raises:
            ConfigError: llguidance is not installed, the model's tokenizer cannot write JSON, or
                the schema is malformed, too large or uses what llguidance does not support.
        """
        text = json.dumps(schema)
        if len(text) > _MAX_SCHEMA:
            raise ConfigError(
                f"the schema must have at most {_MAX_SCHEMA} characters, got {len(text)}"
            )
        with self._lock:
            matcher = self._matchers.get(text)
            if matcher is None:
                matcher = self._compile(text)
                self._matchers[text] = matcher
                while len(self._matchers) > _KEPT:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(text)
        return lambda: JsonConstraint(matcher.deep_copy(), self._workers)

    def _compile(self, schema: str) -> Any:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise ConfigError(
                "a JSON format needs the llguidance package on the server: "
                'pip install "v2l_fast[json]"'
            ) from None
        if self._vocabulary is None:
            try:
                self._vocabulary = llguidance.hf.from_tokenizer(
                    self._tokenizer, eos_token=list(self._stop_ids)
                )
            except ValueError as error:
                raise ConfigError(
                    f"this model's tokenizer cannot write JSON ({error}); ask for text"
                ) from None
        # Free white space between the parts would let an answer consist of it.
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False}
        )
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:200]
            raise ConfigError(f"the schema cannot be used: {reason}")
        return matcher


class JsonConstraint:
    """A :class:`~v2l_fast.generation.sampling.TokenConstraint` of one answer."""

    def __init__(self, matcher: Any, workers: ThreadPoolExecutor) -> None:
        self._matcher, self._workers = matcher, workers
        self._mask: Future[Tensor] = workers.submit(self._compute)

    def bitmask(self) -> Tensor:
        """The tokens allowed next; waits until the mask is computed."""
        return self._mask.result()

    def accept(self, token: int) -> None:
        """Continue the answer with a token, and start to compute the next mask."""
        self._mask = self._workers.submit(self._advance, token)

    def _advance(self, token: int) -> Tensor:
        self._matcher.consume_token(token)
        return self._compute()

    def _compute(self) -> Tensor:
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        if self._matcher.is_error():
            raise V2LError("the answer cannot be continued within its JSON schema")
        return mask
